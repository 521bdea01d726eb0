"""Every reader, fed whatever a file or a prompt may hold.

A reader gives what its file says, compared here with a plain reading by the standard library, or refuses with a
ValueError that names the file and, where there are some, the line or the item. Files are broken in two ways: random
bytes, and up to three edits of a whole file.
"""

import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import arrays
import data
import dense
import published
import reading
import search
import store
from data import Corpus
from mixlora import MixConfig, add_mixture
from queries import Idf, ListedPseudoQueries, query_digest, store_pseudo_queries, words
from reading import Problems
from rq import Trie
from t5 import T5, T5Config
from tools import doc2query

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # damaged headers
EXAMPLES = int(os.environ.get("MIXLORA_EXAMPLES", 100))  # of each reader; see the soak at the end
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = " ".join(f"word{i % 977}" for i in range(100_000))  # 100,000 words
HUGE = b"9" * 5000  # Python refuses to convert integers of more than 4300 digits
DEEP = b"[" * 100_000
STRANGE = "שלום עולם \u202eabc\u202c 👩‍👩‍👧 \u0085\u2028 é e\u0301"  # right to left, overridden; joined emoji; separators


@pytest.fixture(scope="module")
def folder():
    """One folder for all examples, in memory where there is such a place: thousands of examples write some files each."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "fsync", lambda descriptor: None)  # nothing has to survive a power cut
        gc.freeze()  # what is loaded by now stays: the collector need not look through it after each example
        yield Path(name)
        gc.unfreeze()


# -------------------------------------------------------------------------------------------------- broken files

# fmt: off
PIECES = [
    b"\0", b"\x01", b"\x0b", b"\x0c", b"\x1b[2J", b"\x7f", b"\xff", b"\xc3", b"\r", b"\n", b"\r\n", b"\n\n", b"\t", b" ",
    b"", b"\xef\xbb\xbf", STRANGE.encode(), "🙂".encode(), "\u2028".encode(), "\u00a0".encode(), "٣".encode(), b"\\", b'"',
    b'""', b'" "', b'"\\ud800"', b"\\ud800", b'"\\u0000"', b'"d1"', b'"d9"', b"d1", b"q1", b"query-id", b"0", b"1", b"-1",
    b"7", b"999999999999", HUGE, b"9" * 400, b"1e39", b"1e999", b"-0.0", b"1.5", b"NaN", b"null", b"true", b"[]", b"{}",
    b"[1]", b'{"a": 1}', b"[", b"]", b"{", b"}", b",", b":", b"[" * 50 + b"]" * 50, b"[" * 3000 + b"]" * 3000,
]  # fmt: skip
# fmt: on
TOKEN = re.compile(rb'"[^"\n]*"|-?\d+|\w+')


def put(raw: bytes, start: int, end: int, piece: bytes) -> bytes:
    return raw[:start] + piece + raw[end:]


def flip_a_bit(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    at = a % max(1, len(raw))
    return put(raw, at, at + 1, bytes([byte ^ 1 << b % 8 for byte in raw[at : at + 1]]))


def insert(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    at = a % (len(raw) + 1)
    return put(raw, at, at, piece)


def cut(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    return raw[: a % (len(raw) + 1)]


def take_out(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    at = a % (len(raw) + 1)
    return put(raw, at, at + b % 40, b"")


def replace_a_token(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    """A string, a number or a word becomes the piece."""
    tokens = list(TOKEN.finditer(raw))
    return put(raw, *tokens[a % len(tokens)].span(), piece) if tokens else piece


def swap_tokens(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    """Ids where texts should be, numbers where strings should be."""
    tokens = list(TOKEN.finditer(raw))
    if not tokens:
        return raw
    first, last = sorted((tokens[a % len(tokens)], tokens[b % len(tokens)]), key=lambda token: token.start())
    return raw if first is last else put(put(raw, *last.span(), first[0]), *first.span(), last[0])


def swap_columns(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    lines = raw.split(b"\n")
    cells = lines[a % len(lines)].split(b"\t")
    lines[a % len(lines)] = b"\t".join(cells[b % len(cells) :] + cells[: b % len(cells)])
    return b"\n".join(lines)


def repeat_a_line(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    lines = raw.split(b"\n")
    lines.insert(b % (len(lines) + 1), lines[a % len(lines)])
    return b"\n".join(lines)


def drop_a_line(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    lines = raw.split(b"\n")
    del lines[a % len(lines)]
    return b"\n".join(lines)


def as_windows_writes_it(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    raw = raw.replace(b"\n", b"\r\n")
    return (b"\xef\xbb\xbf" if b % 2 else b"") + raw


def in_utf_16(raw: bytes, a: int, b: int, piece: bytes) -> bytes:
    return raw.decode(errors="replace").encode("utf-16")


EDITS = [
    flip_a_bit, insert, insert, cut, take_out, replace_a_token, replace_a_token, replace_a_token, swap_tokens,
    swap_columns, repeat_a_line, drop_a_line, as_windows_writes_it, in_utf_16,
]  # fmt: skip
places = st.integers(0, 9999)
edit = st.tuples(st.sampled_from(EDITS), places, places, st.sampled_from(PIECES))
# Random bytes, or what is done to a whole file; tuples are drawn faster than lists.
broken = (
    st.binary(max_size=60)
    | st.tuples()
    | st.tuples(edit)
    | st.tuples(edit, edit)
    | st.tuples(edit, edit, edit)
)


def content(raw: bytes, how) -> bytes:
    """Another file: the drawn bytes, or the edits of this one."""
    if isinstance(how, bytes):
        return how
    for edit, a, b, piece in how:
        raw = edit(raw, a, b, piece)
    return raw


WRITTEN: dict[Path, bytes] = {}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes what differs from the files that the example before left."""
    for name, raw in files.items():
        path = folder / name
        if WRITTEN.get(path) != raw:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
            WRITTEN[path] = raw


def change(files: dict[str, bytes], pick: int, how) -> tuple[dict[str, bytes], str]:
    """The files with one of them broken, and its name."""
    name = list(files)[pick % len(files)]
    return files | {name: content(files[name], how)}, name


