"""Lists on disk against plain lists; what a full disk, a cut file or a writer that stopped leaves."""

import errno
import fcntl
import gc
import json
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import arrays
from arrays import (
    ArrayWriter,
    Chain,
    Documents,
    ItemsWriter,
    Strings,
    Tokens,
    open_array,
    scratch,
    write_array,
    writing,
)

FUZZ = settings(max_examples=60, deadline=None, derandomize=True, database=None)
FULL = Path("/dev/full")  # a device on which every write finds no space
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason=f"no {FULL} on this system")
TEXTS = [
    "plain",
    "",
    "two\nlines\r\n",
    "tab\tand \x00",
    "äöü",
    "漢字",
    "👩‍👩‍👧 family",
    "\ufeffmark\u2028",
    "",
    "end",
]

texts = st.lists(st.text(max_size=12), max_size=10)


def store(path: Path, strings: list[str], order=None) -> Strings:
    writer = ItemsWriter(path)
    for text in strings:
        writer.add(text.encode())
    writer.close(order)
    return Strings.open(path)


def disk_of(free: int):
    """Stands in for shutil.disk_usage."""
    return lambda path: namedtuple("usage", "total used free")(free, 0, free)


# ---------------------------------------------------------------------------------------------------- strings


def test_strings_come_back_as_written_at_once_and_opened_again(tmp_path):
    written = store(tmp_path / "new" / "folder" / "s.bin", TEXTS)
    for found in (written, Strings.open(tmp_path / "new" / "folder" / "s.bin")):
        assert list(found) == TEXTS and len(found) == len(TEXTS)
        assert [found[i] for i in range(-len(TEXTS), len(TEXTS))] == TEXTS * 2
        assert found[np.int64(6)] == TEXTS[6] and list(reversed(found)) == TEXTS[::-1]
        assert "漢字" in found and "absent" not in found and found.index("äöü") == 4
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {"s.bin", "s.npy"}


@FUZZ
@given(texts)
def test_any_strings_come_back_as_written(strings):
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder) / "s.bin", strings)
        found = Strings.open(Path(folder) / "s.bin")
        assert found == strings and strings == found and found == store(Path(folder) / "other.bin", strings)
        assert (strings == [""]) == (found == [""]) and found != [*strings, ""]
        with pytest.raises(IndexError):
            found[len(strings)]


@FUZZ
@given(texts.filter(bool), st.data())
def test_views_by_slice_and_by_rows_equal_those_of_a_list(strings, data):
    with tempfile.TemporaryDirectory() as folder:
        found = store(Path(folder) / "s.bin", strings)
        cut = data.draw(st.slices(len(strings)))
        rows = data.draw(st.lists(st.integers(-len(strings), len(strings) - 1), min_size=1, max_size=12))
        assert found[cut] == strings[cut]
        picked = found[np.array(rows)]
        assert picked == [strings[row] for row in rows] and len(picked) == len(rows)
        assert picked[1:][:3] == [strings[row] for row in rows][1:][:3]  # a view of a view
        assert found == strings  # the views left it alone


def test_a_store_may_be_listed_in_another_order_than_written(tmp_path):
    store(tmp_path / "s.bin", ["c", "", "aaa", "bb"], order=np.array([2, 3, 0, 1]))
    assert Strings.open(tmp_path / "s.bin") == ["aaa", "bb", "c", ""]
    assert (tmp_path / "s.bin").read_bytes() == b"caaabb"


def test_strings_equal_other_sequences_by_content_alone(tmp_path):
    found = store(tmp_path / "s.bin", ["a", "b"])
    assert found == ["a", "b"] and found == ("a", "b") and found != ["b", "a"] and found != ["a"]
    assert found != 3 and found is not None and found != {"a", "b"}
    with pytest.raises(TypeError):
        hash(found)


@pytest.mark.parametrize("name", ["s.bin", "s.npy"])
def test_store_without_one_of_its_files_is_refused_by_name(tmp_path, name):
    store(tmp_path / "s.bin", TEXTS)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"s.bin: it or s.npy is missing; take it from a copy of the folder"):
        Strings.open(tmp_path / "s.bin")


