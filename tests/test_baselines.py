"""The comparison methods against formulas worked out by hand, and what T5, search and checkpoints do with them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import baselines
import store
from baselines import (
    Adapter,
    Prompts,
    adapters,
    add_adapters,
    add_prompts,
    climb,
    ewc_penalty,
    fisher,
    insert_rows,
    representation,
    topic_keys,
)
from losses import docid_cross_entropy
from rq import Trie
from scan import SourceCache
from search import beam_search, exact_scores
from t5 import T5, T5Config

M, K, VOCAB, D = 3, 5, 60, 16


def small_model(encoder_blocks: int = 2, decoder_blocks: int = 3, **other) -> T5:
    torch.manual_seed(0)
    model = T5(
        T5Config(VOCAB, D, 4, 4, 24, encoder_blocks, decoder_blocks, codebooks=M, centroids=K, **other)
    )
    with torch.no_grad():
        model.rq *= 0.5
    return model.eval()


def prompted_model(length: int = 4, size: float = 1.0, **shape) -> T5:
    """Six prompts that matter."""
    model = small_model(**shape)
    add_prompts(model, torch.randn(6, D), length)
    with torch.no_grad():
        model.prefix.keys_values.normal_(0, size)
    return model


@pytest.fixture(scope="module")
def codes() -> Tensor:
    return torch.randint(K, (40, M), generator=torch.Generator().manual_seed(3)).unique(dim=0)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Six queries of 1 to 9 tokens, padded with 0."""
    generator = torch.Generator().manual_seed(4)
    ids, lengths = torch.randint(1, VOCAB, (6, 9), generator=generator), torch.tensor([9, 4, 1, 6, 9, 2])
    return ids * (torch.arange(9) < lengths[:, None])


def values_of(model: T5, *names: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name in names}


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- adapters


def test_adapter_by_hand():
    adapter = Adapter(2, 1)
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.up.copy_(torch.tensor([[10.0], [-1.0]]))
    assert adapter(torch.tensor([3.0, 4.0])).tolist() == [113.0, -7.0]  # down: 11; no activation cuts it
    assert adapter(torch.tensor([-3.0, -4.0])).tolist() == [-113.0, 7.0]


@pytest.mark.parametrize("width, inner", [(768, 8), (96, 1), (16, 1)])
def test_adapters_bottleneck_is_the_published_one(width, inner):
    with torch.device("meta"):
        model = T5(T5Config(VOCAB, width, 4, 4, 24, 1, 1, codebooks=M, centroids=K))
        baselines.add_parts(SimpleNamespace(config=SimpleNamespace(prompts=0, adapters=True)), model)
    assert [adapter.down.shape for adapter in adapters(model)] == [(inner, width)] * 5


@pytest.mark.parametrize("gated", [False, True])
def test_adapters_are_behind_every_sub_layer_and_start_as_the_identity(ids, codes, gated):
    model = small_model(gated=gated)
    names, before = set(model.state_dict()), model.docid_hidden(*model.encode(ids), codes[:6])[0]
    assert not adapters(model)
    add_adapters(model, 2)
    assert len(adapters(model)) == 2 * 2 + 3 * 3
    sub_layers = {
        *(f"encoder.{i}.{part}" for i in range(2) for part in ("self_attention", "ff")),
        *(f"decoder.{i}.{part}" for i in range(3) for part in ("self_attention", "cross_attention", "ff")),
    }
    added = set(model.state_dict()) - names
    assert added == {f"{part}.after.{name}" for part in sub_layers for name in ("down", "up")}
    assert all(adapter.down.abs().max() <= D**-0.5 and adapter.down.std() > 0 for adapter in adapters(model))
    assert torch.equal(model.docid_hidden(*model.encode(ids), codes[:6])[0], before)
    assert sum(a.down.numel() + a.up.numel() for a in adapters(model)) == 13 * 2 * 2 * D


