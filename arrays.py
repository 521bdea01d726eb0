"""Files that are whole or absent, and lists that live on disk: strings, token ids and arrays.

Paper    none; MS MARCO's 8.8 million passages and their embeddings (27 GB) ask for it
In       JSON values, tensors, arrays; strings, lists of token ids
Out      the same again; sequences that read like a list or a tensor and hold only what is asked for
Next     data.py and queries.py keep documents and pseudo-queries in them; dense.py embeddings; store.py checkpoints
Differs  the released code keeps JSON maps and tuple-keyed dictionaries, all in memory

A list of strings or token ids is a file of items and an .npy file of spans, which is written last and makes it count.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ files


class StreamedFile:
    """A file written piece by piece, that is whole or absent: `with StreamedFile(path) as file: file.write(..)`."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".part")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.partial.open("wb")
        return self.file

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged(path: Path, reason: str) -> ValueError:
    """The error of a file that must be made anew."""
    return ValueError(f"{path}: {reason}; remove the file to make it anew")


@contextmanager
def reading(path: Path):
    """Raises ValueError, with the path, where the file is missing or whatever reads it fails."""
    if not path.is_file():
        raise ValueError(f"found no {path}; is {path.parent} the folder of a finished run?")
    try:
        yield
    except Exception as error:  # damaged files fail in many ways: NumPy evaluates a header as Python
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise damaged(path, f"cannot be read ({reason})") from None


def write(path: Path, content: bytes) -> None:
    with StreamedFile(path) as file:
        file.write(content)


