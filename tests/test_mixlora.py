"""Experts, routers and their losses, against loops and numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ood
import store
from mixlora import (
    ATTENTIONS,
    Experts,
    LowRankAttention,
    MixConfig,
    MixedFeedForward,
    Route,
    add_attention_lora,
    add_mixture,
    align_loss,
    attention_lora,
    attention_parameters,
    balance_loss,
    expert_parameters,
    first_choice_share,
    fold,
    mixed_delta,
    mixed_layers,
    repel_loss,
    routes_of,
    top_gates,
    z_loss,
)
from rq import Trie
from search import beam_search, exact_scores
from t5 import T5, Attention, FeedForward, T5Config, segment_logits
from train import freeze_old

SHAPE = T5Config(
    vocab=20, width=16, head_width=4, heads=4, feed_forward=24, encoder_blocks=1, decoder_blocks=3,
    codebooks=3, centroids=5, dropout=0.1,
)  # fmt: skip
NAMES = ("in_a", "in_b", "out_a", "out_b")
VARIANTS = [(router, site) for router in ("cosine", "linear") for site in ("post_act", "pre_act")]


def mixed(
    frozen: int, trainable: int, random_b: bool = True, seed: int = 0, gated: bool = False, **config
) -> MixedFeedForward:
    """A mixed feed-forward of D = 16 and F = 24 in evaluation mode."""
    torch.manual_seed(seed)
    config = {"rank": 3, "alpha": 12.0} | config
    plain = FeedForward(replace(SHAPE, gated=gated))
    layer = MixedFeedForward(plain, MixConfig(**config), frozen, trainable)
    if random_b:
        for experts in (layer.old, layer.new):
            torch.nn.init.normal_(experts.in_b)
            torch.nn.init.normal_(experts.out_b)
    return layer.eval()


def tensors(layer: MixedFeedForward) -> dict[str, torch.Tensor]:
    """Copies of all experts and router rows, oldest first."""
    held = {name: layer.stacked(name) for name in NAMES} | {
        "router": torch.cat([layer.router_old, layer.router_new])
    }
    return {name: value.detach().clone() for name, value in held.items()}


def a_route(x, router, scores=None) -> Route:
    router = torch.tensor(router)
    return Route(torch.tensor(x), scores, None, router, 1)


# ---------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_stacked_experts_equal_a_loop_over_experts(experts):
    torch.manual_seed(experts)
    x, gates = torch.randn(4, 3, 16), torch.rand(4, 3, experts)
    a, b = torch.randn(experts, 8, 16), torch.randn(experts, 24, 8)
    onto = torch.randn(4, 3, 24)
    loop = onto.clone()
    for e in range(experts):
        for i in range(4):
            for t in range(3):
                loop[i, t] += gates[i, t, e] * (b[e] @ (a[e] @ x[i, t]))
    torch.testing.assert_close(mixed_delta(x, a, b, gates, onto), loop, rtol=1e-5, atol=1e-4)


def test_an_expert_starts_as_published_lora_does():
    torch.manual_seed(0)
    experts = Experts(3, width=64, feed_forward=256, rank=8)
    assert not experts.in_b.any() and not experts.out_b.any()
    for a, fan_in in ((experts.in_a, 64), (experts.out_a, 256)):
        published = torch.empty(8 * 3, fan_in)
        torch.nn.init.kaiming_uniform_(published, a=math.sqrt(5))
        assert a.abs().max() <= fan_in**-0.5
        assert a.std().item() == pytest.approx(published.std().item(), rel=0.05)
        assert a.abs().max().item() == pytest.approx(published.abs().max().item(), rel=0.02)


def test_an_expert_of_t5_base_has_61440_parameters():
    assert expert_parameters(768, 3072, 8) == 61_440
    held = sum(p.numel() for p in Experts(1, 768, 3072, 8).parameters())
    assert held == expert_parameters(768, 3072, 8)


# ------------------------------------------------------------------------------------------------ mixed layer


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router, site", VARIANTS)
def test_mixed_layer_with_zero_b_equals_the_plain_feed_forward(router, site, gated):
    layer = mixed(frozen=2, trainable=1, random_b=False, router=router, lora_in_site=site, gated=gated)
    x = 5 * torch.randn(4, 3, 16)
    assert torch.equal(layer(x)[0], layer.plain(x)[0])


def gelu(u: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula, as T5 v1.1 has it."""
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router, site", VARIANTS)
@pytest.mark.parametrize("frozen, trainable", [(0, 2), (3, 1), (4, 0)])
def test_forward_equals_a_token_by_token_transcription(router, site, frozen, trainable, gated):
    layer = mixed(frozen, trainable, router=router, lora_in_site=site, gated=gated)
    x = torch.randn(2, 3, 16)
    held = {name: value.double() for name, value in tensors(layer).items()}
    w_in, w_out, s = layer.plain.w_in.double(), layer.plain.w_out.double(), 12.0 / 3
    out = torch.zeros(2, 3, 16, dtype=torch.float64)
    for i in range(2):
        for t in range(3):
            token = x[i, t].double()
            logits = [float(row @ token) for row in held["router"]]
            if router == "cosine":
                logits = [logit / float(r.norm() * token.norm()) for logit, r in zip(logits, held["router"])]
            first, second = sorted(range(len(logits)), key=lambda e: -logits[e])[:2]
            p, q = math.exp(logits[first]), math.exp(logits[second])
            gates = {first: p / (p + q), second: q / (p + q)}
            lora_in = sum(g * s * held["in_b"][e] @ (held["in_a"][e] @ token) for e, g in gates.items())
            u = w_in @ token + (lora_in if site == "pre_act" else 0)
            u = gelu(u) * (layer.plain.w_linear.double() @ token) if gated else u.relu()
            u = u + (lora_in if site == "post_act" else 0)
            lora_out = sum(g * s * held["out_b"][e] @ (held["out_a"][e] @ u) for e, g in gates.items())
            out[i, t] = w_out @ u + lora_out
    torch.testing.assert_close(layer(x)[0].double(), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_post_act_delta_escapes_the_dropout_of_the_feed_forward(gated):
    # With W_in = 0 all of u comes from the experts, which are added after the activation and T5's dropout.
    x = torch.randn(4, 3, 16)
    same = {}
    for site in ("post_act", "pre_act"):
        layer = mixed(0, 2, lora_in_site=site, dropout=0.0, gated=gated)
        layer.plain.dropout = 0.5
        torch.nn.init.zeros_(layer.plain.w_in)
        same[site] = torch.equal(layer.train()(x)[0], layer.eval()(x)[0])
    assert same == {"post_act": True, "pre_act": False}


def test_lora_dropout_acts_on_the_experts_input_in_training_only():
    layer = mixed(0, 2, dropout=0.5)
    layer.plain.dropout = 0.0
    x = torch.randn(4, 3, 16)
    assert not torch.equal(layer.train()(x)[0], layer.train()(x)[0])
    torch.nn.init.zeros_(layer.new.in_b)
    torch.nn.init.zeros_(layer.new.out_b)  # the plain path is left, and no dropout touches it
    assert torch.equal(layer.train()(x)[0], layer.plain(x)[0])


def test_experts_that_are_all_frozen_see_no_dropout():
    layer = mixed(3, 0, dropout=0.5)
    layer.plain.dropout = 0.0
    x = torch.randn(4, 3, 16)
    assert torch.equal(layer.train()(x)[0], layer.eval()(x)[0])
    layer.add_expert()
    assert not torch.equal(layer.train()(x)[0], layer.eval()(x)[0])


@pytest.mark.parametrize("router", ["cosine", "linear"])
def test_evaluation_is_deterministic_and_edits_nothing(router):
    layer = mixed(1, 2, router=router)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(4, 3, 16)
    (first, route), (second, _) = layer(x), layer(x)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(route.router, tensors(layer)["router"]) and route.newest == 2 and route.x is x


# ----------------------------------------------------------------------------------------------------- router


def test_top_gates_by_hand():
    scores = torch.tensor([0.0, math.log(2), math.log(4)])  # softmax 1/7, 2/7, 4/7
    torch.testing.assert_close(top_gates(scores, 2), torch.tensor([0.0, 1 / 3, 2 / 3]))
    torch.testing.assert_close(top_gates(scores, 1), torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(top_gates(scores, 3), torch.tensor([1.0, 2.0, 4.0]) / 7)
    assert top_gates(torch.tensor([0.4, 0.4]), 2).tolist() == [0.5, 0.5]


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=7, unique=True), st.data())
def test_gates_sum_to_1_over_the_active_largest_in_the_ratio_of_the_softmax(scores, data):
    active = data.draw(st.integers(1, len(scores)))
    gates = top_gates(torch.tensor(scores), active)
    kept = gates.nonzero().flatten().tolist()
    assert len(kept) == active and gates.sum().item() == pytest.approx(1, abs=1e-6)
    # Scores closer than float32's softmax tells apart may change places; their gates are then equal.
    assert min(scores[e] for e in kept) >= sorted(scores)[-active] - 1e-6
    for e in kept:
        ratio = math.exp(scores[e] - scores[kept[0]])
        assert (gates[e] / gates[kept[0]]).item() == pytest.approx(ratio, rel=1e-5)


