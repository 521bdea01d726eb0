"""A finished run takes documents in and gives them up; what was there stays, and what is stopped goes on."""

import errno
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import link_tree
from networks import TINY, shape
from test_resume import FLAGS, outcome, runner  # noqa: F401  (a fixture)
from toy import TOY

import arrays
import data
import eval as scoring
import extend
import ood
import prepare
import queries
import rq
import search
import store
import train
from config import parse
from index import Index
from mixlora import mixed_layers
from t5 import T5

NEW = [
    ("n1", "zebra stripes", "zebras have stripes against flies"),
    ("n2", "", "kiwis lay large eggs at night"),
]


def folder_of(path: Path, documents=NEW, tests: dict[str, str] | None = None) -> Path:
    """A BEIR folder; tests: {document id: query}."""
    (path / "qrels").mkdir(parents=True)
    lines = (json.dumps({"_id": i, "title": title, "text": text}) for i, title, text in documents)
    (path / "corpus.jsonl").write_text("\n".join(lines))
    if tests:
        lines = (json.dumps({"_id": f"q-{i}", "text": text}) for i, text in tests.items())
        (path / "queries.jsonl").write_text("\n".join(lines))
        (path / "qrels" / "test.tsv").write_text("\n".join(f"q-{i}\t{i}\t1" for i in tests))
    return path


def extend_by(run: Path, source: Path, *more: str) -> None:
    train.main(["--extend", str(run), "--data", str(source), *more])


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("lock", "log.txt"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_finished_run_takes_documents_in_and_keeps_what_it_had(copied, finished, tmp_path):
    before, was = contents(copied), store.LoadedRun(copied)
    extend_by(copied, folder_of(tmp_path / "new"), "--keep", "0")
    run, results = store.LoadedRun(copied), store.read_json(copied / "results.json")
    assert [run.ids[row] for row in run.corpora[5].rows] == ["n1", "n2"] and run.finished == list(range(6))
    assert run.docids[:50].equal(was.docids) and len(run.docids) == 52
    assert (copied / "doc_ids.txt").read_text().split() == list(run.ids)
    for t in range(6):  # those of before are whole, and still belong to the run
        model, trie = run.at(t)
        assert len(trie.documents) == run.corpora[t].rows.stop
    assert results["evaluated"] == list(range(5)) and list(results["experts"]) == [f"D{t}" for t in range(6)]
    old = store.read_json(finished / "results.json")
    assert (
        results["metrics"] == old["metrics"] and results["baselines"] == old["baselines"]
    )  # nothing is scored anew
    assert contents(finished) == before  # with which the copy shared its files


def test_documents_with_queries_are_evaluated_beside_the_others(copied, tmp_path, capsys):
    extend_by(copied, folder_of(tmp_path / "new", tests={"n1": "zebra flies", "n2": "large eggs of kiwis"}))
    results = store.read_json(copied / "results.json")
    assert results["evaluated"] == list(range(6))
    for system in (results["metrics"], results["baselines"]["bm25"]):
        assert list(map(len, system["recall@10"]["P"])) == list(range(1, 7))
    assert results["baselines"]["bm25"]["recall@1"]["P"][5][5] == 1
    assert "D5" in capsys.readouterr().out


def test_a_corpus_without_queries_has_no_row_and_no_column_in_the_table(copied, tmp_path):
    extend_by(copied, folder_of(tmp_path / "a", NEW[:1]))
    extend_by(copied, folder_of(tmp_path / "b", NEW[1:], {"n2": "large eggs"}))
    results = store.read_json(copied / "results.json")
    assert results["evaluated"] == [0, 1, 2, 3, 4, 6]
    assert list(map(len, results["metrics"]["mrr@10"]["P"])) == list(range(1, 7))
    assert not (copied / "evaluation_D5.json").exists()


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.soak)])
def test_killed_at_random_moments_it_goes_on_to_the_same_bits(once, toy, runner, tmp_path, kills):  # noqa: F811
    """By the same command or --resume, also with the new documents' folder gone once the run has taken them in. Searches
    are answered all the while.
    """
    base = once("whole", lambda folder: train.main(["--data", str(toy), *FLAGS, "--run", str(folder)]))
    source, rng = folder_of(tmp_path / "new", tests={"n1": "zebra flies"}), random.Random(1)
    extend_by(link_tree(base, tmp_path / "wanted"), source)
    wanted, sent, number = outcome(tmp_path / "wanted"), 0, 0
    while sent < kills:
        run, place = link_tree(base, tmp_path / f"run{number}"), tmp_path / f"new{number}"
        shutil.copytree(source, place)
        for i in range(4):
            flags = ["--extend", str(run), "--data", str(place)]
            if len(store.load_corpora(run)) == 4 and "D3" not in store.Stages(run):
                shutil.rmtree(place, ignore_errors=True)
                flags = ["--resume", str(run)] if i % 2 else flags
            if runner.run(flags, rng.uniform(0, 0.6) if i < 3 else None):
                break
            sent += 1
            reopened = store.LoadedRun(run)
            for t in reopened.finished:
                assert len(reopened.at(t)[1].documents) == reopened.corpora[t].rows.stop
        found = outcome(run)
        found["results"]["config"], wanted["results"]["config"] = None, None
        assert found == wanted
        number += 1


