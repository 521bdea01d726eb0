"""The whole job on a small made-up corpus: every stage, every method, resume, and the command line's messages."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import dense
import eval as scoring
import losses
import mixlora
import ood
import rq
import run as store
import scan
import search
import train
from t5 import T5, T5Config

# fmt: off
TOY = [
    "--vocab", "400", "--width", "32", "--heads", "2", "--feed_forward", "64", "--encoder_blocks", "1", "--M", "3",
    "--K", "16", "--rq_pseudo", "2", "--dense_warmup_steps", "5", "--dense_steps", "3", "--dense_batch", "16",
    "--dense_pseudo", "1", "--negatives", "5", "--d0_steps", "30", "--d0_batch", "32", "--d0_fragments", "2",
    "--steps", "6", "--batch", "16", "--rank", "4", "--pseudo_per_document", "4", "--control_queries", "50",
]
# fmt: on


def toy_folder(path: Path, documents: int = 50) -> Path:
    """A BEIR folder whose documents each have words of their own and words that all share."""
    rng = random.Random(0)
    shared = [f"common{i}" for i in range(20)]
    (path / "qrels").mkdir(parents=True)
    corpus, queries, labels = [], [], {"train": [], "test": []}
    for i in range(documents):
        own = [
            "".join(rng.choices("bcdfglmnprstv", k=2)) + rng.choice("aeiou") + str(i) + letter
            for letter in "abcdef"
        ]
        text = " ".join(rng.sample(own * 2 + rng.sample(shared, 8), 20))
        corpus.append({"_id": f"d{i}", "title": own[0], "text": text})
        for split in labels:
            queries.append({"_id": f"{split}{i}", "text": " ".join(rng.sample(own, 3))})
            labels[split].append(f"{split}{i}\td{i}\t1")
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, rows in labels.items():
        (path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("toy") / "beir")


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> Path:
    """A run through every stage; every layer grows at every corpus."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    train.main(["--data", str(toy), "--run", str(folder), "--expand", "always", *TOY])
    return folder


def test_a_run_leaves_every_file_that_the_architecture_names(finished):
    names = {path.name for path in finished.iterdir()}
    wanted = {
        "config.json",
        "tokenizer.model",
        "corpus.json",
        "dense.pt",
        "rq.pt",
        "docids.npy",
        "doc_ids.txt",
    }
    wanted |= {"metrics.jsonl", "ood.json", "results.json", "log.txt", *(f"D{t}.pt" for t in range(5))}
    assert wanted <= names and not [name for name in names if name.endswith(".part")]
    results = store.read_json(finished / "results.json")
    assert [len(row) for row in results["metrics"]["recall@10"]["P"]] == [1, 2, 3, 4, 5]
    assert results["experts"] == {f"D{t}": [2 + t, 2 + t] for t in range(5)}
    assert set(results["baselines"]) == {"bm25", "dense"} and len(results["ood_percent"]["D4"]) == 2
    assert results["metrics"]["recall@10"]["AP"] == scoring.average_performance(
        results["metrics"]["recall@10"]["P"]
    )
    for shares in results["routing"]["D4"]:
        assert len(shares) == 6 and sum(shares) == pytest.approx(1, abs=1e-5)


def test_bm25_finds_the_toy_documents_so_the_toy_is_answerable(finished):
    assert store.read_json(finished / "results.json")["baselines"]["bm25"]["recall@10"]["AP"] > 0.95


def test_resume_repeats_no_finished_stage_and_remakes_a_missing_one_bit_equal(finished, capsys):
    before = {t: store.read_tensors(finished / f"D{t}.pt")["model"] for t in range(5)}
    results = store.read_json(finished / "results.json")
    times = {t: (finished / f"D{t}.pt").stat().st_mtime_ns for t in range(4)}
    for name in ("D4.pt", "results.json"):
        (finished / name).unlink()
    train.main(["--resume", str(finished)])
    assert "D3 is done already" in capsys.readouterr().out
    assert times == {t: (finished / f"D{t}.pt").stat().st_mtime_ns for t in range(4)}
    again = store.read_tensors(finished / "D4.pt")["model"]
    assert all(torch.equal(again[name], before[4][name]) for name in before[4])
    after = store.read_json(finished / "results.json")
    assert after["metrics"] == results["metrics"] and after["experts"] == results["experts"]