@pytest.mark.parametrize("change", [-1, -20, 3])
def test_store_of_another_length_is_refused_with_both(tmp_path, change):
    store(tmp_path / "s.bin", TEXTS)
    content = (tmp_path / "s.bin").read_bytes()
    (tmp_path / "s.bin").write_bytes(content[:change] if change < 0 else content + b"x" * change)
    found, wanted = len(content) + change, len(content)
    with pytest.raises(ValueError, match=f"s.bin: found {found} bytes, wanted {wanted}; take it from a copy"):
        Strings.open(tmp_path / "s.bin")


@pytest.mark.parametrize("kept", [0, 5, 50, -1])
def test_store_whose_offsets_are_cut_is_refused_by_name(tmp_path, kept):
    store(tmp_path / "s.bin", TEXTS)
    content = (tmp_path / "s.npy").read_bytes()
    (tmp_path / "s.npy").write_bytes(content[:kept])
    with pytest.raises(ValueError, match="s.npy|s.bin"):
        Strings.open(tmp_path / "s.bin")


def test_store_whose_writer_was_not_closed_does_not_count_and_neither_does_the_one_before(tmp_path):
    store(tmp_path / "s.bin", ["the first", "run"])
    writer = ItemsWriter(tmp_path / "s.bin")
    writer.add(b"the first run")  # as many bytes
    writer.file.flush()
    with pytest.raises(ValueError, match="is missing"):
        Strings.open(tmp_path / "s.bin")
    assert store(tmp_path / "s.bin", ["again"]) == ["again"]


@needs_full
@pytest.mark.parametrize("where", ["s.bin", "s.npy.part"])
@pytest.mark.parametrize("amount", [1, 100_000])
def test_store_that_meets_a_full_disk_says_so_and_does_not_count(tmp_path, where, amount):
    (tmp_path / where).symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as error:
        store(tmp_path / "s.bin", ["some text"] * amount)
    assert error.value.errno == errno.ENOSPC and not (tmp_path / "s.npy").exists()
    with pytest.raises(ValueError, match="is missing"):
        Strings.open(tmp_path / "s.bin")
    gc.collect()  # what the failed writer holds goes, and the place is free again
    (tmp_path / where).unlink()
    assert store(tmp_path / "s.bin", ["a", "b"]) == ["a", "b"]


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("before", [None, b"old"])
def test_file_being_written_is_as_before_until_its_body_ends(tmp_path, before):
    path = tmp_path / "f"
    if before:
        path.write_bytes(before)

    def now() -> bytes | None:
        return path.read_bytes() if path.exists() else None

    with pytest.raises(RuntimeError, match="in the body"), writing(path) as file:
        file.write(b"half")
        file.flush()
        assert now() == before
        raise RuntimeError("in the body")
    assert now() == before
    with writing(path) as file:
        file.write(b"a")
        file.write(b"whole")
        assert now() == before
    assert now() == b"awhole" and [p.name for p in tmp_path.iterdir()] == ["f"]


@needs_full
@pytest.mark.parametrize("write", [lambda path: write_array(path, np.ones(9)), lambda path: stream(path)])
def test_files_that_meet_a_full_disk_are_absent(tmp_path, write):
    (tmp_path / "f.npy.part").symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f.npy")
    assert not (tmp_path / "f.npy").exists()


def stream(path: Path) -> None:
    with writing(path) as file:
        file.write(b"content")


def test_saved_array_is_whole_or_absent(tmp_path, monkeypatch):
    values = np.arange(6).reshape(2, 3)
    write_array(tmp_path / "a.npy", values)

    def half(file, *_, **__):
        file.write(b"half an array")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", half)
    for path in (tmp_path / "a.npy", tmp_path / "b.npy"):
        with pytest.raises(OSError, match="No space"):
            write_array(path, values + 1)
    assert not (tmp_path / "b.npy").exists()
    again = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert (again == values).all() and again.dtype == values.dtype


# ----------------------------------------------------------------------------------------------------- chain


@FUZZ
@given(st.lists(texts, max_size=5), st.data())
def test_chain_equals_the_lists_one_after_the_other(parts, data):
    chain, wanted = Chain(parts), [text for part in parts for text in part]
    assert list(chain) == wanted and len(chain) == len(wanted)
    assert [chain[row] for row in range(len(wanted))] == wanted
    if wanted:
        text = data.draw(st.sampled_from(wanted))
        assert text in chain and chain.index(text) == wanted.index(text)
    for row in (len(wanted), len(wanted) + 1, -1):
        with pytest.raises(IndexError):
            chain[row]