def test_ids_that_the_run_holds_are_refused_or_replaced(copied, tmp_path):
    source = folder_of(
        tmp_path / "new", [("d3", "zebra stripes", "zebras have stripes")], {"d3": "zebra flies"}
    )
    before = contents(copied)
    with pytest.raises(ValueError, match="holds d3 already; pass --replace"):
        extend_by(copied, source)
    after = contents(copied)
    assert {name for name in after if after[name] != before.get(name)} == set() and set(before) <= set(after)
    extend_by(copied, source, "--replace")
    run = store.LoadedRun(copied)
    rows = [row for row in range(len(run.ids)) if run.ids[row] == "d3"]
    assert rows[1] == 50 and rows[0] not in run.live and rows[1] in run.live and len(run.live) == 50
    asked = [(q, docs) for corpus in run.corpora for q, docs in corpus.qrels.items() if "d3" in docs]
    assert asked == [("q-d3", {"d3": 1})]  # the old version's test query is gone


def test_deleted_documents_leave_trie_disk_dreams_and_evaluation_and_the_weights_stay(copied, finished):
    run = store.LoadedRun(copied)
    row = next(row for row in run.corpora[1].rows)
    doc_id, title = run.ids[row], run.headline(row)
    weights = (copied / "D4.pt").read_bytes()
    assert sum(title.encode() in content for content in contents(copied).values()) >= 3
    said = extend.delete(copied, extend.rows_of(copied, [doc_id]))
    assert said == "deleted 1 documents; 1 labels and 1 test queries left evaluation with them"
    run = store.LoadedRun(copied)
    assert all(row not in run.at(t)[1].documents for t in run.finished)
    held = [name for name, content in contents(copied).items() if title.encode() in content]
    assert set(held) <= {"idf.json", "tokenizer.model"}, held  # counts of D_0's words
    assert not arrays.open_array(copied / "embeddings" / "D1.npy")[0].any()
    assert len(run.corpora[1].test) == 4 and (copied / "D4.pt").read_bytes() == weights
    assert (
        extend.erase(copied) == "deleted 0 documents; 0 labels and 0 test queries left evaluation with them"
    )
    whole = store.LoadedRun(finished)
    assert (
        whole.headline(row) == title and len(whole.corpora[1].test) == 5
    )  # which shares files with the copy
    log = store.Log(copied, quiet=True)
    prepared = prepare.Run(
        parse(["--data", "x", *TOY, "--run", str(copied), "--no-check_memory"]).config, copied, log
    )
    drawn = prepared.choose(5, 5000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(50)) - {row}


