"""Inputs on which peers of this project fall short: what is wrong in them is said while they are read.

The cases lie in ../shared/cases (or where MIXLORA_CASES points); beside them stand tiny inputs of our own.
"""

import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import data
import prepare
import published
import rq
import store
from arrays import Documents
from config import Config, parse
from data import Collection, equal_documents, merge_equal, read_beir
from reading import AT_ONCE, Problems, add_document

CASES = Path(os.environ.get("MIXLORA_CASES") or Path(__file__).parents[1] / "../shared/cases")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"no folder {CASES}; set MIXLORA_CASES")
DATA = Path(os.environ.get("MIXLORA_DATA") or Path(__file__).parents[1] / "../shared/data")


def refusal(read) -> str:
    with pytest.raises(ValueError) as error:
        read()
    assert type(error.value) is ValueError and "\n" not in str(error.value)
    return str(error.value)


def folder_of(path: Path, texts: dict[str, str], queries: dict[str, str] | None = None) -> Path:
    """A BEIR folder with a title-less document for each text and a test query for each document."""
    (path / "qrels").mkdir(parents=True, exist_ok=True)
    rows = [{"_id": doc_id, "text": text} for doc_id, text in texts.items()]
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": f"q{doc_id}", "text": f"query {i}"} for i, doc_id in enumerate(texts)]
    (path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "qrels" / "test.tsv").write_text("".join(f"q{doc_id}\t{doc_id}\t1\n" for doc_id in texts))
    return path


def read_into(run: Path, folder: Path, *flags: str) -> list[str]:
    """prepare.read of a BEIR folder into a run folder; the lines of its log."""
    config = parse(
        ["--data", str(folder), "--run", str(run), "--splits", "60,40", "--device", "cpu", *flags]
    ).config
    run.mkdir(exist_ok=True)
    prepare.read(config, run, store.Log(run, quiet=True))
    return (run / "log.txt").read_text().splitlines()


# ------------------------------------------------------------------------------------------------------ the cases


@needs_cases
def test_ids_with_white_space_are_refused_with_their_lines_the_first_ten_and_a_count_of_all():
    folder = CASES / "trec_ids_with_whitespace" / "a_spaceid"
    said = refusal(lambda: read_beir(folder))
    for i in range(10):
        assert (
            f"{folder / 'corpus.jsonl'}:{i + 1}: document id that is empty or has white space ('doc x{i}')"
            in said
        )
    assert (
        "doc x10" not in said
        and "; and 30 more (in all 20 x document id " in said
        and "--skip_invalid" in said
    )
    assert "found no document" in refusal(lambda: read_beir(folder, skip_invalid=True))


@needs_cases
def test_id_with_a_tab_is_refused_with_its_line_or_left_out():
    folder = CASES / "trec_ids_with_whitespace" / "b_tabid"
    assert r"corpus.jsonl:6: document id that is empty or has white space ('tab\tid')" in refusal(
        lambda: read_beir(folder)
    )
    read = read_beir(folder, skip_invalid=True)
    assert len(read.documents) == 19 and sum(read.problems.counts.values()) == 1


@needs_cases
def test_title_that_is_nan_is_none():
    read = read_beir(CASES / "nan_title" / "a_nantitle")
    assert read.documents.titles[0] == "" and len(read.documents) == 20


@needs_cases
def test_title_that_is_a_list_is_refused_with_line_and_id_or_left_out():
    folder = CASES / "nan_title" / "a_listtitle"
    assert "corpus.jsonl:1: title that is no string (of document 'x0')" in refusal(lambda: read_beir(folder))
    read = read_beir(folder, skip_invalid=True)
    assert "x0" not in read.documents.row_of and read.problems.counts["title that is no string"] == 1


@needs_cases
def test_document_of_symbols_is_refused_while_reading_or_left_out_with_its_labels():
    folder = CASES / "symbol_only_document_late" / "b_late"
    said = refusal(lambda: read_beir(folder))
    for problem in (
        "corpus.jsonl:20: document without a word ('x19')",
        "qrels/train.tsv:14: label of a missing",
        "order:20: ",
    ):
        assert problem in said
    read = read_beir(folder, skip_invalid=True)
    assert len(read.documents) == len(read.order) == 19 and "x19" not in [
        doc_id for doc_id, _, _ in read.train
    ]