def test_cosine_router_ignores_the_length_of_inputs_and_of_rows():
    layer = mixed(1, 2)
    x = torch.randn(4, 3, 16)
    scores = layer.route(x).scores
    torch.testing.assert_close(layer.route(100 * x).scores, scores)
    with torch.no_grad():
        layer.router_old *= 7
        layer.router_new *= 0.01
    torch.testing.assert_close(layer.route(x).scores, scores)
    assert scores.abs().max() <= 1 + 1e-6
    rows = tensors(layer)["router"]
    torch.testing.assert_close(layer.route(rows[None]).scores[0].diagonal(), torch.ones(3))


def test_cosine_scores_equal_the_reference_cosine():
    layer = mixed(1, 2)
    x = torch.randn(4, 3, 16)
    reference = F.cosine_similarity(x[:, :, None], tensors(layer)["router"], dim=-1)
    torch.testing.assert_close(layer.route(x).scores, reference)


def test_linear_router_is_a_product_with_its_rows():
    layer = mixed(1, 2, router="linear")
    x = 3 * torch.randn(4, 3, 16)
    torch.testing.assert_close(layer.route(x).scores, x @ tensors(layer)["router"].T)


def test_router_stays_in_float32_under_autocast():
    layer = mixed(1, 2)
    x = torch.randn(4, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.route(x)
    wanted = layer.route(x)
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.gates, wanted.gates)


