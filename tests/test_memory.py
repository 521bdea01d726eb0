"""The estimate of memory against what autograd keeps, real modules' parameters and arithmetic by hand."""

import multiprocessing
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import memory
import train
import weights
from arrays import Tokens
from config import Config, parse
from memory import Stage, Workload
from mixlora import MixConfig, add_attention_lora, add_mixture, mixed_layers
from published import BENCHMARKS
from t5 import T5, T5Config

NET = T5Config(
    vocab=60, width=32, head_width=4, heads=4, feed_forward=48, encoder_blocks=3, decoder_blocks=4,
    codebooks=3, centroids=16,
)  # fmt: skip
MIX = MixConfig(layers=2, experts=3, rank=4)
NQ320K = Workload(BENCHMARKS["nq320k"].documents, 256)
T5_BASE = 235_464_960  # with 32,100 words: the paper's "235.4M"


def settings(*flags: str) -> Config:
    return parse(["--data", "nq320k", "--precision", "bf16", *flags]).config


def small_settings(**changes) -> Config:
    shape = dict(width=32, heads=8, feed_forward=48, encoder_blocks=3, decoder_blocks=4, vocab=60, M=3, K=16)
    return Config(**(shape | dict(layers=2, experts=2, lora_rank=4) | changes))


def stages(config) -> dict[tuple[str, int | None], Stage]:
    return {(stage.name, stage.t): stage for stage in memory.stages(config, NQ320K)}


# ------------------------------------------------------------------------------------------------- parameters


def on_meta(net: T5Config, mix: MixConfig | None = None) -> T5:
    with torch.device("meta"):
        model = T5(net)
        if mix:
            add_mixture(model, mix)
    return model


def count(*parts, training: bool = False) -> int:
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad or not training)


def test_parameters_of_t5_base_are_the_papers():
    parts = memory.parameters(T5Config(vocab=32_100), MixConfig(layers=1, experts=2))
    assert parts["mixture"] == 2 * (61_440 + 768)  # expert, router row
    assert parts["docids"] == 12_582_912
    assert sum(parts.values()) - parts["mixture"] == T5_BASE


@pytest.mark.parametrize("net", [NET, T5Config(), replace(NET, encoder_blocks=1, heads=2, buckets=8)])
@pytest.mark.parametrize("mix", [None, MIX])
def test_parameters_are_those_of_a_real_model(net, mix):
    model, parts = on_meta(net, mix), memory.parameters(net, mix)
    assert sum(parts.values()) == count(model)
    ends = [model.encoder_norm, model.encoder_bias, model.decoder_norm, model.decoder_bias]
    assert parts["blocks"] + parts["mixture"] == count(model.encoder, model.decoder, *ends)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    "expand, evolve", [("always", False), ("never", False), ("never", True), ("fixed", True)]
)
def test_trained_parameters_are_those_that_training_leaves_unfrozen(expand, evolve, rank):
    config = small_settings(expand=expand, evolve=evolve, attention_rank=rank)
    model, held = on_meta(memory.network(config), MixConfig(layers=2, experts=2, rank=4)), stages(config)
    model.word.requires_grad_(False)
    assert held["training", 0].trained == count(model, training=True)
    assert held["training", 0].parameters == count(model)
    for layer in mixed_layers(model):
        if expand != "fixed":
            layer.add_expert() if expand == "always" else layer.freeze(but=int(evolve))
    add_attention_lora(model, rank)
    train.freeze_old(model)
    assert held["training", 1].trained == count(model, training=True)
    assert held["training", 1].parameters == count(model)


def test_atomic_docids_have_a_row_for_each_document_and_no_quantiser():
    config = settings("--method", "base", "--docid_kind", "atomic", "--d0_fragments", "0")
    held = stages(config)
    plain, rows = (
        memory.parameters(memory.network(replace(config, M=1, K=n))) for n in (1, sum(NQ320K.documents))
    )
    assert held["training", 0].parameters == sum(rows.values()) > sum(plain.values())
    assert held["codebooks and docids", None].activations == 0


