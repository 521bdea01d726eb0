"""Closed formulas against torch's count of FLOPs, real modules' parameters and what autograd keeps."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dense
import memory
import rq
import scan
import train
from config import METHODS, PRESETS, Config
from losses import docid_cross_entropy, kl_to_previous
from mixlora import MixConfig, add_attention_lora, add_mixture, mixed_layers
from search import beam_search
from t5 import T5, T5Config, segment_logits
from tools import cost

NET = T5Config(
    vocab=60, width=32, head_width=4, heads=4, feed_forward=48, encoder_blocks=3, decoder_blocks=4,
    codebooks=3, centroids=16,
)  # fmt: skip
MIX = MixConfig(layers=2, experts=3, rank=4)
B, S, T = 5, 7, 3


def small_model(mix: MixConfig | None = None, net: T5Config = NET) -> T5:
    torch.manual_seed(0)
    model = T5(net)
    if mix:
        add_mixture(model, mix)
    return model


def queries(length: int = S, batch: int = B) -> torch.Tensor:
    return torch.randint(1, NET.vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def padded_queries() -> torch.Tensor:
    """(B, S), of 5 tokens on average."""
    ids = queries()
    for row, length in enumerate((7, 6, 5, 4, 3)):
        ids[row, length:] = 0
    return ids


def docids(batch: int = B) -> torch.Tensor:
    shape = batch, NET.codebooks
    return torch.randint(NET.centroids, shape, generator=torch.Generator().manual_seed(1))


def counted(function) -> int:
    """Without gradients an attention is one call, of which torch counts the plain products alone."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def settings(preset: str = "nq320k", **changes) -> Config:
    return Config(**(PRESETS[preset] | {"data": preset} | changes))


def costs_by_stage(config) -> dict[tuple[str, int | None], cost.Cost]:
    return {(one.held.name, one.held.t): one for one in cost.costs(config)}


def small_settings(**changes) -> Config:
    shape = dict(width=32, heads=8, feed_forward=48, encoder_blocks=3, decoder_blocks=4, vocab=60, M=3, K=16)
    return Config(**(shape | dict(layers=2, experts=2, lora_rank=4) | changes))


# ------------------------------------------------------------------------------------------------------ FLOPs


def test_encoder_flops_are_those_that_torch_counts():
    model, ids = small_model(), queries()
    assert cost.products(NET, None, B, S, T)["encoder"] == counted(lambda: model.encode(ids))


@pytest.mark.parametrize("mix", [None, MIX])
def test_decoder_flops_are_those_that_torch_counts(mix):
    model, parts = small_model(mix), cost.products(NET, mix, B, S, T)
    source, padding = model.encode(queries())
    assert parts["keys_values"] == 0  # none are formed
    flops = counted(lambda: model.docid_hidden(source, padding, docids()))
    assert sum(parts.values()) - parts["encoder"] == flops


@pytest.mark.parametrize("mix", [None, MIX])
def test_flops_of_decoding_from_keys_and_values_are_those_that_torch_counts(mix):
    model, parts = small_model(mix), cost.products(NET, mix, B, S, T, keys=T)
    source, padding = model.encode(queries())
    cross = model.cross_keys_values(source)
    assert parts["keys_values"] == counted(lambda: model.cross_keys_values(source))
    flops = counted(lambda: model.decode(model.docid_inputs(docids()), cross, padding))
    assert sum(parts.values()) - parts["encoder"] - parts["keys_values"] == flops


def test_the_encoder_leaves_padding_out_and_the_decoder_does_not():
    model, ids = small_model(), padded_queries()
    parts = cost.products(NET, None, B, S, 1, tokens=5)
    assert parts["encoder"] == counted(lambda: model.encode(ids))
    assert sum(parts.values()) == counted(lambda: model.embed(ids))
    assert parts | {"encoder": 0} == cost.products(NET, None, B, S, 1) | {"encoder": 0}