def test_annotated_and_listed_queries_of_deleted_documents_are_erased(copied):
    corpora = store.load_corpora(copied)
    documents = [(corpus.ids, corpus.titles, corpus.texts) for corpus in corpora]
    listed = [("", doc_id, f"listed {doc_id} query") for ids, *_ in documents for doc_id in ids]
    queries.store_pseudo_queries(listed, copied / "pseudo_queries", documents, frozenset())
    (row, text), doc_id = corpora[0].train[0], corpora[0].ids[corpora[0].train[0][0]]
    erased = text.encode(), f"listed {doc_id} query".encode()
    assert all(any(query in content for content in contents(copied).values()) for query in erased)
    extend.delete(copied, [row])
    assert [
        name for name, content in contents(copied).items() if any(query in content for query in erased)
    ] == []
    assert sum(b"listed" in content for content in contents(copied).values()) == 5  # those of others stay


@pytest.mark.parametrize(
    "ids, message", [(["d3", "x"], "holds no document x"), (["d3", "d3"], "name each once")]
)
def test_unknown_ids_and_ids_named_twice_delete_nothing(copied, ids, message):
    before = contents(copied)
    with pytest.raises(ValueError, match=message):
        extend.delete(copied, extend.rows_of(copied, ids))
    assert contents(copied) == before


def test_a_run_of_atomic_docids_takes_nothing(copied, tmp_path):
    """A new document would get the docid of the nearest old one."""
    config = store.read_json(copied / "config.json")
    store.write_json(copied / "config.json", config | {"docid_kind": "atomic"})
    with pytest.raises(ValueError, match="atomic docids"):
        extend_by(copied, folder_of(tmp_path / "new"))


def test_a_run_of_another_method_or_one_that_is_not_finished_takes_nothing(begun, tmp_path):
    source = folder_of(tmp_path / "new")
    with pytest.raises(
        ValueError,
        match="a run of base takes no documents in and gives none up, only of mixlora-dsi, paper, dream",
    ):
        extend_by(begun(False), source)
    with pytest.raises(
        ValueError, match=r"the run is not finished \(D1, D2\); go on with python train.py --resume"
    ):
        extend_by(begun(True), source)
    with pytest.raises(ValueError, match="found no .*config.json"):
        extend_by(tmp_path, source)


