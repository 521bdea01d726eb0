"""Files that are whole or absent, and lists that live on disk: strings, token ids and arrays.

Paper    none; MS MARCO's 8.8 million passages and their embeddings (27 GB) ask for it
In       JSON values, tensors, arrays; strings, lists of token ids
Out      the same again; sequences that read like a list or a tensor and hold only what is asked for
Next     data.py and queries.py keep documents and pseudo-queries in them; dense.py embeddings; store.py checkpoints
Differs  the released code keeps JSON maps and tuple-keyed dictionaries, all in memory
"""

import errno
import json
import os
import re
import shutil
import tempfile
import zipfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ files


@contextmanager
def writing(path: Path):
    """Opens a file that is whole or absent: it takes its name once the block has ended and the disk holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def rename(old: Path, new: Path) -> None:
    """Gives a file another name, also after a power cut."""
    os.replace(old, new)
    folder = os.open(new.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextmanager
def alone(folder: Path):
    """Makes the folder, and waits until no other process is alone in it."""
    import fcntl  # POSIX has it, as command.py says

    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def damaged(path: Path, reason: str) -> ValueError:
    """The error of a damaged file: only a model, what is saved while it trains, its evaluation and what lies in a cache are
    made anew where they are gone.
    """
    anew = re.fullmatch(r"(D\d+|latest(\.previous)?)\.pt|documents_\w+\.(bin|npy)", path.name)
    evaluated = re.fullmatch(r"evaluation_(D\d+)\.json", path.name)
    anew = anew or evaluated and path.with_name(f"{evaluated[1]}.pt").exists()
    to_do = "remove the file to make it anew" if anew else "take it from a copy of the folder, or train anew"
    return ValueError(f"{path}: {reason}; {to_do}")


@contextmanager
def reading(path: Path):
    """Raises ValueError, with the path, where the file is missing or whatever reads it fails."""
    if not path.is_file():
        raise ValueError(f"found no {path}; is {path.parent} the folder of a finished run?")
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged files fail in many ways: NumPy evaluates a header as Python
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise damaged(path, f"cannot be read ({reason})") from None


def write(path: Path, content: bytes) -> None:
    with writing(path) as file:
        file.write(content)


def strict_json(value, **form) -> str:
    """As JSON has it: NaN and infinities, of which it knows none, are null; tensors of one number are that number."""
    plain = json.loads(json.dumps(value, default=Tensor.item), parse_constant=lambda _: None)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, **form)


def write_json(path: Path, value) -> None:
    write(path, (strict_json(value, indent=1) + "\n").encode())


def read_json(path: Path):
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, value) -> None:
    with writing(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # of an archive that is cut; the reason, as a full disk, came before it
            raise error.__context__ or error from None


def read_tensors(path: Path):
    with reading(path):
        with zipfile.ZipFile(path) as zipped:  # torch does not look at the checksums
            if bad := zipped.testzip():
                raise ValueError(f"its part {bad} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)


def write_array(path: Path, values: np.ndarray) -> None:
    with writing(path) as file:
        np.save(file, values, allow_pickle=False)


def read_array(path: Path, kind: type, dimensions: int) -> np.ndarray:
    """The array of an .npy file, read where it is used. Raises ValueError where its kind or dimensions are others."""
    with reading(path):
        values = np.load(path, "c", allow_pickle=False)
        if not np.issubdtype(values.dtype, kind) or values.ndim != dimensions:
            raise ValueError(f"found {values.ndim}-D {values.dtype}, wanted {dimensions}-D {kind.__name__}")
    return values


# ---------------------------------------------------------------------------------------- strings and token ids


class ItemsWriter:
    """Appends lists of items to a file, as bytes; `close` writes their spans beside it, which make it count."""

    def __init__(self, path: Path, kind: type = np.uint8):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".npy").unlink(missing_ok=True)
        self.path, self.size, self.file = path, np.dtype(kind).itemsize, path.open("wb")
        self.ends = array("q", [0])

    def add(self, items: bytes) -> None:
        self.ends.append(self.ends[-1] + self.file.write(items) // self.size)

    def close(self, order: np.ndarray | None = None) -> None:
        """Ends the file; `order` (N,) lists the added in another order than they came."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        spans = np.stack([self.ends[:-1], self.ends[1:]], axis=1)
        write_array(self.path.with_suffix(".npy"), spans if order is None else spans[order])


class Items:
    """N lists of items in one file, read when they are used."""

    def __init__(self, flat: np.ndarray, spans: np.ndarray):
        self.flat = flat  # all items
        self.spans = spans  # (N, 2), of each list its first and the one after its last

    @classmethod
    def open(cls, path: Path, kind: type = np.uint8):
        """What an ItemsWriter wrote. Raises ValueError where a file is missing or cut, or does not fit the other."""
        spans_path = path.with_suffix(".npy")
        if not (path.is_file() and spans_path.is_file()):
            raise damaged(path, f"it or {spans_path.name} is missing")
        spans, size = read_array(spans_path, np.int64, 2), path.stat().st_size
        lengths, n = np.diff(spans), int(spans.max(initial=0))
        if (wanted := n * np.dtype(kind).itemsize) != size:
            raise damaged(path, f"found {size} bytes, wanted {wanted}")
        if spans.shape[1] != 2 or min(spans.min(initial=0), lengths.min(initial=0)) < 0 or lengths.sum() != n:
            raise damaged(spans_path, f"found spans that do not cover {path.name}")
        return cls(np.memmap(path, kind, "r") if size else np.empty(0, kind), spans)

    def __len__(self) -> int:
        return len(self.spans)


