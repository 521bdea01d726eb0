"""The written-out T5 against transformers' on the same random weights, and its properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import PADDING, SHAPES, TINY, batch, blank, logits_of, on_meta, reference, shape

import t5
from t5 import T5, Attention, RMSNorm, T5Config, segment_logits
from weights import load_published, read_published


@pytest.fixture(
    scope="module", params=["t5-small", pytest.param("t5-base", marks=pytest.mark.soak), "t5-v1_1-small"]
)
def pair(request):
    """A transformers T5 and ours with the same weights, loaded by name."""
    sizes, kind, _ = SHAPES[request.param]
    if request.param != "t5-small":
        sizes = (1000, *sizes[1:])  # saves memory
    hf, ours = reference(sizes, **kind), blank(sizes, **kind)
    load_published(ours, hf.state_dict())
    return hf, ours


@pytest.fixture
def tiny() -> T5:
    """A small random T5 with M=4 codebooks of K=6, in evaluation mode."""
    torch.manual_seed(1)
    return T5(shape(TINY)).eval()


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


WIDEST = ("t5-3b", "t5-v1_1-xl")  # gigabytes in one block


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.soak] * (n in WIDEST)) for n in SHAPES])
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


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
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
    assert t5.dropout(x, 0.999999, True).isfinite().all()