def test_after_each_corpus_all_but_newest_experts_rows_and_docid_table_are_bit_equal(finished):
    for t in range(1, 5):
        old, new = (store.load_model(finished / f"D{i}.pt")[0] for i in (t - 1, t))
        for name, tensor in old.state_dict().items():
            if ".ff.old." not in name and ".ff.new." not in name and "router" not in name and name != "rq":
                assert torch.equal(tensor, new.state_dict()[name]), name
        assert not torch.equal(old.rq, new.rq)
        for layer, layer_before in zip(mixlora.mixed_layers(new), mixlora.mixed_layers(old)):
            for name in ("in_a", "in_b", "out_a", "out_b"):
                assert torch.equal(getattr(layer.old, name), layer_before.stacked(name))
            assert torch.equal(
                layer.router_old, torch.cat([layer_before.router_old, layer_before.router_new])
            )
            assert layer.new.in_b.abs().max() > 0


def test_docids_never_change_and_codebooks_stay_those_of_d0(finished):
    books, codes = store.read_tensors(finished / "rq.pt"), np.load(finished / "docids.npy")
    embeddings = store.read_tensors(finished / "embeddings.pt")
    assert torch.equal(rq.encode(embeddings, books), torch.from_numpy(codes.astype(np.int64)))
    assert (finished / "doc_ids.txt").read_text().split() == store.LoadedRun(finished).ids


def test_search_and_eval_work_from_the_run_folder_alone(finished, capsys, tmp_path):
    query = next(iter(store.load_corpora(finished)[0].test.values()))
    search.main([str(finished), query, "-k", "3"])
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    scoring.main([str(finished), "--trec", str(tmp_path / "trec")])
    printed = capsys.readouterr().out
    p = store.read_json(finished / "results.json")["metrics"]["recall@10"]["P"]
    assert f"D0: recall@10 {100 * p[0][0]:.1f}" in printed
    assert (tmp_path / "trec" / "after_D4.run").exists() and (tmp_path / "trec" / "D0.qrels").exists()


def experts_after(toy, folder, *flags) -> dict:
    train.main(["--data", str(toy), "--run", str(folder), "--splits", "60,20,20", *TOY, *flags])
    return store.read_json(folder / "results.json")


@pytest.mark.parametrize(
    "method, experts",
    [
        ("mixlora-dsi-pt", {"D0": [], "D1": [2, 2]}),
        ("naive-expansion", {"D0": [], "D1": [2, 2], "D2": [3, 3]}),
        ("never-expand", {"D0": [2, 2], "D1": [2, 2], "D2": [2, 2]}),
        ("always-expand", {"D0": [2, 2], "D1": [3, 3], "D2": [4, 4]}),
        ("base", {"D0": [], "D1": [], "D2": []}),
    ],
)
def test_each_method_runs_through_and_grows_as_the_paper_says(toy, tmp_path, method, experts):
    results = experts_after(toy, tmp_path / method, "--method", method)
    assert results["experts"] | experts == results["experts"]
    model = store.load_model(tmp_path / method / "D2.pt")[0]
    whole = sum(p.numel() for name, p in model.named_parameters())
    trained = results["trainable_parameters"]["D2"]
    assert trained == whole if method == "base" else 0 < trained < whole


@pytest.mark.parametrize(
    "flags",
    [
        ["--mask", "full_vocab"],
        ["--mask", "docid_vocab", "--slow", "grad", "--kl_reduction", "mean"],
        ["--ood_mode", "paper_code", "--router_row", "random", "--lora_in_site", "pre_act"],
        ["--kl_coef", "0", "--slow", "none", "--no-d0_mixture", "--aux_layers", "expanded"],
        ["--router", "linear", "--balance_coef", "0.01", "--z_coef", "0.001", "--d0_fragments", "0"],
    ],
)
def test_every_part_can_be_switched_on_its_own(toy, tmp_path, flags):
    results = experts_after(toy, tmp_path / "run", *flags)
    assert 0 <= results["metrics"]["recall@10"]["AP"] <= 1 and results["trainable_parameters"]["D1"] > 0


def test_pseudo_queries_from_a_file_are_used_and_test_queries_among_them_left_out(toy, tmp_path):
    collection = data.read_beir(toy)
    lines = [{"doc_id": doc, "query": text} for doc, (_, text) in collection.documents.items()]
    leaked = next(iter(collection.test))
    doc = next(iter(collection.qrels[leaked]))
    lines.append({"doc_id": doc, "query": collection.test[leaked].upper()})
    (tmp_path / "pq.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [
        "--pseudo_queries",
        str(tmp_path / "pq.jsonl"),
        "--dense_warmup_steps",
        "0",
        "--d0_fragments",
        "0",
    ]
    experts_after(toy, tmp_path / "run", *flags)
    assert "pseudo-queries from" in (tmp_path / "run" / "log.txt").read_text()
    assert "50, and 1 left out as test queries" in (tmp_path / "run" / "log.txt").read_text()