def test_blocks_with_adapters_equal_the_formula_by_hand(ids, codes):
    """A block whose adapters are folded into its output weights: (I + U W) O does what U W behind O does."""
    model, folded = small_model(), small_model()
    add_adapters(model, 3)
    source, padding = model.encode(ids)
    plain = model.docid_hidden(source, padding, codes[:6])[0]
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.up.normal_(0, 0.5)
        for name, adapter in model.named_modules():
            if isinstance(adapter, Adapter):
                part = folded.get_submodule(name.removesuffix(".after"))
                weight = part.o if hasattr(part, "o") else part.w_out
                weight.copy_((torch.eye(D) + adapter.up @ adapter.down) @ weight)
    close(model.encode(ids)[0], folded.encode(ids)[0])
    found = model.docid_hidden(*model.encode(ids), codes[:6])[0]
    assert (found - plain).abs().max() > 0.1
    close(found, folded.docid_hidden(*folded.encode(ids), codes[:6])[0])
    cross, padding = model.cross_keys_values(model.encode(ids)[0]), model.encode(ids)[1]
    close(model.docid_hidden(cross, padding, codes[:6])[0], found)  # cross-attention's other way
    model.train()
    model.docid_hidden(*model.encode(ids), codes[:6])[0].sum().backward()
    assert all(a.up.grad.abs().max() > 0 and a.down.grad.abs().max() > 0 for a in adapters(model))


# ----------------------------------------------------------------------------------------------------- prompts


def test_representation_is_the_mean_over_words_and_sees_no_padding():
    source = torch.tensor([[[1.0, 0], [3, 4]], [[5, 6], [1000, 1000]]])
    padding = torch.tensor([[0.0, 0.0], [0.0, -1e9]])[:, None, None, :]
    assert representation(source, padding).tolist() == [[2.0, 2.0], [5.0, 6.0]]


def test_representation_is_the_same_in_training_and_search(ids):
    """From the cache of D_t, in any batch, as from the encoder with a query alone."""
    model = small_model()
    cache = SourceCache(model, ids)
    rows = torch.tensor([2, 4, 0, 1])
    found = representation(*cache.get(rows, torch.device("cpu")))
    for row, one in zip(rows, found):
        alone = ids[row][ids[row] != 0][None]
        close(one, representation(*model.encode(alone))[0])


def test_query_takes_the_nearest_topic_by_cosine():
    topics = torch.tensor([[1.0, 0.0], [0.0, 9.0], [-5.0, -5.0]])
    prompts = Prompts(topics, 2, T5Config(width=2, heads=1, head_width=1, decoder_blocks=3))
    with torch.no_grad():
        prompts.keys_values.copy_(torch.arange(12.0).view(3, 2, 1, 2, 1))
    source = torch.tensor([[[3.0, 1.0]], [[0.1, 0.2]], [[-1.0, -3.0]], [[100.0, 99.0]]])  # cosine: not 9 * 99
    padding = torch.zeros(4, 1, 1, 1)
    assert prompts.choose(source, padding).tolist() == [0, 1, 2, 0]
    near = Prompts(
        torch.tensor([[1.0, 0.99], [0.99, 1.0]]),
        2,
        T5Config(width=2, heads=1, head_width=1, decoder_blocks=3),
    )
    with torch.autocast("cpu", torch.bfloat16):  # as in training; search has no autocast
        assert near.choose(torch.tensor([[[1.0, 1.01]], [[1.01, 1.0]]]), padding[:2]).tolist() == [1, 0]
    before, (keys, values), after = prompts(source, padding)
    assert before is None and after is None
    assert keys[:, 0, :, 0].tolist() == [[0, 1], [4, 5], [8, 9], [0, 1]]
    assert values[:, 0, :, 0].tolist() == [[2, 3], [6, 7], [10, 11], [2, 3]]


def test_topic_keys_are_the_mean_directions_of_the_queries_that_choose_them():
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4, 8, generator=generator), dim=1)
    points = directions.repeat(50, 1) + torch.randn(200, 8, generator=generator) * 0.1
    found = topic_keys(points, 4, seed=1)
    close(found.norm(dim=1), torch.ones(4))
    units = F.normalize(points, dim=1)
    chosen = (units @ found.T).argmax(1)
    means = torch.stack([units[chosen == i].mean(0) for i in range(4)])
    close(found, F.normalize(means, dim=1), atol=1e-4)
    lengths = torch.rand(200, 1, generator=generator) * 50 + 0.1
    close(topic_keys(points * lengths, 4, seed=1), found, atol=1e-4)  # lengths do not count
    assert torch.equal(found, topic_keys(points, 4, seed=1))
    with pytest.raises(ValueError, match="found 200 queries for 201 topics; pass fewer --prompts"):
        topic_keys(points, 201, seed=1)