def write_json(path: Path, value) -> None:
    write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path):
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, value) -> None:
    """Raises OSError where the disk is full, as any other write."""
    with StreamedFile(path) as file:
        try:
            torch.save(value, file)
        except (
            RuntimeError
        ) as error:  # torch closes its archive after a write that failed, and may complain of that
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_tensors(path: Path):
    with reading(path):
        with zipfile.ZipFile(path) as zipped:  # torch does not look at the checksums
            if bad := zipped.testzip():
                raise ValueError(f"its part {bad} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)


def write_array(path: Path, values: np.ndarray) -> None:
    with StreamedFile(path) as file:
        np.save(file, values, allow_pickle=False)


def read_array(path: Path, kind: type, dimensions: int, mode: str | None = None) -> np.ndarray:
    """The array of an .npy file; `mode` r or c maps it. Raises ValueError where it is not of this kind and shape."""
    with reading(path):
        values = np.load(path, mode, allow_pickle=False)
        if not np.issubdtype(values.dtype, kind) or values.ndim != dimensions:
            held = f"{values.dtype} in {values.ndim} dimensions"
            raise ValueError(f"found {held}, wanted {kind.__name__} in {dimensions}")
    return values


# ---------------------------------------------------------------------------------------- strings and token ids


def digest(text: str) -> int:
    """64 bits that stand for a string in sorted arrays and sets."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def digests(texts: Sequence[str]) -> np.ndarray:
    """(N,) uint64, one per string."""
    return np.fromiter(map(digest, texts), np.uint64, len(texts))


class ItemsWriter:
    """Appends lists of items to a file, as bytes; `close` flushes it and writes their spans, which make it count."""

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
        ends = np.frombuffer(self.ends, np.int64)
        spans = np.stack([ends[:-1], ends[1:]], axis=1)
        write_array(self.path.with_suffix(".npy"), spans if order is None else spans[order])


def open_items(path: Path, kind: type) -> tuple[np.ndarray, np.ndarray]:
    """All items, and spans (N, 2): of each list the first item and the one after its last; read when they are used.

    Raises ValueError where one of the two files is missing, cut, or does not fit the other.
    """
    spans_path = path.with_suffix(".npy")
    if not (path.is_file() and spans_path.is_file()):
        raise ValueError(f"found no whole {path} (with {spans_path.name}); make it anew")
    spans, size = read_array(spans_path, np.int64, 2, "r"), path.stat().st_size
    if spans.shape[1] != 2:
        raise damaged(spans_path, f"found {spans.shape[1]} columns, wanted 2")
    starts, ends = spans.T
    n = int(ends.max()) if len(spans) else 0
    if (wanted := n * np.dtype(kind).itemsize) != size:
        raise damaged(path, f"found {size} bytes, wanted {wanted}")
    if len(spans) and (starts.min() < 0 or (starts > ends).any() or ends.sum() - starts.sum() != n):
        raise damaged(spans_path, f"found spans that do not cover {path.name}")
    return np.memmap(path, kind, "r") if size else np.empty(0, kind), spans


class Strings(Sequence):
    """Read-only strings of one UTF-8 file: an integer gives a string, a slice or an array of rows a view."""

    def __init__(self, data: np.ndarray, spans: np.ndarray):
        self.data, self.spans = data, spans  # bytes; (N, 2)

    @classmethod
    def open(cls, path: Path) -> "Strings":
        """The store that `StringsWriter(path)` wrote. Raises ValueError as `open_items` does."""
        return cls(*open_items(path, np.uint8))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, rows):
        if isinstance(rows, (int, np.integer)):
            start, end = self.spans[rows]
            try:
                return self.data[start:end].tobytes().decode()
            except UnicodeDecodeError as error:
                place = f"byte {start + error.start}"
                raise damaged(self.data.filename, f"{place} is not UTF-8 ({error.reason})") from None
        return Strings(self.data, self.spans[rows])

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


class StringsWriter(ItemsWriter):
    """`add` strings, then `close`, which returns the finished store."""

    def add(self, text: str) -> None:
        super().add(text.encode())

    def close(self, order: np.ndarray | None = None) -> Strings:
        super().close(order)
        return Strings.open(self.path)


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


class Lookup:
    """String -> row, for millions of strings: a binary search among sorted digests, checked against the string."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        numbers = digests(texts)
        self.order = np.argsort(numbers, kind="stable")
        self.sorted = numbers[self.order]

    def __call__(self, text: str) -> int | None:
        """The first row that holds this string, or None."""
        key = np.uint64(digest(text))
        at = int(np.searchsorted(self.sorted, key))
        while at < len(self.sorted) and self.sorted[at] == key:
            if self.texts[int(self.order[at])] == text:
                return int(self.order[at])
            at += 1
        return None


class Documents:
    """Ids, titles and texts in the order in which they came; written once by `add`, then read."""

    def __init__(self, folder: Path | None = None):
        """Without a folder, a temporary one that goes when this object goes."""
        if folder is None:
            self.temporary = tempfile.TemporaryDirectory(prefix="documents.")
            folder = Path(self.temporary.name)
        self.folder, self.seen = folder, set()
        shutil.rmtree(folder, ignore_errors=True)
        self.writers = [StringsWriter(folder / f"{name}.bin") for name in ("ids", "titles", "texts")]
        self.ids = self.titles = self.texts = ()

    def add(self, doc_id: str, title: str, text: str) -> bool:
        """False, and nothing is added, where the id is there already."""
        assert self.writers, "no document is added after close()"
        if doc_id in self:
            return False
        self.seen.add(digest(doc_id))
        for writer, value in zip(self.writers, (doc_id, title, text)):
            writer.add(value)
        return True

    def __contains__(self, doc_id: str) -> bool:
        """Whether `add` has seen this id, while documents are being added."""
        return digest(doc_id) in self.seen

    def close(self) -> "Documents":
        """Ends the adding: from here on the documents are read."""
        self.ids, self.titles, self.texts = (writer.close() for writer in self.writers)
        self.seen, self.writers = set(), []
        return self

    @classmethod
    def open(cls, folder: Path) -> "Documents":
        """Raises ValueError where a store is missing or damaged, or does not hold as many as the others."""
        documents = cls.__new__(cls)
        stores = [Strings.open(folder / f"{name}.bin") for name in ("ids", "titles", "texts")]
        documents.folder, (documents.ids, documents.titles, documents.texts) = folder, stores
        if len(set(counts := list(map(len, stores)))) > 1:
            raise damaged(folder, f"found {counts} ids, titles and texts, wanted as many of each")
        return documents

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def row(self) -> Lookup:
        """row(doc_id) -> its row, or None."""
        return Lookup(self.ids)


class Tokens:
    """Token ids of N texts without padding: one flat array and the span of each text in it."""

    def __init__(self, flat: np.ndarray, spans: np.ndarray):
        self.flat, self.starts = flat, spans[:, 0]  # (tokens,), (N,)
        self.lengths = torch.from_numpy(spans[:, 1] - spans[:, 0])

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, ids: Tensor) -> "Tokens":
        """From a padded batch (N, S), padded with 0."""
        lengths = (ids != 0).sum(1).numpy()
        ends = lengths.cumsum()
        return cls(ids[ids != 0].numpy(), np.stack([ends - lengths, ends], axis=1))

    @classmethod
    def write(cls, path: Path, pieces: Iterable[list[int]], vocabulary: int) -> "Tokens":
        """Streams token ids into a store: two bytes a token where the vocabulary allows it."""
        writer = ItemsWriter(path, kind := token_kind(vocabulary))
        with writer.file:
            for ids in pieces:
                writer.add(np.asarray(ids, kind).tobytes())
            writer.close()
        return cls.open(path, vocabulary)

    @classmethod
    def open(cls, path: Path, vocabulary: int) -> "Tokens":
        return cls(*open_items(path, token_kind(vocabulary)))

    def batch(self, rows: Tensor) -> Tensor:
        """Rows (B,) -> token ids (B, S) int64, padded with 0 to the longest."""
        return self.window(rows, torch.zeros(len(rows), dtype=torch.long), int(self.lengths[rows].max()))

    def window(self, rows: Tensor, first: Tensor, length: int) -> Tensor:
        """`length` tokens of each row from its token `first` (B,) on, 0 beyond its end: (B, length) int64."""
        at = first[:, None] + torch.arange(length)
        inside = at < self.lengths[rows, None]
        places = torch.from_numpy(self.starts[rows.numpy()])[:, None] + at
        ids = self.flat[places.clamp(max=len(self.flat) - 1).numpy()].astype(np.int64)
        return torch.from_numpy(ids) * inside