def test_a_stopped_extension_is_ended_before_another_begins(copied, tmp_path, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learn", stop)
        extend_by(copied, folder_of(tmp_path / "new"))
    for other in (
        lambda: extend_by(copied, folder_of(tmp_path / "other", NEW[:1])),
        lambda: extend.require_finished(copied),
    ):
        with pytest.raises(ValueError, match="taking other documents in, which was stopped; go on with"):
            other()
    with pytest.raises(ValueError, match="taking other documents in"):
        extend_by(copied, tmp_path / "absent")  # is not the folder that may be gone by now
    train.main(["--resume", str(copied)])
    assert store.LoadedRun(copied).finished[-1] == 5


def test_stopped_while_old_versions_go_it_ends_with_the_same_bits_and_an_index_has_one_version_throughout(
    copied, finished, tmp_path, monkeypatch
):
    source = folder_of(tmp_path / "new", [("d3", "zebra", "zebras have stripes"), NEW[1]])
    extend_by(wanted := link_tree(finished, tmp_path / "wanted"), source, "--replace", "--keep", "1")

    def stop(folder, *given):
        # `take_in` erases too: what an earlier stop has left
        if name == "drop_checkpoints" or (folder / "D5.pt").exists():
            raise KeyboardInterrupt

    for name in ("erase", "drop_checkpoints"):
        run = link_tree(finished, tmp_path / name)
        before = Index.open(run)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(extend, name, stop)
            extend_by(run, source, "--replace", "--keep", "1")
        for index in (before, Index.open(run)):
            assert len(index) == 51 and "n2" in index and index.documents(["d3"])[0][1] == "zebra"
        train.main(["--resume", str(run)])
        found, expected = (store.read_tensors(path / "D5.pt") for path in (run, wanted))
        assert all(found["model"][key].equal(value) for key, value in expected["model"].items())
        for stat, was in zip(found["stats"], expected["stats"], strict=True):
            assert all(torch.equal(stat[key], was[key]) for key in ("arrivals", "newest", "pool", "dreams"))
        assert store.load_deleted(run).tolist() == store.load_deleted(wanted).tolist()
        assert [p.name for p in sorted(run.glob("D*.pt"))] == ["D0.pt", "D5.pt"]
        assert not any("zebras" in text for text in store.load_corpora(run)[0].texts)


def test_new_versions_of_all_documents(copied, tmp_path, capsys):
    """Of no earlier docid is there anything to dream."""
    extend.delete(copied, list(range(2, 50)))
    ids = [store.LoadedRun(copied).ids[row] for row in (0, 1)]
    documents = [(doc, "", f"{doc} anew") for doc in ids]
    extend_by(copied, folder_of(tmp_path / "new", documents, {ids[0]: "anew"}), "--replace")
    run = store.LoadedRun(copied)
    assert run.live.tolist() == [50, 51] and run.finished[-1] == 5
    scoring.main([str(copied)])  # D_0's model, too, which has nothing to find
    assert "D5: recall@10 100.0" in capsys.readouterr().out


def test_what_was_deleted_can_be_taken_in_again_from_the_same_folder(copied, tmp_path):
    source = folder_of(tmp_path / "new")
    extend_by(copied, source)
    extend.delete(copied, extend.rows_of(copied, ["n1", "n2"]))
    extend_by(copied, source)
    assert store.LoadedRun(copied).live.tolist() == [*range(50), 52, 53]


@pytest.mark.parametrize(
    "name", ["texts.bin", "D5.json", "excluded.npy", "D5.npy", "docids.npy", "corpus.json", "D5.pt"]
)
def test_a_disk_that_is_full_in_the_middle_leaves_the_run_as_it_was(copied, tmp_path, monkeypatch, name):
    """Every file that is written before the new documents count, and the checkpoint."""
    source, before = folder_of(tmp_path / "new"), store.LoadedRun(copied)

    def full(old: Path, new: Path) -> None:
        if new.name.removesuffix(".npy") in (name, name.removesuffix(".npy"), name.removesuffix(".bin")):
            raise OSError(errno.ENOSPC, "No space left on device", str(new))
        rename(old, new)

    rename = arrays.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(arrays, "rename", full)
        extend_by(copied, source)
    run = store.LoadedRun(copied)
    assert run.finished == before.finished and list(run.ids)[:50] == list(before.ids)
    assert run.at(4)[1].documents.equal(before.at(4)[1].documents)
    extend_by(copied, source)
    assert store.LoadedRun(copied).finished[-1] == 5


def test_the_same_folder_once_more_changes_nothing(copied, tmp_path):
    source = folder_of(tmp_path / "new")
    extend_by(copied, source)
    was = contents(copied)
    extend_by(copied, source)
    now = contents(copied)
    assert {name for name in now if now[name] != was[name]} <= {"results.json"}  # which counts seconds


def test_two_processes_do_not_extend_at_once(copied, tmp_path):
    with store.lock(copied), pytest.raises(ValueError, match="another process trains here"):
        extend_by(copied, folder_of(tmp_path / "new"))


@pytest.mark.parametrize("flags, message", [
    (["--extend", "RUN"], "takes --data DIR"), (["--extend", "RUN", "--data", "x", "--lr", "1"], "takes --data DIR"),
    (["--replace"], "--replace is of --extend"), (["--extend", "RUN", "--data", "x", "--keep", "-1"], "--keep -1"),
    (["--consolidate", "RUN"], "takes --run NEW"),
    (["--consolidate", "RUN", "--run", "x", "--device", "tpu"], "--device tpu: this machine has cpu"),
])  # fmt: skip
def test_flags_that_do_not_belong_together_are_refused(finished, flags, message):
    with pytest.raises(ValueError, match=message):
        parse([str(finished) if flag == "RUN" else flag for flag in flags])


def test_few_documents_never_grow_a_layer_and_share_one_pool(copied, tmp_path, monkeypatch):
    """Of the run, every layer grew with every corpus. Of few pseudo-queries all go into the pool, which is of 512 values."""
    monkeypatch.setattr(ood, "FEW", 4)
    before = [len(layer) for layer in mixed_layers(store.LoadedRun(copied).at(4)[0])]
    arrivals, experts, sizes = [], [], []
    monkeypatch.setattr(
        prepare.memory, "require_memory", lambda config, workload, *_: sizes.append(workload.documents)
    )
    for i in range(3):
        extend_by(
            copied, folder_of(tmp_path / f"{i}", [(f"{i}{doc}", title, text) for doc, title, text in NEW])
        )
        model, stats = store.load_model(copied / f"D{5 + i}.pt")
        arrivals.append([(len(stat.arrivals), len(stat.pool)) for stat in stats])
        experts.append([len(layer) for layer in mixed_layers(model)])
    n, drawn = 5, 2 * 4  # D_0 and the four corpora of the stream; pseudo-queries of an add
    assert arrivals == [[(n, drawn * adds)] * 2 for adds in (1, 2, 3)]
    assert experts[0] == experts[1] == before and sizes[-1] == (
        30,
        5,
        5,
        5,
        5,
        4,
        1,
    )  # by which experts are counted; 1 to come
    assert not (copied / "D4.pt").exists() and (copied / "D0.pt").exists()  # the newest two stay
    assert store.LoadedRun(copied).finished == [0, 6, 7]
    (copied / "D6.pt").unlink()  # cannot be made anew, and nothing needs it
    extend_by(copied, folder_of(tmp_path / "more", [("more", "ibis", "an ibis wades")]))
    assert store.LoadedRun(copied).finished == [0, 7, 8]
    (copied / "D8.pt").unlink()
    (copied / "D0.pt").unlink()  # whose successor was dropped: nothing needs it either
    most = folder_of(tmp_path / "most", [("most", "emu", "an emu runs")])
    with pytest.raises(ValueError, match="D8.pt, its newest model, is gone; make one anew with .* --resume"):
        extend_by(copied, most)
    train.main(["--resume", str(copied)])
    assert store.LoadedRun(copied).finished == [7, 8]
    for name in ("D7.pt", "D8.pt"):
        (copied / name).unlink()
    with pytest.raises(ValueError, match="is gone; make one anew with .* --consolidate .* --run NEW"):
        extend_by(copied, most)
    extend.require_finished(copied)  # deleting needs no model


def test_a_lost_checkpoint_is_made_anew_without_what_was_deleted(copied):
    extend.delete(copied, [0, store.load_corpora(copied)[1].first_row])
    for name in ("D0.pt", "D1.pt"):
        (copied / name).unlink()
    train.main(["--resume", str(copied)])
    assert store.LoadedRun(copied).finished == list(range(5))


def test_few_documents_take_free_docids_of_their_own_and_many_those_of_the_quantiser(
    copied, tmp_path, monkeypatch
):
    before = store.LoadedRun(copied).docids
    extend_by(copied, folder_of(tmp_path / "few"))
    chosen = store.LoadedRun(copied).docids[len(before) :]
    assert len(torch.cat([before, chosen]).unique(dim=0)) == len(before.unique(dim=0)) + len(NEW)
    monkeypatch.setattr(ood, "FEW", 2)
    extend_by(copied, folder_of(tmp_path / "many", [(f"again-{i}", *document) for i, *document in NEW]))
    embedded = arrays.open_array(copied / "embeddings" / "D6.npy")
    books = arrays.read_tensors(copied / "rq.pt")
    assert torch.equal(store.LoadedRun(copied).docids[-len(NEW) :], rq.encode(embedded, books))


def test_the_likeliest_docid_is_that_of_all_docids_whose_weighted_mean_is_largest(monkeypatch):
    """Against the exact scores of all 4^3 docids; with a narrow beam, a docid that is free."""
    torch.manual_seed(0)
    model = T5(shape(TINY, codebooks=3, centroids=4)).eval()
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.tensor([[5, 9, 1, 0], [7, 1, 0, 0], [3, 4, 8, 1]])
    weights = torch.tensor([0.5, 0.2, 0.3])
    order = (weights @ search.exact_scores(model, ids, every)).argsort(descending=True)
    ranked = [tuple(docid) for docid in every[order].tolist()]
    monkeypatch.setattr(extend, "BEAM", 64)
    assert extend.likeliest(model, ids, weights, set()) == ranked[0]
    assert extend.likeliest(model, ids, weights, set(ranked[:7])) == ranked[7]
    assert extend.likeliest(model, ids, weights, set(ranked)) == ranked[0]
    monkeypatch.setattr(extend, "BEAM", 2)
    assert extend.likeliest(model, ids, weights, set(ranked[:5])) not in ranked[:5]


def test_a_full_pool_becomes_a_sketch_and_decides(monkeypatch):
    """By hand: z are the numbers themselves where one expert's score is -z and the scale of dreams is 0, 1."""
    monkeypatch.setattr(ood, "FEW", 8)

    def scores(z) -> torch.Tensor:
        return -torch.as_tensor(z, dtype=torch.float32)[:, None, None]  # (Q, 1, 1)

    stats = ood.new_stats("pooled", 1, 1)
    ood.arrive(stats, scores(np.linspace(0, 1, 1000)))
    strange = scores(np.full(2000, 5.0))
    for documents, pool in ((3, 192), (4, 448)):
        assert not ood.decide(strange, stats, 1.0, 0.02, documents=documents).expand
        ood.arrive(stats, strange, documents)
        assert len(stats.pool) == pool and len(stats.arrivals) == 1
    assert ood.decide(strange, stats, 1.0, 0.02, documents=1).expand  # 8 documents by now
    assert ood.decide(strange, stats, 1.0, 0.02, documents=1).tails == [0.0, 100.0]
    usual = ood.decide(scores(np.linspace(0.1, 0.9, 2000)), stats, 1.0, 0.02, documents=4)
    assert usual.ood_percent == 0 and usual.expand  # by those before it
    assert usual.pool_percent == pytest.approx(100 * 448 / (448 + 256))
    assert ood.rule(usual, 4, 3.0) == "63.6% of the pool of small additions, grows above 3% once that is full"
    assert ood.rule(replace(usual, pool_percent=None), 4, 3.0) == "too few documents to grow"
    assert ood.rule(usual, 8, 3.0) == "grows above 3%"
    assert not ood.decide(
        scores(np.linspace(0, 1, 2000)), ood.Stats(**stats.state() | {"pool": stats.pool[:0]}), 1.0, 0.02
    ).expand
    ood.arrive(stats, strange, 1)
    assert len(stats.pool) == 0 and len(stats.arrivals) == 2 and stats.arrivals[1].eq(5).all()


def test_steps_grow_with_the_number_of_documents():
    assert [extend.growth_of_steps(n / 258) for n in (258, 258 / 4, 258 * 16)] == [1, 0.5, 8]
    assert [extend.steps_scale(n) for n in (1, 1551, 1551 * 16)] == [0.15, 1, 8]


@pytest.mark.parametrize("documents, batch, steps", [(1, 4, 3), (2, 4, 6), (2, 3, 9)])
def test_epochs_of_few_documents_are_as_many_as_the_run_has(
    copied, tmp_path, monkeypatch, documents, batch, steps
):
    """Three epochs of four pseudo-queries a document, in batches of all of them or of `batch`, whichever is less, at the
    run's own rates.
    """
    config, rates = store.read_json(copied / "config.json"), []
    store.write_json(
        copied / "config.json", config | {"steps": 0, "epochs": 3, "batch": batch, "dream_batch": 2 * batch}
    )
    groups = train.parameter_groups
    monkeypatch.setattr(
        train, "parameter_groups", lambda named, rate: rates.append(rate) or groups(named, rate)
    )
    extend_by(copied, folder_of(tmp_path / "new", NEW[:documents]))
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines if line["stage"] == "D5") == steps
    assert rates == [config["table_lr"] or config["lr"], config["lr"], config["attention_lr"]]