def test_base_trains_everything_and_pt_brings_its_mixture_with_d1():
    base, pt = settings("--method", "base"), settings("--method", "mixlora-dsi-pt")
    whole = sum(memory.parameters(memory.network(base)).values())
    assert [stages(base)["training", t].trained for t in (0, 1)] == [whole, whole]
    assert memory.mixture(base, 3) is None and memory.mixture(pt, 0) is None
    assert [memory.mixture(pt, t).experts for t in (1, 2, 4)] == [2, 3, 5]
    one = 5 * (61_440 + 768)  # an expert and its router row in each mixed layer
    trained = [stages(pt)["training", t].trained - 12_582_912 for t in (1, 2, 4)]
    assert trained == [2 * one, one, one]


def test_word_rows_follow_the_weights():
    assert memory.network(settings("--t5", "none", "--vocab", "500")).vocab == 500
    assert memory.network(settings("--t5", "folder")) == T5Config()


# ----------------------------------------------------------------------------------------------------- stages


def saved_bytes(model: T5, function) -> int:
    """Bytes of the tensors that autograd keeps for the backward, parameters and their casts apart.

    The CPU keeps a dropout mask as numbers, 0 or 1 / (1 - p); accelerators keep a byte each, counted so here.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}
    heads, head_width, width = model.config.heads, model.config.head_width, model.config.width
    shapes |= {(heads, head_width, width), (heads, width, head_width)}  # W_k and W_v by heads
    kept, held = {}, {}

    def pack(tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in weights and tensor.shape not in shapes:
            is_mask = tensor.is_floating_point() and len(tensor.unique()) == 2 and not tensor.min()
            held[key] = tensor.untyped_storage()  # so that no address is used twice
            kept[key] = tensor.numel() if is_mask else held[key].nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    del out
    return sum(kept.values())


@pytest.mark.parametrize("mix, tokens", [(None, 24), (MIX, 24), (None, 9)])
def test_activation_bytes_are_what_autograd_keeps(mix, tokens):
    """Within 5%: left out is what has one number per token, counted the bias, which is merely alive. Beside longer
    queries dreams are of 9 tokens and padding.
    """
    net = replace(NET, width=64, head_width=16, feed_forward=256)
    torch.manual_seed(0)
    model = T5(net)
    if mix:
        add_mixture(model, mix)
    model.train()
    ids, codes = torch.randint(1, 60, (8, 24)), torch.randint(16, (8, 3))
    ids[:, tokens:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        whole = saved_bytes(model, lambda: model.docid_hidden(*model.encode(ids), codes))
        source = [tensor.detach() for tensor in model.encode(ids)]
        alone = saved_bytes(model, lambda: model.docid_hidden(*source, codes))
    assert 8 * memory.kept(net, mix, 24, 3, tokens=tokens) == pytest.approx(whole, rel=0.05)
    assert 8 * memory.kept(net, mix, 24, 3, encode=False) == pytest.approx(alone, rel=0.05)


def test_lora_on_attention_keeps_what_a_decoder_that_trains_alone_does():
    """Its W + B A aside, of which there is one for a batch."""
    net = replace(NET, width=64, head_width=16, feed_forward=256)
    torch.manual_seed(0)
    model = T5(net)
    add_attention_lora(model, 4)
    train.freeze_old(model.train())
    codes, (source, padding) = torch.randint(16, (8, 3)), model.encode(torch.randint(1, 60, (8, 24)))
    with torch.autocast("cpu", torch.bfloat16):
        held = saved_bytes(model, lambda: model.docid_hidden(source.detach(), padding, codes))
    assert held <= 8 * memory.kept(net, None, 24, 3, encode=False) < 1.4 * held


def test_dreams_beside_each_new_query_are_held_with_it():
    """By hand: 16 dreams beside each of 32 queries; `dream` trains an encoder that sees 9 tokens of each."""
    ours, bare = (settings("--dreams", dreams, "--dream_batch", "512") for dreams in ("20000", "0"))
    net, difference = memory.network(ours), {}
    for t in (0, 1):
        held, without = (stages(config)["training", t] for config in (ours, bare))
        difference[t] = held.activations - without.activations
        assert held.weights == without.weights
    each = memory.kept(net, memory.mixture(ours, 1), 20, 8, encode=False)
    assert difference == {0: 0, 1: 32 * 16 * (each + 14 * 2 * 8 * 2048)}
    whole = settings("--method", "dream", "--batch", "32")
    asked, dreamt = (memory.kept(net, None, 20, 8, tokens=tokens) for tokens in (20, 9))
    logits = 8 * 2048
    assert stages(whole)["training", 1].activations == 32 * (
        asked + 14 * logits + 16 * (dreamt + 28 * logits)
    )
    assert ("scans", 1) in stages(whole) and ("scans", 0) not in stages(whole)
    rehearsed = stages(replace(whole, rehearsal=True))["training", 1]  # old queries, as long as new ones
    assert rehearsed.activations == 32 * (17 * asked + (14 + 16 * 28) * logits)


def test_general_text_is_analysed_and_quantised_with_d0():
    """7,128 pages beside 1,551, as of the default stream: 80 bytes of each piece, 16 of each factor; points of D."""
    config = small_settings(t5="", vocab=8000, width=128, rq_pseudo=24)
    (bare, held), points = (
        (
            {stage.name: stage for stage in memory.stages(config, Workload((1551, 258), 256, general))}
            for general in (0, 7128)
        ),
        [1551 * 25, 1551 * 25 + 7128],
    )
    name = "latent semantic analysis"
    assert held[name].weights - bare[name].weights == 80 * 7128 * 256 + 16 * 7128 * 128
    name = "codebooks and docids"
    quantised = [4 * 128 * (n + 3 * min(5 * n, 200_000)) for n in points]
    assert [bare[name].activations, held[name].activations] == quantised


def test_recomputation_keeps_the_inputs_of_blocks_and_one_whole_block():
    """By hand, with D = 768 and S = 20: 12 blocks' inputs in float32, the largest block, what lies around them."""
    net = replace(T5Config(), decoder_blocks=1)
    block = 20 * (15 + 8 + 11) * 768 + 20 * 5 * 3072 + 7 * 12 * 20 * 20
    inputs = 4 * 768 * (12 * 20 + 1 * 1)
    around = 14 * 768 * (20 + 1) + 4 * 12 * 20 * 20
    assert memory.kept(net, None, 20, 1, recompute=True) == block + inputs + around