def token_kind(vocabulary: int) -> type:
    return np.uint16 if vocabulary <= 1 << 16 else np.int32


# ----------------------------------------------------------------------------------------------------- arrays


def open_array(path: Path) -> Tensor:
    """A matrix of an .npy file as a tensor whose pages are read when they are used."""
    return torch.from_numpy(read_array(path, np.float32, 2, "c"))


class ArrayWriter:
    """A tensor in an .npy file that is filled in place and counts once `close` has renamed it."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(path.name + ".part")
        self.mapped = np.lib.format.open_memmap(self.partial, "w+", np.float32, shape)
        try:
            with self.partial.open("r+b") as file:
                reserve(file, self.partial, self.partial.stat().st_size)
        except OSError:
            self.partial.unlink()
            raise
        self.values = torch.from_numpy(self.mapped)

    def close(self) -> Tensor:
        self.mapped.flush()
        os.replace(self.partial, self.path)
        sync_folder(self.path.parent)
        return open_array(self.path)


def scratch(folder: Path | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on disk for the time that it is used: its file has no name and goes with it; in memory without a
    folder. Raises OSError where the disk has no room for all of it.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if folder is None or size == 0:
        return torch.empty(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file, folder, size)
        mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(mapped).view(dtype).view(shape)


def reserve(file, path: Path, size: int) -> None:
    """Takes the disk space of a file that will be mapped: writing to a mapped page on a full disk would kill the
    process without a message.
    """
    free = shutil.disk_usage(path.parent).free + os.fstat(file.fileno()).st_blocks * 512
    try:
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        text = f"{error.strerror}: {size / 2**30:.2f} GiB wanted, {free / 2**30:.2f} GiB free"
        raise OSError(error.errno, text, str(path)) from None
