"""The whole job on a small made-up corpus: every stage, every method, resume, and the command line's messages."""

import json
import math
import os
import shutil
import socket
import types
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import link_tree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy import TOY, toy_folder

import arrays
import data
import dense
import eval as scoring
import losses
import memory
import mixlora
import ood
import prepare
import queries
import rq
import scan
import search
import store
import train
from config import parse
from t5 import T5, T5Config, segment_logits
from tools import cost
from tools.experiments import inherit
from weights import to_published

SHARED = Path(os.environ.get("MIXLORA_DATA") or Path(__file__).parents[1] / "../shared/data")
SAMPLE, SPIECE = SHARED / "nq320k_sample", SHARED / "t5" / "spiece.model"


def test_a_run_leaves_every_file_that_the_architecture_names(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    wanted = (
        "config.json tokenizer.model corpus.json idf.json excluded.npy dense.pt rq.pt docids.npy doc_ids.txt "
    )
    wanted += "stages.json metrics.jsonl ood.json results.json log.txt"
    for t in range(5):
        wanted += f" D{t}.pt documents/D{t} queries/D{t}.json embeddings/D{t}.npy"
    assert set(wanted.split()) <= names and not [name for name in names if name.endswith(".part")]
    results = store.read_json(finished / "results.json")
    assert [len(row) for row in results["metrics"]["recall@10"]["P"]] == [1, 2, 3, 4, 5]
    assert results["experts"] == {f"D{t}": [2 + t, 2 + t] for t in range(5)}
    assert (
        set(results["baselines"]) == {"bm25", "dense", "quantised"} and len(results["ood_percent"]["D4"]) == 2
    )
    assert results["metrics"]["recall@10"]["AP"] == scoring.average_performance(
        results["metrics"]["recall@10"]["P"]
    )
    for shares in results["routing"]["D4"]:
        assert len(shares) == 6 and sum(shares) == pytest.approx(1, abs=1e-5)


def test_bm25_finds_the_toy_documents_so_the_toy_is_answerable(finished):
    assert store.read_json(finished / "results.json")["baselines"]["bm25"]["recall@10"]["AP"] > 0.95


def test_resume_repeats_no_finished_stage_and_remakes_a_missing_one_bit_equal(copied, capsys):
    before = {t: store.read_tensors(copied / f"D{t}.pt")["model"] for t in range(5)}
    results = store.read_json(copied / "results.json")
    times = {t: (copied / f"D{t}.pt").stat().st_mtime_ns for t in range(4)}
    for name in ("D4.pt", "results.json"):
        (copied / name).unlink()
    train.main(["--resume", str(copied)])
    assert "D3 is done already" in capsys.readouterr().out
    assert times == {t: (copied / f"D{t}.pt").stat().st_mtime_ns for t in range(4)}
    again = store.read_tensors(copied / "D4.pt")["model"]
    assert all(torch.equal(again[name], before[4][name]) for name in before[4])
    after = store.read_json(copied / "results.json")
    assert after["metrics"] == results["metrics"] and after["experts"] == results["experts"]


def test_after_each_corpus_all_but_the_newest_experts_rows_docid_table_and_lora_are_bit_equal(finished):
    for t in range(1, 5):
        old, new = (store.load_model(finished / f"D{i}.pt")[0] for i in (t - 1, t))
        trained, tensors = {"rq"} | {name for name, _ in mixlora.attention_parameters(new)}, new.state_dict()
        for name, tensor in old.state_dict().items():
            if name not in tensors:  # D_1 puts LoRA around what was plain
                name = name.replace("_attention.", "_attention.plain.")
            if ".ff.old." not in name and ".ff.new." not in name and "router" not in name:
                assert torch.equal(tensor, tensors[name]) == (name not in trained), name
        for layer, layer_before in zip(mixlora.mixed_layers(new), mixlora.mixed_layers(old)):
            for name in ("in_a", "in_b", "out_a", "out_b"):
                assert torch.equal(getattr(layer.old, name), layer_before.stacked(name))
            assert torch.equal(
                layer.router_old, torch.cat([layer_before.router_old, layer_before.router_new])
            )
            assert layer.new.in_b.abs().max() > 0


def test_after_each_corpus_the_statistics_hold_every_arrival_and_the_newest_corpus(finished):
    for t in range(5):
        for stat in store.load_model(finished / f"D{t}.pt")[1]:
            assert (stat.mode, stat.experts) == ("pooled", 2 + t)
            assert (len(stat.arrivals), len(stat.newest)) == (1 + t, t > 0)
    lines = (finished / "log.txt").read_text().splitlines()
    assert sum("of the queries just learnt lie outside what was known" in line for line in lines) == 4


def test_docids_never_change_and_codebooks_stay_those_of_d0(finished):
    books, codes = store.read_tensors(finished / "rq.pt"), np.load(finished / "docids.npy")
    embeddings = [arrays.open_array(finished / "embeddings" / f"D{t}.npy") for t in range(5)]
    assert torch.equal(rq.encode(torch.cat(embeddings), books), torch.from_numpy(codes.astype(np.int64)))
    assert (finished / "doc_ids.txt").read_text().split() == list(store.LoadedRun(finished).ids)


def test_search_and_eval_work_from_the_run_folder_alone(finished, capsys, tmp_path):
    query = next(iter(store.load_corpora(finished)[0].test.values()))
    search.main([str(finished), query, "-k", "3"])
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    scoring.main([str(finished), "--trec", str(tmp_path / "trec")])
    printed = capsys.readouterr().out
    p = store.read_json(finished / "results.json")["metrics"]["recall@10"]["P"]
    assert f"D0: recall@10 {100 * p[0][0]:.1f}" in printed
    assert (tmp_path / "trec" / "after_D4.run").exists() and (tmp_path / "trec" / "D0.qrels").exists()


def follow(begun, folder: Path, *flags: str, after: str = "D0", last: int | None = None) -> dict:
    """What a run with these flags leaves, that goes on from `begun` after a stage; of results.json, unless `last`."""
    asked = parse([*begun.flags, "--run", str(folder), *flags])
    inherit(begun(asked.config.d0_mixture), folder, after, asked.config)
    asked.resume = True
    return train.execute(asked, last, quiet=True)


@pytest.fixture(scope="module")
def base(begun, tmp_path_factory) -> Path:
    """A finished run of BASE."""
    folder = tmp_path_factory.mktemp("base") / "run"
    follow(begun, folder, "--method", "base")
    return folder


@pytest.mark.parametrize(
    "method, experts",
    [
        ("mixlora-dsi-pt", {"D0": [], "D1": [2, 2]}),
        ("naive-expansion", {"D0": [], "D1": [2, 2], "D2": [3, 3]}),
        ("never-expand", {"D0": [2, 2], "D1": [2, 2], "D2": [2, 2]}),
        ("always-expand", {"D0": [2, 2], "D1": [3, 3], "D2": [4, 4]}),
    ],
)
def test_each_method_grows_as_the_paper_says_and_trains_what_is_newest(begun, tmp_path, method, experts):
    results = follow(begun, tmp_path / "run", "--method", method)
    assert results["experts"] | experts == results["experts"]
    model = store.load_model(tmp_path / "run" / "D1.pt")[0]
    newest = [p for layer in mixlora.mixed_layers(model) for p in (*layer.new.parameters(), layer.router_new)]
    trained = model.rq.numel() + sum(p.numel() for p in newest)
    assert results["trainable_parameters"]["D1"] == trained
    assert (trained > model.rq.numel()) == (method != "never-expand")


def test_base_trains_every_parameter(base):
    results, model = store.read_json(base / "results.json"), store.load_model(base / "D2.pt")[0]
    assert results["experts"] == {"D0": [], "D1": [], "D2": []}
    assert results["trainable_parameters"]["D2"] == sum(p.numel() for p in model.parameters())
    assert parameters_that_moved(base, 2) == {name for name, _ in model.named_parameters()}


def parameters_that_moved(folder: Path, t: int) -> set[str]:
    """Names of D_t's parameters that are not, where D_{t-1} has them, bit by bit the same."""
    old, new = (dict(store.load_model(folder / f"D{i}.pt")[0].named_parameters()) for i in (t - 1, t))
    return {name for name in new if name in old and not torch.equal(old[name], new[name])}


def test_promptdsi_trains_its_prompts_and_the_docid_table_alone(begun, tmp_path):
    follow(begun, tmp_path / "run", "--method", "promptdsi", "--prompts", "3", "--kl_coef", "0.25")
    assert parameters_that_moved(tmp_path / "run", 1) == {"rq"}
    assert parameters_that_moved(tmp_path / "run", 2) == {"rq", "prefix.keys_values"}
    assert store.load_model(tmp_path / "run" / "D1.pt")[0].prefix.topics.shape == (3, 32)


def test_corpusbrain_trains_its_adapters_and_the_shared_table_alone(begun, tmp_path):
    results = follow(begun, tmp_path / "run", "--method", "corpusbrain++")
    assert parameters_that_moved(tmp_path / "run", 1) == {"rq", "word"}
    model, moved = store.load_model(tmp_path / "run" / "D2.pt")[0], parameters_that_moved(tmp_path / "run", 2)
    adapters = {name for name, _ in model.named_parameters() if ".after." in name}
    assert len(adapters) == 2 * 2 + 2 * 3 * 2  # of 1 encoder and 2 decoder blocks
    assert moved == {"rq", "word", *adapters}
    assert results["trainable_parameters"]["D1"] == model.rq.numel() + model.word.numel() + len(adapters) * 32


def test_incdsi_appends_rows_and_moves_nothing_else(begun, tmp_path):
    flags = ["--d0_fragments", "0", "--d0_steps", "60"]
    results = follow(begun, tmp_path / "run", "--method", "incdsi", *flags, after="dense")
    for t, (before, after) in enumerate(((30, 40), (40, 50)), 1):
        assert parameters_that_moved(tmp_path / "run", t) == {"rq"}
        old, new = (store.load_model(tmp_path / "run" / f"D{i}.pt")[0].rq for i in (t - 1, t))
        assert old.shape[1] == before and new.shape[1] == after and torch.equal(new[:, :before], old)
    p = results["metrics"]["recall@10"]["P"]
    assert results["trainable_parameters"] == {"D1": 320, "D2": 320} and p[2][0] > 0.9 and p[2][2] > 0.8


def test_joint_retraining_sees_every_corpus_and_knows_them_better(begun, base, tmp_path):
    joint = follow(begun, tmp_path / "joint", "--method", "joint")
    metrics = map(json.loads, (tmp_path / "joint" / "metrics.jsonl").read_text().splitlines())
    last = {line["stage"]: line["step"] for line in metrics}
    assert (last["D1"], last["D2"]) == (36, 42)  # 30 as on D_0, and 6 of each later corpus
    found = [
        results["metrics"]["recall@10"]["AP"] for results in (joint, store.read_json(base / "results.json"))
    ]
    assert found[0] > found[1]


def logged(folder: Path, stage: str, term: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[term] for line in lines if line["stage"] == stage and term in line]


def test_clever_protects_earlier_corpora_but_d0_only_where_asked(begun, tmp_path):
    flags = ["--method", "clever", "--ewc_samples", "20"]
    follow(begun, tmp_path / "released", *flags)
    follow(begun, tmp_path / "fair", *flags, "--ewc_protect_d0", last=1)
    assert logged(tmp_path / "released", "D1", "ewc") == []
    assert logged(tmp_path / "released", "D2", "ewc")[-1] > 0 == logged(tmp_path / "released", "D2", "ewc")[0]
    assert logged(tmp_path / "fair", "D1", "ewc")[-1] > 0


def test_dsi_plus_plus_steps_by_the_gradient_at_the_climbed_point(begun, base, tmp_path):
    """Its first logged loss is BASE's, at the same weights; its gradient is not."""
    follow(begun, tmp_path / "run", "--method", "dsi++", last=1)
    for term, same in (("loss", True), ("gradient_norm", False)):
        one, other = (logged(folder, "D1", term)[0] for folder in (base, tmp_path / "run"))
        assert (one == other) == same


def test_a_fixed_set_of_experts_goes_on_training_without_growing(begun, tmp_path):
    results = follow(begun, tmp_path / "run", "--expand", "fixed")
    assert results["experts"] == {f"D{t}": [2, 2] for t in range(3)}
    moved, model = parameters_that_moved(tmp_path / "run", 2), store.load_model(tmp_path / "run" / "D2.pt")[0]
    lora = {name for name, _ in mixlora.attention_parameters(model)}
    assert {"rq", "decoder.0.ff.new.in_b", "decoder.1.ff.router_new"} | lora <= moved
    assert all(".ff.new." in name or "router_new" in name for name in moved - lora - {"rq"})


def test_a_layer_that_does_not_grow_trains_its_newest_expert_alone_where_it_evolves(begun, tmp_path):
    results = follow(begun, tmp_path / "run", "--expand", "never", "--evolve")
    assert results["experts"] == {f"D{t}": [2, 2] for t in range(3)}
    for t in (1, 2):
        old, new = (store.load_model(tmp_path / "run" / f"D{i}.pt")[0] for i in (t - 1, t))
        for before, after in zip(mixlora.mixed_layers(old), mixlora.mixed_layers(new), strict=True):
            assert (len(after.old), len(after.new)) == (1, 1)
            tensors = [
                (before.stacked(name), after.stacked(name)) for name in ("in_a", "in_b", "out_a", "out_b")
            ]
            tensors += [[torch.cat([layer.router_old, layer.router_new]) for layer in (before, after)]]
            for one, other in tensors:
                assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_dream_trains_all_weights_and_no_expert_held_by_dreams_alone(begun, tmp_path):
    results = follow(begun, tmp_path / "run", "--method", "dream")
    model = store.load_model(tmp_path / "run" / "D2.pt")[0]
    assert results["experts"] == {"D0": [], "D1": [], "D2": []} and not mixlora.attention_lora(model)
    assert results["trainable_parameters"]["D2"] == sum(p.numel() for p in model.parameters())
    for t in (1, 2):
        assert parameters_that_moved(tmp_path / "run", t) == {name for name, _ in model.named_parameters()}
        assert logged(tmp_path / "run", f"D{t}", "kl") == []
        first, last = logged(tmp_path / "run", f"D{t}", "dream")
        assert first == pytest.approx(0, abs=1e-5) and last > 0.01


@pytest.mark.parametrize("kind, codes, centroids", [("pq", 4, (16, 16)), ("atomic", 1, (30, 40))])
def test_a_mixture_is_trained_on_docids_of_every_kind(begun, tmp_path, kind, codes, centroids):
    flags = ["--docid_kind", kind, "--M", "4", "--d0_fragments", "0"]
    follow(begun, tmp_path / "run", *flags, after="dense", last=1)
    run = store.LoadedRun(tmp_path / "run")
    assert run.docids.shape == (50, codes)
    assert tuple(run.at(t)[0].config.centroids for t in (0, 1)) == centroids
    recall = np.mean(store.read_json(tmp_path / "run" / "evaluation_D1.json")["values"][0]["recall@10"])
    assert recall > 0.5  # chance is 10 of 40


def test_ood_json_counts_every_query_in_the_histogram_of_its_scores(finished):
    """Half of D_t's 20 training queries are dreams, which are not counted."""
    for stage, layers in store.read_json(finished / "ood.json").items():
        for layer in layers if stage != "D0" else []:
            found, (low, high) = layer["histogram"], layer["histogram"]["thresholds"]
            counts, edges = found["queries"], found["edges"]
            assert len(edges) == 61 and sum(counts) == 10
            assert sum(found["reference"]) == ood.SKETCH * (int(stage[1]) + (stage != "D1"))
            bins = list(zip(counts, edges, edges[1:]))
            beyond = sum(n for n, left, right in bins if right <= low or left >= high)
            touching = sum(n for n, left, right in bins if left < low or right > high)
            assert (
                beyond <= layer["ood_percent"] * 10 / 100 + 1e-9
                and sum(layer["tails"]) == layer["ood_percent"]
            )
            assert layer["ood_percent"] * 10 / 100 <= touching + 1e-9


def first_losses(run: Path) -> list[float]:
    return [logged(run, stage, "loss")[0] for stage in ("D0", "D1")]


@pytest.mark.parametrize(
    "flags, same",  # whether they leave the loss of D_0's first step alone
    [
        (["--mask", "full_vocab"], False),
        (["--mask", "docid_vocab", "--slow", "lr", "--kl_reduction", "mean"], False),
        (["--ood_mode", "paper_code", "--router_row", "random", "--lora_in_site", "pre_act"], True),
        (
            ["--router", "linear", "--balance_coef", "0.01", "--z_coef", "0.001", "--repel_reduction", "sum"],
            False,
        ),
    ],
)
def test_every_part_can_be_switched_on_its_own(begun, tmp_path, flags, same):
    follow(begun, tmp_path / "run", *flags, after="rq", last=1)
    losses = [logged(folder, "D0", "loss")[0] for folder in (begun(True), tmp_path / "run")]
    assert (losses[0] == losses[1]) == same
    recall = store.read_json(tmp_path / "run" / "evaluation_D1.json")["values"][0]["recall@10"]
    assert np.mean(recall) > 0.6  # chance is 10 of 40


def test_a_plain_start_may_go_on_without_slow_learner_and_kl(begun, tmp_path):
    flags = "--no-d0_mixture --kl_coef 0 --dreams 0 --slow none --aux_layers expanded".split()
    follow(begun, tmp_path / "run", *flags, last=1)
    assert logged(tmp_path / "run", "D1", "kl") == logged(tmp_path / "run", "D1", "dream") == []
    for stat in store.load_model(tmp_path / "run" / "D1.pt")[1]:
        assert (len(stat.arrivals), len(stat.newest)) == (1, 0)  # D_1 was the mixture's first corpus


def test_bfloat16_in_micro_batches_with_recomputation_starts_as_float32_does(begun, tmp_path):
    firsts = []
    for name, flags in (("float32", ""), ("bf16", "--precision bf16 --recompute --micro_batch 11")):
        asked = [*"--lora_dropout 0 --d0_steps 2 --steps 2".split(), *flags.split()]
        follow(begun, tmp_path / name, *asked, after="rq", last=1)
        firsts.append([logged(tmp_path / name, stage, "loss")[0] for stage in ("D0", "D1")])
    assert firsts[1] == pytest.approx(firsts[0], rel=0.005)


EXACT = ["--lora_dropout", "0", "--dense_warmup_steps", "0", "--dense_contrastive", "0", "--dense_margin", "1",
         "--dense_pseudo", "0", "--splits", "60,40", "--d0_steps", "6", "--no-baselines", "--kl_coef", "0.25"]  # fmt: skip


def losses_of(run: Path, stages=("dense round 1", "D0", "D1")) -> list[float]:
    return [loss for stage in stages for loss in logged(run, stage, "loss")]


@pytest.fixture(scope="module")
def exact(toy, tmp_path_factory) -> Path:
    """A run in which no chance depends on how a batch is cut."""
    folder = tmp_path_factory.mktemp("exact") / "run"
    train.main(["--data", str(toy), "--run", str(folder), *TOY, *EXACT, "--save_negatives"])
    return folder


def test_micro_batches_and_recomputation_train_the_same(toy, tmp_path, exact):
    flags = ["--micro_batch", "11", "--recompute"]
    train.main(["--data", str(toy), "--run", str(tmp_path / "run"), *TOY, *EXACT, *flags])
    wanted = losses_of(exact)
    assert len(wanted) >= 6 and losses_of(tmp_path / "run") == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    for term in ("ce", "kl", "dream"):
        found, wanted = (logged(run, "D1", term) for run in (tmp_path / "run", exact))
        assert len(wanted) == 2 and found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_negatives_that_a_run_saved_teach_the_next_one(toy, tmp_path, exact):
    """The file has --teacher's format; with BM25's own scores in it the first round is the same."""
    files = ",".join(str(exact / f"negatives_{number}.jsonl") for number in (1, 2))
    flags = ["--data", str(toy), "--run", str(tmp_path / "run"), *TOY, *EXACT, "--teacher", files]
    train.execute(parse(flags), last=-1)  # no corpus
    rounds = ("dense round 1", "dense round 2")
    assert losses_of(tmp_path / "run", rounds) == pytest.approx(losses_of(exact, rounds), rel=1e-3)


def test_bfloat16_keeps_router_norms_softmax_and_losses_in_float32():
    torch.manual_seed(0)
    model = T5(T5Config(60, 32, 16, 2, 64, 2, 2, codebooks=3, centroids=8, dropout=0.0))
    mixlora.add_mixture(model, mixlora.MixConfig(layers=2, rank=2, dropout=0.0))
    ids, codes = torch.randint(3, 60, (8, 6)), torch.randint(8, (8, 3))
    types = {}

    def watch(name):
        def hook(module, inputs, output):
            types[name] = output.dtype

        return hook

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(watch(name))
    products = []

    def run():
        source, padding = model.encode(ids)
        products.append(model.encoder[0].self_attention.keys_values(source)[0].dtype)
        hidden, routes = model.docid_hidden(source, padding, codes)
        ce = losses.docid_cross_entropy(model, hidden, codes, "segment")
        logits = segment_logits(hidden, model.rq)
        kl = losses.kl_to_previous(logits, logits * 0.5, "sum")
        return ce, kl, routes

    ce, kl, routes = run()
    with torch.autocast("cpu", torch.bfloat16):
        ce16, kl16, routes16 = run()
    assert products == [torch.float32, torch.bfloat16]
    assert ce16.dtype == kl16.dtype == torch.float32 and set(types.values()) == {torch.float32}
    assert all(route.scores.dtype == route.gates.dtype == torch.float32 for route in routes16)
    assert ce16.item() == pytest.approx(ce.item(), rel=0.05) and kl16.item() == pytest.approx(
        kl.item(), rel=0.1
    )
    (ce16 + kl16).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_blocks_are_compiled_and_computed_again_where_asked(begun, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **given: compiled.append((block, given)))
    model = T5(T5Config(60, 16, 8, 2, 32, 1, 2, codebooks=2, centroids=4))
    for asked in (False, True):
        config = types.SimpleNamespace(recompute=asked, compile=asked)
        prepare.Run.ready(types.SimpleNamespace(device=torch.device("cpu"), config=config), model)
        blocks = [*model.encoder, *model.decoder] if asked else []
        assert compiled == [(block, {"dynamic": True}) for block in blocks] and model.recompute == asked


@pytest.mark.soak  # capturing takes half a minute
def test_compiled_blocks_give_the_same_gradients(monkeypatch):
    config = types.SimpleNamespace(recompute=False, compile=True)
    run = types.SimpleNamespace(device=torch.device("cpu"), config=config)
    torch.manual_seed(0)
    model = T5(T5Config(60, 16, 8, 2, 32, 1, 1, codebooks=2, centroids=4, dropout=0.0))
    mixlora.add_mixture(model, mixlora.MixConfig(layers=1, rank=2, dropout=0.0))
    ids, codes = torch.randint(3, 60, (4, 6)), torch.randint(4, (4, 2))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        hidden, routes = model.docid_hidden(*model.encode(ids), codes)
        (hidden.pow(2).mean() + mixlora.align_loss(routes[0])).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    compile = (
        torch.nn.Module.compile
    )  # the code generator takes a minute here; capturing and autograd are what may fail
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **given: compile(m, backend="aot_eager", **given)
    )
    torch._dynamo.reset()
    prepare.Run.ready(run, model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = gradients()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs  # it did compile
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not (SAMPLE.is_dir() and SPIECE.is_file()), reason=f"no {SAMPLE} or {SPIECE}; set MIXLORA_DATA"
)
@pytest.mark.parametrize("last, centroids", [(0, 64), pytest.param(None, 2048, marks=pytest.mark.soak)])
def test_the_sample_of_nq320k_is_trained_on_with_t5_s_own_tokenizer(tmp_path, capsys, last, centroids):
    """D_0 alone, and as a soak every corpus with dreams and as many centroids as the paper's."""
    asked = parse([
        "--data", "nq320k", "--data-dir", str(SAMPLE), "--preset", "beir", "--splits", "paper", "--tokenizer", str(SPIECE),
        "--run", str(tmp_path / "nq"), *TOY[2:], "--M", "4", "--K", str(centroids), "--rq_pseudo", "4", "--d0_fragments", "1",
    ])  # fmt: skip
    train.execute(asked, last)
    manifest = store.read_json(tmp_path / "nq" / "corpus.json")["manifest"]
    assert manifest["found"]["documents"] == [537, 15, 15, 15, 15]
    assert sum(manifest["found"]["test queries"]) == 300
    assert manifest["paper"]["documents"] == [98_743, 2_743, 2_743, 2_743, 2_743]
    assert "sample" in manifest["difference"]
    assert np.load(tmp_path / "nq" / "docids.npy").shape == (597, 4)
    printed = capsys.readouterr().out
    assert printed.count("ids sha256") == 5 and ("after D4" in printed) == (last is None)
    assert (" dream " in printed) == (last is None)
    assert store.read_tensors(tmp_path / "nq" / "rq.pt").shape[1] == centroids
    search.main([str(tmp_path / "nq"), "who sings this song", "-k", "2"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and all(len(line.split()) > 6 for line in lines)  # first words in place of a title


def test_weights_from_a_folder_bring_their_tokenizer_and_are_checked_against_it(toy, tmp_path):
    passages = list(data.split(data.read_beir(toy), "60,40", "random", 0)[0][0].passages())
    tokenizer = data.train_tokenizer(passages, 400)
    rows = data.load_tokenizer(tokenizer).vocab_size() + 100  # as many more as T5's sentinels
    given = dict(
        vocab_size=rows, d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=1, num_decoder_layers=2,
        relative_attention_num_buckets=32, dropout_rate=0.0,
    )  # fmt: skip
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps(given))
    torch.manual_seed(0)
    model = T5(T5Config(rows, 32, 16, 2, 64, 1, 2, codebooks=3, centroids=16))
    torch.save(to_published(model), tmp_path / "t5" / "pytorch_model.bin")
    (tmp_path / "t5" / "spiece.model").write_bytes(tokenizer)
    flags = ["--data", str(toy), "--splits", "60,40", *TOY[2:], "--M", "4", "--t5", str(tmp_path / "t5")]
    train.execute(parse([*flags, "--run", str(tmp_path / "run")]), last=-1)  # no corpus
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tokenizer
    assert store.load_model(tmp_path / "run" / "dense.pt")[0].config.vocab == rows
    for flag, said in (
        ("--layers 3", "at most the 2 decoder blocks"),
        ("--docid_kind pq --M 5", "divides the width .*, 32"),
    ):
        with pytest.raises(ValueError, match=said):
            train.main([*flags, *flag.split(), "--run", str(tmp_path / "none")])
    (tmp_path / "t5" / "spiece.model").write_bytes(data.train_tokenizer(passages, 60))
    with pytest.raises(ValueError, match="the tokenizer has .* pieces, .* word rows"):
        train.main([*flags, "--run", str(tmp_path / "other")])


def test_pseudo_queries_from_a_file_are_used_and_test_queries_among_them_left_out(toy, tmp_path):
    collection = data.read_beir(toy)
    texts = zip(collection.documents.ids, collection.documents.texts)
    lines = [{"doc_id": doc, "query": text} for doc, text in texts]
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
    flags += ["--splits", "60,40", "--d0_steps", "2", "--steps", "2", "--no-baselines"]
    train.main(["--data", str(toy), "--run", str(tmp_path / "run"), *TOY, *flags])
    manifest = store.read_json(tmp_path / "run" / "corpus.json")["manifest"]
    assert manifest["pseudo-queries"] == {"kept": 50, "left out as test queries": 1}
    pairs = prepare.Run(
        parse(["--resume", str(tmp_path / "run")]).config, tmp_path / "run", None
    ).training_queries(1)
    assert (
        dict(pairs) == dict(enumerate(store.load_corpora(tmp_path / "run")[1].texts, 30)) and len(pairs) == 20
    )


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


def test_cached_encoder_outputs_equal_a_fresh_pass(monkeypatch):
    monkeypatch.setattr(scan, "BATCH", 7)
    torch.manual_seed(0)
    model = T5(T5Config(50, 16, 8, 2, 32, 1, 1, codebooks=2, centroids=4)).eval()
    ids = torch.randint(3, 50, (20, 9))
    ids[torch.arange(9) >= torch.randint(2, 10, (20, 1))] = 0
    cache, rows = scan.SourceCache(model, ids), torch.tensor([3, 17, 0])
    source, padding = cache.get(rows, torch.device("cpu"))
    rounded = scan.SourceCache(model, ids, "bf16").get(rows, torch.device("cpu"))[0]
    assert torch.equal(rounded, source.bfloat16().float())
    length = source.shape[1]
    expected, expected_padding = model.encode(ids[rows, :length])
    assert torch.equal(padding, expected_padding)
    seen = (ids[rows, :length] != 0)[..., None]
    torch.testing.assert_close(source * seen, expected * seen)


def every_second(layer: int, scores: torch.Tensor) -> torch.Tensor:
    """Stands in for the verdict on each query."""
    return scores[:, 0, 0] > scores[:, 0, 1]


def test_scan_gives_the_states_and_scores_of_each_query_in_the_order_asked(monkeypatch):
    monkeypatch.setattr(scan, "BATCH", 6)
    torch.manual_seed(0)
    model = T5(T5Config(50, 16, 8, 2, 32, 1, 2, codebooks=2, centroids=4))
    mixlora.add_mixture(model, mixlora.MixConfig(layers=2, rank=2))
    ids = torch.randint(3, 50, (20, 9))
    ids[torch.arange(9) >= torch.randint(2, 10, (20, 1))] = 0
    codes = torch.randint(4, (20, 2))
    found = scan.scan(model, scan.SourceCache(model, ids), codes, every_second, 20)
    hidden, routes = model.docid_hidden(*model.encode(ids), codes)
    torch.testing.assert_close(found.hidden, hidden)
    brief = scan.scan(model, scan.SourceCache(model, ids), codes, every_second, 20, hidden=False)
    assert brief.hidden is None and len(brief.scores) == len(routes) == 2
    for scores, route in zip(found.scores, routes):
        torch.testing.assert_close(scores, route.scores)
    for a, b in zip((*brief.scores, *brief.direction), (*found.scores, *found.direction), strict=True):
        torch.testing.assert_close(a, b)


def test_ood_direction_is_the_mean_direction_of_flagged_new_queries_only(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(scan, "BATCH", 11)
    model = T5(T5Config(50, 16, 8, 2, 32, 1, 1, codebooks=2, centroids=4))
    mixlora.add_mixture(model, mixlora.MixConfig(layers=1, rank=2))
    ids, codes = torch.randint(3, 50, (30, 5)), torch.randint(4, (30, 2))
    cache = scan.SourceCache(model, ids)

    def direction(is_ood, n_new: int) -> torch.Tensor:
        return scan.scan(model, cache, codes, is_ood, n_new).direction[0]

    def summed(x: torch.Tensor) -> torch.Tensor:
        return (x / x.norm(dim=-1, keepdim=True)).sum((0, 1))

    _, (route,) = model.docid_hidden(*model.encode(ids), codes)
    flagged = every_second(0, route.scores)
    flagged[20:] = False  # these are dreams
    assert 0 < flagged.sum() < 20
    torch.testing.assert_close(direction(every_second, 20), summed(route.x[flagged]))
    none = lambda layer, scores: torch.zeros(len(scores), dtype=torch.bool)  # noqa: E731
    torch.testing.assert_close(direction(none, 20), summed(route.x[:20]))  # then all new queries count


def test_offline_the_benchmark_names_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", offline)
    flags = [
        "--data",
        "nq320k",
        "--data-dir",
        str(tmp_path / "nq"),
        "--run",
        str(tmp_path / "run"),
        "--t5",
        "none",
    ]
    with pytest.raises(ValueError, match=r"GenRet.*nq320k\.zip") as error:
        train.main(flags)
    assert str(tmp_path / "nq" / "nq320k.zip") in str(error.value)


def test_the_leak_check_stops_a_stage_whose_queries_are_of_another_corpus(toy, tmp_path, monkeypatch):
    def leaking(sampler, rows, per_document, seed):
        return [(rows[0] - 1, "a query of the corpus before")]

    monkeypatch.setattr(queries, "draw_pseudo_queries", leaking)
    settings = parse(["--data", str(toy), "--run", str(tmp_path), *TOY]).config
    run = prepare.Run(settings, tmp_path, store.Log(tmp_path, quiet=True))
    with pytest.raises(ValueError, match="leak: stage D_1"):
        run.pseudo_queries(1, 1, "training")


def test_what_d0_learns_from_does_not_depend_on_later_corpora(toy, tmp_path):
    """Tokenizer, idf and quantiser of D_0 are bit-equal when the documents of D_1.. are other ones."""
    other = toy_folder(tmp_path / "other", 50)
    settings = parse(["--data", str(toy), "--run", str(tmp_path / "a"), *TOY]).config
    (tmp_path / "a").mkdir()
    first = prepare.Run(settings, tmp_path / "a", store.Log(tmp_path / "a", quiet=True))
    later = set(first.ids) - set(first.corpora[0].ids)
    rows = [json.loads(line) for line in (other / "corpus.jsonl").read_text().splitlines()]
    changed = [row | {"text": "wholly different words"} if row["_id"] in later else row for row in rows]
    (other / "corpus.jsonl").write_text("\n".join(map(json.dumps, changed)))
    settings = parse(["--data", str(other), "--run", str(tmp_path / "b"), *TOY]).config
    (tmp_path / "b").mkdir()
    second = prepare.Run(settings, tmp_path / "b", store.Log(tmp_path / "b", quiet=True))
    assert first.corpora[1].texts != second.corpora[1].texts
    models = [(tmp_path / name / "tokenizer.model").read_bytes() for name in "ab"]
    assert models[0] == models[1]
    assert first.pseudo_queries(0, 2, "x") == second.pseudo_queries(0, 2, "x")
    books = []
    for run in (first, second):
        books.append(prepare.docid_stage(run, prepare.dense_stage(run))[0])
    assert torch.equal(*books)


def test_dense_baseline_ranks_by_inner_product():
    scores, rows = dense.nearest(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 9.0], [2.0, 0.0]]), 2)
    assert rows.tolist() == [[1, 0]] and scores.tolist() == [[2.0, 0.5]]


