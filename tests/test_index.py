"""The index as one object: four lines of Python, from ten documents on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import link_tree

import extend
import search
import store
from index import Hit, Index

ANIMALS = "zebra kiwi otter walrus gecko heron badger lemur ibis tapir".split()
DOCUMENTS = [
    (f"d{i}", name, f"the {name} lives in region {i} and eats food {i}") for i, name in enumerate(ANIMALS)
]
SMALL = dict(  # held by weight 2, a model of this width does not learn two documents in so few steps
    width=32, heads=2, feed_forward=64, encoder_blocks=1, dream_batch=64, batch=64, d0_batch=64, dream_kl=0.5
)


@pytest.fixture(scope="session")
def ten(once) -> Path:
    """An index of ten documents, with M, K, vocabulary and steps of its own choice. Not to be changed."""
    return once("ten", lambda folder: Index.train(DOCUMENTS, folder, **SMALL))


@pytest.fixture
def index(ten, tmp_path) -> Index:
    return Index.open(link_tree(ten, tmp_path / "index"))


def test_ten_documents_are_found_by_their_titles(ten):
    index = Index.open(ten)
    assert len(index) == 10 and "d3" in index and "x" not in index
    first = [hits[0] for hits in index.search(ANIMALS, k=1)]
    assert sum(hit.id == f"d{i}" for i, hit in enumerate(first)) >= 9
    assert all(isinstance(hit, Hit) and hit.score <= 0 for hit in first)
    assert index.documents(["d2", "d0"]) == [DOCUMENTS[2], DOCUMENTS[0]]


def test_search_answers_as_the_command_does(index):
    run = store.LoadedRun(index.folder)
    model, trie = run.at(0)
    ranking = search.retrieve(
        model, trie, run.tokenizer, ["otter food"], run.ids, 5, 10, run.config["query_length"]
    )[0]
    hits = index.search("otter food", k=5)
    assert [(hit.id, hit.score) for hit in hits] == [(run.ids[row], score) for row, score in ranking]
    assert index.search(["otter food"], k=5) == [hits]
    assert len(index.search("otter", k=100)) == 10  # a wider beam than there are docids is capped


def test_added_documents_are_found_and_outlive_a_restart(index):
    index.add([("n1", "narwhal", "the narwhal has a long tooth"), ("n2", "", "an okapi is striped")])
    for opened in (index, Index.open(index.folder)):
        assert len(opened) == 12 and "n1" in opened
        assert "n1" in [hit.id for hit in opened.search("narwhal", k=10)]
        assert opened.documents(["n2"]) == [("n2", "", "an okapi is striped")]
    assert {hit.id: hit.title for hit in index.search("okapi", 12)}["n2"] == "an okapi is striped"


def test_deleted_documents_are_gone_for_every_index_on_the_folder_and_after_a_restart(index):
    other = Index.open(index.folder)
    weights = {name: p.clone() for name, p in index.model.state_dict().items()}
    assert index.delete(["d0"]).startswith("deleted 1 documents")
    assert index.delete(["d7"]).startswith("deleted 1 documents")
    for opened in (index, other, Index.open(index.folder)):
        assert len(opened) == 8 and "d0" not in opened
        assert not {"d0", "d7"} & {hit.id for hit in opened.search("zebra lemur", k=10)}
        assert all(torch.equal(p, weights[name]) for name, p in opened.model.state_dict().items())
    with pytest.raises(ValueError, match="holds no document d0"):
        index.documents(["d0"])
    index.add([("d0", "zebra", "the zebra is back")])  # a deleted id is free again
    assert index.documents(["d0"]) == [("d0", "zebra", "the zebra is back")] and len(index) == 9


def test_an_index_sees_what_another_process_added(index):
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; import conftest; from index import Index;"
        "Index.open(sys.argv[1]).add([('n1', 'narwhal', 'a long tooth')])"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    adding = subprocess.Popen([sys.executable, "-c", code, str(index.folder), *paths])
    answered = 0
    while adding.poll() is None:  # searches are answered all the while
        assert index.search("otter")[0].score <= 0
        answered += 1
        time.sleep(0.01)
    assert adding.returncode == 0 and answered
    assert "n1" in index and len(index.search("narwhal", k=11)) == 11


def test_new_versions_replace_old_ones(index):
    index.add([("d2", "otter", "an otter swims on its back")], replace=True)
    assert len(index) == 10 and index.documents(["d2"]) == [("d2", "otter", "an otter swims on its back")]


def test_a_document_that_was_deleted_can_be_added_again_as_it_was(index):
    document = ("n1", "narwhal", "the narwhal has a long tooth")
    for _ in range(2):
        index.add([document])
        assert index.documents(["n1"]) == [document]
        index.delete(["n1"])
    assert len(index) == 10


def test_what_a_stop_within_delete_left_is_erased_by_the_next_call(index, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(extend, "erase", lambda folder: "stopped")
        index.delete(["d0"])
    assert len(index) == 9 and b"zebra" in (index.folder / "documents" / "D0" / "texts.bin").read_bytes()
    with pytest.raises(ValueError, match="holds no document d0"):
        index.delete(["d0"])
    assert b"zebra" not in (index.folder / "documents" / "D0" / "texts.bin").read_bytes()


def test_ids_and_documents_may_come_one_by_one_and_the_working_directory_may_change(index, monkeypatch):
    monkeypatch.chdir(index.folder.parent)
    opened = Index.open(index.folder.name)
    monkeypatch.chdir("/")
    opened.add(document for document in [["日本é", "narwhal", "a long tooth"]])
    assert [doc_id for doc_id, *_ in opened.documents(iter(["d1", "日本é"]))] == ["d1", "日本é"]
    opened.delete(iter(["d1"]))
    assert len(opened) == 10


def test_a_checkpoint_that_makes_way_while_it_is_opened_is_no_error(index, monkeypatch):
    load, calls = store.load_model, []

    def gone_at_first(*given):
        calls.append(given)
        if len(calls) == 1:
            stages = index.folder / "stages.json"
            store.write(stages, stages.read_bytes())
            raise ValueError("found no D0.pt")
        return load(*given)

    monkeypatch.setattr(store, "load_model", gone_at_first)
    index.delete(["d0"])
    assert len(index) == 9 and len(calls) == 2


def test_an_error_that_is_kept_does_not_keep_the_folder(index):
    with pytest.raises(ValueError, match="holds d1 already") as kept:
        index.add([("d1", "a b", "c")])
    index.add([("n1", "a b", "c")])
    assert kept and len(index) == 11


def test_consolidated_it_is_an_index_of_the_same_documents(index, tmp_path):
    index.add([("n1", "narwhal", "the narwhal has a long tooth")])
    index.delete(["d9"])
    anew = index.consolidate(tmp_path / "anew")
    assert len(anew) == 10 and "n1" in anew and "d9" not in anew and anew.run.finished == [0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i.add([]), "found no document"),
        (lambda i: i.add([("n1", "", " . ")]), r"^corpus.jsonl:1: document without a word \('n1'\)$"),
        (lambda i: i.add([("n1", "", "____")]), "document without a word"),
        (lambda i: i.add([("n1", "a b", "c"), ("n1", "a b", "d")]), "duplicate document id"),
        (lambda i: i.add([("n 1", "a b", "c")]), "document id that is empty or has white space"),
        (lambda i: i.add([("d1", "a b", "c")]), "holds d1 already"),
        (lambda i: i.add([("n1", None, "c")]), r"wanted \(id, title, text\), 3 strings"),
        (lambda i: i.add(["abc"]), r"found 'abc', wanted \(id, title, text\)"),
        (lambda i: i.add([dict(id="n1", title="a", text="b")]), r"wanted \(id, title, text\)"),
        (lambda i: i.add([("n1", "a", "b")], queries=["ab"]), r"found 'ab', wanted \(text, document id\)"),
        (lambda i: i.delete("d1"), r"wanted a list of ids; pass \['d1'\]"),
        (lambda i: i.documents("d1"), r"wanted a list of ids; pass \['d1'\]"),
        (lambda i: i.add([("n1", "a", "b")], keep=-1), "--keep -1"),
        (lambda i: i.add([("n1", "a", "b")], queries=[("q", "x")]), "label of a missing document"),
        (lambda i: i.delete(["x"]), "holds no document x"),
        (lambda i: i.delete(["d1", "d1"]), "name each once"),
        (lambda i: i.delete([f"d{j}" for j in range(10)]), "these are all of its documents"),
        (lambda i: i.search("  "), "the query is empty"),
        (lambda i: i.search("otter", k=0), "k = 0"),
        (lambda i: i.search(None), "found None, wanted a query"),
        (lambda i: i.search(["otter", 3]), "found 3, wanted a query"),
    ],
)
def test_bad_input_is_one_line_and_the_index_stays_as_it_was(index, change, message):
    before = index.search(ANIMALS)
    with pytest.raises(ValueError, match=message):
        change(index)
    assert index.search(ANIMALS) == before == Index.open(index.folder).search(ANIMALS)
    index.add([("fresh", "narwhal", "a long tooth")])  # nothing stands in its way
    assert len(index) == 11


def test_an_index_is_of_a_run_and_of_a_method_that_takes_documents(tmp_path):
    with pytest.raises(ValueError, match="found no"):
        Index.open(tmp_path)
    with pytest.raises(ValueError, match="one of mixlora-dsi, paper, dream"):
        Index.train(DOCUMENTS, tmp_path / "x", method="base")
    with pytest.raises(ValueError, match="unrecognized arguments: --nonsense"):
        Index.train(DOCUMENTS, tmp_path / "x", nonsense=1)
    with pytest.raises(ValueError, match="run: follows from the documents and the folder"):
        Index.train(DOCUMENTS, tmp_path / "x", run=str(tmp_path / "y"))
    with pytest.raises(ValueError, match="D_0 has 1 document, wanted 2 or more"):
        Index.train(DOCUMENTS[:1], tmp_path / "x")
    assert not (tmp_path / "x" / "corpus.json").exists()


def test_queries_train_d0(tmp_path):
    asked = [("who wears stripes", "d0"), ("which bird does not fly", "d1")]
    index = Index.train(DOCUMENTS, tmp_path / "x", "dream", asked, **SMALL)
    assert sorted(index.run.corpora[0].train) == sorted(
        (next(row for row in range(10) if index.run.ids[row] == doc_id), text) for text, doc_id in asked
    )


def test_documents_of_before_are_still_found_after_adds(index):
    """Held by dreams, which a small tokenizer has too."""
    for n in range(3):
        index.add([(f"n{n}", "", f"narwhal number {n} has a tooth")])
    assert sum(f"d{i}" in [hit.id for hit in hits[:3]] for i, hits in enumerate(index.search(ANIMALS))) >= 9