def test_normalise_rows_gives_unit_rows_in_the_same_direction_and_leaves_frozen_ones_alone():
    layer = mixed(2, 2)
    old, new = layer.router_old.clone(), layer.router_new.detach().clone()
    layer.normalise_rows()
    torch.testing.assert_close(layer.router_new.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(F.cosine_similarity(layer.router_new, new), torch.ones(2))
    assert torch.equal(layer.router_old, old) and not torch.allclose(old.norm(dim=1), torch.ones(2))


def test_normalise_rows_leaves_a_linear_router_alone():
    layer = mixed(0, 2, router="linear")
    before = layer.router_new.detach().clone()
    layer.normalise_rows()
    assert torch.equal(layer.router_new, before)


# ----------------------------------------------------------------------------------------------------- growth


@pytest.mark.parametrize("frozen, trainable", [(0, 2), (2, 1), (3, 0)])
def test_add_expert_keeps_old_experts_and_router_rows_bit_equal(frozen, trainable):
    layer = mixed(frozen, trainable)
    before = tensors(layer)
    layer.add_expert()
    after = tensors(layer)
    n = frozen + trainable
    assert (len(layer), len(layer.old), len(layer.new)) == (n + 1, n, 1)
    assert all(len(after[name]) == n + 1 and torch.equal(after[name][:n], before[name]) for name in before)
    assert not layer.new.in_b.any() and not layer.new.out_b.any() and layer.new.in_a.any()
    assert layer.router_new.norm().item() == pytest.approx(1)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad and "plain" not in name}
    assert trained == {f"new.{name}" for name in NAMES} | {"router_new"}


