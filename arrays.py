"""Lists that live on disk: strings, token ids and arrays that need not fit into memory.

Paper    none; MS MARCO's 8.8 million passages and their embeddings (27 GB) ask for it
In       strings, lists of token ids, shapes of arrays
Out      sequences that read like a list or a tensor and hold only what is asked for
Next     data.py keeps documents and pseudo-queries in them; dense.py embeddings; scan.py encoder outputs
Differs  the released code keeps JSON maps and tuple-keyed dictionaries, all in memory

A store is a file of raw bytes and a file of offsets, which is written last: a store without it does not count.
"""

import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def digest(text: str) -> int:
    """64 bits that stand for a string in sorted arrays and sets."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class StreamedFile:
    """A file written piece by piece, that is whole or absent: `with StreamedFile(path) as file: file.write(..)`."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".part")

    def __enter__(self):
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


def write_tensors(path: Path, value) -> None:
    """Raises OSError where the disk is full, as any other write."""
    with StreamedFile(path) as file:
        failed = ()
        try:
            torch.save(value, file)
        except (
            RuntimeError
        ) as error:  # torch may close its archive after a write that failed, and complain of that
            if not isinstance(error.__context__, OSError):
                raise
            failed = error.__context__.args
        if failed:  # raised here, so that it does not hold on to torch's error and all of its frames
            raise OSError(*failed)


def read_tensors(path: Path):
    if not path.is_file():
        raise ValueError(f"found no {path}; is {path.parent} the folder of a run that got this far?")
    try:
        with zipfile.ZipFile(path) as zipped:  # torch does not look at the checksums
            if bad := zipped.testzip():
                raise ValueError(f"its part {bad} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read ({reason}); remove the file to make it anew") from None


class Strings(Sequence):
    """Read-only strings of one UTF-8 file: an integer gives a string, a slice or an array of rows a view."""

    def __init__(self, data: np.ndarray, spans: np.ndarray):
        self.data, self.spans = data, spans  # bytes; (N, 2) first byte and the one after the last

    @classmethod
    def open(cls, path: Path) -> "Strings":
        """The store that `StringsWriter(path)` wrote. Raises ValueError where one of its files is missing or cut."""
        spans_path = path.with_suffix(".npy")
        if not (path.is_file() and spans_path.is_file()):
            raise ValueError(f"found no whole {path} (with {spans_path.name}); make it anew")
        spans, size = load_array(spans_path, np.int64, 2, "r"), path.stat().st_size
        if spans.shape[1] != 2:
            raise ValueError(f"{spans_path}: found {spans.shape[1]} columns, wanted 2; make {path.name} anew")
        starts, ends = spans.T
        wanted = int(ends.max()) if len(spans) else 0
        if wanted != size:
            raise ValueError(f"{path}: found {size} bytes, wanted {wanted}; make it anew")
        if len(spans) and (starts.min() < 0 or (starts > ends).any() or ends.sum() - starts.sum() != size):
            raise ValueError(f"{spans_path}: found offsets that do not cover {path.name}; make it anew")
        return cls(np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8), spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, rows):
        if isinstance(rows, (int, np.integer)):
            start, end = self.spans[rows]
            try:
                return self.data[start:end].tobytes().decode()
            except UnicodeDecodeError as error:
                where = f"{self.data.filename}: byte {start + error.start}"
                raise ValueError(f"{where}: not UTF-8 ({error.reason}); make the file anew") from None
        return Strings(self.data, self.spans[rows])

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    @cached_property
    def digests(self) -> np.ndarray:
        """(N,) uint64, one per string."""
        return np.fromiter(map(digest, self), np.uint64, len(self))


class StringsWriter:
    """Appends strings to a store; `close` flushes it and writes its offsets, which make it count."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".npy").unlink(missing_ok=True)
        self.path, self.file, self.end, self.ends = path, path.open("wb"), 0, array("q")

    def add(self, text: str) -> None:
        self.end += self.file.write(text.encode())
        self.ends.append(self.end)

    def close(self, order: np.ndarray | None = None) -> Strings:
        """The finished store; `order` (N,) lists its strings in another order than they came."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        ends = np.frombuffer(self.ends, np.int64) if self.ends else np.empty(0, np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]) if len(ends) else ends, ends], axis=1)
        save_array(self.path.with_suffix(".npy"), spans if order is None else spans[order])
        return Strings.open(self.path)


def digests(texts: Sequence[str]) -> np.ndarray:
    """(N,) uint64, one per string; a store remembers its own."""
    if hasattr(texts, "digests"):
        return texts.digests
    return np.fromiter(map(digest, texts), np.uint64, len(texts))


def load_array(path: Path, kind: type, dimensions: int | None = None, mode: str | None = None) -> np.ndarray:
    """The array of an .npy file. Raises ValueError where it is missing, damaged or holds numbers of another kind."""
    try:
        found = np.load(path, mode, allow_pickle=False)
        if found.dtype != kind or dimensions not in (None, found.ndim):
            raise ValueError(
                f"found {found.dtype} in {found.ndim} dimensions, wanted {kind.__name__} in {dimensions}"
            )
    except Exception as error:  # NumPy evaluates the header as Python, which fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read ({reason}); remove the file to make it anew") from None
    return found