def test_a_replaced_document_may_take_its_docid_again(copied, tmp_path, monkeypatch):
    run, seen = store.LoadedRun(copied), []

    def record(model, ids, weights, taken):
        seen.append(set(taken))
        return likeliest(model, ids, weights, taken)

    likeliest = extend.likeliest
    monkeypatch.setattr(extend, "likeliest", record)
    old = list(run.ids).index("d3")
    extend_by(copied, folder_of(tmp_path / "new", [("d3", "zebra", "stripes")]), "--replace")
    others = [row for row in range(len(run.ids)) if row != old]
    assert seen == [{tuple(docid) for docid in run.docids[others].tolist()}]


def test_the_first_mixture_may_come_with_few_documents(toy, tmp_path):
    """Its statistics are then those of these few, and further few are compared with them."""
    run = tmp_path / "run"
    train.main(["--data", str(toy), "--splits", "100", *TOY, "--no-d0_mixture", "--run", str(run)])
    for i, document in enumerate(NEW):
        extend_by(run, folder_of(tmp_path / f"{i}", [document]))
    _, stats = store.load_model(run / "D2.pt")
    assert [len(stat.arrivals) for stat in stats] == [1, 1] and all(len(stat.pool) for stat in stats)


def test_without_test_queries_a_run_ends_and_says_that_nothing_is_evaluated(tmp_path, toy, capsys):
    place, run = tmp_path / "documents", tmp_path / "run"
    place.mkdir()
    shutil.copy(toy / "corpus.jsonl", place)
    train.main(["--data", str(place), "--splits", "100", *TOY, "--run", str(run)])
    assert "nothing is evaluated" in capsys.readouterr().out
    extend_by(run, folder_of(tmp_path / "new"))
    assert store.read_json(run / "results.json")["evaluated"] == []
    with pytest.raises(ValueError, match="no corpus of this run has test queries"):
        scoring.main([str(run)])