def test_add_expert_leaves_the_output_alone_where_it_is_not_routed_to():
    layer = mixed(0, 2)
    direction = torch.randn(16)
    x = direction * (1 + torch.rand(4, 3, 1)) + 0.05 * torch.randn(4, 3, 16)
    before, route = layer(x)
    layer.add_expert(-direction)
    after, grown = layer(x)
    torch.testing.assert_close(grown.gates[..., :2], route.gates)
    assert not grown.gates[..., 2].any()
    torch.testing.assert_close(after, before)


def test_new_router_row_points_where_it_is_told_and_wins_its_tokens():
    layer = mixed(0, 2)
    direction = 5 * torch.randn(16)
    layer.add_expert(direction)
    torch.testing.assert_close(layer.router_new[0], direction / direction.norm())
    route = layer.route(direction[None, None])
    assert (
        route.scores[0, 0, 2].item() == pytest.approx(1) and route.gates.argmax() == 2 and route.newest == 1
    )


def test_freeze_moves_everything_and_changes_no_output():
    layer = mixed(1, 2)
    x = torch.randn(4, 3, 16)
    before, held = layer(x)[0], tensors(layer)
    layer.freeze()
    assert (len(layer.old), len(layer.new), len(layer.router_new)) == (3, 0, 0)
    assert all(torch.equal(value, held[name]) for name, value in tensors(layer).items())
    after, route = layer(x)
    assert torch.equal(after, before) and route.newest == 0
    assert (
        sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * 16 * 24
    )  # the plain feed-forward


@pytest.mark.parametrize("frozen, trainable", [(0, 2), (2, 1), (3, 0), (1, 3)])
@pytest.mark.parametrize("but", [0, 1, 2])
def test_freeze_leaves_the_last_few_to_train_and_changes_no_bit(frozen, trainable, but):
    layer, x = mixed(frozen, trainable), torch.randn(4, 3, 16)
    before, held = layer(x)[0], tensors(layer)
    layer.freeze(but)
    n = frozen + trainable
    assert (len(layer.old), len(layer.new), len(layer.router_new)) == (n - but, but, but)
    assert all(torch.equal(value, held[name]) for name, value in tensors(layer).items())
    after, route = layer(x)
    assert torch.equal(after, before) and route.newest == but
    assert all(p.requires_grad for p in (*layer.new.parameters(), layer.router_new))
    assert not any(p.requires_grad for p in (*layer.old.parameters(), layer.router_old))


def test_frozen_experts_stay_bit_equal_through_steps_with_weight_decay():
    layer = mixed(0, 2)
    layer.add_expert()
    before = tensors(layer)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        out, route = layer.train()(torch.randn(4, 3, 16))
        loss = out.pow(2).mean() + align_loss(route) + repel_loss(route)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        layer.normalise_rows()
    after = tensors(layer)
    assert all(torch.equal(after[name][:2], before[name][:2]) for name in before)
    assert all(not torch.equal(after[name][2], before[name][2]) for name in before)
    assert all(p.grad is None for p in [layer.router_old, *layer.old.parameters()])


def test_two_growths_in_a_row_keep_the_order_of_experts():
    layer = mixed(0, 2)
    first = tensors(layer)
    layer.add_expert()
    second = tensors(layer)
    layer.add_expert()
    after = tensors(layer)
    for name in first:
        assert torch.equal(after[name][:2], first[name]) and torch.equal(after[name][2], second[name][2])