def save_array(path: Path, values: np.ndarray) -> None:
    with StreamedFile(path) as file:
        np.save(file, values, allow_pickle=False)


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

    @cached_property
    def digests(self) -> np.ndarray:
        return np.concatenate([digests(part) for part in self.parts])


class Lookup:
    """String -> row, for millions of strings: a binary search among sorted digests, checked against the string."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        found = digests(texts)
        self.order = np.argsort(found, kind="stable")
        self.sorted = found[self.order]

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
        found = cls.__new__(cls)
        found.folder = folder
        found.ids, found.titles, found.texts = (
            Strings.open(folder / f"{name}.bin") for name in ("ids", "titles", "texts")
        )
        if not len(found.ids) == len(found.titles) == len(found.texts):
            counts = f"{len(found.ids)} ids, {len(found.titles)} titles and {len(found.texts)} texts"
            raise ValueError(f"{folder}: found {counts}, wanted as many of each; make it anew")
        return found

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def row(self) -> Lookup:
        """row(doc_id) -> its row, or None."""
        return Lookup(self.ids)


class Tokens:
    """Token ids of N texts without padding: one flat array and where each text starts in it."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray):
        self.flat, self.starts = flat, starts  # (tokens,), (N + 1,)
        self.lengths = torch.from_numpy(np.diff(starts))

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, ids: Tensor) -> "Tokens":
        """From a padded batch (N, S), padded with 0."""
        lengths = (ids != 0).sum(1).numpy()
        return cls(ids[ids != 0].numpy(), np.concatenate([[0], lengths.cumsum()]))

    @classmethod
    def write(cls, path: Path, pieces: Iterable[list[int]], vocabulary: int) -> "Tokens":
        """Streams token ids into a store: two bytes a token where the vocabulary allows it."""
        kind = np.uint16 if vocabulary <= 1 << 16 else np.int32
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".npy").unlink(missing_ok=True)
        starts = array("q", [0])
        with path.open("wb") as file:
            for ids in pieces:
                file.write(np.asarray(ids, kind).tobytes())
                starts.append(starts[-1] + len(ids))
            file.flush()
            os.fsync(file.fileno())
        save_array(path.with_suffix(".npy"), np.frombuffer(starts, np.int64))
        return cls.open(path, vocabulary)

    @classmethod
    def open(cls, path: Path, vocabulary: int) -> "Tokens":
        kind = np.uint16 if vocabulary <= 1 << 16 else np.int32
        starts_path = path.with_suffix(".npy")
        starts = load_array(starts_path, np.int64, 1)
        if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) < 0).any():
            raise ValueError(
                f"{starts_path}: found offsets that do not ascend from 0; remove the file to make it anew"
            )
        found = path.stat().st_size if path.is_file() else 0
        wanted = int(starts[-1]) * np.dtype(kind).itemsize
        if found != wanted:
            raise ValueError(
                f"{path}: found {found} bytes, wanted {wanted}; remove the file {starts_path.name} to make it anew"
            )
        return cls(np.memmap(path, kind, "r") if found else np.empty(0, kind), starts)

    def batch(self, rows: Tensor) -> Tensor:
        """Rows (B,) -> token ids (B, S) int64, padded with 0 to the longest."""
        return self.window(rows, torch.zeros(len(rows), dtype=torch.long), int(self.lengths[rows].max()))

    def window(self, rows: Tensor, first: Tensor, length: int) -> Tensor:
        """`length` tokens of each row from its token `first` (B,) on, 0 beyond its end: (B, length) int64."""
        at = first[:, None] + torch.arange(length)
        inside = at < self.lengths[rows, None]
        places = torch.from_numpy(self.starts[rows.numpy()])[:, None] + at
        found = self.flat[places.clamp(max=len(self.flat) - 1).numpy()].astype(np.int64)
        return torch.from_numpy(found) * inside


def open_array(path: Path) -> Tensor:
    """An .npy file as a tensor whose pages are read when they are used."""
    return torch.from_numpy(load_array(path, np.float32, mode="c"))


class ArrayWriter:
    """A tensor in an .npy file that is filled in place and counts once `close` has renamed it."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.path, self.partial = path, path.with_name(path.name + ".part")
        self.mapped = np.lib.format.open_memmap(self.partial, "w+", np.float32, shape)
        reserve(self.partial, self.partial.stat().st_size)
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
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.close(descriptor)
    try:
        reserve(Path(name), size)
        mapped = np.memmap(name, np.uint8, "r+", shape=(size,))
    finally:
        Path(name).unlink(missing_ok=True)
    return torch.from_numpy(mapped).view(dtype).view(shape)


def reserve(path: Path, size: int) -> None:
    """Takes the disk space of a file that will be mapped: writing to a mapped page on a full disk would kill the
    process without a message.
    """
    free = shutil.disk_usage(path.parent).free + path.stat().st_blocks * 512
    try:
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        text = f"{error.strerror}: {size / 2**30:.2f} GiB wanted, {free / 2**30:.2f} GiB free"
        raise OSError(error.errno, text, str(path)) from None