def test_dense_embedding_flops_are_those_that_torch_counts():
    model = small_model()
    assert cost.embedding(NET, B, S) == counted(lambda: model.embed(queries()))


@pytest.mark.parametrize("mask", ["segment", "docid_vocab", "full_vocab"])
def test_logits_are_those_that_torch_counts(mask):
    model, hidden = small_model(), torch.randn(B, NET.codebooks, NET.width)
    flops = counted(lambda: docid_cross_entropy(model, hidden, docids(), mask))
    assert 2 * B * NET.width * memory.logits(NET, mask) == flops


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("net, mask", [(NET, "segment"), (NET, "full_vocab")])
def test_d0_step_flops_are_those_that_torch_counts(mixed, net, mask, recompute):
    config = small_settings(mixture=mixed, mask=mask, recompute=recompute, layers=2, experts=3, lora_rank=4)
    model = small_model(memory.mixture(config, 0), net).train()
    model.recompute = recompute
    model.word.requires_grad_(not mixed)

    def step():
        hidden, _ = model.docid_hidden(*model.encode(queries()), docids())
        docid_cross_entropy(model, hidden, docids(), mask).backward()

    assert cost.docid_step(config, net, 0, B, S) == counted(step)


@pytest.mark.parametrize("recompute", [False, True])
def test_dense_step_flops_are_those_that_torch_counts(recompute):
    config = small_settings(dense_batch=B, dense_contrastive=1.0, recompute=recompute)
    net = memory.network(config)
    model = small_model(net=net).train()
    model.recompute = recompute

    def step(windows):
        q, passages = model.embed(queries()), model.embed(queries(11, windows * B))
        (q @ passages.T).logsumexp(1).sum().backward()

    for windows in (1, 2):  # warm-up, round
        assert cost.dense_step(config, net, windows, (S, S), (11, 11)) == counted(lambda n=windows: step(n))


def test_steps_of_padded_texts_are_those_that_torch_counts():
    config = small_settings(dense_batch=B, dense_contrastive=1.0, mixture=False)
    net, ids = memory.network(config), padded_queries()
    model = small_model(net=net).train()

    def docid_step():
        hidden, _ = model.docid_hidden(*model.encode(ids), docids())
        docid_cross_entropy(model, hidden, docids(), "segment").backward()

    assert cost.docid_step(config, net, 0, B, S, 5) == counted(docid_step)
    flops = counted(lambda: (model.embed(ids) @ model.embed(queries(11)).T).sum().backward())
    assert cost.dense_step(config, net, 1, (S, 5), (11, 11)) == flops


def test_stages_take_padded_and_mean_lengths_of_the_workload():
    config = settings("msmarco")  # passages of 75 tokens, windows of 128, queries of 10 among 20
    net, stages = memory.network(config), costs_by_stage(config)
    rounds = stages["dense rounds", None]
    assert rounds.flops == rounds.steps * cost.dense_step(config, net, 2, (20, 10), (128, 75))
    for t, batch in (0, config.d0_batch), (1, config.batch):
        training = stages["training", t]
        assert training.flops == training.steps * cost.docid_step(config, net, t, batch, 20, 10)