def test_dream_takes_documents_in_as_well(toy, tmp_path):
    run = tmp_path / "run"
    train.main(
        [
            "--data",
            str(toy),
            "--splits",
            "80,20",
            *TOY,
            "--method",
            "dream",
            "--no-baselines",
            "--run",
            str(run),
        ]
    )
    extend_by(run, folder_of(tmp_path / "new"))
    assert store.LoadedRun(run).finished == [0, 1, 2]


def test_consolidated_all_live_documents_are_d0_of_a_new_run(copied, tmp_path):
    extend_by(copied, folder_of(tmp_path / "new"))
    extend.delete(copied, extend.rows_of(copied, ["d3"]))
    was = store.LoadedRun(copied)
    train.main(["--consolidate", str(copied), "--run", str(tmp_path / "anew")])
    run = store.LoadedRun(tmp_path / "anew")
    assert set(run.ids) == {was.ids[row] for row in was.live.tolist()} and len(run.corpora) == 1
    annotated = [pair for pair in was.corpora[0].train if pair[0] in was.live]
    assert len(run.corpora[0].test) == 49 and len(run.corpora[0].train) == len(annotated) >= 29
    steps = {
        name: run.config[name] for name in extend.STEPS
    }  # (51 / 1551) ** 0.5 / 0.15 = 1.21 times as many
    assert steps == {"dense_warmup_steps": 7, "dense_steps": 4, "d0_steps": 37}