# -------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("router, site", VARIANTS)
def test_t5_with_fresh_experts_equals_the_plain_t5(router, site, gated):
    torch.manual_seed(0)
    shape = replace(SHAPE, gated=gated, tied=not gated)
    plain, model = T5(shape).eval(), T5(shape)
    model.load_state_dict(plain.state_dict())
    add_mixture(model, MixConfig(layers=2, router=router, lora_in_site=site))
    model.eval()
    ids, codes = torch.randint(1, 20, (4, 6)), torch.randint(5, (4, 3))
    wanted, no_routes = plain.docid_hidden(*plain.encode(ids), codes)
    found, routes = model.docid_hidden(*model.encode(ids), codes)
    assert torch.equal(found, wanted) and no_routes == []
    for layer, route in zip(mixed_layers(model), routes, strict=True):
        assert route.x.shape == (4, 3, 16) and torch.equal(route.scores, layer.route(route.x).scores)
    assert [isinstance(block.ff, MixedFeedForward) for block in model.decoder] == [True, True, False]


def test_a_mixture_added_to_a_model_in_evaluation_mode_is_in_evaluation_mode():
    model = T5(SHAPE).eval()
    add_mixture(model, MixConfig(layers=2))
    x = torch.randn(4, 3, 16)
    assert all(torch.equal(layer(x)[0], layer.plain(x)[0]) for layer in mixed_layers(model))


@pytest.mark.parametrize("kind", [{}, {"gated": True, "tied": False}])
def test_checkpoint_gives_back_experts_frozen_counts_and_statistics(tmp_path, kind):
    torch.manual_seed(0)
    model = T5(replace(SHAPE, **kind))
    add_mixture(model, MixConfig(layers=2, rank=3, lora_in_site="pre_act"))
    grown, kept = mixed_layers(model)
    for layer in (grown, kept):
        torch.nn.init.normal_(layer.new.in_b)
        torch.nn.init.normal_(layer.new.out_b)
    grown.add_expert()
    kept.freeze()
    stats = [ood.new_stats("pooled", 2, 3), ood.new_stats("paper_code", 2, 3)]
    ood.measure(stats[0], torch.rand(50, 3, 2))
    ood.settle(stats, [torch.rand(50, 3, 2)] * 2, first_mixture=True)
    store.save_model(tmp_path / "D1.pt", model.eval(), stats)
    loaded, loaded_stats = store.load_model(tmp_path / "D1.pt")

    assert [(len(layer.old), len(layer.new)) for layer in mixed_layers(loaded)] == [(2, 1), (2, 0)]
    assert mixed_layers(loaded)[0].config == grown.config
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert not any(
        p.requires_grad for layer in mixed_layers(loaded) for p in (*layer.old.parameters(), layer.router_old)
    )
    ids, codes = torch.randint(1, 20, (4, 6)), torch.randint(5, (4, 3))
    found, expected = (m.docid_hidden(*m.encode(ids), codes)[0] for m in (loaded, model))
    assert torch.equal(found, expected)
    for found, wanted in zip(loaded_stats, stats, strict=True):
        assert (found.mode, found.experts) == (wanted.mode, wanted.experts)
        for name in ("mean", "variance", "arrivals", "newest", "dreams"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_more_mixed_layers_than_decoder_blocks_is_refused_by_name():
    with pytest.raises(ValueError, match="found 3 decoder blocks, wanted 4 mixed layers; pass --layers"):
        add_mixture(T5(SHAPE), MixConfig(layers=4))


@pytest.mark.parametrize("wrong", [{"router": "cos"}, {"lora_in_site": "after"}, {"experts": 1}])
def test_bad_mixture_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"found .*{next(iter(wrong))}"):
        MixConfig(**wrong)


# ------------------------------------------------------------------------------------------ LoRA on attention


