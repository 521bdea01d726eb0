"""The written-out T5 against transformers' on the same random weights, its file reader, its properties."""

import json
import math
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import t5
from t5 import T5, Attention, RMSNorm, T5Config, load_published, read_published, segment_logits, to_published

DATA = Path(os.environ.get("MIXLORA_DATA") or Path(t5.__file__).parent.parent / "shared" / "data")

# V, D, Dh, H, F, encoder and decoder blocks, by the names of T5Config and of transformers' T5Config
OURS = ("vocab", "width", "head_width", "heads", "feed_forward", "encoder_blocks", "decoder_blocks")
THEIRS = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers", "num_decoder_layers")
TINY = (30, 12, 5, 3, 20, 2, 3)
V1_1 = {"gated": True, "tied": False}
SHAPES = {  # the published networks, and the number of their parameters
    "t5-small": ((32128, 512, 64, 8, 2048, 6, 6), {}, 60_506_624),
    "t5-base": ((32128, 768, 64, 12, 3072, 12, 12), {}, 222_903_552),
    "t5-large": ((32128, 1024, 64, 16, 4096, 24, 24), {}, 737_668_096),
    "t5-3b": ((32128, 1024, 128, 32, 16384, 24, 24), {}, 2_851_598_336),
    "t5-v1_1-small": ((32128, 512, 64, 6, 1024, 8, 8), V1_1, 76_961_152),
    "t5-v1_1-base": ((32128, 768, 64, 12, 2048, 12, 12), V1_1, 247_577_856),
    "t5-v1_1-large": ((32128, 1024, 64, 16, 2816, 24, 24), V1_1, 783_150_080),
    "t5-v1_1-xl": ((32128, 2048, 64, 32, 5120, 24, 24), V1_1, 2_849_757_184),
}
PADDING = 32_128 - 32_100  # rows of a published table that belong to no piece


def shape(sizes: tuple, codebooks: int = 4, centroids: int = 6, **changes) -> T5Config:
    sizes = dict(zip(OURS, sizes))
    vocab = t5.our_rows(sizes.pop("vocab"))
    return T5Config(vocab=vocab, **sizes, codebooks=codebooks, centroids=centroids, **changes)