def test_pool_has_the_published_size():
    """Section 14: 4.8 million parameters for 310 topics (NQ320k), 101.5 for 6611 (MS MARCO); topics do not train."""
    for topics, millions in ((310, 4.8), (6611, 101.5)):
        with torch.device("meta"):
            prompts = Prompts(torch.empty(topics, 768), length=10, config=T5Config())
        trained = [p for p in prompts.parameters() if p.requires_grad]
        assert [round(p.numel() / 1e6, 1) for p in trained] == [millions]


def attention_by_hand(model: T5, y: Tensor, prompt_keys: Tensor, prompt_values: Tensor) -> Tensor:
    """Self-attention of the prompted block, entry by entry: y (T, D), prompts (H, length, Dh) -> (T, D)."""
    attention, bias = model.decoder[1].self_attention, model.decoder_bias
    rows = []
    for t in range(len(y)):
        heads = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            q = attention.q[part] @ y[t]
            scores = [q @ key for key in prompt_keys[h]]  # no bias
            offset = torch.arange(t + 1)
            biases = bias(torch.tensor([t]), offset)[0, h, 0]
            scores += [q @ (attention.k[part] @ y[s]) + biases[s] for s in range(t + 1)]
            seen = [*prompt_values[h], *(attention.v[part] @ y[s] for s in range(t + 1))]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * v for w, v in zip(weights, seen)))
        rows.append(attention.o @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("blocks", [2, 3])
def test_prompts_equal_brute_force_attention_and_shift_no_relative_bias(ids, codes, blocks):
    model = prompted_model(decoder_blocks=blocks)
    source, padding = model.encode(ids)
    seen = {}
    block = model.decoder[1]
    block.self_norm.register_forward_hook(lambda _, __, out: seen.update(y=out))
    block.self_attention.after.register_forward_hook(lambda _, __, out: seen.update(found=out))
    with torch.no_grad():
        model.docid_hidden(source, padding, codes[:6], model.past(source, padding))
        keys, values = model.prefix(source, padding)[1]
        for b in range(6):
            close(seen["found"][b], attention_by_hand(model, seen["y"][b], keys[b], values[b]))


def test_prompt_that_no_query_looks_at_changes_nothing(ids, codes):
    """A key against every query's direction, at e^-1000 of the weight, leaves the plain model."""
    model = prompted_model(decoder_blocks=2)
    source, padding = model.encode(ids)
    attention, seen = model.decoder[1].self_attention, {}
    model.decoder[1].self_norm.register_forward_hook(lambda _, __, out: seen.update(y=out))
    model.docid_hidden(source, padding, codes[:6], model.past(source, padding))
    prompts, plain_model = model.prefix, small_model(decoder_blocks=2)
    plain = plain_model.docid_hidden(source, padding, codes[:6])[0]
    queries = (
        (seen["y"] @ attention.q.T).unflatten(-1, (4, 4)).flatten(0, 1).transpose(0, 1)
    )  # (H, B * T, Dh)
    some = model.docid_hidden(source, padding, codes[:6], model.past(source, padding))[0]
    assert (some - plain).abs().max() > 0.1
    with torch.no_grad():
        against = torch.linalg.lstsq(queries[:, :4], torch.full((4, 4, 1), -1e3)).solution[..., 0]  # (H, Dh)
        prompts.keys_values[:, 0] = against[None, :, None]
        prompts.keys_values[:, 1] = 0
    lost = (queries @ against[..., None])[..., 0] < -100  # positions whose queries all turn away
    assert lost[:, :4].all()
    found = model.docid_hidden(source, padding, codes[:6], model.past(source, padding))[0]
    turned = lost.all(0).view(6, M)
    first = turned.cumprod(1).bool()  # and so did every position before
    close(found[first], plain[first])


@pytest.mark.parametrize("blocks", [2, 3])
def test_steps_with_a_cache_equal_teacher_forcing_with_prompts(ids, codes, blocks):
    model = prompted_model(decoder_blocks=blocks)
    with torch.no_grad():
        source, padding = model.encode(ids)
        cross = model.cross_keys_values(source)
        want = model.docid_hidden(source, padding, codes[:6], model.past(source, padding))[0]
        x, past = model.docid_inputs(codes[:6]), model.past(source, padding)
        for t in range(M):
            hidden, past, _ = model.decode(x[:, t : t + 1], cross, padding, past)
            close(hidden[:, 0], want[:, t])
        hidden, past, _ = model.decode(x[:, :2], cross, padding, model.past(source, padding))
        close(model.decode(x[:, 2:], cross, padding, past)[0], want[:, 2:])


@pytest.mark.parametrize("blocks", [2, 3])
def test_widest_beam_equals_exact_scores_with_prompts(ids, codes, blocks):
    model, plain = prompted_model(decoder_blocks=blocks), small_model(decoder_blocks=blocks)
    trie = Trie(codes)
    leaves, scores = beam_search(model, trie, ids, len(codes))
    exact = exact_scores(model, ids, codes, chunk=7)
    rows = trie.documents[leaves[..., 0]]
    assert (rows.sort(1).values == torch.arange(len(codes))).all()  # every docid is found
    close(scores, exact.gather(1, rows))
    assert (exact - exact_scores(plain, ids, codes)).abs().max() > 0.1
    assert model.prefix.choose(*model.encode(ids)).unique().numel() > 1


def test_several_docids_of_a_query_share_its_prompt(ids, codes):
    model = prompted_model()
    source, padding = model.encode(ids)
    past = model.past(source, padding)
    several = codes[:18].view(6, 3, M)
    together = model.docid_hidden(source, padding, several.flatten(0, 1), past)[0].unflatten(0, (6, 3))
    for i in range(3):
        close(together[:, i], model.docid_hidden(source, padding, several[:, i], past)[0])


def test_only_chosen_prompts_have_a_gradient(ids, codes):
    model = prompted_model().train()
    model.requires_grad_(False)
    model.prefix.keys_values.requires_grad_(True)
    source, padding = model.encode(ids[:2])
    chosen = set(model.prefix.choose(source, padding).tolist())
    hidden, _ = model.docid_hidden(source, padding, codes[:2], model.past(source, padding))
    docid_cross_entropy(model, hidden, codes[:2], "segment").backward()
    moved = model.prefix.keys_values.grad.abs().amax((1, 2, 3, 4)) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == chosen and len(chosen) < 6
    assert model.prefix.topics.grad is None


@pytest.mark.parametrize("how", ["recompute", "bf16"])
def test_prompts_train_with_recomputed_blocks_and_in_bf16(ids, codes, how):
    gradients = []
    for changed in (False, True):
        model = prompted_model()
        model.recompute = changed and how == "recompute"
        with torch.autocast("cpu", torch.bfloat16, enabled=changed and how == "bf16"):
            source, padding = model.encode(ids)
            hidden, _ = model.docid_hidden(source, padding, codes[:6], model.past(source, padding))
            docid_cross_entropy(model, hidden, codes[:6], "segment").backward()
        gradients.append(model.prefix.keys_values.grad)
    plain, other = gradients
    if how == "recompute":
        close(other, plain, atol=1e-6)
    assert F.cosine_similarity(plain.flatten(), other.flatten(), dim=0) > 0.98


def test_model_with_prompts_refuses_to_decode_without_them(ids, codes):
    model = prompted_model()
    with pytest.raises(AssertionError, match="decodes from model.past"):
        model.docid_hidden(*model.encode(ids), codes[:6])
    assert small_model().past(*small_model().encode(ids)) is None


def test_prompts_need_a_second_decoder_block():
    with pytest.raises(ValueError, match="second decoder block, this T5 has one; pass --decoder_blocks 2"):
        prompted_model(decoder_blocks=1)


@pytest.mark.parametrize("training", [False, True])
def test_prompts_change_no_parameter_name_and_no_mode(training):
    model, plain = small_model().train(training), small_model()
    add_prompts(model, torch.randn(6, D), 3)
    names = set(model.state_dict()) - {"prefix.topics", "prefix.keys_values"}
    assert names == set(plain.state_dict())
    assert all(torch.equal(model.state_dict()[name], plain.state_dict()[name]) for name in names)
    assert all(module.training == training for module in model.decoder.modules())


# ------------------------------------------------------------------------------------------------------- DSI++


def test_climb_by_hand_and_back_bit_equal():
    """|w| g = (3, -8) and (0, 0): norm sqrt(73), w^2 g = (3, 16 * -2)."""
    a, b, still = (torch.tensor(x, requires_grad=True) for x in ([1.0, -4.0], [0.0, 2.0], [5.0]))
    a.grad, b.grad = torch.tensor([3.0, -2.0]), torch.tensor([7.0, 0.0])
    values = [w.detach().clone() for w in (a, b, still)]
    before = climb([a, b, still], rho=0.5)
    scale = 0.5 / math.sqrt(73)
    close(a.detach(), torch.tensor([1 + 3 * scale, -4 - 32 * scale]))
    assert torch.equal(b, values[1]) and torch.equal(still, values[2])
    assert all(torch.equal(*pair) for pair in zip(before, values))


def test_climb_goes_as_far_as_rho_says_in_relative_terms_and_up():
    torch.manual_seed(0)
    parameters = [torch.randn(shape, requires_grad=True) for shape in (7, (3, 4))]

    def loss():
        return sum((w - 1).pow(4).sum() for w in parameters)

    low = loss()
    low.backward()
    before = climb(parameters, 0.05)
    relative = torch.cat([((w - old) / old).flatten() for w, old in zip(parameters, before)])
    assert relative.norm().item() == pytest.approx(0.05, rel=1e-3)  # || T^-1 eps || = rho, ASAM's constraint
    assert loss() > low


@pytest.mark.parametrize("gradient", [None, 0.0, float("inf"), float("nan")])
def test_climb_without_a_usable_gradient_moves_nothing(gradient):
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    w.grad = None if gradient is None else torch.tensor([1.0, gradient]) * gradient
    before = climb([w], 0.15)
    assert w.tolist() == [1.0, -2.0] and before[0].tolist() == [1.0, -2.0]


# ------------------------------------------------------------------------------------------------------ CLEVER


def test_fisher_is_the_square_of_the_gradient_of_one_mean(ids, codes):
    model = small_model()
    model.encoder[0].requires_grad_(False)
    hidden, _ = model.docid_hidden(*model.encode(ids), codes[:6])
    docid_cross_entropy(model, hidden, codes[:6], "full_vocab").backward()
    want = {name: p.grad.square() for name, p in model.named_parameters() if p.requires_grad}
    for batch in (64, 4, 1):  # parts of 4 and 2 weigh as their lengths
        model.train()
        found = fisher(model, ids, codes[:6], batch)
        assert model.training and all(p.grad is None for p in model.parameters())
        assert found.keys() == want.keys() and "word" in found and "encoder.0.ff.w_in" not in found
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-3, atol=1e-9)
    alone = [fisher(model, ids[i : i + 1], codes[i : i + 1])["rq"] for i in range(6)]
    assert (torch.stack(alone).mean(0) - want["rq"]).abs().max() > 0.1 * want["rq"].max()  # not Fisher's own