def test_gradients_and_moments_are_of_the_trained_parameters_alone():
    held = stages(settings())
    trained = 12_582_912 + 5 * (61_440 + 768)  # docid table, one expert and router row per layer
    whole = T5_BASE + 5 * 3 * (61_440 + 768)
    assert held["training", 1].weights == (4 + 2) * whole + 12 * trained  # float32 and bfloat16; three more
    assert held["scans", 1].weights == 4 * whole


def test_ewc_and_sam_hold_copies_of_the_weights():
    """CLEVER on D_3 holds F and theta of two corpora (of three with D_0), DSI++ the weights before its climb."""

    def held(*flags) -> float:
        return stages(settings(*flags))["training", 3].weights

    base = held("--method", "base")
    n = stages(settings("--method", "base"))["training", 3].parameters
    assert held("--method", "clever") - base == 2 * 8 * n
    assert held("--method", "clever", "--ewc_protect_d0") - base == 3 * 8 * n
    assert held("--method", "dsi++") - base == 4 * n


def test_a_wide_search_holds_keys_and_values_of_all_its_beams():
    """A beam more: M positions, held twice, in 12 blocks, of keys and values of 768 float32."""
    ten, hundred = (stages(settings("--beam", str(beam)))["evaluation", 0] for beam in (10, 100))
    caches = 128 * 90 * 8 * 2 * 12 * 2 * 768 * 4
    assert 1 < (hundred.activations - ten.activations) / caches < 1.5