# --------------------------------------------------------------------------- general text, dreams, invariant 11


def loaded(folder: Path) -> tuple[prepare.Run, prepare.Prepared]:
    """A run whose docids are made, as train.train hands it to the stages."""
    run = prepare.Run(store_config(folder), folder, store.Log(folder, quiet=True))
    made = store.load_model(folder / "dense.pt")[0], store.read_tensors(folder / "rq.pt")
    dreams = prepare.find_dreams(run, *made, wanted=False)
    return run, prepare.Prepared(*made, store.load_docids(folder), dreams)


def store_config(folder: Path):
    return parse(["--resume", str(folder)]).config


@pytest.fixture(scope="module")
def with_general(toy, general, tmp_path_factory) -> dict[str, Path]:
    """Runs with general text that ended after the docids: `drawn`, and `listed` by the pseudo-queries that they use."""
    folder, collection = tmp_path_factory.mktemp("prefix"), data.read_beir(toy)
    lines = [{"doc_id": doc, "query": " ".join(text.split()[i : i + 4])} for i in range(0, 20, 5)
             for doc, text in zip(collection.documents.ids, collection.documents.texts)]  # fmt: skip
    (folder / "pq.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = {}
    for name, more in (("drawn", []), ("listed", ["--pseudo_queries", str(folder / "pq.jsonl")])):
        flags = [
            "--data",
            str(toy),
            "--splits",
            "60,20,20",
            *TOY,
            "--general",
            str(general),
            "--no-baselines",
        ]
        runs[name] = folder / name
        train.execute(parse([*flags, *more, "--run", str(runs[name])]), last=-1, quiet=True)
    return runs


def go_on(prefix: Path, folder: Path, *flags: str, last: int) -> None:
    """Trains up to D_last from a run that ended after the docids."""
    settings = store_config(prefix)
    given = ["--data", settings.data, "--splits", settings.splits, *TOY, "--general", settings.general,
             "--pseudo_queries", settings.pseudo_queries, "--no-baselines"]  # fmt: skip
    asked = parse([*given, *flags, "--run", str(folder)])
    inherit(prefix, folder, "rq", asked.config)
    asked.resume = True
    train.execute(asked, last, quiet=True)


OF_D0 = (
    "documents/D0",
    "queries/D0.json",
    "embeddings/D0.npy",
    "cache",
)


@pytest.mark.parametrize(
    "method, pseudo_queries",
    [("mixlora-dsi", "drawn"), ("mixlora-dsi", "listed"), ("dream", "drawn"), ("paper", "drawn")],
)
def test_while_d1_trains_nothing_of_d0_s_texts_and_queries_is_read(
    with_general, tmp_path, method, pseudo_queries
):
    """Invariant 11: without these files D_1 ends with the same bits; `paper` reads no general text either."""
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    go_on(with_general[pseudo_queries], whole, "--method", method, last=1)
    wanted, wanted_stats = store.load_model(whole / "D1.pt")
    link_tree(whole, bare)
    unread = ["pseudo_queries/D0"] if pseudo_queries == "listed" else []
    unread += ["documents/general", "embeddings/general.npy"] if method == "paper" else []
    for name in (*OF_D0, *unread, "D1.pt"):
        path = bare / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run, made = loaded(bare)
    state, _ = train.learn(run, 1, made, train.State(*run.after(0)))
    found, tensors = state.model.state_dict(), wanted.state_dict()
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    for stat, other in zip(state.stats, wanted_stats, strict=True):
        assert all(torch.equal(getattr(stat, n), getattr(other, n)) for n in ("mean", "arrivals", "newest"))
    assert len(logged(whole, "D1", "dream")) == (0 if method == "paper" else 2)


def test_general_text_is_in_no_corpus_and_no_trie_and_takes_30_percent_of_d0_s_batches(
    with_general, tmp_path
):
    go_on(with_general["drawn"], tmp_path / "run", last=0)
    run, made = loaded(tmp_path / "run")
    log = (with_general["drawn"] / "log.txt").read_text()
    assert "general text: 20 documents, never indexed; 1 left out that are indexed" in log
    texts = {text for corpus in run.corpora for text in corpus.texts}
    assert len(run.general.rows) == 20 and not texts & set(run.general.texts)
    assert len(run.ids) == len(made.codes) == 50 and sum(len(corpus.rows) for corpus in run.corpora) == 50
    trie = store.LoadedRun(tmp_path / "run").at(0)[1]
    assert sorted(trie.documents.tolist()) == list(range(30))
    stage = train.FirstCorpus(run, made)
    assert len(stage.targets) == 50 + 20
    embedded = arrays.open_array(tmp_path / "run" / "embeddings" / "general.npy")
    assert torch.equal(stage.targets[50:], rq.encode(embedded, made.books))
    seen = {row for _ in range(20) for row, _ in stage.next_batch()}
    assert seen == {*range(30), *range(50, 70)}
    batch = stage.next_batch()
    asked = [(row - 50, query) for row, query in batch if row >= 50]
    assert len(batch) == 32 and len(asked) == 9  # 30 %
    for row, query in asked:
        passage = f"{run.general.titles[row]} {run.general.texts[row]}".lower()
        assert set(query.lower().split()) & set(passage.split())


def test_on_d1_half_of_what_holds_the_model_asks_for_general_text_and_new_queries_are_plain(
    with_general, tmp_path
):
    go_on(with_general["drawn"], tmp_path / "run", last=0)
    run, made = loaded(tmp_path / "run")
    stage = train.LaterCorpus(run, 1, made, train.State(*run.after(0)))
    assert (stage.n_plain, stage.n_new, stage.n_old) == (40, 40, 200) and len(stage.ids) == 240
    of_documents = {tuple(row) for row in made.codes[:30].tolist()}
    assert {tuple(row) for row in stage.docids[40:140].tolist()} <= of_documents
    assert len({tuple(row) for row in stage.docids[140:].tolist()}) <= 13  # pages, of 8 queries each
    embedded = arrays.open_array(tmp_path / "run" / "embeddings" / "general.npy")
    words = {}  # of all pages that share a docid
    for page, docid in enumerate(rq.encode(embedded, made.books).tolist()):
        passage = f"{run.general.titles[page]} {run.general.texts[page]}"
        words[tuple(docid)] = words.get(tuple(docid), set()) | set(passage.lower().split())
    for docid, ids in zip(stage.docids[140:].tolist(), stage.ids[140:].tolist()):
        asked = run.tokenizer.decode([i for i in ids if i > data.EOS]).lower().split()
        assert set(asked) & words[tuple(docid)]


def test_few_added_documents_move_weights_in_proportion_and_are_kept_from_other_queries(
    with_general, tmp_path, monkeypatch
):
    go_on(with_general["drawn"], tmp_path / "run", last=0)
    run, made = loaded(tmp_path / "run")
    run.corpora[1].added = "texts"
    vars(run.config).update(dream_style=0.5)
    stage = train.LaterCorpus(run, 1, made, train.State(*run.after(0)))
    assert (stage.n_plain, stage.n_new) == (40, 40)  # no dreams of their own
    share, rows = (10 / 258) ** 0.5, run.corpora[1].rows  # of ten documents
    assert stage.dream_kl == pytest.approx(2 * 2.25 / share)
    new = {tuple(docid) for docid in made.codes[list(rows)].tolist()}
    held = [tuple(docid) for docid in stage.docids[stage.n_new :].tolist()]
    assert len(held) == stage.n_old and set(held[::2]) <= new and set(held[1::2]) - new
    stages, config = [], run.config
    monkeypatch.setattr(train, "fit_and_check_frozen", lambda run, model, stage: stages.append(stage))
    stage.scan()
    stage.grow()
    stage.train()
    assert stages[0].steps == math.ceil(share * config.steps)
    rates = {name: group["lr"] for group in stages[0].groups for name, p in stage.model.named_parameters()
             if any(p is q for q in group["params"])}  # fmt: skip
    assert rates.pop("rq") == pytest.approx(share * (config.table_lr or config.lr))
    attention = {rates.pop(name) for name, _ in mixlora.attention_parameters(stage.model)}
    assert sorted(attention) == pytest.approx([config.attention_lr * share])
    assert sorted(set(rates.values())) == pytest.approx([config.lr * share])


def test_d1_s_scan_and_step_make_the_products_that_tools_cost_counts(with_general, tmp_path):
    """Dreams, general text and LoRA on attention, in the loop itself; the tool leaves router losses out, D per token."""
    go_on(with_general["drawn"], tmp_path / "run", "--expand", "always", last=0)
    run, made = loaded(tmp_path / "run")
    stage = train.LaterCorpus(run, 1, made, train.State(*run.after(0)))
    config, net, lengths = run.config, stage.model.config, (stage.ids != data.PAD).sum(1)
    assert config.attention_rank and stage.n_old == 200 and len(lengths) <= scan.BATCH
    longest, mean = int(lengths.max()), lengths.double().mean().item()

    def counted(function) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    once = cost.products(net, memory.mixture(config, 0), len(lengths), longest, net.codebooks, mean)
    assert counted(stage.scan) == pytest.approx(sum(once.values()), rel=1e-6)
    stage.grow()
    stage.energies = ood.MovingEnergies(stage.stats, only_new=True)
    stage.order = dense.Batches(stage.n_new, stage.batch, stage.generator)
    rows = stage.next_batch()
    step = cost.docid_step(config, net, 1, len(rows), int(lengths[rows.flatten()].max()))
    assert counted(lambda: stage.loss(rows)[0].backward()) == pytest.approx(step, rel=1e-3)


@pytest.fixture(scope="module")
def later(begun, tmp_path_factory) -> Path:
    """A run that ended after D_0, for `train.LaterCorpus` to begin on D_1."""
    folder = tmp_path_factory.mktemp("later") / "run"
    inherit(begun(True), folder, "D0", parse([*begun.flags, "--run", str(folder)]).config)
    return folder


def stage_of(folder: Path, **settings) -> train.LaterCorpus:
    run, made = loaded(folder)
    vars(run.config).update(settings)
    return train.LaterCorpus(run, 1, made, train.State(*run.after(0)))


def test_half_of_d1_s_queries_are_dreams_of_its_documents_and_dreams_of_d0_follow(later):
    stage = stage_of(later)
    assert (stage.n_plain, stage.n_new, stage.n_old) == (20, 40, 200) and len(stage.ids) == 240
    plain, codes = dict(stage.run.training_queries(1)), stage.made.codes
    assert not {tuple(row) for row in stage.docids[:40].tolist()} - {
        tuple(codes[row].tolist()) for row in plain
    }
    assert not {tuple(row) for row in stage.docids[40:].tolist()} - {
        tuple(row) for row in codes[:30].tolist()
    }
    drawn = [stage.run.tokens([pair]) for pair in stage.run.training_queries(1)]
    sentences = {tuple(ids[ids != 0].tolist()) for ids in drawn}
    for i, (ids, docid) in enumerate(zip(stage.ids, stage.docids)):
        ids = ids[ids != 0]
        if i < 20:
            assert tuple(ids.tolist()) in sentences
        else:
            own = stage.made.dreams.pieces[stage.made.dreams.words(docid[None])[0][0]]
            assert ids[-1] == data.EOS and torch.isin(ids, own).sum() >= 2
    assert torch.equal(stage_of(later).ids, stage.ids)  # by the seed


def test_each_new_query_has_its_dreams_beside_it_in_whatever_part_of_a_batch(later):
    stage = stage_of(later)
    stage.order = dense.Batches(stage.n_new, 16, stage.generator)
    batches = [stage.next_batch() for _ in range(3)]
    assert [tuple(batch.shape) for batch in batches] == [
        (16, 3),
        (16, 3),
        (8, 3),
    ]  # 32 dreams to a batch of 16
    rows = torch.cat(batches)
    assert sorted(rows[:, 0].tolist()) == list(range(40))
    assert rows[:, 1:].min() >= 40 and rows[:, 1:].max() < 240 and len(rows[:, 1:].unique()) > 50


def test_where_the_encoder_trains_queries_of_like_length_share_a_part_of_a_batch(
    begun, tmp_path, monkeypatch
):
    asked = parse([*begun.flags, "--run", str(tmp_path / "run"), "--method", "dream"])
    inherit(begun(False), tmp_path / "run", "D0", asked.config)
    by_length, mixed, stages = stage_of(tmp_path / "run"), stage_of(tmp_path / "run"), []
    mixed.cache = True  # as where the encoder is frozen
    for stage in (by_length, mixed):
        stage.order = dense.Batches(stage.n_new, 16, stage.generator)
    one, other = by_length.next_batch(), mixed.next_batch()
    assert len(one) == 16 and not torch.equal(one, other)
    for column, same in ((one[:, 0], other[:, 0]), (one[:, 1:].flatten(), other[:, 1:].flatten())):
        assert sorted(column.tolist()) == sorted(same.tolist())
        assert by_length.lengths[column].diff().min() >= 0 < mixed.lengths[same].diff().abs().max()
    monkeypatch.setattr(train, "fit_and_check_frozen", lambda run, model, stage: stages.append(stage.parts))
    by_length.train(), mixed.train()
    assert stages == [2, 1]


@pytest.mark.parametrize("method", ["mixlora-dsi", "dream"])
def test_the_loss_of_a_batch_with_dreams_is_the_mean_of_its_parts_losses(begun, tmp_path, method):
    asked = parse([*begun.flags, "--run", str(tmp_path / "run"), "--method", method, "--kl_coef", "0.25"])
    inherit(begun(method != "dream"), tmp_path / "run", "D0", asked.config)
    stage = stage_of(tmp_path / "run")
    stage.scan()
    stage.grow()
    with torch.no_grad():
        for p in stage.model.parameters():
            p += 0.01 * torch.randn_like(p)  # so that both KL terms are above zero
    stage.energies = ood.MovingEnergies([])
    rows = torch.cat([torch.arange(12)[:, None], stage.n_new + torch.randint(200, (12, 2))], dim=1)
    whole, parts = stage.loss(rows)[1], [stage.loss(part)[1] for part in rows.split([5, 7])]
    router = {"align", "repel"} if method == "mixlora-dsi" else set()
    assert whole.keys() == {"ce", "kl", "dream"} | router and min(whole["kl"], whole["dream"]) > 0
    for name, value in whole.items():
        torch.testing.assert_close(
            (5 * parts[0][name] + 7 * parts[1][name]) / 12, value, rtol=1e-4, atol=1e-6
        )


def test_rehearsal_asks_for_the_same_old_documents_by_their_text(later):
    stage, dreamt = stage_of(later, rehearsal=True), stage_of(later)
    width = dreamt.ids.shape[1]
    assert torch.equal(stage.docids, dreamt.docids) and torch.equal(stage.ids[:40, :width], dreamt.ids[:40])
    (corpus, *_), codes = stage.run.corpora, stage.made.codes[:30]
    for ids, docid in zip(stage.ids[40:], stage.docids[40:]):
        words = set(stage.run.tokenizer.decode(ids[ids != 0].tolist()).lower().split())
        rows = (codes == docid).all(1).nonzero()[:, 0].tolist()
        assert any(words & set(f"{corpus.titles[row]} {corpus.texts[row]}".lower().split()) for row in rows)


@pytest.mark.parametrize("outside, warns", [(10, False), (11, True)])
def test_a_distance_of_the_newest_queries_from_dreams_is_reported_and_warns_above_10_percent(outside, warns):
    """What was known is every arrival; that of the corpus learnt before is left out, as it has the same drift."""
    stat, lines = ood.new_stats("pooled", 2, 3), []
    stat.arrivals, stat.newest = torch.zeros(2, ood.SKETCH), torch.full((1, ood.SKETCH), 5.0)
    scores = torch.full((100, 3, 2), 0.0)
    scores[:outside] = -5.0
    stage = types.SimpleNamespace(
        t=3, stats=[stat], record={}, config=types.SimpleNamespace(epsilon=0.02), added=None,
        run=types.SimpleNamespace(log=types.SimpleNamespace(line=lines.append)),
    )  # fmt: skip
    train.LaterCorpus.report_distance(stage, [scores])
    assert stage.record == {"distance_percent": [outside]} and len(stat.newest) == 1
    wanted = f"D3: by layer {outside}.0% of the queries just learnt lie outside what was known"
    assert lines[0] == wanted and len(lines) == 1 + warns
    assert not warns or lines[1].startswith("warning: above 10% the model tells new queries from dreams")


def test_a_frozen_tensor_that_moves_stops_the_stage_by_name(begun, tmp_path, monkeypatch):
    normalise = mixlora.MixedFeedForward.normalise_rows

    def stray(layer):
        normalise(layer)
        if len(layer.old):  # from D_1 on
            layer.plain.w_out.data[0, 0] += 1e-3

    monkeypatch.setattr(mixlora.MixedFeedForward, "normalise_rows", stray)
    with pytest.raises(ValueError, match=r"D1: frozen tensors moved \(decoder\.0\.ff\.plain\.w_out"):
        follow(begun, tmp_path / "run")
    assert not (tmp_path / "run" / "D1.pt").exists() and store.load_model(tmp_path / "run" / "D0.pt")


def test_a_run_that_cannot_fit_into_memory_says_so_before_it_trains(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train.prepare.memory, "free_memory", lambda device: 1_000_000)
    with pytest.raises(ValueError, match="needs about .* --no-check_memory"):
        train.main(["--data", str(toy), "--run", str(tmp_path / "run"), *TOY])
    assert not (tmp_path / "run" / "dense.pt").exists()


def test_a_batch_that_is_not_finite_moves_no_energies():
    stats = [ood.new_stats("paper_code", 2, 3)]
    averages = ood.MovingEnergies(stats)
    scores = torch.rand(4, 3, 2)
    good, bad = (
        mixlora.Route(None, scores * factor, mixlora.top_gates(scores, 2), None, 2)
        for factor in (1, torch.nan)
    )
    for route in (bad, good):
        averages.see([route])
        averages.step()
    alone = ood.new_stats("paper_code", 2, 3)
    ood.move(alone, ood.routed_energy_moments(good.scores, good.gates))
    assert torch.equal(stats[0].mean, alone.mean) and stats[0].mean.isfinite().all()


def test_every_file_that_a_run_writes_can_be_read_by_what_it_is_for(finished, tmp_path):
    """JSON is strict JSON, which knows no NaN; TREC files are what pytrec_eval reads, and give our own metrics."""
    for path in [*finished.rglob("*.json"), finished / "metrics.jsonl"]:
        for text in (
            path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
        ):
            json.loads(
                text, parse_constant=lambda name, path=path: pytest.fail(f"{path}: {name} is not JSON")
            )
    scoring.main([str(finished), "--trec", str(tmp_path)])
    run, qrels = {}, {}
    with (tmp_path / "after_D4.run").open() as file:
        run = pytrec_eval.parse_run(file)
    for t in range(5):
        with (tmp_path / f"D{t}.qrels").open() as file:
            qrels |= pytrec_eval.parse_qrel(file)
    scored = pytrec_eval.RelevanceEvaluator(qrels, {"recall_10"}).evaluate(run)
    results = store.read_json(finished / "results.json")["metrics"]["recall@10"]
    assert np.mean([scored[q]["recall_10"] for q in qrels]) == pytest.approx(results["AP_micro"])


def test_what_cannot_work_is_refused_while_reading(toy, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"qid": "train0", "docids": ["d0"], "scores": [true]}\nno json\n')
    flags = ["--data", str(toy), "--run", str(tmp_path / "run"), *TOY]
    with pytest.raises(ValueError, match=r"--M 2 codes of --K 4 are fewer docids than D_0's 30 documents"):
        train.main([*flags, "--M", "2", "--K", "4"])
    with pytest.raises(ValueError, match=r"t\.jsonl:1: .*t\.jsonl:2: .*--skip_invalid"):
        train.main([*flags, "--teacher", str(tmp_path / "t.jsonl")])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # no step was taken


@pytest.mark.parametrize(
    "slow, rate, of_gradient", [("grad", 0.01, 0.01), ("lr", 0.0001, 1), ("none", 0.01, 1)]
)
def test_the_slow_learner_divides_the_docid_tables_gradient_or_its_rate_by_a_hundred(
    later, monkeypatch, slow, rate, of_gradient
):
    stage, trained = stage_of(later, slow=slow, table_lr=0.01), []
    monkeypatch.setattr(train, "fit_and_check_frozen", lambda run, model, stage: trained.append(stage))
    stage.scan()
    stage.grow()
    stage.train()
    table = stage.model.rq
    rates = [group["lr"] for group in trained[0].groups if any(p is table for p in group["params"])]
    table.grad = torch.ones_like(table)
    trained[0].before_clip()
    assert rates == [pytest.approx(rate)] and table.grad.unique().tolist() == [pytest.approx(of_gradient)]


def test_the_kl_is_to_the_model_before_with_its_own_docid_table(later):
    stage, rows = stage_of(later, kl_coef=0.25), torch.tensor([3, 1, 7])
    before = stage.run.after(0)[0].eval()
    stage.scan()
    stage.grow()
    with torch.no_grad():
        stage.model.rq += torch.randn_like(stage.model.rq)
        hidden, _ = before.docid_hidden(*before.encode(stage.ids[rows]), stage.docids[rows])
        logits, logits_before = torch.randn(3, 3, 16), segment_logits(hidden, before.rq)
        wanted = losses.kl_to_previous(logits, logits_before, "sum")
        assert stage.kl(logits, rows).item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["ood_mean", "random"])