def test_penalty_by_hand_and_its_gradient():
    model = small_model()
    name = "decoder_norm.weight"
    weight = torch.arange(16.0)
    old = values_of(model, name)
    with torch.no_grad():
        model.decoder_norm.weight += 2.0
    later = values_of(model, name)
    with torch.no_grad():
        model.decoder_norm.weight += 1.0
    assert ewc_penalty(model, []).item() == 0
    penalty = ewc_penalty(model, [({name: weight}, old), ({name: torch.ones(16)}, later)])
    assert penalty.item() == 9 * 120 + 1 * 16  # sum 0..15 = 120; moved by 3 and by 1
    (0.5 * penalty).backward()
    close(model.decoder_norm.weight.grad, weight * 3 + 1)


def test_penalty_is_zero_where_it_was_taken_and_holds_what_mattered(ids, codes):
    model = small_model()
    found = fisher(model, ids, codes[:6])
    memory = [(found, values_of(model, *found))]
    assert ewc_penalty(model, memory).item() == 0
    used, unused = ids[0, 0], next(w for w in range(1, VOCAB) if w not in ids)
    assert (
        found["word"][used].max() > found["word"][unused].max() > 0
    )  # unused words are in the softmax, as negatives


# ------------------------------------------------------------------------------------------------------ IncDSI