def adapted_t5(random_b: bool = True, rank: int = 3, **shape) -> T5:
    """A T5 with two mixed layers and LoRA on its decoder's attention."""
    torch.manual_seed(0)
    model = T5(replace(SHAPE, **shape))
    add_mixture(model, MixConfig(layers=2, rank=3))
    add_attention_lora(model, rank)
    if random_b:
        for name, p in model.named_parameters():
            if name.endswith("_b"):
                torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def merged(adapted: LowRankAttention) -> Attention:
    """Plain attention whose matrices are W + B A."""
    plain = Attention(replace(SHAPE, dropout=adapted.dropout))
    with torch.no_grad():
        for name in "qkvo":
            w, a, b = (
                getattr(adapted.plain, name),
                getattr(adapted, f"{name}_a"),
                getattr(adapted, f"{name}_b"),
            )
            getattr(plain, name).copy_(w + b @ a)
    return plain.eval()


@pytest.mark.parametrize("random_b", [False, True])
def test_attention_with_lora_equals_attention_with_w_plus_b_a(random_b):
    """With B = 0 that is the plain attention, bit by bit."""
    adapted = attention_lora(adapted_t5(random_b))[0]
    wanted = merged(adapted) if random_b else adapted.plain
    x, source, bias = torch.randn(4, 3, 16), torch.randn(4, 6, 16), torch.zeros(4, 1, 1, 6)
    bias[:, :, :, 4:] = -1e9
    rtol, atol = (1e-5, 1e-5) if random_b else (0, 0)
    keys_values = adapted.keys_values(source)
    torch.testing.assert_close(keys_values, wanted.keys_values(source), rtol=rtol, atol=atol)
    for found, expected in (
        (adapted(x, *keys_values, bias), wanted(x, *keys_values, bias)),
        (adapted.to_source(x, source, bias), wanted.to_source(x, source, bias)),
    ):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    plain = adapted.plain.to_source(x, source, bias)
    assert torch.equal(adapted.to_source(x, source, bias), plain) != random_b


def test_fresh_lora_changes_no_answer_of_a_t5_and_stands_in_every_decoder_block():
    model, plain = adapted_t5(random_b=False), adapted_t5(random_b=False)
    for block in plain.decoder:
        for site in ATTENTIONS:
            setattr(block, site, getattr(block, site).plain)
    ids, codes = torch.randint(1, 20, (4, 6)), torch.randint(5, (4, 3))
    found, wanted = (m.docid_hidden(*m.encode(ids), codes)[0] for m in (model, plain))
    assert torch.equal(found, wanted) and len(attention_lora(model)) == 6 and attention_lora(plain) == []
    assert all(len(lora.k_a) == 3 and not lora.k_b.any() for lora in attention_lora(model))


def test_an_a_starts_as_the_experts_do_and_every_a_and_b_is_named():
    model = adapted_t5(random_b=False)
    sites = [f"decoder.{i}.{site}" for i in range(3) for site in ATTENTIONS]
    names = [f"{site}.{m}_{side}" for site in sites for m in "qkvo" for side in "ab"]
    assert sorted(name for name, _ in attention_parameters(model)) == sorted(names)
    every = torch.cat([p.flatten() for name, p in attention_parameters(model) if name.endswith("a")])
    assert every.abs().max() <= 0.25 and every.std().item() == pytest.approx(0.5 / 12**0.5, rel=0.05)


def test_of_adapted_attention_a_and_b_alone_train():
    model = adapted_t5()
    freeze_old(model)
    for layer in mixed_layers(model):
        layer.freeze()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trains = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimiser = torch.optim.AdamW(trains, lr=0.01, weight_decay=0.5)
    ids, codes = torch.randint(1, 20, (8, 6)), torch.randint(5, (8, 3))
    for _ in range(2):
        hidden, _ = model.train().docid_hidden(*model.encode(ids), codes)
        optimiser.zero_grad()
        hidden.pow(2).mean().backward()
        optimiser.step()
    moved = {
        name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert moved == {"rq"} | {name for name, _ in attention_parameters(model)}


@pytest.mark.parametrize("kind", [{}, {"gated": True, "tied": False}])
def test_lora_on_attention_comes_back_with_the_checkpoint_and_trains_on(tmp_path, kind):
    model = adapted_t5(rank=5, **kind)
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, _ = store.load_model(tmp_path / "D1.pt")
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys() and len(attention_lora(loaded)[2].o_a) == 5
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    ids, codes = torch.randint(1, 20, (4, 6)), torch.randint(5, (4, 3))
    found, expected = (m.docid_hidden(*m.encode(ids), codes)[0] for m in (loaded, model))
    assert torch.equal(found, expected)
    freeze_old(loaded)
    assert all(p.requires_grad for _, p in attention_parameters(loaded))


def test_a_checkpoint_with_lora_on_cross_attention_alone_comes_back_as_it_was(tmp_path):
    """As those of commit 9c736df and before."""
    model = adapted_t5()
    for block in model.decoder:
        block.self_attention = block.self_attention.plain
    store.save_model(tmp_path / "D1.pt", model, [])
    loaded, _ = store.load_model(tmp_path / "D1.pt")
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys() and len(attention_lora(loaded)) == 3
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())