def test_a_new_router_row_starts_from_the_mean_of_ood_inputs_or_at_random(later, kind):
    stage = stage_of(later, expand="always", router_row=kind)
    stage.scan()
    stage.grow()
    for layer, mean in zip(mixlora.mixed_layers(stage.model), stage.before.direction, strict=True):
        cosine = torch.cosine_similarity(layer.router_new[0].detach(), mean, dim=0)
        assert (cosine > 0.9999) == (kind == "ood_mean")


def test_the_bi_encoders_rows_rank_by_its_vectors_and_by_those_of_docids(finished):
    run, bi_encoder = store.LoadedRun(finished), store.load_model(finished / "dense.pt")[0].eval()
    vectors = torch.cat([arrays.open_array(finished / "embeddings" / f"D{t}.npy") for t in range(5)])
    books = store.read_tensors(finished / "rq.pt")
    for name, documents in ("dense", vectors), ("quantised", rq.decode(books, run.docids)):
        rankings = store.read_json(finished / f"evaluation_{name}.json")["rankings"]
        for corpus, found in zip(run.corpora, rankings, strict=True):
            for query_id, text in corpus.test.items():
                with torch.no_grad():
                    scores = (bi_encoder.embed(data.tokenize(run.tokenizer, [text], 32)) @ documents.T)[0]
                best = scores.topk(10).values
                assert [score for _, score in found[query_id]] == pytest.approx(best.tolist(), rel=1e-4)
                rows = [list(run.ids).index(doc_id) for doc_id, _ in found[query_id]]
                torch.testing.assert_close(scores[rows], best, rtol=1e-4, atol=1e-4)