# What a refusal says of a whole file, in place of a line.
WHOLE = re.compile(
    r"found no|have no |adds no document|document without a (line|pseudo-query)|cannot be read|found \d+ bytes|not a SentencePiece|"
    r"tokenizer has|not JSON|not the corpora|not the queries|no counts of words|found format|different runs|"
    r"found .*, first at .*:\d+|spans that do not|byte \d+ is not UTF-8|"
    r"malformed or cut JSON|: found .*, wanted a (JSON )?(list|object)"
)
PLACE = re.compile(r":\d+: |item \d+: |query '|query \"|document '|document \"")


def read_or_refused(reader, *names: str):
    """What `reader()` gives, or None where it refuses with the name of a file and, in it, of the place."""
    try:
        return reader()
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        text = str(error)
        assert any(name in text for name in names) and (PLACE.search(text) or WHOLE.search(text)), text[:500]
        return None


def lines_of(raw: bytes) -> list[str]:
    return [line.strip("\r\n") for line in raw.decode("utf-8-sig").split("\n") if line.strip()]


def objects_of(raw: bytes) -> list[dict]:
    return [json.loads(line) for line in lines_of(raw)]


def jsonl(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# ------------------------------------------------------------------------------------------------- BEIR, BoolQ

BEIR = {
    "corpus.jsonl": jsonl(
        {"_id": "d1", "title": "Rome ", "text": "Rome is the capital of Italy."},
        {"_id": "d2", "text": STRANGE},
        {"_id": "d3", "title": "Oslo", "text": ""},
    ),
    "queries.jsonl": jsonl(
        {"_id": "q1", "text": "capital of italy"},
        {"_id": "q2", "text": STRANGE},
        {"_id": "q3", "text": "oslo"},
    ),
    "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2\n",
    "qrels/train.tsv": b"query-id\tcorpus-id\tscore\nq3\td3\t1\nq3\td1\t0\n",
    "order": b"d3\nd1\nd2\n",
}


def well_formed_lines(raw: bytes) -> list[str]:
    """The lines of a file that are UTF-8."""
    lines = []
    for number, line in enumerate(raw.split(b"\n")):
        with suppress(UnicodeDecodeError):
            lines.append(line.decode("utf-8" if number else "utf-8-sig").strip("\r\n"))
    return [line for line in lines if line.strip()]


def well_formed(raw: bytes) -> list[dict]:
    """The lines of a file that are JSON objects with a string as id."""
    rows = []
    for line in well_formed_lines(raw):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
            if isinstance(row, dict) and isinstance(row.get("_id"), str):
                rows.append(row)
    return rows


def named(row: dict) -> bool:
    """Has it an id that can be in a TREC file?"""
    return bool(row["_id"]) and not any(c.isspace() or unicodedata.category(c) == "Cc" for c in row["_id"])


def words_in(text: str) -> bool:
    return any(c.isalnum() or c == "_" for c in text)


def labels_of(raw: bytes) -> list[tuple[str, str, int]]:
    """The first label of each pair: once more it changes nothing, and another one is a problem."""
    rows = [line.split("\t") for line in well_formed_lines(raw)]
    rows = [row for row in rows if len(row) == 3 and re.fullmatch(r"-?\d{1,9}", row[2].strip())]
    first: dict[tuple[str, str], int] = {}
    for query, doc_id, score in rows:
        first.setdefault((query, doc_id), int(score))
    return [(*pair, score) for pair, score in first.items()]


@FUZZ
@given(st.integers(0, 9), broken, st.booleans())
@example(0, jsonl({"_id": "d1", "text": LONG}, {"_id": "d2", "text": "b"}, {"_id": "d3", "text": "c"}), False)
@example(0, jsonl({"_id": "d1", "text": ""}), True)
@example(0, b'{"_id": "d1", "text": "a", "title": ' + HUGE + b"}", False)
@example(0, b'{"_id": "d1", "text": "a", "title": ' + DEEP, False)
@example(0, b'{"_id": "", "text": "a"}\n' + BEIR["corpus.jsonl"], True)
@example(1, jsonl({"_id": "q1", "text": LONG}, {"_id": "q2", "text": ""}), True)
@example(2, b"q1\td1\t" + HUGE, False)
@example(4, b"d1\nd2\nd2\n", False)
def test_beir_folder_is_read_as_written_or_refused_by_line(folder, pick, how, skip_invalid):
    files, name = change(BEIR, pick, how)
    write(folder / "beir", files)
    found = read_or_refused(
        lambda: data.read_beir(folder / "beir", skip_invalid, folder / "store"),
        str(folder / "beir" / name),
        *["test.tsv:", "train.tsv:", "order:"]
        * (pick % 5 < 2),  # labels and the order name ids that are gone
        f"{folder / 'beir'}: found",
    )
    if found is None:
        return
    documents, ids = found.documents, list(found.documents.ids)
    rows = {}
    for row in well_formed(files["corpus.jsonl"]):
        parts = [row.get("title", ""), row.get("text", False)]
        title, text = ("" if part is None or part != part else part for part in parts)
        if named(row) and isinstance(title, str) and isinstance(text, str) and words_in(title + text):
            rows.setdefault(row["_id"], (" ".join(title.split()), text.strip()))
    assert dict(zip(ids, zip(documents.titles, documents.texts))) == rows and list(rows) == ids
    texts = {}
    for row in well_formed(files["queries.jsonl"]):
        if named(row) and isinstance(row.get("text"), str):
            texts.setdefault(row["_id"], row["text"].strip())
    texts = {query: text for query, text in texts.items() if words_in(text)}
    qrels = {}
    for query, doc_id, score in labels_of(files["qrels/test.tsv"]):
        if score > 0 and doc_id in ids and query in texts:
            qrels.setdefault(query, {})[doc_id] = score
    assert found.qrels == qrels and found.test == {query: texts[query] for query in qrels}
    assert found.train == [
        (doc_id, texts[query], query)
        for query, doc_id, score in labels_of(files["qrels/train.tsv"])
        if score > 0 and doc_id in ids and query in texts
    ]
    listed = [line.strip() for line in well_formed_lines(files["order"]) if line.strip() in ids]
    assert found.order[: len(set(listed))] == list(dict.fromkeys(listed)) and sorted(found.order) == sorted(
        ids
    )
    if not skip_invalid:  # nothing was left out
        assert not found.problems.counts and len(ids) == len(lines_of(files["corpus.jsonl"]))


BOOLQ = jsonl(
    {"question": "is rome old", "passage": "Rome -- Rome is old.", "answer": True},
    {"question": "is rome big", "passage": "Rome -- Rome is big."},
    {"question": "is oslo old", "passage": f"Oslo -- {STRANGE}"},
    {"question": "is oslo big", "passage": f"Oslo -- {STRANGE}"},
    {"question": "is oslo far", "passage": "Oslo"},
    {"question": "alone", "passage": "Bern -- A page of one question."},
)


@FUZZ
@given(broken)
@example(jsonl({"question": "a", "passage": f"T -- {LONG}"}, {"question": LONG, "passage": "T -- b"}))
@example(b'{"question": "a", "passage": ' + HUGE + b"}")
@example(DEEP)
@example('{"question": "a\u2028b", "passage": "T -- c\x85d"}\n'.encode() * 2)
def test_boolq_lines_become_pages_with_their_questions_or_are_refused_by_line(folder, how):
    raw = content(BOOLQ, how)
    (folder / "boolq.jsonl").write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "MEMBER_SHA256", data.sha256(raw))
        found = read_or_refused(
            lambda: data.read_boolq(0, folder / "boolq.jsonl", folder / "store"), str(folder / "boolq.jsonl")
        )
    if found is None:
        return
    pages = {}
    for row in objects_of(raw):
        title, _, text = row["passage"].partition(" -- ")
        questions, texts = pages.setdefault(title, ([], []))
        questions.append(row["question"])
        texts.append(text)
    kept = {f"{i}": (title, *page) for i, (title, page) in enumerate(pages.items()) if len(page[0]) > 1}
    documents = found.documents
    assert list(zip(documents.ids, documents.titles, documents.texts)) == [
        (f"p{i}", title, " ".join(dict.fromkeys(texts))) for i, (title, _, texts) in kept.items()
    ]
    assert found.qrels == {f"q{i}": {f"p{i}": 1} for i in kept} and list(found.test) == [
        f"q{i}" for i in kept
    ]
    for i, (_, questions, _) in kept.items():
        asked = [found.test[f"q{i}"], *(query for doc_id, query, _ in found.train if doc_id == f"p{i}")]
        assert not Counter(asked) - Counter(questions) and len(asked) == min(len(questions), 9)