def on_meta(sizes: tuple, gated: bool = False, tied: bool = True):
    """A transformers T5 without memory for its weights: v1.0, or v1.1 where gated and untied."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        **dict(zip(THEIRS, sizes)),
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):  # skips transformers' own, slower initialisation
        model = transformers.T5ForConditionalGeneration(config)
    untie(model)
    return model


def untie(model) -> None:
    """Gives the model a head of its own where its config wants one: transformers 5 shares the word table."""
    if not model.config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))


def reference(sizes: tuple = TINY, **kind):
    """A transformers T5 with random weights everywhere, norms and position biases too, in evaluation mode."""
    model = on_meta(sizes, **kind).to_empty(device="cpu").eval()
    model.tie_weights()
    untie(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1, 0.3)
            elif "relative_attention_bias" in key:
                weight.normal_()
            elif "shared" not in key:
                d_kv = model.config.d_kv if key.endswith(".q.weight") else 1  # no division by sqrt(Dh) inside
                weight.normal_(0, (weight.shape[1] * d_kv) ** -0.5)
            else:
                weight.normal_()
    return model


def blank(sizes: tuple = TINY, **kind) -> T5:
    """Our T5 with nan in all tensors, so that a tensor that is never loaded shows."""
    with torch.device("meta"):
        model = T5(shape(sizes, **kind))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    return model


@pytest.fixture(scope="module", params=["t5-small", "t5-base", "t5-v1_1-small"])
def pair(request):
    """A transformers T5 and ours with the same weights, loaded by name."""
    sizes, kind, _ = SHAPES[request.param]
    if request.param != "t5-small":
        sizes = (1000, *sizes[1:])  # saves memory
    hf, ours = reference(sizes, **kind), blank(sizes, **kind)
    load_published(ours, hf.state_dict())
    return hf, ours


def logits_of(hf, *args, **kwargs):
    """Logits by transformers, without those of the words that are none."""
    return hf(*args, **kwargs).logits[..., : t5.our_rows(hf.config.vocab_size)]


@pytest.fixture
def tiny() -> T5:
    """A small random T5 with M=4 codebooks of K=6, in evaluation mode."""
    torch.manual_seed(1)
    return T5(shape(TINY)).eval()


def batch(vocab: int, lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Random token ids (B, S) of these lengths, padded with 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    return ids * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


# --------------------------------------------------------------------------------------- against transformers


@torch.no_grad()
def test_states_and_logits_equal_transformers_with_padding(pair):
    hf, ours = pair
    ids = batch(1000, [1, 9, 140] if hf.config.num_layers < 12 else [1, 9, 36])
    words = batch(1000, [25, 25, 25], seed=1)  # past the offsets where the two directions share their buckets
    want = hf(ids, attention_mask=ids != 0, decoder_input_ids=words, output_hidden_states=True)

    source, padding = ours.encode(ids)
    hidden, _, routes = ours.decode(ours.word[words], ours.cross_keys_values(source), padding)
    assert (source - want.encoder_last_hidden_state)[ids != 0].abs().max() < 1e-5
    assert (source[ids == 0] == 0).all()
    assert (hidden - want.decoder_hidden_states[-1]).abs().max() < 1e-5
    want = want.logits[..., : ours.config.vocab]
    assert (ours.word_logits(hidden) - want).abs().max() < 1e-5
    assert want.std() > 0.5 and routes == []  # the logits compared are not all near zero


@torch.no_grad()
def test_cached_decoding_equals_transformers_with_and_without_its_cache(pair):
    hf, ours = pair
    ids, words = batch(1000, [12, 5]), batch(1000, [6, 6], seed=1)
    at_once = logits_of(hf, ids, attention_mask=ids != 0, decoder_input_ids=words)
    encoded, cache, theirs = hf.encoder(ids, attention_mask=ids != 0), None, []
    for t in range(6):
        step = hf(
            encoder_outputs=encoded, attention_mask=ids != 0, decoder_input_ids=words[:, t : t + 1],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = step.past_key_values
        theirs.append(step.logits[..., : ours.config.vocab])

    source, padding = ours.encode(ids)
    cross = ours.cross_keys_values(source)
    for pieces in ([1] * 6, [3, 2, 1]):
        past, logits = None, []
        for part in words.split(pieces, dim=1):
            hidden, past, _ = ours.decode(ours.word[part], cross, padding, past)
            logits.append(ours.word_logits(hidden))
        assert (torch.cat(logits, 1) - at_once).abs().max() < 1e-5
        assert (torch.cat(logits, 1) - torch.cat(theirs, 1)).abs().max() < 1e-5


@torch.no_grad()
def test_embed_is_the_first_decoder_state_of_transformers(pair):
    hf, ours = pair
    ids = batch(1000, [11, 4], seed=2)
    start = torch.zeros(2, 1, dtype=torch.long)
    want = hf(ids, attention_mask=ids != 0, decoder_input_ids=start, output_hidden_states=True)
    assert (ours.embed(ids) - want.decoder_hidden_states[-1][:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape_has_as_many_parameters_as_transformers(name):
    sizes, kind, published = SHAPES[name]
    with torch.device("meta"):
        ours = T5(shape(sizes, **kind))
    theirs = on_meta(sizes, **kind)
    tables = 1 if ours.head is None else 2
    count = sum(w.numel() for w in ours.parameters()) - ours.rq.numel() + tables * PADDING * ours.config.width
    assert count == sum(w.numel() for w in theirs.parameters()) == published


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_a_published_width_gives_the_logits_of_transformers(name, tmp_path):
    """One block a stack at full width, by way of the files that transformers writes and we read."""
    (_, *widths, _, _), kind, _ = SHAPES[name]
    hf = reference((512, *widths, 1, 1), **kind)
    hf.save_pretrained(tmp_path)
    ours = read_published(tmp_path, codebooks=1, centroids=2).eval()
    (tmp_path / "model.safetensors").unlink()
    ids, words = batch(512, [1, 9, 40]), batch(512, [7, 7, 7], seed=1)
    want = hf(ids, attention_mask=ids != 0, decoder_input_ids=words).logits
    source, padding = ours.encode(ids)
    hidden, _, _ = ours.decode(ours.word[words], ours.cross_keys_values(source), padding)
    # Weights are drawn so that logits are of the order 1 at every width; float32 sums of 16,384 terms differ
    # by some 1e-6 with the order of the terms.
    assert 0.5 < want.std() < 2
    assert (ours.word_logits(hidden) - want).abs().max() < 1e-5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (12, 50)])
def test_relative_bucket_equals_transformers(bidirectional, buckets, max_distance):
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention._relative_position_bucket
    offset = torch.arange(-700, 701).reshape(3, -1)
    ours = t5.relative_bucket(offset, bidirectional, buckets, max_distance)
    assert torch.equal(ours, theirs(offset, bidirectional, buckets, max_distance))


def test_relative_bucket_on_hand_worked_offsets():
    offset = torch.tensor([-500, -128, -91, -32, -16, -8, -7, -1, 0, 1, 7, 8, 16, 128])
    # encoder: n < 8 exact, else 8 + floor(8 ln(n / 8) / ln 16), at most 15; 16 more for keys to the right
    both = torch.tensor([15, 15, 15, 12, 10, 8, 7, 1, 0, 17, 23, 24, 26, 31])
    # decoder: n < 16 exact, else 16 + floor(16 ln(n / 16) / ln 8), at most 31; what lies ahead counts as 0
    back = torch.tensor([31, 31, 29, 21, 16, 8, 7, 1, 0, 0, 0, 0, 0, 0])
    assert torch.equal(t5.relative_bucket(offset, True, 32, 128), both)
    assert torch.equal(t5.relative_bucket(offset, False, 32, 128), back)


# -------------------------------------------------------------------------------------------- published files


KINDS = [{"gated": gated, "tied": tied} for gated in (False, True) for tied in (True, False)]


@pytest.mark.parametrize("kind", KINDS)
def test_to_published_gives_back_every_tensor_of_transformers_bit_equal(kind):
    hf, ours = reference(**kind), blank(**kind)
    load_published(ours, hf.state_dict())
    back = to_published(ours)
    copies = t5.COPIES if kind["tied"] else t5.COPIES - {"lm_head.weight"}
    assert set(hf.state_dict()) - set(back) == copies and not set(back) - set(hf.state_dict())
    assert all(torch.equal(back[name], hf.state_dict()[name]) for name in back)
    assert ours.rq.isnan().all() and all(not w.isnan().any() for n, w in ours.named_parameters() if n != "rq")

    other = reference(**kind)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert not other.load_state_dict(back, strict=False).unexpected_keys
    ids, words = batch(30, [5, 3]), batch(30, [4, 4], seed=1)
    assert torch.equal(other(ids, decoder_input_ids=words).logits, hf(ids, decoder_input_ids=words).logits)


@pytest.mark.parametrize("zipped", [True, False])  # torch.save's format, and the one before 2020's 1.6
@pytest.mark.parametrize("kind", KINDS)
def test_read_published_reads_what_transformers_wrote(tmp_path, kind, zipped):
    hf = reference(**kind)
    hf.save_pretrained(tmp_path)
    from_safetensors = read_published(tmp_path, codebooks=4, centroids=6)
    (tmp_path / "model.safetensors").unlink()
    weights = tmp_path / "pytorch_model.bin"
    torch.save(hf.state_dict(), weights, _use_new_zipfile_serialization=zipped)
    from_bin = read_published(tmp_path, codebooks=4, centroids=6, dropout=0.25)

    for model, dropout in ((from_safetensors, 0.1), (from_bin, 0.25)):
        assert model.config == shape(TINY, dropout=dropout, **kind)
        published = to_published(model)
        assert all(torch.equal(published[name], hf.state_dict()[name]) for name in published)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_widened_to_the_same_values(tmp_path, dtype):
    save_file = pytest.importorskip("safetensors.torch").save_file
    hf = reference()
    hf.save_pretrained(tmp_path)
    halves = {
        name: w.detach().to(dtype).clone() for name, w in hf.state_dict().items() if name not in t5.COPIES
    }
    save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    published = to_published(read_published(tmp_path, 2, 3))
    assert all(torch.equal(published[name], halves[name].float()) for name in halves)


def test_copies_of_the_word_table_and_the_stray_bias_are_accepted():
    hf = reference()
    tensors = hf.state_dict()
    assert set(tensors) >= t5.COPIES
    tensors[t5.STRAY] = torch.randn(32, 3)  # t5-small's and t5-base's files hold it
    ours = blank()
    load_published(ours, tensors)
    assert torch.equal(ours.word, hf.shared.weight)

    del tensors["shared.weight"]  # a writer that drops copies may keep another of the four names
    again = blank()
    load_published(again, tensors)
    assert torch.equal(again.word, hf.shared.weight)


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "encoder.block.1.layer.1.DenseReluDense.wo.weight",
            None,
            "missing .*block.1.layer.1.DenseReluDense.wo",
        ),
        ("decoder.final_layer_norm.weight", None, "missing .*decoder.final_layer_norm"),
        ("decoder.block.3.layer.0.layer_norm.weight", torch.ones(12), "unknown .*decoder.block.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", torch.ones(20, 12), "unknown .*wi_0"),
        (
            "decoder.block.0.layer.0.SelfAttention.q.weight",
            torch.ones(12, 15),
            r"\(12, 15\), wanted \(15, 12\)",
        ),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            torch.ones(32, 1),
            r"\(32, 3\)",
        ),
        ("lm_head.weight", torch.ones(30, 12), "lm_head.weight differs from shared.weight"),
        ("encoder.embed_tokens.weight", torch.ones(30, 12), "encoder.embed_tokens.weight differs"),
    ],
)
def test_every_tensor_is_accounted_for(name, value, message):
    hf = reference()
    tensors = hf.state_dict() | {name: value}
    if value is None:
        del tensors[name]
    with pytest.raises(ValueError, match=message):
        load_published(blank(), tensors)


def test_a_word_table_of_another_size_is_refused():
    hf = reference()
    tensors = {name: w for name, w in hf.state_dict().items() if name not in t5.COPIES}
    with pytest.raises(ValueError, match=r"shared.weight has shape \(29, 12\), wanted \(30, 12\)"):
        load_published(blank(), tensors | {"shared.weight": tensors["shared.weight"][:29]})


# What the files of the hub hold of the keys that tell v1.0 from v1.1; transformers has changed them over time.
TOLD = ("feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings", "scale_decoder_outputs")
GATED = {"feed_forward_proj": "gated-gelu"}


@pytest.mark.parametrize(
    "told, kind",
    [
        ({}, {}),  # t5-base
        ({"feed_forward_proj": "relu", "dense_act_fn": "relu", "tie_word_embeddings": True}, {}),
        (GATED | {"tie_word_embeddings": False}, V1_1),  # t5-v1_1-base
        (GATED | {"dense_act_fn": "gelu_new", "is_gated_act": True, "tie_word_embeddings": False}, V1_1),
        (GATED | {"tie_word_embeddings": True, "scale_decoder_outputs": False}, V1_1),  # transformers 5
        (GATED, {"gated": True}),
    ],
)
def test_config_keys_of_all_ages_tell_the_network(tmp_path, told, kind):
    hf = reference(**kind)
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rest = {key: value for key, value in config.items() if key not in TOLD}
    (tmp_path / "config.json").write_text(json.dumps(rest | told))
    model = read_published(tmp_path, 4, 6)
    assert model.config == shape(TINY, **kind)
    assert all(torch.equal(value, hf.state_dict()[name]) for name, value in to_published(model).items())


@pytest.mark.parametrize(
    "edit, message",
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn='silu'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, "scale_decoder_outputs=True"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path, edit, message):
    reference().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | edit))
    with pytest.raises(ValueError, match=f"config.json: not the config of a T5 v1.0 or v1.1 .*{message}"):
        read_published(tmp_path, 2, 3)


def test_a_shared_table_without_the_scale_becomes_a_head_equal_to_it(tmp_path):
    """What transformers 5 writes for a v1.1 that it never untied."""
    hf = reference(**V1_1)
    hf.lm_head.weight = hf.shared.weight
    hf.save_pretrained(tmp_path)
    ours = read_published(tmp_path, 4, 6).eval()
    assert not ours.config.tied and torch.equal(ours.head, ours.word)
    ids, words = batch(30, [5, 3]), batch(30, [4, 4], seed=1)
    with torch.no_grad():
        source, padding = ours.encode(ids)
        hidden, _, _ = ours.decode(ours.word[words], ours.cross_keys_values(source), padding)
        want = hf(ids, attention_mask=ids != 0, decoder_input_ids=words).logits
        torch.testing.assert_close(ours.word_logits(hidden), want, atol=1e-4, rtol=1e-5)

    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing .*lm_head.weight"):
        read_published(tmp_path, 4, 6)


@pytest.mark.parametrize("rows, kept", [(32_128, 32_100), (32_100, 32_100), (32_000, 32_000), (30, 30)])
def test_only_a_table_of_32128_rows_loses_its_padding(rows, kept):
    assert t5.our_rows(rows) == kept
    assert t5.published_rows(kept) == (32_128 if kept == 32_100 else kept)


def test_padding_rows_are_cut_from_both_tables_and_come_back_as_zeros():
    sizes = (32_128, *TINY[1:])
    hf = reference(sizes, **V1_1)
    ours = blank(sizes, **V1_1)
    load_published(ours, hf.state_dict())
    back = to_published(ours)
    for table, name in ((ours.word, "shared.weight"), (ours.head, "lm_head.weight")):
        assert torch.equal(table, hf.state_dict()[name][:32_100])
        assert torch.equal(back[name][:32_100], table) and back[name].shape == (32_128, 12)
        assert not back[name][32_100:].any()
    hf.load_state_dict(back, strict=False)
    ids, words = batch(32_100, [5, 3]), batch(32_100, [4, 4], seed=1)
    with torch.no_grad():
        source, padding = ours.eval().encode(ids)
        hidden, _, _ = ours.decode(ours.word[words], ours.cross_keys_values(source), padding)
        want = logits_of(hf, ids, attention_mask=ids != 0, decoder_input_ids=words)
    assert (ours.word_logits(hidden) - want).abs().max() < 1e-5


def test_safetensors_are_mapped_and_writes_stay_out_of_the_file(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).half()}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    tensors = t5.read_safetensors(tmp_path / "x")
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3)) and tensors["b"].dtype == torch.float16
    tensors["a"].zero_()
    assert not tensors["a"].any() and (tmp_path / "x").read_bytes() == before

    save_file({"w": torch.zeros(2**24)}, tmp_path / "large")  # 64 MB
    tracemalloc.start()
    large = t5.read_safetensors(tmp_path / "large")["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(large) == 2**24 and peak < 2**20


def test_a_missing_config_or_weight_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"found no .*config"):
        read_published(tmp_path, 2, 3)
    reference().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin"):
        read_published(tmp_path, 2, 3)


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    reference().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 1, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
            read_published(tmp_path, 2, 3)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_bin_cut_anywhere_is_refused(tmp_path, zipped):
    reference().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(reference().state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pytorch_model.bin: cannot be read .*fetch it again"):
            read_published(tmp_path, 2, 3)


def test_safetensors_of_integers_are_refused(tmp_path):
    pytest.importorskip("safetensors.torch").save_file(
        {"shared.weight": torch.ones(2, 2).long()}, tmp_path / "a"
    )
    with pytest.raises(ValueError, match="I64"):
        t5.read_safetensors(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------- by hand


def test_rms_norm_divides_by_the_root_mean_square_without_centring():
    norm = RMSNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    x = torch.tensor(
        [[1.0, 1.0, 5.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    )  # mean square 36 / 4 = 9; the zero row stays zero
    want = torch.tensor([[1 / 3, 2 / 3, -5 / 3, 0.5], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(norm(x), want, atol=1e-6, rtol=0)
    assert norm(torch.full((1, 4), 1e-3)).abs().max() < 1.5  # epsilon 1e-6 counts: 2 / sqrt(2), not 2
    large = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    assert torch.equal(norm(large), norm.weight[None].half())


def test_attention_by_hand_has_no_square_root_and_takes_the_bias():
    attention = Attention(shape((30, 4, 4, 1, 20, 1, 1))).eval()
    with torch.no_grad():
        for weight in attention.parameters():
            weight.copy_(torch.eye(4))
    query, key = torch.tensor([[[1.0, 0, 0, 0]]]), torch.tensor([[[math.log(3), 0, 0, 0], [0, 0, 0, 1.0]]])
    # scores (ln 3, 0) give weights 3/4 and 1/4; a bias of ln 3 on the second key makes them equal
    out = attention(query, *attention.keys_values(key), torch.zeros(1))
    torch.testing.assert_close(out, (0.75 * key[:, :1] + 0.25 * key[:, 1:]))
    out = attention(query, *attention.keys_values(key), torch.tensor([0, math.log(3)]))
    torch.testing.assert_close(out, key.mean(1, keepdim=True))


@torch.no_grad()
def test_segment_logits_are_the_slices_of_the_full_product(tiny):
    hidden = torch.randn(3, 4, 12)
    full = hidden @ tiny.rq.flatten(0, 1).T  # (3, 4, M * K), what one extended vocabulary would give
    want = torch.stack([full[:, m, 6 * m : 6 * m + 6] for m in range(4)], dim=1)
    torch.testing.assert_close(segment_logits(hidden, tiny.rq), want)
    torch.testing.assert_close(segment_logits(hidden[:, 2:3], tiny.rq[2:3]), want[:, 2:3])


@torch.no_grad()
def test_docid_inputs_are_the_start_row_and_all_codes_but_the_last(tiny):
    codes = torch.tensor([[5, 0, 3, 1], [2, 2, 4, 0]])
    want = [
        [tiny.word[0], tiny.rq[0, 5], tiny.rq[1, 0], tiny.rq[2, 3]],
        [tiny.word[0], tiny.rq[0, 2], tiny.rq[1, 2], tiny.rq[2, 4]],
    ]
    assert torch.equal(tiny.docid_inputs(codes), torch.stack([torch.stack(row) for row in want]))
    assert torch.equal(tiny.docid_inputs(codes[:, :1]), tiny.start(2))


def test_t5_base_with_the_papers_docid_table_has_235_million_parameters():
    with torch.device("meta"):
        model = T5(T5Config())
    total = sum(w.numel() for w in model.parameters())
    assert (len(model.word), model.rq.numel()) == (32_100, 12_582_912)
    assert len(model.word) + 8 * 2048 == 48_484  # the rows of the released code's one table
    assert total == 235_464_960 and total // 100_000 == 2354  # the paper's 235.4 M, cut and not rounded


def test_gated_feed_forward_by_hand():
    layer = t5.FeedForward(shape((30, 2, 1, 1, 2, 1, 1), gated=True)).eval()
    with torch.no_grad():
        layer.w_in.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.w_linear.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        layer.w_out.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    x, y = 0.5, -1.5

    def gelu(v: float) -> float:
        return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    u = [gelu(x) * 2 * x, gelu(y) * 3 * y]
    want = torch.tensor([[[u[0], u[0] + u[1]]]])
    torch.testing.assert_close(layer(torch.tensor([[[x, y]]]))[0], want)
    inner, x_y = torch.tensor([[[x + 1, y]]]), torch.tensor([[[x, y]]])  # as with an expert's delta added
    u[0] = gelu(x + 1) * 2 * x  # it goes into the GELU, not into the linear branch
    torch.testing.assert_close(layer.activate(inner, x_y), torch.tensor([[u]]))


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_zeroes_hidden_units_and_rescales_the_others(gated):
    torch.manual_seed(0)
    layer = t5.FeedForward(shape((30, 8, 2, 2, 50, 1, 1), gated=gated, dropout=0.5))
    x = torch.randn(4, 5, 8)
    plain, dropped = layer.eval().hidden(x), layer.train().hidden(x)
    kept = (dropped - 2 * plain).abs() < 1e-5
    assert (kept | (dropped == 0)).all() and 0.4 < dropped[
        plain != 0
    ].count_nonzero() / plain.count_nonzero() < 0.6


@torch.no_grad()
def test_word_logits_are_scaled_only_where_the_head_is_tied(tiny):
    hidden = torch.randn(2, 3, 12)
    torch.testing.assert_close(tiny.word_logits(hidden), hidden @ tiny.word.T / math.sqrt(12))
    untied = T5(shape(TINY, tied=False)).eval()
    torch.testing.assert_close(untied.word_logits(hidden), hidden @ untied.head.T)
    assert {n for n, _ in untied.named_parameters()} - {n for n, _ in tiny.named_parameters()} == {"head"}


@pytest.mark.parametrize(
    "edit",
    [
        {"width": 0},
        {"heads": -1},
        {"feed_forward": 2.5},
        {"codebooks": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"gated": 1},
        {"tied": None},
        {"heads": True},
    ],
)
def test_config_names_the_field_that_is_no_shape(edit):
    (field, value), *_ = edit.items()
    with pytest.raises(ValueError, match=f"{field}={value}"):
        T5Config(**edit)


# ------------------------------------------------------------------------------------------------- properties


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_later_code_leaves_earlier_hidden_states_bit_equal(tiny, place):
    source, padding = tiny.encode(batch(30, [6, 2]))
    codes = torch.tensor([[5, 0, 3, 1], [2, 2, 4, 0]])
    other = codes.clone()
    other[:, place] = (other[:, place] + 1) % 6
    a, b = (tiny.docid_hidden(source, padding, c)[0] for c in (codes, other))
    assert torch.equal(a[:, : place + 1], b[:, : place + 1])  # code m is an input of position m + 1 only
    assert all(not torch.equal(a[:, t], b[:, t]) for t in range(place + 1, 4))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 30))
def test_padding_columns_change_no_output(lengths, extra):
    torch.manual_seed(1)
    model = T5(shape(TINY)).eval()
    ids = batch(30, lengths)
    codes = torch.randint(6, (len(lengths), 4))
    with torch.no_grad():
        (source, padding), (source2, padding2) = model.encode(ids), model.encode(F.pad(ids, (0, extra)))
        torch.testing.assert_close(source, source2[:, : ids.shape[1]], atol=1e-5, rtol=0)
        hidden, hidden2 = (
            model.docid_hidden(s, p, codes)[0] for s, p in ((source, padding), (source2, padding2))
        )
        torch.testing.assert_close(hidden, hidden2, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embed(ids), model.embed(F.pad(ids, (0, extra))), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_beams_that_share_a_source_equal_a_repeated_source(tiny, beams):
    source, padding = tiny.encode(batch(30, [6, 2, 4]))
    codes = torch.randint(6, (3 * beams, 4))
    x = tiny.docid_inputs(codes)
    repeated = source.repeat_interleave(beams, 0), padding.repeat_interleave(beams, 0)
    want = tiny.decode(x, tiny.cross_keys_values(repeated[0]), repeated[1])[0]

    cross = tiny.cross_keys_values(source)
    torch.testing.assert_close(tiny.decode(x, cross, padding)[0], want, atol=1e-5, rtol=0)
    past, hidden = None, []
    for t in range(4):
        step, past, _ = tiny.decode(x[:, t : t + 1], cross, padding, past)
        hidden.append(step)
    torch.testing.assert_close(torch.cat(hidden, 1), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_chance_enters_only_in_training(tiny):
    ids = batch(30, [6, 2])
    assert torch.equal(tiny.embed(ids), tiny.embed(ids))
    tiny.train()
    assert not torch.equal(tiny.embed(ids), tiny.embed(ids))


# --------------------------------------------------------------------------------------------- start_from_lsa


def fresh(vocab: int, width: int) -> T5:
    torch.manual_seed(0)
    return T5(shape((vocab, width, width // 4, 4, 2 * width, 2, 2))).eval()


def found_first(model: T5, documents: torch.Tensor, queries: torch.Tensor) -> float:
    """Share of queries whose own document has the largest inner product."""
    with torch.no_grad():
        scores = model.embed(queries) @ model.embed(documents).T
    return (scores.argmax(1) == torch.arange(len(queries))).float().mean().item()


def test_lsa_start_finds_documents_by_two_rare_words_at_step_0():
    generator = torch.Generator().manual_seed(0)
    own = 20 + torch.arange(60 * 6).reshape(60, 6)  # each of 60 documents: six words of its own, twice each,
    common = torch.randint(1, 20, (60, 40), generator=generator)  # and 40 drawn from 19 common words
    mixed = torch.cat([own, own, common], 1)
    documents = mixed[:, torch.randperm(52, generator=generator)]
    queries = torch.cat([common[:, :2], own[:, [1, 4]]], 1)  # two common words, two rare ones
    model = fresh(20 + 60 * 6, width=64)
    assert found_first(model, documents, queries) < 0.5  # random word rows match words too, but not by rarity
    t5.start_from_lsa(model, documents)
    assert found_first(model, documents, queries) >= 0.95


def test_lsa_start_weights_words_by_idf():
    documents = torch.tensor([[5, 6, 7, 0], [5, 8, 9, 0], [5, 10, 11, 12]])
    model = fresh(20, width=16)
    t5.start_from_lsa(model, documents, std=0.5)
    # idf of a word in one of three documents, in all three (0, held at 0.05), in none
    for word, idf in ((6, math.log(4 / 2)), (5, 0.05), (15, math.log(4 / 1))):
        assert model.word[word, -1].item() == pytest.approx(0.5 * math.log(idf), abs=1e-6)
    assert model.word[0, :-1].abs().max() == 0
    with torch.no_grad():
        rare, common, both = (model.embed(torch.tensor([ids])) for ids in ([6], [5], [5, 6]))
    assert F.cosine_similarity(both, rare).item() > F.cosine_similarity(both, common).item()


def three_topics() -> tuple[torch.Tensor, torch.Tensor]:
    """The topic of each of the words 5..34, and 30 documents of six words of a topic and four of 35..39."""
    generator, topic = torch.Generator().manual_seed(0), torch.arange(30) // 10
    own = [5 + 10 * t + torch.randperm(10, generator=generator)[:6] for t in topic.tolist()]
    return topic, torch.cat([torch.stack(own), torch.randint(35, 40, (30, 4), generator=generator)], 1)


def test_lsa_start_gives_like_rows_to_words_that_share_documents():
    topic, documents = three_topics()
    model = fresh(45, width=16)
    t5.start_from_lsa(model, documents)
    rows = F.normalize(model.word[5:35, :-1], dim=1)
    cosine, same = rows @ rows.T, topic[:, None] == topic
    assert cosine[same].mean() > 0.3 and cosine[~same].mean() < 0.1


@torch.no_grad()
def test_lsa_start_embeds_a_text_as_the_idf_weighted_mean_of_its_words():
    documents = three_topics()[1]
    model = fresh(45, width=16)
    t5.start_from_lsa(model, documents)
    found_in = torch.stack([(documents == word).any(1).sum() for word in range(45)])
    idf = torch.log((1 + len(documents)) / (1 + found_in)).clamp(min=0.05)
    queries = documents[:, [0, 1, 6, 7, 8]]  # two words of the topic, three common ones
    embedded, rows = model.embed(queries)[:, :-1], model.word[queries][..., :-1]  # the last column: ln idf
    weighted = F.cosine_similarity(embedded, (rows * idf[queries][..., None]).sum(1))
    plain = F.cosine_similarity(embedded, rows.sum(1))
    assert weighted.min() > 0.85 and weighted.mean() > plain.mean() + 0.02


def test_lsa_start_answers_real_questions_at_step_0():
    folder, tokenizer_file = DATA / "xquad_en", DATA / "t5" / "spiece.model"
    if not (folder / "corpus.jsonl").is_file() or not tokenizer_file.is_file():
        pytest.skip("no xquad_en and t5/spiece.model under $MIXLORA_DATA or ../shared/data")
    from data import load_tokenizer, read_beir, tokenize

    collection, tokenizer = read_beir(folder), load_tokenizer(tokenizer_file)
    read = collection.documents
    rows = {doc_id: row for row, doc_id in enumerate(read.ids)}
    passages = [f"{title}. {text}" for title, text in zip(read.titles, read.texts)]
    documents = tokenize(tokenizer, passages, 128)
    queries = tokenize(tokenizer, list(collection.test.values()), 32)
    relevant = torch.tensor([rows[next(iter(collection.qrels[query_id]))] for query_id in collection.test])
    model = fresh(tokenizer.vocab_size(), width=64)
    t5.start_from_lsa(model, documents)
    with torch.no_grad():
        scores = model.embed(queries) @ model.embed(documents).T
    top10 = (scores.topk(10).indices == relevant[:, None]).any(1).float().mean().item()
    assert top10 > 0.8  # measured 0.92 to 0.94; random word rows give 0.19


# --------------------------------------------------------------------------------- fast forms against plain ones


@pytest.mark.parametrize("lengths", [[7, 7, 7], [1, 7, 4], [3, 0, 7]])
def test_packing_leaves_just_the_padding_out_and_puts_it_back_as_zeros(lengths):
    ids, x = batch(50, lengths), torch.randn(3, 7, 2, requires_grad=True)
    packing = t5.Packing(ids != 0)
    packed = packing.pack(x)
    assert torch.equal(packed, x[ids != 0]) and torch.equal(packing.pack(ids), ids[ids != 0])
    padded = packing.pad(packed)
    assert torch.equal(padded, x.masked_fill((ids == 0)[..., None], 0))
    padded.sum().backward()
    assert torch.equal(x.grad, (ids != 0)[..., None].expand_as(x).float())


@pytest.mark.parametrize("length", [1, 3, 9])
def test_attention_to_the_source_equals_that_to_its_keys_and_values(length):
    torch.manual_seed(0)
    attention = t5.Attention(shape((30, 12, 4, 3, 20, 1, 1), dropout=0.0))
    x, source = torch.randn(2, length, 12, requires_grad=True), torch.randn(2, 6, 12, requires_grad=True)
    bias, gradient = torch.zeros(2, 1, 1, 6), torch.randn(2, length, 12)
    bias[1, ..., 4:] = -1e9
    inputs = [x, source, *attention.parameters()]
    plain = attention(x, *attention.keys_values(source), bias)
    fast = attention.to_source(x, source, bias)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    wanted, found = (torch.autograd.grad(y, inputs, gradient) for y in (plain, fast))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_fused_attention_without_gradients_equals_the_form_with_them(tiny):
    ids, codes = batch(30, [6, 2, 4]), torch.tensor([[1, 2, 3, 0], [5, 5, 5, 5], [0, 4, 0, 4]])
    plain = tiny.docid_hidden(*tiny.encode(ids), codes)[0]
    assert plain.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(tiny.docid_hidden(*tiny.encode(ids), codes)[0], plain, atol=1e-5, rtol=0)


def test_several_docids_of_a_query_decode_as_each_alone(tiny):
    ids, codes = batch(30, [6, 2]), torch.randint(6, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    source, padding = tiny.encode(ids)
    together = tiny.docid_hidden(source, padding, codes.flatten(0, 1))[0].unflatten(0, (2, 3))
    for i in range(3):
        alone = tiny.docid_hidden(source, padding, codes[:, i])[0]
        torch.testing.assert_close(together[:, i], alone, atol=1e-5, rtol=1e-5)


def test_dropout_drops_the_share_that_it_is_told_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(301, 1001, requires_grad=True)
    for p in (0.05, 0.1, 0.5):
        y = t5.dropout(x, p, True)
        dropped = (y == 0).double().mean().item()
        assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / x.numel()) + 2**-17
        torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)]), atol=0, rtol=2e-5)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y.detach())  # the same mask forward and backward
        # neighbours share 64 random bits and are independent all the same
        gone = (y[:, :1000] == 0).double().view(301, 250, 4)
        both = (gone[..., :-1] * gone[..., 1:]).mean().item()
        assert abs(both - p * p) < 6 * p / math.sqrt(gone.numel())
    assert t5.dropout(x, 0.1, False) is x and t5.dropout(x, 0.0, True) is x