def test_a_folded_t5_answers_alike_bit_by_bit_and_holds_each_layer_s_experts_in_one_tensor():
    model, folded = adapted_t5(), adapted_t5()
    for m in (model, folded):  # an older expert and a newest
        for layer in mixed_layers(m):
            torch.manual_seed(1)
            layer.add_expert()
            torch.nn.init.normal_(layer.new.out_b)
    fold(folded)
    assert attention_lora(folded) == [] and len(attention_lora(model)) == 6
    assert all(layer.stacked("out_b") is layer.old.out_b for layer in mixed_layers(folded))
    ids, codes = torch.randint(1, 20, (4, 6)), torch.randint(5, (30, 3)).unique(dim=0)
    for found, wanted in zip(*(beam_search(m, Trie(codes), ids, 4) for m in (folded, model))):
        assert torch.equal(found, wanted)


def test_a_t5_with_lora_on_attention_scores_its_beams_as_by_teacher_forcing():
    """Search reads keys and values of the source, which it keeps; teacher forcing in training reads the source."""
    model, codes = (
        adapted_t5(),
        torch.randint(5, (30, 3), generator=torch.Generator().manual_seed(0)).unique(dim=0),
    )
    ids = torch.randint(2, 20, (4, 7))
    ids[1, 5:] = 0
    leaves, scores = beam_search(model, Trie(codes), ids, 4)
    exact = exact_scores(model, ids, codes)
    trie = Trie(codes)
    for query, (runs, found) in enumerate(zip(leaves.tolist(), scores)):
        rows = [trie.documents_at(run)[0] for run in runs]
        torch.testing.assert_close(found, exact[query, rows])
        hidden, _ = model.docid_hidden(*model.encode(ids[query : query + 1].expand(4, -1)), codes[rows])
        forced = torch.log_softmax(segment_logits(hidden, model.rq), -1).gather(2, codes[rows][..., None])
        torch.testing.assert_close(found, forced.sum((1, 2)), rtol=1e-4, atol=1e-4)
    plain = adapted_t5(random_b=False)
    assert not torch.allclose(exact_scores(plain, ids, codes), exact)


# ----------------------------------------------------------------------------------------------------- losses