def test_chain_of_stores_and_lists(tmp_path):
    one, other = store(tmp_path / "a.bin", TEXTS), store(tmp_path / "b.bin", ["x", "y"])
    chain = Chain([other, [], one[2:4], ["z"]])
    assert list(chain) == ["x", "y", *TEXTS[2:4], "z"] and chain[np.int64(4)] == "z"


# -------------------------------------------------------------------------------------------------- documents


@FUZZ
@given(st.lists(st.tuples(st.text("abc", max_size=2), st.text(max_size=5), st.text(max_size=9)), max_size=12))
def test_documents_keep_the_first_of_each_id_in_the_order_they_came(rows):
    documents, wanted = Documents(), {}
    for doc_id, title, text in rows:
        assert (doc_id in documents.row_of) == (doc_id in wanted)
        assert documents.add(doc_id, title, text) == (doc_id not in wanted)  # a second of equal id is refused
        wanted.setdefault(doc_id, (title, text))
    documents.close()
    assert documents.ids == list(wanted) and len(documents) == len(wanted)
    assert list(zip(documents.titles, documents.texts)) == list(wanted.values())
    assert documents.row_of == {doc_id: row for row, doc_id in enumerate(wanted)}


def some_documents(folder: Path | None = None) -> Documents:
    documents = Documents(folder)
    for i, text in enumerate(TEXTS):
        documents.add(f"d{i}", f"title {text}", text)
    return documents


def test_documents_that_were_not_closed_do_not_count_nor_do_those_before_them(tmp_path):
    some_documents(tmp_path / "d").close()
    documents = some_documents(tmp_path / "d")
    for writer in documents.writers:
        writer.file.flush()
    for name in ("ids", "titles", "texts"):
        with pytest.raises(ValueError, match=f"{name}.bin"):
            Strings.open(tmp_path / "d" / f"{name}.bin")


def test_documents_replace_what_lay_in_their_folder(tmp_path):
    some_documents(tmp_path / "d").close()
    (tmp_path / "d" / "stale.bin").write_bytes(b"x")
    documents = Documents(tmp_path / "d")
    documents.add("only", "", "one")
    documents.close()
    assert documents.ids == Strings.open(tmp_path / "d" / "ids.bin") == ["only"]
    assert len(list((tmp_path / "d").iterdir())) == 6


def test_temporary_documents_go_with_their_object_and_views_read_on():
    documents = some_documents().close()
    folder, view = documents.writers[0].path.parent, documents.texts[3:6]
    assert folder.is_dir()
    del documents
    gc.collect()
    assert not folder.exists() and view == TEXTS[3:6]


# ----------------------------------------------------------------------------------------------------- tokens


def padded(pieces: list[list[int]], width: int = 0) -> torch.Tensor:
    width = max([width, *map(len, pieces)])
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in pieces]).view(len(pieces), width)


pieces_of_tokens = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=7), min_size=1, max_size=8)


@FUZZ
@given(pieces_of_tokens, st.integers(0, 3), st.data())
def test_tokens_equal_slices_of_the_lists_written_or_from_a_padded_batch(pieces, extra, data):
    rows = data.draw(st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=9))
    first = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    length = data.draw(st.integers(1, 10))
    with tempfile.TemporaryDirectory() as folder:
        written = Tokens.write(Path(folder) / "t.bin", iter(pieces), 100)
        width = max(map(len, pieces)) + extra
        for tokens in (written, Tokens.open(Path(folder) / "t.bin", 100), Tokens.of(padded(pieces, width))):
            assert len(tokens) == len(pieces) and tokens.lengths.tolist() == list(map(len, pieces))
            batch = tokens.batch(torch.tensor(rows))
            assert torch.equal(batch, padded([pieces[row] for row in rows])) and batch.dtype == torch.int64
            window = tokens.window(torch.tensor(rows), torch.tensor(first), length)
            wanted = [pieces[row][start : start + length] for row, start in zip(rows, first)]
            assert torch.equal(window, padded(wanted, length)) and window.dtype == torch.int64