def test_a_batch_that_is_cut_is_embedded_once_more_and_compared_as_a_whole():
    whole, cut, none, none_cut = (
        cost.dense_step(
            small_settings(dense_batch=64, dense_contrastive=c, micro_batch=m), NET, 2, (S, S), (11, 11)
        )
        for c, m in ((1.0, 0), (1.0, 16), (0.0, 0), (0.0, 16))
    )
    assert whole - none == 3 * 2 * 64 * 128 * NET.width and none == none_cut
    assert cut - whole == cost.embedding(NET, 64, S) + cost.embedding(NET, 128, 11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        dict(expand="always"),
        dict(expand="never"),
        dict(expand="never", evolve=True),
        dict(expand="always", dreams=9),
        dict(expand="never", attention_rank=3),
        dict(expand="never", evolve=True, dreams=9, attention_rank=3),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_continual_step_flops_are_those_that_torch_counts(changes, recompute):
    """Everything rests but docid table, newest experts and LoRA on attention; two dreams stand beside each new query.
    Router losses, D per token, are left out.
    """
    config = small_settings(batch=B, dream_batch=2 * B, recompute=recompute, **changes)
    net, rank = memory.network(config), config.attention_rank
    model = small_model(MixConfig(layers=2, experts=2, rank=4), net).train()
    for layer in mixed_layers(model):
        layer.add_expert() if config.expand == "always" else layer.freeze(but=int(config.evolve))
    if rank:
        add_attention_lora(model, rank)
    train.freeze_old(model)
    model.recompute = recompute
    n = 3 * B if config.dreams else B
    with torch.no_grad():
        source, padding = model.encode(queries(batch=n))
    before, rq_before = torch.randn(n, net.codebooks, net.width), model.rq.detach().clone()

    def step():
        cross = source if rank else model.cross_keys_values(source)
        hidden, _ = model.docid_hidden(cross, padding, docids(n))
        logits = segment_logits(hidden, model.rq)
        loss = docid_cross_entropy(model, None, docids(), config.mask, logits[:B])
        for of in (slice(B), slice(B, n)):  # new queries, dreams
            if len(before[of]):
                loss = loss + kl_to_previous(logits[of], segment_logits(before[of], rq_before), "sum")
        loss.backward()

    assert cost.docid_step(config, net, 1, B, S) == counted(step)


def test_a_step_of_dream_encodes_all_queries_and_dreams_without_their_padding():
    """All weights train on B padded queries and as many dreams; new queries have no KL."""
    config = small_settings(mixture=False, kl_coef=0.0, dreams=9, dream_batch=B, batch=B)
    net = memory.network(config)
    model, ids = (
        small_model(net=net).train(),
        torch.cat([padded_queries(), queries(3, B).repeat(1, 3)[:, :S]]),
    )
    ids[B:, 3:] = 0
    before, rq_before = torch.randn(B, net.codebooks, net.width), model.rq.detach().clone()

    def step():
        hidden, _ = model.docid_hidden(*model.encode(ids), docids(2 * B))
        logits = segment_logits(hidden, model.rq)
        loss = docid_cross_entropy(model, None, docids(), config.mask, logits[:B])
        (loss + kl_to_previous(logits[B:], segment_logits(before, rq_before), "sum")).backward()

    assert cost.docid_step(config, net, 1, B, S, 4) == counted(step)


def test_the_first_mixture_of_pt_trains_all_its_experts():
    """The mixture comes with D_1, so both experts of a layer are new."""
    config = small_settings(d0_mixture=False, kl_coef=0.0)
    net = memory.network(config)
    model = small_model(MixConfig(layers=2, experts=2, rank=4), net)
    train.freeze_old(model)
    with torch.no_grad():
        source, padding = model.encode(queries())

    def step():
        hidden, _ = model.docid_hidden(model.cross_keys_values(source), padding, docids())
        docid_cross_entropy(model, hidden, docids(), "segment").backward()

    assert cost.docid_step(config, net, 1, B, S) == counted(step)


@pytest.mark.parametrize("beam", [5, 20])  # one below K, one above
@pytest.mark.parametrize("mix, rank", [(None, 0), (MIX, 0), (MIX, 3)])
def test_beam_search_flops_are_those_that_torch_counts(mix, rank, beam):
    model = small_model(mix).eval().requires_grad_(False)
    if rank:
        add_attention_lora(model, rank)
        model.requires_grad_(False)
    lora = memory.attention_parameters(small_settings(attention_rank=rank), NET, 1)
    every = torch.cartesian_prod(*[torch.arange(NET.centroids)] * NET.codebooks)  # so that all beams are live
    trie = rq.Trie(every)
    assert cost.beam_search(NET, mix, B, S, beam, lora) == counted(
        lambda: beam_search(model, trie, queries(), beam)
    )


def test_quantiser_flops_by_hand():
    """N = 1000 points, K = 16, D = 32, M = 3."""
    product = 2 * 16 * 32
    points = 0 + 1 + 2  # levels before each level, of 1000 points each
    sample = 1000 + 4096 + 4096  # 256 K of 5000 residuals from the second level on
    table = 16 * product  # centroids of one codebook with those of another: one pair precedes the third level
    assert cost.quantiser(NET, 5, 1000, 0) == product * (1000 * points + rq.ITERATIONS * sample) + table
    assert cost.quantiser(NET, 5, 1000, 70) - cost.quantiser(NET, 5, 1000, 0) == product * 70 * 3 + 3 * table


def test_quantiser_encoding_flops_are_those_that_torch_counts():
    books, points = torch.randn(3, 16, 32), torch.randn(40, 32)
    assert cost.quantiser(NET, 5, 0, 40) == counted(lambda: rq.encode(points, books, 5))


@pytest.mark.parametrize("stage", ["dense rounds", "training"])
def test_micro_batches_and_recomputation_trade_products_and_traffic_for_memory(stage):
    def cost_of(**changes):
        return next(one for one in cost.costs(settings(**changes)) if one.held.name == stage)

    before, parts = cost_of(), cost_of(micro_batch=64)
    share = 64 / (256 if stage == "dense rounds" else 1024)
    assert parts.held.activations == pytest.approx(share * before.held.activations)
    assert parts.flops == before.flops and parts.bytes > before.bytes  # weights are read for every part
    again = cost_of(micro_batch=64, recompute=True)
    assert again.held.activations < parts.held.activations / 4 and again.held.weights == parts.held.weights
    assert again.bytes > parts.bytes  # what is not kept is still written and read
    assert (
        1.2 * before.flops < again.flops and 3 * again.flops <= 4 * before.flops
    )  # at most one forward more


# --------------------------------------------------------------------------------------------- rows and table


def test_lengths_are_cut_by_the_config():
    assert cost.query_lengths(settings()) == (10, 20)
    short = settings(query_length=8, document_length=200)
    assert cost.query_lengths(short) == (8, 8)
    for words in ("a query 8 on average, 8 when padded", "document 200 on average"):
        assert words in cost.table(short)


def test_steps_are_those_of_the_config():
    steps = {stage: one.steps for stage, one in costs_by_stage(settings()).items()}
    assert steps["dense rounds", None] == 2 * 54_000  # 50 epochs of 276,493 at batch 256
    assert steps["training", 0] == 20_000
    assert steps["training", 1] == 10 * -(-41_132 // 32) == 12_860
    steps = {stage: one.steps for stage, one in costs_by_stage(settings("msmarco")).items()}
    assert steps["training", 0] == 250_000 and steps["training", 4] == 5 * -(-2_210_471 // 512)


def test_lines_of_the_table_add_up():
    every, text = cost.costs(settings()), cost.table(settings())
    later = [one for one in every if one.held.name == "training" and one.held.t]
    for name, group in ("total", every), ("D1..D4 training", later):
        line = next(line for line in text.splitlines() if line.startswith(name))
        cells = line.removeprefix(name).split()
        assert int(cells[0]) == sum(one.steps for one in group)
        assert float(cells[1]) == pytest.approx(sum(one.flops for one in group) / 1e15, abs=1e-3)
        most = max(one.memory for one in group) / 2**30
        assert float(cells[3]) + float(cells[4]) == pytest.approx(most, abs=2e-3)
        assert float(cells[5]) == pytest.approx(sum(one.hours(cost.A100) for one in group), abs=1e-3)


def test_hours_are_the_slower_of_products_and_traffic():
    chip = cost.Accelerator("chip", bf16=200.0, tf32=100.0, memory=10.0, bandwidth=50.0, utilisation=0.5)
    held = memory.Stage("stage", None, 0, 0, weights=6, activations=4)
    one = cost.Cost(held, 0, "bf16", 3600 * 100, 3600 * 10)
    assert one.hours(chip) == 1.0 and replace(one, rate="tf32").hours(chip) == 2.0
    assert replace(one, bytes=3600 * 200).hours(chip) == 4.0
    assert one.memory == 10


@pytest.mark.parametrize("preset", ["nq320k", "msmarco"])
def test_the_table_names_every_stage_and_its_assumptions(preset):
    config = settings(preset)
    stages = ["dense rounds", "mining", "document embeddings", "codebooks and docids"]
    names = [one.held.name for one in cost.costs(config)]
    assert names == stages + 5 * ["training", "scans", "evaluation"]
    stages += [f"{d} {stage}" for d in ("D0", "D1..D4") for stage in ("training", "scans", "evaluation")]
    lines = cost.table(config).splitlines()
    assert [line[:22].strip() for line in lines[1 : lines.index("")]] == [*stages, "total"]
    assert all(line.endswith("A100, H100") for line in lines[1 : lines.index("")])
    for words in ("hours A100", "35%", "not measured", "BM25", "a query 10", "whatever --precision says"):
        assert words in "\n".join(lines)


def test_a_stage_that_does_not_fit_is_marked():
    lines = cost.table(settings(dense_batch=1024)).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(("dense rounds", "D0 training"))] == [
        "none",
        "H100",
    ]


def test_methods_without_a_mixture_scan_nothing():
    assert "scans" not in [stage for stage, _ in costs_by_stage(settings(**METHODS["base"]))]
    pt = costs_by_stage(settings(**METHODS["mixlora-dsi-pt"]))
    assert ("scans", 0) not in pt and ("scans", 1) in pt


def test_a_scan_by_a_model_with_lora_is_what_torch_counts():
    config = small_settings(attention_rank=3)
    net = memory.network(config)
    model = small_model(memory.mixture(config, 1), net).eval()
    add_attention_lora(model, 3)
    with torch.no_grad():
        flops = counted(lambda: scan.scan(model, scan.SourceCache(model, queries(cost.QUERY)), docids()))
    assert cost.scan(config, net, 1, B, 0) == flops


def test_scans_encode_each_query_and_each_dream_once(monkeypatch):
    """D_2's 41,136 pseudo-queries, half of them dreams, and 20,000 dreams; beside them each model's own scale."""
    monkeypatch.setattr(train, "FRESH_QUERIES", 2_743 * 2 + 9)  # twice each document, evenly
    monkeypatch.setattr(train, "YARDSTICK", 700)
    config = settings(dreams=20_000, ood_mode="pooled")
    stages, net = costs_by_stage(config), memory.network(config)

    def flops(t: int, asked: int, dreamt: int) -> float:
        each = [
            sum(cost.products(net, memory.mixture(config, t), 1, length, 8).values()) for length in (10, 6)
        ]
        return asked * each[0] + dreamt * each[1]

    assert stages["scans", 0].flops == flops(0, 2_743 * 2 + 9, 700)
    before = flops(1, 20_568, 20_568 + 20_000)
    assert stages["scans", 2].flops == before + flops(2, 2_743 * 2, 700)
    bare = costs_by_stage(settings())["scans", 2]
    assert bare.flops == flops(1, 41_136, 0) + flops(2, 2_743 * 2, 0)
    config = replace(config, general="boolq", dream_general=0.25, dream_style=0.0)  # 5,000 queries for dreams
    before = flops(1, 41_136 + 5_000, 15_000)
    assert costs_by_stage(config)["scans", 2].flops == before + flops(2, 2_743 * 2, 700)


def test_queries_and_dreams_of_a_batch_of_dream_share_their_padding():
    """R = 16: of 17 texts one is a query, half of which are dreams: (10 + 6) / 2 tokens and 16 times 6."""
    config = settings(**METHODS["dream"] | dict(batch=32))
    net, stages = memory.network(config), costs_by_stage(config)
    step = cost.docid_step(config, net, 1, 32, 20, (8 + 16 * 6) / 17)
    assert stages["training", 1].flops == stages["training", 1].steps * step
    assert ("scans", 1) in stages and ("scans", 0) not in stages


def test_general_text_is_embedded_mined_and_quantised_with_d0_in_place_of_fragments():
    n, bare, general = (
        7_128,
        costs_by_stage(settings(d0_fragments=2)),
        costs_by_stage(settings(general="boolq")),
    )
    net, d0 = memory.network(settings()), 98_743
    embedded = cost.embedding(net, 1, 256)
    difference = general["document embeddings", None].flops - bare["document embeddings", None].flops
    assert difference == (n - 2 * d0) * embedded
    mined, queries = general["mining", None].flops - bare["mining", None].flops, 276_493
    products = 2 * 768 * ((queries + n) * (d0 + n) - queries * d0)
    assert mined == n * (embedded + cost.embedding(net, 1, 10)) + products
    quantised = cost.quantiser(net, rq.BEAM, d0 + n, 109_715 + n)
    assert general["codebooks and docids", None].flops == quantised


def test_general_text_of_a_folder_has_the_size_of_its_corpus(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("\n".join(['{"_id": "a", "text": "b"}'] * 7_128) + "\n\n")
    assert cost.costs(settings(general=str(tmp_path))) == cost.costs(settings(general="boolq"))


def test_stages_that_a_run_skips_are_left_out():
    stages = costs_by_stage(settings(teacher="scores.jsonl", dense_warmup_steps=100))
    assert [name for name, _ in stages][:3] == ["dense warm-up", "dense rounds", "document embeddings"]
    config = settings(docids="docid_to_smtid.json")  # made elsewhere
    assert ("codebooks and docids", None) not in costs_by_stage(config)


def test_precision_and_device_of_this_machine_change_nothing():
    tables = {
        cost.table(settings(precision=p, device=d))
        for p, d in (("", ""), ("float32", "cpu"), ("bf16", "cuda"))
    }
    assert len(tables) == 1


def test_batches_are_those_of_the_code():
    embedded = inspect.signature(dense.embed).parameters["batch"].default
    assert embedded == memory.EMBED_BATCH


def test_the_command_prints_the_table_and_reads_nothing(capsys):
    flags = [
        "--data",
        "msmarco",
        "--teacher",
        "not there yet.jsonl",
    ]  # nor pseudo-queries, which a run would miss
    cost.main(flags)
    assert capsys.readouterr().out.strip() == cost.table(settings("msmarco", teacher=flags[-1])).strip()


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "nq320k or msmarco, not --data boolq"),
        (["--data", "nq320k", "--method", "dsi++"], "counts no --sam_rho"),
        (["--data", "nq320k", "--method", "base", "--steps", "100", "--joint"], "counts no --joint"),
        (["--data", "nq320k", "--method", "base", "--docid_kind", "pq"], "counts no --docid_kind pq"),
        (["--data", "nq320k", "--layers", "20"], "--layers 20: wanted at most --decoder_blocks 12"),
        (["--data", "nq320k", "--batch", "0"], "--batch 0: wanted a number from 1"),
        (["--data", "nq320k", "--epsilon", "7"], "--epsilon 7.0: wanted a number from 0 to 1"),
        (["--data", "nq320k", "--general", "texts"], "--general texts: found no texts/corpus.jsonl"),
    ],
)
def test_the_command_names_what_it_does_not_count(flags, said):
    with pytest.raises(ValueError, match=said):
        cost.main(flags)


def test_sizes_that_follow_from_d0_are_those_of_the_run(capsys):
    tables = []
    for sizes in ("0 0", "6 256"):
        m, k = sizes.split()
        cost.main(["--data", "nq320k", "--M", m, "--K", k])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