def test_align_loss_by_hand():
    x = [[[3.0, 4.0]]]  # cosine 0.6 with the first axis, 0.8 with the second
    assert align_loss(a_route(x, [[1.0, 0.0], [0.0, 2.0]])).item() == pytest.approx((0.4 + 0.2) / 2)
    three = a_route(x, [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert align_loss(three).item() == pytest.approx(0.2)
    two_tokens = a_route([[[3.0, 4.0], [0.0, -1.0]]], [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert align_loss(two_tokens).item() == pytest.approx((0.2 + 2.0) / 2)


def test_repel_loss_by_hand():
    route = a_route(
        [[[1.0, 0.0]]], [[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 4.0]]
    )  # cosines 0.6, 0.8, -0.6
    assert repel_loss(route, "sum").item() == pytest.approx(1.4)
    assert repel_loss(route).item() == pytest.approx(1.4 / 3)


@pytest.mark.parametrize("newest", [[0.0, 0.0, 3.0], [-1.0, -1.0, 0.0], [-2.0, 0.0, 1.0]])
def test_repel_loss_is_zero_where_no_older_row_is_nearby(newest):
    route = a_route([[[1.0, 0.0, 0.0]]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], newest])
    assert repel_loss(route).item() == 0


def test_balance_loss_by_hand():
    to_0, to_1 = [math.log(3), 0.0], [0.0, math.log(3)]  # probabilities 3/4 and 1/4
    balanced = a_route([], [], torch.tensor([[to_0, to_1]]))
    one_sided = a_route([], [], torch.tensor([[to_0, to_0]]))
    assert balance_loss(balanced).item() == pytest.approx(1.0)
    assert balance_loss(one_sided).item() == pytest.approx(4 * (1 * 0.75 + 0 * 0.25) / 2)
    # Shares are taken per sequence: two one-sided sequences do not make up for each other.
    opposite = a_route([], [], torch.tensor([[to_0, to_0], [to_1, to_1]]))
    assert balance_loss(opposite).item() == pytest.approx(1.5)


def test_z_loss_by_hand():
    route = a_route([], [], torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]]))
    assert z_loss(route).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_first_choice_share_by_hand():
    scores = torch.tensor([[[0.1, 0.9, 0.0], [0.2, 0.3, 0.1]], [[0.9, 0.3, 0.0], [0.1, 0.2, 0.0]]])
    torch.testing.assert_close(first_choice_share(scores), torch.tensor([0.25, 0.75, 0.0]))


def test_router_losses_pull_the_input_and_the_newest_row_only():
    layer = mixed(0, 2)
    layer.add_expert()
    with torch.no_grad():
        layer.router_new.copy_(
            layer.router_old[:1] + 0.1 * torch.randn(16)
        )  # near an older row: the repel loss acts
    x = torch.randn(4, 3, 16, requires_grad=True)
    route = layer.route(x)
    repel_loss(route).backward()
    assert layer.router_old.grad is None and layer.router_new.grad.abs().sum() > 0 and x.grad is None
    align_loss(layer.route(x)).backward()
    assert layer.router_old.grad is None and x.grad.abs().sum() > 0


def test_a_step_against_each_router_loss_moves_the_newest_row_as_it_should():
    layer = mixed(2, 1)
    x = torch.randn(4, 3, 16) + 2
    with torch.no_grad():
        layer.router_new.copy_(layer.router_old[:1] + 0.3 * torch.randn(16))
    for loss in (align_loss, repel_loss):
        copy = mixed(2, 1)
        copy.load_state_dict(layer.state_dict())
        before = loss(copy.route(x))
        before.backward()
        with torch.no_grad():
            copy.router_new -= 0.05 * copy.router_new.grad
        assert loss(copy.route(x)) < before


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_routes_alone_are_those_of_the_whole_decoder(layers):
    torch.manual_seed(0)
    model = T5(SHAPE)
    add_mixture(model, MixConfig(layers=layers, experts=3))
    for layer in mixed_layers(model):
        torch.nn.init.normal_(layer.new.in_b)
        torch.nn.init.normal_(layer.new.out_b)
    model.eval()
    ids, codes = torch.randint(1, 20, (4, 6)), torch.randint(5, (4, 3))
    source, padding = model.encode(ids)
    _, wanted = model.docid_hidden(source, padding, codes)
    found = routes_of(model, source, padding, codes)
    assert len(found) == layers
    for a, b in zip(found, wanted, strict=True):
        for name in ("x", "scores", "gates"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name))
    with pytest.raises(AssertionError, match="dropout"):
        routes_of(model.train(), source, padding, codes)


def test_some_rows_of_a_route():
    layer = mixed(frozen=1, trainable=1)
    route = layer.route(torch.randn(6, 3, 16))
    some = route.rows(slice(1, None, 2))
    for name in ("x", "scores", "gates"):
        assert torch.equal(getattr(some, name), getattr(route, name)[[1, 3, 5]])
    assert some.router is route.router and some.newest == route.newest