@pytest.mark.parametrize(
    "vocabulary, size", [(3, 2), (32_128, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (250_112, 4)]
)
def test_tokens_take_two_bytes_where_the_vocabulary_allows_it(tmp_path, vocabulary, size):
    pieces = [[1, vocabulary - 1], [2, 1, vocabulary - 2 or 1]]
    tokens = Tokens.write(tmp_path / "t.bin", pieces, vocabulary)
    assert (tmp_path / "t.bin").stat().st_size == 5 * size
    assert tokens.batch(torch.arange(2)).tolist() == [
        [*pieces[0], 0],
        pieces[1],
    ]  # the last id comes back too
    assert torch.equal(
        Tokens.open(tmp_path / "t.bin", vocabulary).batch(torch.arange(2)), tokens.batch(torch.arange(2))
    )


def test_joined_tokens_are_those_of_each_store_in_turn(tmp_path):
    one, other = ([[5, 6], [7]], [[8], [], [9, 5, 4]])
    stores = [Tokens.write(tmp_path / f"{i}.bin", pieces, 100) for i, pieces in enumerate((one, other))]
    joined = Tokens.joined(stores)
    assert joined.lengths.tolist() == [2, 1, 1, 0, 3] and Tokens.joined(stores[:1]) is stores[0]
    assert joined.batch(torch.tensor([4, 0, 2])).tolist() == [[9, 5, 4], [5, 6, 0], [8, 0, 0]]


@pytest.mark.parametrize("change", [-1, -2, 2])
def test_tokens_of_another_length_are_refused_with_both(tmp_path, change):
    Tokens.write(tmp_path / "t.bin", [[5, 6], [7]], 100)
    content = (tmp_path / "t.bin").read_bytes()
    (tmp_path / "t.bin").write_bytes(content[:change] if change < 0 else content + b"x" * change)
    with pytest.raises(ValueError, match=f"t.bin: found {6 + change} bytes, wanted 6; take it from a copy"):
        Tokens.open(tmp_path / "t.bin", 100)


def test_tokens_read_with_the_width_of_another_vocabulary_are_refused(tmp_path):
    Tokens.write(tmp_path / "t.bin", [[5, 6], [7]], 100)
    with pytest.raises(ValueError, match="found 6 bytes, wanted 12"):
        Tokens.open(tmp_path / "t.bin", 100_000)


def test_tokens_whose_writing_stopped_do_not_count_and_neither_do_those_before(tmp_path):
    def stops():
        yield [8, 9]
        yield [7]
        raise KeyboardInterrupt

    Tokens.write(tmp_path / "t.bin", [[5, 6], [7]], 100)
    with pytest.raises(KeyboardInterrupt):
        Tokens.write(tmp_path / "t.bin", stops(), 100)
    assert not (tmp_path / "t.npy").exists()  # what tokenize_passages asks for
    with pytest.raises((ValueError, OSError)):
        Tokens.open(tmp_path / "t.bin", 100)


@needs_full
@pytest.mark.parametrize("where", ["t.bin", "t.npy.part"])
def test_tokens_that_meet_a_full_disk_say_so_and_do_not_count(tmp_path, where):
    (tmp_path / where).symlink_to(FULL)
    with pytest.raises(OSError, match="No space left"):
        Tokens.write(tmp_path / "t.bin", [[5, 6], [7]] * 9, 100)
    assert not (tmp_path / "t.npy").exists()
    (tmp_path / where).unlink()
    assert len(Tokens.write(tmp_path / "t.bin", [[5, 6], [7]], 100)) == 2


# ----------------------------------------------------------------------------------------------------- arrays


def test_array_has_no_file_of_its_name_until_it_is_closed(tmp_path):
    writer = ArrayWriter(tmp_path / "new" / "a.npy", (5, 3))
    assert writer.values.dtype == torch.float32 and writer.values.shape == (5, 3)
    writer.values[:2] = torch.arange(6.0).view(2, 3)
    writer.values[2:] = -1
    assert not (tmp_path / "new" / "a.npy").exists()
    found = writer.close()
    wanted = [[0, 1, 2], [3, 4, 5], *[[-1, -1, -1]] * 3]
    assert found.tolist() == open_array(tmp_path / "new" / "a.npy").tolist() == wanted
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npy"]


def test_array_that_was_not_closed_leaves_the_one_before_and_can_be_written_again(tmp_path):
    write_array(tmp_path / "a.npy", np.ones((2, 2), np.float32))
    unfinished = ArrayWriter(tmp_path / "a.npy", (4, 2))
    unfinished.values[:] = 7
    assert open_array(tmp_path / "a.npy").tolist() == [[1, 1], [1, 1]]
    again = ArrayWriter(tmp_path / "a.npy", (3, 1))
    again.values[:] = 5
    assert again.close().tolist() == [[5], [5], [5]]


def test_opened_array_can_be_written_to_without_changing_its_file(tmp_path):
    write_array(tmp_path / "a.npy", np.arange(4, dtype=np.float32)[None])
    opened = open_array(tmp_path / "a.npy")
    opened += 1
    assert opened.tolist() == [[1, 2, 3, 4]] and open_array(tmp_path / "a.npy").tolist() == [[0, 1, 2, 3]]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot take space in advance")
def test_array_s_disk_space_is_taken_before_it_is_filled(tmp_path):
    writer = ArrayWriter(tmp_path / "a.npy", (1000, 300))
    assert (tmp_path / "a.npy.part").stat().st_blocks * 512 >= writer.values.nbytes


def refuse_space(monkeypatch, how: str) -> None:
    """A disk that has too little room: by what it tells beforehand, or by what it says when asked for it."""
    if how == "too little is free":
        monkeypatch.setattr(shutil, "disk_usage", disk_of(free=1000))
        return

    def posix_fallocate(descriptor, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate, raising=False)


@pytest.mark.parametrize("how", ["too little is free", "the disk refuses"])
def test_array_for_which_the_disk_has_no_room_is_refused_and_gives_the_place_back(tmp_path, monkeypatch, how):
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"No space left.*: 0\.02 GiB wanted") as error,
    ):
        refuse_space(patch, how)
        ArrayWriter(tmp_path / "a.npy", (5_000_000, 1))
    assert error.value.errno == errno.ENOSPC and "a.npy.part" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    ArrayWriter(tmp_path / "a.npy", (2, 1)).close()