# ------------------------------------------------------------------------------- pseudo-queries, the tokenizer


def two_corpora() -> list[Corpus]:
    first = Corpus(0, ["d1", "d2"], ["Rome", ""], ["Rome is old.", STRANGE])
    return [first, Corpus(2, ["d3"], ["Oslo"], [""])]


PSEUDO = jsonl(
    {"doc_id": "d2", "query": STRANGE},
    {"doc_id": "d1", "query": "how old is rome"},
    {"doc_id": "d3", "query": "a test query"},
    {"doc_id": "d3", "query": "oslo"},
    {"doc_id": "d1", "query": "rome"},
)


@FUZZ
@given(broken, st.booleans())
@example(PSEUDO + jsonl({"doc_id": "d1", "query": LONG}), True)
@example(PSEUDO + jsonl({"doc_id": "d1", "query": ""}), False)
@example(b'{"doc_id": ' + HUGE + b', "query": "a"}', False)
@example(PSEUDO + DEEP, True)
def test_pseudo_queries_are_stored_by_document_or_refused_by_line(folder, how, published_file):
    raw, corpora = content(PSEUDO, how), two_corpora()
    problems = None if published_file else Problems()
    path, stored, excluded = folder / "pseudo.jsonl", folder / "pseudo", {query_digest("a test query")}
    path.write_bytes(raw)
    documents = [(corpus.ids, corpus.titles, corpus.texts) for corpus in corpora]
    counts = read_or_refused(
        lambda: store_pseudo_queries(
            reading.read_pseudo_queries(path, problems or reading.AT_ONCE),
            stored,
            documents,
            excluded,
            problems,
        ),
        str(path),
        "pseudo-queries: document without a pseudo-query",  # an empty file
    )
    if counts is None:
        assert not list(stored.rglob("starts.npy"))  # half a store does not count
        return
    row_of = {"d1": 0, "d2": 1, "d3": 2}
    lines = [(row_of.get(row["doc_id"]), row["query"]) for row in objects_of(raw)]
    worded = [(row, query) for row, query in lines if row is not None and words(query)]
    wanted = [(row, query) for row, query in worded if query_digest(query) not in excluded]
    parts = [ListedPseudoQueries(stored / f"D{t}", corpus.first_row) for t, corpus in enumerate(corpora)]
    pairs = [pair for part in parts for pair in part.pairs()]
    made = [pair for pair in pairs if pair[0] not in {row for row, _ in wanted}]
    assert [pair for pair in pairs if pair not in made] == sorted(wanted, key=lambda pair: pair[0])
    assert {row for row, _ in pairs} == {0, 1, 2} and counts["kept"] == len(wanted)
    assert all(query and query_digest(query) not in excluded for _, query in pairs)
    assert published_file or (not made and len(worded) == len(lines))


PASSAGES = ["The cat sat on the mat, and the dog barked at it.", "A dog and a cat; the mat was red.", STRANGE]