def geometry(old: int = 60, new: int = 12, width: int = 12, seed: int = 0):
    """Queries around directions of their documents; a third of the new documents lie beside an old one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape) -> Tensor:
        return torch.randn(*shape, generator=generator)

    z = F.normalize(draw(old, width), dim=1) * 3
    centres = F.normalize(draw(new, width), dim=1) * 3
    centres[: new // 3] = z[: new // 3] + 0.35 * draw(new // 3, width)
    centres = F.normalize(centres, dim=1) * 4.5  # their plain means would win old queries by sheer length
    old_queries = z.repeat_interleave(5, 0) + 0.1 * draw(5 * old, width)
    new_queries = centres.repeat_interleave(6, 0) + 0.1 * draw(6 * new, width)
    table = F.normalize(z, dim=1) * 3
    return table, old_queries, new_queries


def correct(queries: Tensor, rows: Tensor, owner: Tensor) -> float:
    return ((queries @ rows.T).argmax(1) == owner).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inserted_rows_win_their_queries_and_leave_the_old_ones_theirs(seed, monkeypatch):
    table, old_queries, new_queries = geometry(seed=seed)
    old_owner, new_owner = torch.arange(60).repeat_interleave(5), torch.arange(12).repeat_interleave(6)
    represented = old_queries.view(60, 5, -1).mean(1)
    start = new_queries.view(12, 6, -1).mean(1)
    inputs = [t.clone() for t in (table, represented, start, new_queries)]
    rows = insert_rows(table, represented, start, new_queries, new_owner)
    assert all(torch.equal(*pair) for pair in zip(inputs, (table, represented, start, new_queries)))
    assert rows.shape == start.shape and not rows.requires_grad
    before = correct(old_queries, table, old_owner)
    mean_table, found_table = torch.cat([table, start]), torch.cat([table, rows])
    assert before > 0.95 and correct(old_queries, mean_table, old_owner) < 0.92  # means take over
    assert correct(old_queries, found_table, old_owner) > before - 0.03
    assert correct(new_queries, found_table, 60 + new_owner) > 0.97
    # Without the guard the new rows win their queries too, at the old ones' cost.
    with monkeypatch.context() as patch:
        patch.setattr(baselines, "GUARD", 0.0)
        free = insert_rows(table, represented, start, new_queries, new_owner)
    assert correct(old_queries, torch.cat([table, free]), old_owner) < 0.92
    # Short means lose their own queries instead, and are mended as well.
    assert correct(new_queries, torch.cat([table, start / 3]), 60 + new_owner) < 0.8
    rows = insert_rows(table, represented, start / 3, new_queries, new_owner)
    assert correct(new_queries, torch.cat([table, rows]), 60 + new_owner) > 0.97
    assert correct(old_queries, torch.cat([table, rows]), old_owner) > before - 0.03


def test_new_documents_compete_with_each_other():
    """The first one's row is so long that it wins the second one's query: both give way."""
    table, represented = torch.zeros(1, 3), torch.tensor([[0.0, 0, 1]])
    start, queries = torch.tensor([[9.0, 6, -2], [0, 3, -2]]), torch.tensor([[1.0, 0, 0], [0.2, 1, 0]])
    assert (queries @ start.T).argmax(1).tolist() == [0, 0]
    rows = insert_rows(table, represented, start, queries, torch.arange(2))
    scores = queries @ rows.T
    assert scores.argmax(1).tolist() == [0, 1] and scores[1, 1] - scores[1, 0] > 0.9  # the margin, nearly
    assert rows[0, 1] < 6 and rows[1, 1] > 3


def test_inserted_rows_do_not_depend_on_the_chunk_or_a_grad_mode(monkeypatch):
    table, old_queries, new_queries = geometry()
    owner, represented = torch.arange(12).repeat_interleave(6), old_queries.view(60, 5, -1).mean(1)
    start = new_queries.view(12, 6, -1).mean(1)
    monkeypatch.setattr(baselines, "INSERT_STEPS", 20)
    whole = insert_rows(table, represented, start, new_queries, owner)
    monkeypatch.setattr(baselines, "CHUNK", 7)
    with torch.no_grad():
        close(insert_rows(table, represented, start, new_queries, owner), whole, atol=1e-4)


def test_satisfied_rows_stay_where_they_are(monkeypatch):
    """Everything is already won by more than the margin: no term of the loss is left."""
    table, represented = 10 * torch.eye(4)[:2], torch.eye(4)[:2]
    start, queries = 10 * torch.eye(4)[2:], torch.eye(4)[2:]
    assert torch.equal(insert_rows(table, represented, start, queries, torch.arange(2)), start)
    one = insert_rows(table, represented, start[:1], queries[:1], torch.zeros(1, dtype=torch.long))
    assert torch.equal(one, start[:1])  # no other new document
    monkeypatch.setattr(baselines, "MARGIN", 11.0)
    assert not torch.equal(insert_rows(table, represented, start, queries, torch.arange(2)), start)


def test_first_step_of_insertion_follows_the_gradient_worked_out_by_hand(monkeypatch):
    """One old row (2, 0) with z (1, 0), one new row (1, 1) with query (0, 1): own hinge 1 + 0 - 1 = 0, guard hinge
    1 + 1 - 2 = 0. With margin 2 both are 1: gradient 2 * (-q + z) = (2, -2), and Adam's first step is lr * its sign.
    """
    table, z, start, q = (torch.tensor([row]) for row in ([2.0, 0], [1.0, 0], [1.0, 1], [0.0, 1]))
    owner = torch.zeros(1, dtype=torch.long)
    monkeypatch.setattr(baselines, "INSERT_STEPS", 1)
    assert torch.equal(insert_rows(table, z, start, q, owner), start)
    monkeypatch.setattr(baselines, "MARGIN", 2.0)
    monkeypatch.setattr(baselines, "INSERT_LR", 0.1)
    found = insert_rows(table, z, start, q, owner)
    step = 0.1 * math.sqrt(6 / 4)  # of the entries' size: squares 4, 0, 1, 1
    close(found, torch.tensor([[1 - step, 1 + step]]))


# ------------------------------------------------------------------------------------------------- checkpoints


def test_adapters_come_back_with_the_checkpoint(tmp_path, ids, codes):
    model = small_model()
    add_adapters(model, 3)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.up.normal_()
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, _ = store.load_model(tmp_path / "D1.pt")
    assert loaded.prefix is None and len(adapters(loaded)) == 13 and len(adapters(loaded)[0].down) == 3
    assert torch.equal(exact_scores(loaded, ids, codes), exact_scores(model, ids, codes))
    assert all(p.requires_grad for adapter in adapters(loaded) for p in adapter.parameters())


@pytest.mark.parametrize("blocks", [2, 3])
def test_prompts_come_back_with_the_checkpoint(tmp_path, ids, codes, blocks):
    model = prompted_model(length=2, decoder_blocks=blocks)
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, _ = store.load_model(tmp_path / "D1.pt")
    assert loaded.prefix.length == 2 and not adapters(loaded)
    assert torch.equal(loaded.prefix.topics, model.prefix.topics)
    assert torch.equal(exact_scores(loaded, ids, codes), exact_scores(model, ids, codes))
    trains = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert "prefix.keys_values" in trains and "prefix.topics" not in trains