@needs_cases
def test_equal_documents_are_named_in_log_and_manifest_and_merged_on_demand(tmp_path):
    folder, said = CASES / "duplicates_late" / "b_dup", "3 documents equal others: x1 = x0, x2 = x0, x4 = x0"
    assert said in read_into(tmp_path / "kept", folder)
    assert store.read_json(tmp_path / "kept" / "corpus.json")["manifest"]["equal documents"] == said
    lines = read_into(tmp_path / "merged", folder, "--merge_equal")
    assert f"{said}; merged, with the labels and training queries of all" in lines
    kept, merged = (store.load_corpora(tmp_path / name) for name in ("kept", "merged"))
    assert [len(c.ids) for c in kept] == [12, 8] and [len(c.ids) for c in merged] == [10, 7]
    assert sorted(q for c in kept for q in c.test) == sorted(q for c in merged for q in c.test)


@needs_cases
def test_ten_equal_documents_are_read_and_become_one(tmp_path):
    folder = CASES / "duplicates_late" / "l_ident"
    assert any(
        line.startswith("9 documents equal others: d1 = d0, ") for line in read_into(tmp_path / "a", folder)
    )
    assert "1 documents" in refusal(lambda: read_into(tmp_path / "b", folder, "--merge_equal"))


@needs_cases
def test_more_centroids_than_points_are_refused_before_any_training_and_the_run_starts_anew(tmp_path):
    said = refusal(lambda: read_into(tmp_path / "run", CASES / "base", "--K", "32", "--rq_pseudo", "1"))
    assert (
        said == "K=32 centroids need 32 points, D_0 has 12 documents and 1 pseudo-query of each: pass --K 8"
    )
    assert not (tmp_path / "run" / "corpus.json").exists()  # the same command with another --K goes on
    assert "D_0 has 12 documents: M 4, K 8, vocabulary 1100" in read_into(
        tmp_path / "run", CASES / "base", "--K", "8"
    )


@needs_cases
@pytest.mark.parametrize(
    "case", ["combining_marks/l_hi", "combining_marks/c_hi", "chinese_bm25_zero/l_zh", "base"]
)
def test_sound_cases_are_read_whole(case):
    read = read_beir(CASES / case)
    assert not read.problems.counts and read.test


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}; set MIXLORA_DATA")
def test_nothing_of_the_real_corpora_is_refused_and_the_one_pair_of_equal_documents_is_named():
    readers = [lambda: read_beir(DATA / "xquad_en"), lambda: published.read_nq320k(DATA / "nq320k_sample")]
    if data.CACHE.is_file():
        readers.append(lambda: data.read_boolq(42))
    pairs = []
    for reader in readers:
        read = reader()
        list(read.pseudo or ())
        assert not read.problems.counts
        ids, groups = read.documents.ids, equal_documents(read.documents.titles, read.documents.texts)
        pairs += [[ids[row] for row in group] for group in groups]
    assert pairs == [["188", "355"]]


# ---------------------------------------------------------------------------------------------- inputs of our own


def test_every_problem_of_a_folder_is_in_one_message_and_each_is_left_out(tmp_path):
    folder = folder_of(tmp_path, {"a": "alpha", "b": "beta"})
    lines = {
        "corpus.jsonl": ['{"_id": "c", "text": 1}', '{"_id": "", "text": "x"}', '{"_id": "e", "text": "?!"}', "{",
                         '{"_id": "f", "text": "x", "title": 3}', '{"_id": "a", "text": "again"}', "\xff"],
        "queries.jsonl": ['{"_id": "q c", "text": "x"}', '{"_id": "qa", "text": "again"}', '{"_id": "q", "text": "."}', "[]"],
        "qrels/test.tsv": ["q\ta\t1", "gone\ta\t1", "qa\tgone\t1", "qb\tb\tNaN", "qb\tb\ttrue", "qa b 1"],
        "qrels/train.tsv": ["qa\tb\t1", "qa\tlost\t1"],
        "order": ["b", "b", "lost"],
    }  # fmt: skip
    for name, added in lines.items():
        with (folder / name).open("ab") as file:
            file.write("".join(line + "\n" for line in added).encode("latin-1"))
    said = refusal(lambda: read_beir(folder))
    assert said.count(f"{folder}/corpus.jsonl:") == 7 and len(re.findall(r":\d+: ", said)) == 10
    assert "; and 11 more (in all " in said
    read = read_beir(folder, skip_invalid=True)
    assert list(read.documents.ids) == ["a", "b"] and read.order == ["b", "a"]
    assert read.qrels == {"qa": {"a": 1}, "qb": {"b": 1}} and read.train == [("b", "query 0", "qa")]
    assert sum(read.problems.counts.values()) == 21