def test_exported_queries_keep_apart_what_different_folders_call_alike(copied, tmp_path, monkeypatch):
    """Replaced documents and their queries stay out, also where the run was stopped, and training queries that a later
    corpus has for test queries.
    """
    first = store.load_corpora(copied)[0]
    asked, train_id = first.train[0][1], first.train_ids[0]
    texts = {"n1": "zebra flies", "n2": "large eggs", "n3": asked}
    for i, (doc_id, text) in enumerate(texts.items()):
        folder = folder_of(tmp_path / f"{i}", [(doc_id, "", f"of {text}")], {doc_id: text})
        for path in (folder / "queries.jsonl", folder / "qrels" / "test.tsv"):
            path.write_text(path.read_text().replace(f"q-{doc_id}", "q"))
        extend_by(copied, folder)

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "learn", stop)
        extend_by(copied, folder_of(tmp_path / "new", [("n1", "", "an ibis")]), "--replace")
    assert extend.export(copied, tmp_path / "all") == 53
    held = data.read_beir(tmp_path / "all")
    del texts["n1"]  # of the version that goes
    assert {text: list(held.qrels[q]) for q, text in held.test.items() if text in texts.values()} == {
        text: [doc_id] for doc_id, text in texts.items()
    }
    trained = [query_id for *_, query_id in held.train]
    assert len(trained) == len(first.train) - 1 and train_id not in trained