@pytest.mark.parametrize("how", ["too little is free", "the disk refuses"])
def test_scratch_for_which_the_disk_has_no_room_is_refused_and_leaves_no_file(tmp_path, monkeypatch, how):
    refuse_space(monkeypatch, how)
    with pytest.raises(OSError, match=r"No space left.*: 0\.02 GiB wanted") as error:
        scratch(tmp_path, (5_000_000,), torch.float32)
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_scratch_of_more_than_any_disk_holds_is_refused(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        scratch(tmp_path, (1 << 30, 1 << 30), torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("folder", [None, "new/cache"])
def test_scratch_keeps_its_values_and_leaves_no_file(tmp_path, folder, dtype):
    folder = folder and tmp_path / folder
    one, other = (scratch(folder, (70, 30, 2), dtype) for _ in range(2))
    assert one.shape == (70, 30, 2) and one.dtype == dtype
    values = torch.arange(4200).view(70, 30, 2).to(dtype)
    one[:], other[:] = values, -values
    assert folder is None or (folder.is_dir() and list(folder.iterdir()) == [])
    assert (
        torch.equal(one[[5, 69]], values[[5, 69]])
        and torch.equal(one, values)
        and torch.equal(other, -values)
    )


def test_scratch_of_nothing_is_an_empty_tensor(tmp_path):
    assert scratch(tmp_path, (0, 5), torch.float32).shape == (0, 5)
    assert scratch(None, (3, 0), torch.float32).shape == (3, 0)


def test_space_is_asked_for_as_file_systems_without_fallocate_need_it(tmp_path, monkeypatch):
    """There glibc writes to every block itself, and takes no descriptor that appends or cannot read."""

    def emulated(descriptor, start, size):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_APPEND or flags & os.O_ACCMODE != os.O_RDWR:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        os.ftruncate(descriptor, max(size, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "posix_fallocate", emulated, raising=False)
    writer = ArrayWriter(tmp_path / "a.npy", (50, 3))
    writer.values[:] = 2
    assert writer.close().tolist() == [[2, 2, 2]] * 50
    assert scratch(tmp_path, (50, 3), torch.float32).fill_(2).tolist() == [[2, 2, 2]] * 50


def test_json_of_a_run_is_strict_nan_and_infinities_are_null(tmp_path):
    value = {
        "loss": float("nan"),
        "P": [[1.0, float("inf")], [-float("inf")]],
        "name": "é",
        "n": torch.tensor(2.5),
    }
    arrays.write_json(tmp_path / "x.json", value)

    def no_constant(name: str):
        pytest.fail(f"{name} is not JSON")

    read = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"), parse_constant=no_constant)
    assert read == {"loss": None, "P": [[1.0, None], [None]], "name": "é", "n": 2.5}