def test_skipped_problems_are_counted_by_kind_in_log_and_run(tmp_path):
    folder = folder_of(
        tmp_path / "data", {f"d{i}": f"text {i}" for i in range(12)} | {"bad id": "x", "none": "!"}
    )
    general = folder_of(tmp_path / "general", {"g": "general text", "void": "?", "blank": "!"})
    lines = read_into(tmp_path / "run", folder, "--skip_invalid", "--general", str(general))
    assert "left out, document without a word: 3" in lines  # one of them indexed, two general
    assert "left out, label of a missing document: 2" in lines
    left_out = store.read_json(tmp_path / "run" / "corpus.json")["left_out"]
    assert left_out["document id that is empty or has white space"] == 1


@pytest.mark.parametrize(
    "doc_id", ["", " ", "a b", "a\tb", "a\n", "a\u00a0b", "\u2028", "a\x00", "a\x1f", "\x7f", "\x85"]
)
def test_id_that_cannot_be_in_a_trec_file_is_refused(doc_id):
    with pytest.raises(ValueError, match=r"f:3: document id that is empty or has white space \('"):
        add_document(Documents(), AT_ONCE, "f:3", doc_id, "", "text")


@pytest.mark.parametrize(
    "doc_id", ["a", "-", "文", "क\u094dष", "a\u200db", "http://x.y/?z=1#2", "\U0001f600"]
)
def test_other_ids_are_kept(doc_id):
    documents = Documents()
    assert add_document(documents, AT_ONCE, "f:3", doc_id, "", "text") and list(documents.row_of) == [doc_id]


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_title_or_text_that_is_null_or_nan_is_empty(tmp_path, value):
    folder = folder_of(tmp_path, {"a": "alpha"})
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(
            f'{{"_id": "b", "title": "Beta", "text": {value}}}\n{{"_id": "c", "title": {value}, "text": "c"}}\n'
        )
    documents = read_beir(folder).documents
    assert list(documents.titles) == ["", "Beta", ""] and list(documents.texts) == ["alpha", "", "c"]


@pytest.mark.parametrize("field", ["title", "text"])
@pytest.mark.parametrize("value", ["[]", "{}", "0", "1.5", "false", "true", "Infinity", '["A"]'])
def test_title_or_text_of_another_type_is_refused(tmp_path, field, value):
    folder = folder_of(tmp_path, {"a": "alpha"})
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(f'{{"_id": "b", "text": "b", "{field}": {value}}}\n')
    assert f"corpus.jsonl:2: {field} that is no string (of document 'b')" in refusal(
        lambda: read_beir(folder)
    )


def test_problems_up_to_ten_are_listed_without_a_count():
    problems = Problems()
    for i in range(10):
        problems.add(f"f:{i}", "kind", i)
    assert refusal(problems.check).startswith("f:0: kind (0); f:1: kind (1); ") and "more" not in refusal(
        problems.check
    )
    problems.add("f:10", "other kind", 10)
    assert "; and 1 more (in all 10 x kind, 1 x other kind). Repair" in refusal(problems.check)
    skipped = Problems(skip=True)
    skipped.add("f", "kind", 1)
    skipped.check()


def test_equal_documents_are_those_of_the_same_title_and_text_but_for_white_space():
    titles, texts = ["a", "a ", "", "a", "", ""], ["b c", "b\n c", "a b c", "B c", "x", "x"]
    assert equal_documents(titles, texts) == [[0, 1], [4, 5]]
    assert equal_documents(["a"], ["b"]) == equal_documents([], []) == []