class Strings(Items, Sequence):
    """Read-only strings in UTF-8: an integer gives a string, a slice or an array of rows a view."""

    def __getitem__(self, rows):
        if not isinstance(rows, (int, np.integer)):
            return Strings(self.flat, self.spans[rows])
        start, end = self.spans[rows]
        try:
            return self.flat[start:end].tobytes().decode()
        except UnicodeDecodeError as error:
            raise damaged(self.flat.filename, f"byte {start + error.start} is not UTF-8") from None

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Chain(Sequence):
    """Several sequences read as one: the ids of D_0..D_T."""

    def __init__(self, parts: list[Sequence]):
        self.parts, self.ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, row: int):
        part = bisect_right(self.ends, row)
        if row < 0 or part == len(self.parts):
            raise IndexError(row)
        return self.parts[part][row - self.ends[part] + len(self.parts[part])]


class Documents:
    """Ids, titles and texts in the order in which they come: added first, and read after `close`."""

    def __init__(self, folder: Path | None = None):
        if folder is None:  # a temporary one, that goes when this object goes
            self.temporary = tempfile.TemporaryDirectory(prefix="documents.")
            folder = Path(self.temporary.name)
        shutil.rmtree(folder, ignore_errors=True)
        self.row_of: dict[str, int] = {}  # id -> row
        self.writers = [ItemsWriter(folder / f"{name}.bin") for name in ("ids", "titles", "texts")]

    def add(self, doc_id: str, title: str, text: str) -> bool:
        """False, and nothing is added, where the id is there already."""
        if doc_id in self.row_of:
            return False
        self.row_of[doc_id] = len(self.row_of)
        for writer, value in zip(self.writers, (doc_id, title, text)):
            writer.add(value.encode())
        return True

    def close(self) -> "Documents":
        for writer in self.writers:
            writer.close()
        self.ids, self.titles, self.texts = (Strings.open(writer.path) for writer in self.writers)
        return self

    def __len__(self) -> int:
        return len(self.row_of)


class Tokens(Items):
    """Token ids of N texts without padding."""

    def __init__(self, flat: np.ndarray, spans: np.ndarray):
        super().__init__(flat, spans)
        self.lengths = torch.from_numpy(spans[:, 1] - spans[:, 0])

    @classmethod
    def of(cls, ids: Tensor) -> "Tokens":
        """From a padded batch (N, S), padded with 0."""
        lengths = (ids != 0).sum(1).numpy()
        ends = lengths.cumsum()
        return cls(ids[ids != 0].numpy(), np.stack([ends - lengths, ends], axis=1))

    @classmethod
    def joined(cls, parts: list["Tokens"]) -> "Tokens":
        """The texts of several stores as one, in memory where there is more than one."""
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(len(part.flat) for part in parts)])
        spans = [part.spans + start for part, start in zip(parts, starts)]
        return cls(np.concatenate([part.flat for part in parts]), np.concatenate(spans))

    @classmethod
    def write(cls, path: Path, pieces: Iterable[list[int]], vocabulary: int) -> "Tokens":
        """Streams token ids into a store: two bytes a token where the vocabulary allows it."""
        writer = ItemsWriter(path, kind := token_kind(vocabulary))
        for ids in pieces:
            writer.add(np.array(ids, kind).tobytes())
        writer.close()
        return cls.open(path, vocabulary)

    @classmethod
    def open(cls, path: Path, vocabulary: int) -> "Tokens":
        return super().open(path, token_kind(vocabulary))

    def batch(self, rows: Tensor) -> Tensor:
        """Rows (B,) -> token ids (B, S) int64, padded with 0 to the longest."""
        return self.window(rows, torch.zeros(len(rows), dtype=torch.long), int(self.lengths[rows].max()))

    def window(self, rows: Tensor, first: Tensor, length: int) -> Tensor:
        """`length` tokens of each row from its token `first` (B,) on, 0 beyond its end: (B, length) int64."""
        at = first[:, None] + torch.arange(length)
        inside = at < self.lengths[rows, None]
        places = torch.from_numpy(self.spans[rows.numpy(), :1]) + at
        ids = self.flat[places.clamp(max=len(self.flat) - 1).numpy()].astype(np.int64)
        return torch.from_numpy(ids) * inside


def token_kind(vocabulary: int) -> type:
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


# ----------------------------------------------------------------------------------------------------- arrays


def open_array(path: Path) -> Tensor:
    """A matrix of an .npy file as a tensor whose pages are read when they are used."""
    return torch.from_numpy(read_array(path, np.float32, 2))


class ArrayWriter:
    """A tensor in an .npy file that is filled in place and counts once `close` has renamed it."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(path.name + ".part")
        self.mapped = np.lib.format.open_memmap(self.partial, "w+", np.float32, shape)
        with self.partial.open("r+b") as file:
            reserve(file, self.partial, self.partial.stat().st_size)
        self.values = torch.from_numpy(self.mapped)

    def close(self) -> Tensor:
        self.mapped.flush()
        rename(self.partial, self.path)
        return open_array(self.path)


def scratch(folder: Path | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a nameless file that goes with it, or in memory without a folder. Raises OSError as `reserve` does."""
    size = int(np.prod(shape)) * dtype.itemsize
    if folder is None or size == 0:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file, folder / "scratch", size)
        mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(shape)


def reserve(file, path: Path, size: int) -> None:
    """Takes the disk space of a file that will be mapped: writing to a mapped page on a full disk would kill the
    process without a message. Where there is too little, it raises OSError and removes the file.
    """
    free = shutil.disk_usage(path.parent).free
    try:
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        text = f"{error.strerror}: {size / 2**30:.2f} GiB wanted, {free / 2**30:.2f} GiB free"
        raise OSError(error.errno, text, str(path)) from None