def small_model() -> bytes:
    """A tokenizer as data.train_tokenizer makes it, without its 240 KB of rules that fold letters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PASSAGES), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        normalization_rule_name="identity", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


MODEL = small_model()


@FUZZ
@given(broken)
@example(b"")
@example(MODEL[:-1])
@example(HUGE)
@example(DEEP)
def test_bytes_are_a_tokenizer_with_t5_s_ids_or_refused_by_name(folder, how):
    path = folder / "tokenizer.model"
    path.write_bytes(content(MODEL, how))
    tokenizer = read_or_refused(lambda: data.load_tokenizer(path), str(path))
    if tokenizer is not None:
        assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2)


# ------------------------------------------------------------------------------------------ published layouts

LIST = json.dumps(["text", STRANGE, 1, -0.5, None, {"a": [1, {"b": "c"}]}], ensure_ascii=False).encode()
OBJECT = json.dumps({"a": [1, 2], STRANGE: {"b": 3}, "c": "text"}, ensure_ascii=False, indent=1).encode()


@FUZZ
@given(st.sampled_from([LIST, OBJECT]), broken)
@example(LIST, json.dumps([LONG]).encode())
@example(LIST, b"[1, " + HUGE + b"]")
@example(LIST, b"[1, " + DEEP)
def test_json_is_read_whole_or_refused_by_name(folder, raw, how):
    path = folder / "file.json"
    path.write_bytes(content(raw, how))
    found = read_or_refused(lambda: published.read_json(path, (list, dict), "a list"), str(path))
    if found is not None:
        assert repr(found) == repr(json.loads(path.read_bytes().decode("utf-8-sig")))  # repr: nan, 1 and 1.0


NQ320K = {
    "corpus_lite.json": json.dumps(["Rome is old .", f" {STRANGE} \n", "Bern", "Oslo"]).encode(),
    "train.json": json.dumps([["age of rome", 0], [["seine city", "another"], [1, 0]]]).encode(),
    "dev.json": json.dumps([[["how old is rome"], [0]], [[["norway"]], [[[3]]]]]).encode(),
    "train.json.qg.json": json.dumps([["rome old", 0], ["", 2], [["oslo"], 3]]).encode(),
}


def first_of(value):
    return first_of(value[0]) if isinstance(value, list) else value


@FUZZ
@given(st.integers(0, 9), broken)
@example(0, json.dumps([LONG, "b", "c", "d"]).encode())
@example(0, b'["a", "b", "c", ' + DEEP)
@example(1, json.dumps([[LONG, 3]]).encode())
@example(1, b'[["a", ' + HUGE + b"]]")
@example(2, b'[["a", ' + b"[" * 700 + b"0" + b"]" * 700 + b"]]")
@example(3, b'[["", 0], ["", true]]')
def test_nq320k_is_read_as_written_or_refused_by_item(folder, pick, how):
    files, name = change(NQ320K, pick, how)
    write(folder / "nq", files)

    def reader():
        found = published.read_nq320k(folder / "nq", folder / "store")
        pseudo = list(found.pseudo)
        found.problems.check()
        return found, pseudo

    read = read_or_refused(
        reader, name, f"{folder / 'nq'}: found no", *["train.json", "dev.json"] * (name == "corpus_lite.json")
    )
    if read is None:
        return
    found, pseudo = read
    texts, train, dev, generated = (json.loads(raw.decode("utf-8-sig")) for raw in files.values())
    assert list(found.documents.ids) == [str(row) for row in range(len(texts))] and texts
    assert list(found.documents.texts) == [text.strip() for text in texts]
    pairs = [
        [(str(first_of(row)), first_of(query)) for query, row in rows] for rows in (train, dev, generated)
    ]
    assert [pair[:2] for pair in found.train] == pairs[0]
    assert [(*found.qrels[query], found.test[query]) for query in found.test] == pairs[1]
    assert [pair[1:] for pair in pseudo] == pairs[2]
    assert all(doc_id in found.documents.ids for part in pairs for doc_id, _ in part)


MSMARCO = {
    "collection.tsv": f"0\tRome is old.\n1\t{STRANGE}\n2\ta\ttab\n".encode(),
    "queries.train.tsv": b"10\tage of rome\n11\tseine city\n12\tunlabelled\n",
    "qrels.train.tsv": b"10 0 0 1\n11\t0\t1\t1\n11\t0\t2\t0\n",
    "queries.dev.small.tsv": f"20\t{STRANGE}\n21\ttab\n".encode(),
    "qrels.dev.small.tsv": b"20\t0\t1\t1\n21\t0\t2\t1\n20\t0\t0\t1\n",
}


def tsv(raw: bytes) -> list[list[str]]:
    return [line.split("\t", 1) for line in lines_of(raw)]


def triples(raw: bytes) -> list[tuple[str, str, int]]:
    rows = [line.split() for line in lines_of(raw)]
    return list(
        dict.fromkeys((query, doc_id, int(label)) for query, _, doc_id, label in rows if int(label) > 0)
    )


@FUZZ
@given(st.integers(0, 9), broken)
@example(0, f"0\t{LONG}\n1\tb\n2\tc\n".encode())
@example(0, b"0\t\n1\tb\n2\tc\n0\td\n")
@example(0, b"0\ta\n1\tb\n2\tc\n\td\n")
@example(1, f"10\t{LONG}\n11\tb\n".encode())
@example(1, b"10\ta\n11\tb\n10\tanother\n")
@example(2, b"10 0 0 " + HUGE)
@example(4, HUGE + b" 0 0 1")
def test_msmarco_is_read_as_written_or_refused_by_line(folder, pick, how):
    files, name = change(MSMARCO, pick, how)
    write(folder / "marco", files)
    others = {"collection.tsv": ["qrels.train.tsv", "qrels.dev.small.tsv"], "queries.train.tsv": ["qrels.train.tsv"],
              "queries.dev.small.tsv": ["qrels.dev.small.tsv"]}  # fmt: skip
    found = read_or_refused(
        lambda: published.read_msmarco(folder / "marco", folder / "store"),
        name,
        f"{folder / 'marco'}: found no",
        *others.get(name, []),
    )
    if found is None:
        return
    rows = tsv(files["collection.tsv"])
    ids = list(found.documents.ids)
    assert list(zip(ids, found.documents.texts)) == [(pid, text.strip()) for pid, text in rows]
    assert len(set(ids)) == len(ids) and all(pid.strip() for pid in ids)
    texts = {query: text.strip() for query, text in tsv(files["queries.train.tsv"])}
    train, test = triples(files["qrels.train.tsv"]), triples(files["qrels.dev.small.tsv"])
    assert found.train == [(pid, texts[query], query) for query, pid, _ in train]
    texts = {query: text.strip() for query, text in tsv(files["queries.dev.small.tsv"])}
    assert found.test == {query: texts[query] for query, _, _ in test}
    assert {(query, pid) for query, labels in found.qrels.items() for pid in labels} == {
        (query, pid) for query, pid, _ in test
    }
    assert all(pid in ids for _, pid, _ in train + test) and all(found.test.values())


AUTHORS = {
    "d0/full_collection/raw.tsv": f"5\tRome is old.\n3\t{STRANGE}\n".encode(),
    "d0/eval_queries/raw.tsv": b"0\thow old\n1\tunlabelled\n",
    "d0/eval_queries/eval_qrel.json": b'{"0": {"5": 1, "3": 0}}',
    "d0/train_queries/raw.tsv": b"70\tage of rome\n71\thello\n",
    "d0/train_queries/train_qrel.json": b'{"70": {"5": 1}, "71": {"3": 2}}',
    "d0/doc2query/query_to_docid.train.json": jsonl(
        {"doc_id": 5, "query": "a"}, {"doc_id": "3", "query": STRANGE}
    ),
    "d1/full_collection/raw.tsv": b"5\tRome is old.\n8\ta\ttab\n",
    "d1/eval_queries/raw.tsv": f"0\t{STRANGE}\n".encode(),
    "d1/eval_queries/eval_qrel.json": b'{"0": {"8": 1}}',
    "d1/doc2query/query_to_docid.train.json": jsonl({"doc_id": 8, "query": "b"}),
}


def relevant(raw: bytes) -> dict[str, dict[str, int]]:
    rows = {
        query: {doc_id: label for doc_id, label in labels.items() if label > 0}
        for query, labels in json.loads(raw.decode("utf-8-sig")).items()
    }
    return {query: labels for query, labels in rows.items() if labels}


@FUZZ
@given(st.integers(0, 9), broken)
@example(0, f"5\t{LONG}\n3\tb\n".encode())
@example(0, b"5\t\n3\t\n")
@example(2, b'{"0": {"5": ' + HUGE + b"}}")
@example(2, b'{"0": ' + DEEP)
@example(2, b'{"0": {"5": true}}')
@example(2, b'{"0": {"5": 1}, "0": {"3": 1}}')
@example(5, b'{"doc_id": ' + HUGE + b', "query": "a"}')
@example(5, b'{"doc_id": 5, "query": ' + DEEP)
@example(5, jsonl({"doc_id": 5, "query": LONG}))
def test_authors_folders_are_read_as_written_or_refused_by_place(folder, pick, how):
    files, name = change(AUTHORS, pick, how)
    write(folder / "authors", files)

    def reader():
        found = published.read_authors(folder / "authors", folder / "store")
        pseudo = list(found.pseudo)
        found.problems.check()
        return found, pseudo

    part = str(folder / "authors" / name.partition("/")[0])
    others = {"full_collection": ["d0", "d1"], "eval_queries": [part], "train_queries": [part]}
    whole = f"{folder / 'authors'}: found no"
    read = read_or_refused(reader, str(folder / "authors" / name), whole, *others.get(name.split("/")[1], []))
    if read is None:
        return
    found, pseudo = read
    texts, sizes = {}, []
    for t in (0, 1):
        for doc_id, text in tsv(files[f"d{t}/full_collection/raw.tsv"]):
            texts.setdefault(doc_id, text.replace("\t", " ").strip())
        sizes.append(len(texts) - sum(sizes))
    assert dict(zip(found.documents.ids, found.documents.texts)) == texts and found.notes["sizes"] == sizes
    assert found.order == list(texts) and all(sizes) and all(doc_id.strip() for doc_id in texts)
    qrels, test = {}, {}
    for t in (0, 1):
        queries = dict(tsv(files[f"d{t}/eval_queries/raw.tsv"]))
        for query, labels in relevant(files[f"d{t}/eval_queries/eval_qrel.json"]).items():
            qrels[f"d{t}.{query}"], test[f"d{t}.{query}"] = labels, queries[query].strip()
    assert found.qrels == qrels and found.test == test and all(test.values())
    assert not any(isinstance(label, bool) for labels in found.qrels.values() for label in labels.values())
    queries = dict(tsv(files["d0/train_queries/raw.tsv"]))
    labels = relevant(files["d0/train_queries/train_qrel.json"])
    assert found.train == [(doc_id, queries[q].strip(), q) for q, of in labels.items() for doc_id in of]
    assert all(doc_id in texts for of in [*qrels.values(), *labels.values()] for doc_id in of)
    assert [pair[1:] for pair in pseudo] == [
        (str(row["doc_id"]), row["query"])
        for t in (0, 1)
        for row in objects_of(files[f"d{t}/doc2query/query_to_docid.train.json"])
    ]


DOCIDS = b'{"d1": [-1, 0, 255], "d2": [3, 4], "unasked": [5, 6]}'


@FUZZ
@given(broken)
@example(b'{"d1": [1, 2], "d2": [3, ' + HUGE + b"]}")
@example(b'{"d1": [1, 2], "d2": ' + DEEP)
@example(b'{"d1": [1, 2], "d2": [true, 4]}')
@example(b'{"d1": [1, 2], "d2": [3, 4], "d1": [5, 6]}')
def test_docids_are_codes_as_written_or_refused_by_document(folder, how):
    raw, path = content(DOCIDS, how), folder / "docids.json"
    path.write_bytes(raw)
    found = read_or_refused(lambda: published.read_docids(path, ["d2", "d1"], 2, 256), str(path))
    if found is not None:
        pairs = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=list)
        listed = dict(pairs)
        assert found == [listed["d2"][-2:], listed["d1"][-2:]]
        assert all(type(code) is int and 0 <= code < 256 for codes in found for code in codes)
        assert [name for name, _ in pairs].count("d1") == 1


# ----------------------------------------------------------------------------------- the teacher, doc2query's input

D0 = Corpus(
    0, ["d1", "d2", "d3"], ["", "", ""], ["a", "b", "c"], [(0, "one"), (1, STRANGE)], ["q1", "q2"], {}, {}
)
TEACHER = jsonl(
    {"qid": "q1", "docids": ["d1", "d2", "d3"], "scores": [9.5, 2, -1.25]},
    {"qid": "q2", "docids": ["d2", "gone", "d1"], "scores": [3, 2, 1]},
    {"qid": "q1", "docids": ["d1"], "scores": [1]},
)


@FUZZ
@given(broken)
@example(b"")
@example(jsonl({"qid": "q1", "docids": ["d1", "d2"], "scores": [10**400, 0]}))
@example(jsonl({"qid": "q1", "docids": ["d1", "d2"], "scores": [1e39, 0]}))
@example(jsonl({"qid": "q1", "docids": {"d1": 1, "d2": 2}, "scores": "10"}))
@example(b'{"qid": "q1", "docids": ["d1", "d2"], "scores": [1, ' + HUGE + b"]}")
@example(b'{"qid": "q1", "docids": ' + DEEP)
@example(jsonl({"qid": LONG, "docids": ["d1", "d2"], "scores": [1, 0]}))
def test_teacher_s_scores_are_read_as_written_or_refused_by_line(folder, how):
    raw, path = content(TEACHER, how), folder / "teacher.jsonl"
    path.write_bytes(raw)
    found = read_or_refused(lambda: dense.read_teacher(path, D0), str(path))
    if found is None:
        return
    rows, queries = {"d1": 0, "d2": 1, "d3": 2}, {"q1": "one", "q2": STRANGE}
    wanted = []
    for item in objects_of(raw):
        pairs = [(rows[d], float(score)) for d, score in zip(item["docids"], item["scores"]) if d in rows]
        wanted += [(queries[item["qid"]], pairs)] if len(pairs) > 1 else []
    k = max(len(pairs) for _, pairs in wanted) - 1
    assert found.queries == [query for query, _ in wanted]
    wanted = [pairs[:1] + [pairs[1 + i % (len(pairs) - 1)] for i in range(k)] for _, pairs in wanted]
    assert found.documents.tolist() == [[row for row, _ in pairs] for pairs in wanted]
    scores = torch.tensor([[score for _, score in pairs] for pairs in wanted])
    assert torch.equal(found.scores, scores) and scores.isfinite().all()


LAYOUTS = {
    "corpus.jsonl": BEIR["corpus.jsonl"],
    "collection.tsv": MSMARCO["collection.tsv"],
    "corpus_lite.json": NQ320K["corpus_lite.json"],
}


@FUZZ
@given(st.integers(0, 8), broken)
@example(0, jsonl({"_id": "d1", "text": LONG}))
@example(0, jsonl({"_id": "d1", "text": ""}))
@example(0, b'{"_id": "a", "text": ' + DEEP)
@example(1, f"0\t{LONG}\n1\t\n".encode())
@example(2, json.dumps([LONG, ""]).encode())
@example(2, b"[" + HUGE + b"]")
@example(2, DEEP)
def test_doc2query_reads_documents_as_written_or_refuses_them_by_place(folder, pick, how):
    files, name = change(LAYOUTS, pick, how)
    write(folder / "doc2query", files)
    path = folder / "doc2query" / name
    found = read_or_refused(lambda: list(doc2query.documents(SimpleNamespace(documents=path))), str(path))
    if found is None:
        return
    if name == "corpus.jsonl":
        parts = [(row["_id"], row.get("title"), row["text"]) for row in objects_of(files[name])]
        rows = [["" if part is None or part != part else part for part in row] for row in parts]
        rows = [(doc_id, " ".join(title.split()), text.strip()) for doc_id, title, text in rows]
        wanted = [
            (doc_id, f"{title}. {text}" if title else text) for doc_id, title, text in rows if title or text
        ]
    elif name == "collection.tsv":
        wanted = [(pid, text.strip()) for pid, text in tsv(files[name]) if text.strip()]
    else:
        texts = json.loads(files[name].decode("utf-8-sig"))
        wanted = [(str(row), text.strip()) for row, text in enumerate(texts) if text.strip()]
    assert found == wanted


# ------------------------------------------------------------------------------------------------- the run folder


@FUZZ
@given(st.sampled_from([LIST, OBJECT]), broken)
@example(LIST, b"[" + HUGE + b"]")
@example(LIST, DEEP)
def test_json_of_a_run_is_read_as_written_or_refused_by_name(folder, raw, how):
    raw, path = content(raw, how), folder / "config.json"
    path.write_bytes(raw)
    found = read_or_refused(lambda: [store.read_json(path)], str(path))
    if found is not None:
        assert repr(found[0]) == repr(json.loads(raw.decode()))


@pytest.fixture(scope="module")
def corpora_files(folder) -> dict[str, bytes]:
    corpora = two_corpora()
    corpora[0].train, corpora[0].train_ids = [(0, "how old is rome"), (1, STRANGE)], ["t1", "t2"]
    corpora[0].test, corpora[0].qrels = {"q1": "age of rome"}, {"q1": {"d1": 1}}
    corpora[1].test, corpora[1].qrels = {"q2": STRANGE}, {"q2": {"d3": 1}}
    store.save_corpora(folder / "run", "made up", corpora, {}, {})
    names = ["corpus.json", "idf.json", "excluded.npy", "queries/D0.json"]
    names += [f"documents/D0/{n}.{k}" for n in ("ids", "titles", "texts") for k in ("bin", "npy")]
    return {name: (folder / "run" / name).read_bytes() for name in names}


@FUZZ
@given(st.integers(0, 9), broken)
@example(0, DEEP)
@example(0, b'{"format": 2, "corpora": [{"first_row": ' + HUGE + b"}]}")
@example(1, b'{"documents": 1, "counts": {"a": ' + HUGE + b"}}")
@example(3, b'{"train": [[0, "a", 1]], "train_ids": [], "test": {}, "qrels": {}}')
def test_corpora_of_a_run_are_whole_or_refused_by_name(folder, corpora_files, pick, how):
    files, name = change(corpora_files, pick, how)
    write(folder / "run", files)

    def reader():
        corpora = store.load_corpora(folder / "run")
        opened = [list(corpora[0].passages()), list(corpora[0].ids), corpora[0].train, corpora[0].test]
        return *opened, Idf.load(folder / "run" / "idf.json"), store.load_excluded(folder / "run")

    read = read_or_refused(reader, name, name.replace(".npy", ".bin"), str(folder / "run"))
    if read is not None:
        passages, ids, train, _, idf, excluded = read
        assert len(passages) == len(ids) and all(len(pair) == 2 for pair in train)
        assert idf("rome") > 0
        if name != "excluded.npy":
            assert excluded == {query_digest("age of rome"), query_digest(STRANGE)}


@pytest.mark.parametrize("stated", [b'"first_row": -1', b'"first_row": 1', b'"first_row": 3'])
def test_corpora_of_a_run_whose_rows_do_not_follow_each_other_are_refused(folder, corpora_files, stated):
    raw = corpora_files["corpus.json"].replace(b'"first_row": 2', stated)
    write(folder / "run", corpora_files | {"corpus.json": raw})
    with pytest.raises(ValueError, match=r"corpus\.json"):
        store.load_corpora(folder / "run")


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


ARRAY = npy(np.arange(6).reshape(2, 3))
# What a damaged header makes of NumPy: each of these once ended in another error than ValueError.
HEADERS = [
    b"PK\x03\x04" + ARRAY,
    ARRAY.replace(b"(2, 3)", b"(2, -3"),
    ARRAY.replace(b"'descr'", b"[2345]:"),
    ARRAY.replace(b"'<i8'", b"'|V0'"),
    ARRAY.replace(b"(2, 3), }          ", b"(9999999999999, 3)}"),
]


@FUZZ
@given(broken)
@example(HEADERS[0])
@example(HEADERS[1])
@example(HEADERS[2])
@example(HEADERS[3])
@example(HEADERS[4])
def test_array_of_a_run_is_an_array_or_refused_by_name(folder, how):
    path = folder / "docids.npy"
    path.write_bytes(content(ARRAY, how))
    found = read_or_refused(lambda: [arrays.read_array(path, np.int64, 2)], str(path))
    assert found is None or (found[0].dtype, found[0].ndim) == (np.int64, 2)


@FUZZ
@given(broken)
def test_embeddings_are_float32_or_refused_by_name(folder, how):
    path = folder / "embeddings.npy"
    path.write_bytes(content(npy(np.ones((2, 3), np.float32)), how))
    found = read_or_refused(lambda: arrays.open_array(path), str(path))
    assert found is None or found.dtype == torch.float32


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"weights": torch.ones(2, 3), "name": STRANGE, "steps": 3}, file)
    return file.getvalue()


@FUZZ
@given(broken)
@example(b"")
@example(HUGE)
@example(DEEP)
def test_tensors_of_a_run_are_as_written_or_refused_by_name(folder, checkpoint, how):
    path = folder / "D0.pt"
    path.write_bytes(content(checkpoint, how))
    found = read_or_refused(lambda: store.read_tensors(path), str(path))
    if found is not None:
        assert torch.equal(found["weights"], torch.ones(2, 3)) and (found["name"], found["steps"]) == (
            STRANGE,
            3,
        )


def make_stores(folder: Path) -> None:
    writer = arrays.ItemsWriter(folder / "strings.bin")
    for text in ("one", STRANGE, "", "four"):
        writer.add(text.encode())
    writer.close(np.array([2, 0, 3, 1]))
    arrays.Tokens.write(folder / "tokens.bin", [[5, 6], [7], [40]], 100)


@pytest.fixture(scope="module")
def stores(folder) -> dict[str, bytes]:
    make_stores(folder)
    names = ("strings.bin", "strings.npy", "tokens.bin", "tokens.npy")
    return {name: (folder / name).read_bytes() for name in names}


@FUZZ
@given(st.integers(0, 1), broken)
@example(1, npy(np.array(7)))
@example(1, npy(np.zeros((0,), np.int64)))
@example(1, npy(np.array([[0.0, 3.0]])))
@example(1, npy(np.zeros((3, 0), np.int64)))
@example(1, npy(np.zeros((3, 3), np.int64)))
@example(1, npy(np.array([[0, 3], [9, 3], [-5, 61]])))
@example(1, HEADERS[0])
@example(1, HEADERS[2])
@example(0, b"\xff" * (len("one" + "four") + len(STRANGE.encode())))
def test_strings_of_a_store_cover_its_bytes_or_are_refused_by_name(folder, stores, pick, how):
    files, _ = change({name: stores[name] for name in ("strings.bin", "strings.npy")}, pick, how)
    write(folder, files)

    def reader():
        opened = arrays.Strings.open(folder / "strings.bin")
        return list(opened), opened.spans.tolist()

    read = read_or_refused(reader, str(folder / "strings.bin"), str(folder / "strings.npy"))
    if read is not None:
        raw = files["strings.bin"]
        assert read[0] == [raw[start:end].decode() for start, end in read[1]]
        assert sum(end - start for start, end in read[1]) == len(raw)


@FUZZ
@given(st.integers(0, 1), broken)
@example(1, npy(np.zeros((0,), np.int64)))
@example(1, npy(np.array(7)))
@example(1, npy(np.array([0, 5, 2, 4])))
@example(1, HEADERS[0])
@example(0, b"")
def test_tokens_of_a_store_cover_its_bytes_or_are_refused_by_name(folder, stores, pick, how):
    files, _ = change({name: stores[name] for name in ("tokens.bin", "tokens.npy")}, pick, how)
    write(folder, files)
    tokens = read_or_refused(
        lambda: arrays.Tokens.open(folder / "tokens.bin", 100),
        str(folder / "tokens.bin"),
        str(folder / "tokens.npy"),
    )
    if tokens is not None:
        flat = np.frombuffer(files["tokens.bin"], np.uint16).tolist()
        assert (tokens.lengths >= 0).all() and tokens.lengths.sum() == len(flat)
        if len(tokens) and flat:
            batch = tokens.batch(torch.arange(len(tokens)))
            inside = torch.arange(batch.shape[1]) < tokens.lengths[:, None]
            assert batch[inside].tolist() == flat and not batch[~inside].any()


@pytest.mark.parametrize("name", ["strings.bin", "strings.npy", "tokens.bin", "tokens.npy"])
def test_missing_half_of_a_store_is_refused_by_name(tmp_path, name):
    make_stores(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{re.escape(name)}"):
        arrays.Strings.open(tmp_path / "strings.bin")
        arrays.Tokens.open(tmp_path / "tokens.bin", 100)


@pytest.mark.parametrize(
    "reader",
    [
        lambda path: data.read_beir(path.parent),
        lambda path: list(reading.read_pseudo_queries(path)),
        lambda path: data.load_tokenizer(path),
        lambda path: published.read_nq320k(path.parent),
        lambda path: published.read_msmarco(path.parent),
        lambda path: published.read_docids(path, [], 2, 8),
        lambda path: published.read_authors(path.parent),
        lambda path: dense.read_teacher(path, D0),
        store.read_json,
        store.read_tensors,
        lambda path: arrays.read_array(path, np.int64, 2),
        Idf.load,
        arrays.open_array,
        lambda path: store.load_corpora(path.parent),
    ],
)
def test_missing_file_is_refused_by_name(tmp_path, reader):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        reader(tmp_path / "absent")


# ----------------------------------------------------------------------------------------------------- the search

M, K, N = 2, 8, 40


@pytest.fixture(scope="module")
def finished(folder):
    """What search.py loads of a run, on a small random model with 40 documents."""
    torch.manual_seed(0)
    shape = dict(encoder_blocks=1, decoder_blocks=1, codebooks=M, centroids=K)
    tokenizer = data.load_tokenizer(data.train_tokenizer(PASSAGES, 60))
    model = T5(T5Config(tokenizer.vocab_size(), 16, 2, 8, 24, **shape))
    add_mixture(model, MixConfig(layers=1, experts=2, rank=2))
    codes = torch.randint(K, (N, M), generator=torch.Generator().manual_seed(3))
    return SimpleNamespace(
        tokenizer=tokenizer, docids=codes, ids=[f"d{row:02}" for row in range(N)], finished=[0],
        config={"query_length": 16, "beam": 10}, at=lambda t: (model.eval(), Trie(codes)), headline=lambda row: "Title",
    )  # fmt: skip


queries = st.text(max_size=40) | st.lists(st.sampled_from([piece.decode(errors="replace") for piece in PIECES])).map(
    " ".join
)  # fmt: skip
MANY = settings(FUZZ, max_examples=EXAMPLES // 5)  # of ten queries or more


@MANY
@given(st.lists(queries, min_size=10, max_size=20))
@example([LONG, "", " ", "\0", STRANGE, "9" * 5000, "[" * 100_000, "</s> <pad> <unk>"])
def test_any_query_ranks_documents_of_the_trie_by_score(finished, texts):
    model, trie = finished.at(0)
    rankings = search.retrieve(
        model, trie, finished.tokenizer, texts, finished.ids, k=7, beam=7, max_length=16
    )
    assert len(rankings) == len(texts)
    for ranking in rankings:
        rows, scores = zip(*ranking)
        assert len(set(rows)) == len(rows) == 7 and set(rows) <= set(range(N))
        assert all(-1e4 < score <= 0 for score in scores) and list(scores) == sorted(scores, reverse=True)
    (alone,) = search.retrieve(model, trie, finished.tokenizer, texts[:1], finished.ids, 7, 7, max_length=16)
    assert [score for _, score in rankings[0]] == pytest.approx([score for _, score in alone], abs=1e-5)


numbers = st.sampled_from(
    ["1", "3", "10", "500", "0", "-1", "-99999999999", "1e3", "٣", "", "x", "0x10", "1_0", "\0"]
)
flags = st.lists(
    st.tuples(st.sampled_from(["-k", "--beam", "-k=", "--bea", "-b"]), numbers)
    | st.tuples(queries)
    | st.tuples(st.sampled_from(["--", "-", "--help!", "--k", "--device"])),
    max_size=3,
)


@FUZZ
@given(queries, flags)
@example("", [])
@example(LONG, [])
@example("-k", [("-k", "3")])
@example("rome", [("-k", "9" * 5000)])
@example("half a letter \udcff", [])
@example("\ud83d", [("-k", "2")])
def test_any_command_line_prints_a_ranking_or_says_what_is_wrong(finished, capsys, query, flags):
    arguments = ["a run", query, *(part for flag in flags for part in flag)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LoadedRun", lambda path, device: finished)
        patch.setattr("builtins.input", lambda prompt: "")
        try:
            search.main(arguments)
        except ValueError as error:
            assert str(error) and not capsys.readouterr().out
            wrong = not query.strip() or query.startswith("-") or "Unicode" in str(error)  # half a letter
            assert flags or wrong
        except SystemExit as ended:
            assert ended.code == 0 and capsys.readouterr().out.startswith("usage: ")
        else:
            shown = capsys.readouterr().out.splitlines()
            line = r" *\d+ +-\d+\.\d{3}  \S+ +d\d\d  Title|40 documents.*"
            assert shown and all(re.fullmatch(line, one) for one in shown)


@pytest.mark.parametrize(
    "flag, shown", [("-k", N), ("--beam", 10)]
)  # beams beyond the documents are cut to them
def test_beam_wider_than_memory_still_finds_every_document(finished, capsys, monkeypatch, flag, shown):
    monkeypatch.setattr(search, "LoadedRun", lambda path, device: finished)
    search.main(["a run", "rome", flag, "9" * 18])
    assert len(set(capsys.readouterr().out.splitlines())) == shown


def test_run_folder_of_an_impossible_name_is_refused():
    with pytest.raises(OSError, match="name too long"):  # of which the command makes one line
        search.main(["9" * 5000, "rome"])


@pytest.mark.soak
def test_every_reader_holds_on_2000_examples():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__]
    subprocess.run(command, env=os.environ | {"MIXLORA_EXAMPLES": "2000"}, check=True)