def test_merged_documents_keep_all_labels_queries_and_their_place_in_the_order():
    documents = Documents()
    for doc_id, text in zip("abcde", ("one", "two", "one", "two", "three")):
        documents.add(doc_id, "", text)
    train = [("a", "q1", "t1"), ("c", "q1", "t1"), ("c", "q2", "t2"), ("e", "q3", "t3")]
    qrels = {"x": {"c": 3, "a": 1}, "y": {"d": 1}, "z": {"e": 1, "b": 2}}
    c = Collection(
        documents.close(), train, dict.fromkeys(qrels, "?"), qrels, list("dcbae"), notes={"sizes": [2, 2, 1]}
    )
    merge_equal(c, equal_documents(documents.titles, documents.texts))
    assert list(documents.ids) == list(documents.row_of) == ["a", "b", "e"] and list(documents.texts) == [
        "one",
        "two",
        "three",
    ]
    assert c.qrels == {"x": {"a": 3}, "y": {"b": 1}, "z": {"b": 2, "e": 1}}
    assert c.train == [("a", "q1", "t1"), ("a", "q2", "t2"), ("e", "q3", "t3")]
    assert c.order == ["b", "a", "e"] and c.merged == {"c": "a", "d": "b"} and c.notes["sizes"] == [2, 0, 1]


def test_pseudo_queries_of_merged_documents_go_to_the_one_that_stays(tmp_path):
    texts = {f"d{i}": f"text {i}" for i in range(12)} | {"copy": "text 0"}
    folder, lines = folder_of(tmp_path / "data", texts), tmp_path / "pseudo.jsonl"
    lines.write_text(
        "".join(json.dumps({"doc_id": doc_id, "query": f"of {doc_id}"}) + "\n" for doc_id in texts)
    )
    read_into(tmp_path / "run", folder, "--merge_equal", "--pseudo_queries", str(lines))
    manifest = store.read_json(tmp_path / "run" / "corpus.json")["manifest"]
    assert manifest["pseudo-queries"] == {"kept": 13} and manifest["found"]["documents in the files"] == 12


def test_small_presets_take_their_sizes_from_the_number_of_documents():
    config = parse(["--data", str(CASES), "--device", "cpu"], files=False).config
    sizes = {
        n: (c.M, c.K, c.vocab) for n in (12, 30, 144, 1499, 1500, 10**6) for c in [prepare.sized(config, n)]
    }
    assert sizes[1500] == sizes[10**6] == (6, 256, 8000)
    for n in (12, 30, 144, 1499):
        m, k, _ = sizes[n]
        assert (m, k) == rq.suggest(n) and m * math.log2(k) >= 2 * math.log2(n)
    given = prepare.sized(replace(config, M=3, K=16, vocab=400), 30)
    assert (given.M, given.K, given.vocab) == (3, 16, 400)
    assert 2 * math.log2(30) <= prepare.sized(replace(config, K=2), 30).M  # M follows a K that is given
    assert prepare.sized(replace(config, docid_kind="pq"), 30).M == 8  # divides the width, 128
    boolq = parse(["--device", "cpu"], files=False).config
    assert prepare.sized(boolq, 30) == boolq and (boolq.M, boolq.K, boolq.vocab) == (6, 256, 8000)


def test_one_document_in_d0_is_refused_while_reading(tmp_path):
    folder = folder_of(tmp_path / "data", {f"d{i}": f"text {i}" for i in range(5)})
    assert refusal(lambda: read_into(tmp_path / "run", folder, "--splits", "1,4")).startswith(
        "D_0 has 1 document, wanted 2"
    )


def test_files_of_a_folder_that_changed_are_named_on_resuming(tmp_path):
    folder, run = folder_of(tmp_path / "data", {f"d{i}": f"text {i}" for i in range(12)}), tmp_path / "run"
    read_into(run, folder)
    config, log = replace(Config(), data=str(folder)), store.Log(run, quiet=True)
    before = (run / "log.txt").read_text()
    prepare.report_changes(config, run, log)
    assert (run / "log.txt").read_text() == before
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "text": "a new document"}\n')
    (folder / "order").write_text("")
    prepare.report_changes(config, run, log)
    line = (run / "log.txt").read_text().removeprefix(before)
    assert "has changed since it was read (corpus.jsonl, order)" in line and "--extend" in line
    (folder / "corpus.jsonl").rename(tmp_path / "gone")
    prepare.report_changes(
        replace(config, data=str(tmp_path / "nowhere")), run, log
    )  # not there: nothing to say
    assert (run / "log.txt").read_text() == before + line and asdict(config)["data"] == str(folder)