def test_32_documents_are_learnt_by_heart():
    """Invariant 10: a plain T5 with random docids reaches Recall@1 = 1 on the queries that it is trained on."""
    torch.manual_seed(0)
    model = T5(T5Config(120, 32, 16, 2, 64, 1, 1, dropout=0.0, codebooks=3, centroids=8))
    ids = torch.cat([torch.randint(3, 120, (32, 6)), torch.ones(32, 1, dtype=torch.long)], dim=1)
    codes = torch.unique(torch.randint(8, (200, 3)), dim=0)[:32]
    codes = codes[torch.randperm(32)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        hidden, _ = model.docid_hidden(*model.encode(ids), codes)
        loss = losses.docid_cross_entropy(model, hidden, codes, "segment")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trie = rq.Trie(codes)
    leaves, scores = search.beam_search(model.eval(), trie, ids, 10)
    best = [
        ranking[0][0]
        for ranking in search.documents(trie, leaves, scores, [f"d{i:02}" for i in range(32)], 10)
    ]
    assert best == list(range(32))


def test_cached_encoder_outputs_equal_a_fresh_pass():
    torch.manual_seed(0)
    model = T5(T5Config(50, 16, 8, 2, 32, 1, 1, codebooks=2, centroids=4)).eval()
    ids = torch.randint(3, 50, (20, 9))
    ids[torch.arange(9) >= torch.randint(2, 10, (20, 1))] = 0
    cache, rows = scan.SourceCache(model, ids, batch=7), torch.tensor([3, 17, 0])
    source, padding = cache.get(rows, torch.device("cpu"))
    length = source.shape[1]
    expected, expected_padding = model.encode(ids[rows, :length])
    assert torch.equal(padding, expected_padding)
    seen = (ids[rows, :length] != 0)[..., None]
    torch.testing.assert_close(source * seen, expected * seen)


def test_scan_gives_the_states_and_scores_of_each_query_in_the_order_asked():
    torch.manual_seed(0)
    model = T5(T5Config(50, 16, 8, 2, 32, 1, 2, codebooks=2, centroids=4))
    mixlora.add_mixture(model, mixlora.MixConfig(layers=2, rank=2))
    ids = torch.randint(3, 50, (20, 9))
    ids[torch.arange(9) >= torch.randint(2, 10, (20, 1))] = 0
    codes = torch.randint(4, (20, 2))
    found = scan.scan(model, scan.SourceCache(model, ids), codes, [], batch=6)
    hidden, routes = model.docid_hidden(*model.encode(ids), codes)
    torch.testing.assert_close(found.hidden, hidden)
    for scores, route in zip(found.scores, routes):
        torch.testing.assert_close(scores, route.scores)


def test_ood_direction_is_the_mean_direction_of_flagged_queries_only():
    torch.manual_seed(0)
    model = T5(T5Config(50, 16, 8, 2, 32, 1, 1, codebooks=2, centroids=4))
    mixlora.add_mixture(model, mixlora.MixConfig(layers=1, rank=2))
    ids, codes = torch.randint(3, 50, (30, 5)), torch.randint(4, (30, 2))
    cache = scan.SourceCache(model, ids)
    stats = [ood.calibrate(ood.energy(scan.scan(model, cache, codes, []).scores[0]), 2, 0.3)]
    found = scan.scan(model, cache, codes, stats, batch=11)
    _, routes = model.docid_hidden(*model.encode(ids), codes)
    flagged = ood.is_ood(ood.energy(routes[0].scores), stats[0])
    assert 0 < flagged.sum() < 30
    x = routes[0].x[flagged]
    torch.testing.assert_close(found.direction[0], (x / x.norm(dim=-1, keepdim=True)).sum((0, 1)))
    stats[0].threshold = 1e9  # nothing is flagged: all queries count
    x = routes[0].x
    found = scan.scan(model, cache, codes, stats)
    torch.testing.assert_close(found.direction[0], (x / x.norm(dim=-1, keepdim=True)).sum((0, 1)))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data", "nq320k"], "--preset nq320k"),
        (["--method", "magic"], "mixlora-dsi-pt"),
        (["--preset", "magic"], "msmarco"),
        (["--slow", "maybe"], "grad, lr, none"),
        (["--ood_mode", "x"], "calibrated, paper_code"),
        (["--router", "x"], "cosine, linear"),
        (["--width", "130"], "heads"),
        (["--layers", "9"], "--decoder_blocks"),
        (["--lr", "nan"], "finite"),
        (["--delta", "-1"], "0 or more"),
        (["--experts", "1"], "at least the 2"),
        (["--no-mixture"], "--kl_coef 0"),
        (["--data", "no/such/folder"], "corpus.jsonl"),
        (["--resume", "no/such/run"], "config.json"),
        (["--resume", "runs/x", "--lr", "1"], "remove --lr"),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_wanted(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train.main(argv)


def test_help_groups_every_field_of_config_by_stage(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text or f"--{name}," in text for name in train.Config.__dataclass_fields__)
    assert [text.index(f"\n{group}:") for group in ("data", "model", "dense", "docids", "mixture", "growth")]


def test_a_folder_that_holds_a_run_is_refused_and_overwrite_moves_it_aside(tmp_path):
    config = train.Config(run=str(tmp_path / "run"))
    train.open_folder(config, overwrite=False)
    train.open_folder(config, overwrite=False)  # nothing was saved yet: no run is in the way
    (tmp_path / "run" / "corpus.json").write_text("{}")
    (tmp_path / "run" / "precious").write_text("kept")
    with pytest.raises(ValueError, match="--resume .*--overwrite"):
        train.open_folder(config, overwrite=False)
    train.open_folder(config, overwrite=True)
    assert [path.read_text() for path in tmp_path.glob("run.*/precious")] == ["kept"]


def test_a_run_may_be_moved_and_one_of_another_version_is_refused_by_name(tmp_path):
    train.open_folder(train.Config(run=str(tmp_path / "old"), lr=0.5), overwrite=False)
    (tmp_path / "old").rename(tmp_path / "new")
    config, resume, _ = train.parse(["--resume", str(tmp_path / "new")])
    assert resume and config.lr == 0.5 and config.run == str(tmp_path / "new")
    store.write_json(tmp_path / "new" / "config.json", {"learning_rate": 1})
    with pytest.raises(ValueError, match="config.json: written by another version"):
        train.parse(["--resume", str(tmp_path / "new")])


def test_flags_override_the_method_and_the_method_overrides_the_preset():
    config, _, _ = train.parse(["--method", "naive-expansion"])
    assert (config.router, config.kl_coef, config.width) == ("linear", 0.0, train.SMALL["width"])
    config, _, _ = train.parse(["--method", "naive-expansion", "--router", "cosine", "--kl-coef", "0.2"])
    assert (config.router, config.kl_coef) == ("cosine", 0.2)
    config, _, _ = train.parse(["--data", "some/folder", "--preset", "nq320k", "--method", "base"])
    assert (config.M, config.K, config.width, config.batch, config.epochs) == (8, 2048, 768, 128, 5)


def test_the_leak_check_stops_a_stage_whose_queries_are_of_another_corpus(toy, tmp_path, monkeypatch):
    def leaking(sampler, rows, per_document, seed):
        return [(rows.start - 1, "a query of the corpus before")]

    monkeypatch.setattr(data, "draw_pseudo_queries", leaking)
    config, _, _ = train.parse(["--data", str(toy), "--run", str(tmp_path), *TOY])
    job = train.Job(config, tmp_path, store.Log(tmp_path, quiet=True))
    with pytest.raises(ValueError, match="leak: stage D_1"):
        job.pseudo_queries(1, 1, "training")


def test_what_d0_learns_from_does_not_depend_on_later_corpora(toy, tmp_path):
    """Tokenizer, idf and quantiser of D_0 are bit-equal when the documents of D_1.. are other ones."""
    other = toy_folder(tmp_path / "other", 50)
    config, _, _ = train.parse(["--data", str(toy), "--run", str(tmp_path / "a"), *TOY])
    (tmp_path / "a").mkdir()
    first = train.Job(config, tmp_path / "a", store.Log(tmp_path / "a", quiet=True))
    later = set(first.ids) - set(first.corpora[0].ids)
    rows = [json.loads(line) for line in (other / "corpus.jsonl").read_text().splitlines()]
    changed = [row | {"text": "wholly different words"} if row["_id"] in later else row for row in rows]
    (other / "corpus.jsonl").write_text("\n".join(map(json.dumps, changed)))
    config, _, _ = train.parse(["--data", str(other), "--run", str(tmp_path / "b"), *TOY])
    (tmp_path / "b").mkdir()
    second = train.Job(config, tmp_path / "b", store.Log(tmp_path / "b", quiet=True))
    assert first.corpora[1].texts != second.corpora[1].texts
    models = [(tmp_path / name / "tokenizer.model").read_bytes() for name in "ab"]
    assert models[0] == models[1]
    assert first.pseudo_queries(0, 2, "x") == second.pseudo_queries(0, 2, "x")
    books = []
    for job in (first, second):
        bi_encoder, embeddings = train.dense_stage(job)
        books.append(train.rq_stage(job, bi_encoder, embeddings)[0])
    assert torch.equal(*books)


def test_dense_baseline_ranks_by_inner_product():
    scores, rows = dense.rank(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 9.0], [2.0, 0.0]]), 2)
    assert rows.tolist() == [[1, 0]] and scores.tolist() == [[2.0, 0.5]]