def peak_of_lsa(documents: Tokens, width: int, answer) -> None:
    """Puts how far this process's memory peaks above what it held before, in bytes."""

    def held(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    torch.set_num_threads(1)
    model = T5(T5Config(8000, width, 16, width // 16, 64, 1, 1, codebooks=1, centroids=2))
    weights.start_from_lsa(
        model, documents.of(documents.batch(torch.arange(99)))
    )  # loads what products ask for
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = held("VmRSS")
    weights.start_from_lsa(model, documents)
    answer.put(held("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
def test_latent_semantic_analysis_takes_the_memory_that_is_counted():
    """30 distinct pieces in each of 20,000 documents. A dense matrix would take 640 MB, here or in the estimate."""
    flat = np.random.default_rng(0).integers(1, 8000, 600_000).astype(np.uint16)
    ends = np.arange(1, 20_001) * 30
    spawn, config = multiprocessing.get_context("spawn"), small_settings(t5="", vocab=8000, width=64)
    answer = spawn.SimpleQueue()
    process = spawn.Process(
        target=peak_of_lsa, args=(Tokens(flat, np.stack([ends - 30, ends], 1)), 64, answer)
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0
    peak = answer.get()
    held = {stage.name: stage for stage in memory.stages(config, Workload((20_000,), 30))}
    stage = held["latent semantic analysis"]
    assert 0.3 < peak / (stage.weights - 4 * stage.parameters) < 1.1


def test_latent_semantic_analysis_is_counted_where_no_published_weights_are_read():
    """By hand: 2,000 documents of at most 64 tokens, 8,000 pieces, D = 768."""
    config = settings("--t5", "none", "--document_length", "64")
    stage = next(memory.stages(config, Workload((2_000, 9), 100)))
    held = 4 * stage.parameters + 80 * 2_000 * 64 + 16 * (2_000 + 8_000) * 768
    assert (stage.name, stage.weights, stage.activations) == ("latent semantic analysis", held, 0)
    assert "latent semantic analysis" not in {stage.name for stage in memory.stages(settings(), NQ320K)}


def test_a_d0_whose_latent_semantic_analysis_cannot_fit_says_so():
    config, workload = small_settings(t5="", precision="float32"), Workload((5_000_000, 10), 256)
    with pytest.raises(ValueError, match="latent semantic analysis needs about .* take a smaller T5 or D_0"):
        memory.require_memory(config, workload, 90e9, "cpu")
    memory.require_memory(config, workload, 110e9, "cpu")


# ------------------------------------------------------------------------------------------- what a machine has


def require(config, available: float, where: str = "cpu") -> None:
    memory.require_memory(config, NQ320K, available, where)


@pytest.mark.parametrize("gib", [40, 12, 6])
def test_a_run_that_cannot_fit_says_so_and_the_flags_that_it_names_make_it_fit(gib):
    message = f"dense rounds needs about 48.9 GiB, cuda:0 has {gib}.0 GiB free"
    with pytest.raises(ValueError, match=message) as error:
        require(settings(), gib * 2**30, "cuda:0")
    flags = re.search(r"pass (--micro_batch \d+(?: --recompute)?)", str(error.value))[1].split()
    require(settings(*flags), gib * 2**30)
    larger = str(2 * int(flags[1]))  # and the next larger micro-batch would not fit
    with pytest.raises(ValueError, match="needs about"):
        require(settings("--micro_batch", larger, *flags[2:]), gib * 2**30)


def test_where_no_micro_batch_fits_a_larger_machine_is_named():
    with pytest.raises(ValueError, match=r"a machine with \d+\.\d GiB, or --no-check_memory"):
        require(settings(), 2**30)


def test_float32_activations_count_twice():
    activations = max(stage.activations for stage in stages(settings()).values())
    weights = stages(settings())["dense rounds", None].weights
    require(settings("--precision", "float32"), weights + 2 * activations)
    with pytest.raises(ValueError, match="dense rounds needs"):
        require(settings("--precision", "float32"), weights + 2 * activations - 1)


def test_the_machine_s_free_memory_is_between_nothing_and_all_of_it():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.free_memory("cpu") <= total


def test_of_a_run_that_goes_on_only_the_stages_that_are_left_must_fit():
    with pytest.raises(ValueError, match="dense rounds needs about"):
        require(settings(), 6 * 2**30)
    memory.require_memory(settings(), NQ320K, 6 * 2**30, "cpu", left=4)
    with pytest.raises(ValueError, match="D_0|training needs about|evaluation needs about"):
        memory.require_memory(settings(), NQ320K, 6 * 2**30, "cpu", left=5)


def test_joint_retraining_takes_d_0_s_batches_at_every_corpus():
    found = stages(settings("--method", "joint", "--steps", "100"))
    assert len({found["training", t].activations for t in range(5)}) == 1
