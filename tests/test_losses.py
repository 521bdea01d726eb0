"""The losses of train.py, against full-vocabulary and brute-force versions, and what is left to train."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import mixlora
from losses import docid_cross_entropy, kl_to_previous, router_losses
from mixlora import MixConfig, Route, add_mixture, mixed_layers
from t5 import T5, T5Config, segment_logits
from train import freeze_old

V, M, K, D = 20, 3, 5, 16
SHAPE = T5Config(
    vocab=V, width=D, head_width=4, heads=4, feed_forward=24, encoder_blocks=1, decoder_blocks=3,
    codebooks=M, centroids=K, dropout=0.0,
)  # fmt: skip


def case(seed: int) -> tuple[T5, torch.Tensor, torch.Tensor]:
    """A small T5, hidden states (B, M, D) that take gradients, and docids (B, M)."""
    torch.manual_seed(seed)
    return T5(SHAPE), torch.randn(6, M, D, requires_grad=True), torch.randint(K, (6, M))


def one_vocabulary(model: T5, hidden: torch.Tensor, codes: torch.Tensor):
    """Logits (B, M, V + M * K) of one tied table, words first, and the docids as its token ids."""
    table = torch.cat([model.word, *model.rq])
    return hidden @ table.T, V + codes + K * torch.arange(M)


# ---------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("seed", range(3))
def test_segment_loss_equals_full_vocabulary_loss_under_the_papers_mask(seed):
    model, hidden, codes = case(seed)
    ours = docid_cross_entropy(model, hidden, codes, "segment")
    gradients = torch.autograd.grad(ours, [hidden, model.rq])

    logits, tokens = one_vocabulary(model, hidden, codes)
    mask = torch.full((M, V + M * K), -torch.inf)  # Eq. 4-5: position m keeps the K tokens of codebook m
    for m in range(M):
        mask[m, V + m * K : V + (m + 1) * K] = 0
    full = F.cross_entropy((logits + mask).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(ours, full)
    *masked_gradients, word = torch.autograd.grad(full, [hidden, model.rq, model.word])
    torch.testing.assert_close(gradients, tuple(masked_gradients), rtol=1e-4, atol=1e-6)
    assert not word.any()


@pytest.mark.parametrize("mask, first", [("full_vocab", 0), ("docid_vocab", V)])
def test_unmasked_losses_equal_brute_force(mask, first):
    model, hidden, codes = case(0)
    ours = docid_cross_entropy(model, hidden, codes, mask)
    logits, tokens = one_vocabulary(model, hidden, codes)
    total = 0.0
    for b in range(len(codes)):
        for m in range(M):
            row = logits[b, m, first:].double().tolist()
            total += math.log(sum(map(math.exp, row))) - row[tokens[b, m] - first]
    assert ours.item() == pytest.approx(total / codes.numel(), rel=1e-5)
    word = torch.autograd.grad(ours, model.word, allow_unused=True)[0]
    assert (word is not None) == (mask == "full_vocab")


def test_a_larger_softmax_never_has_a_smaller_loss():
    model, hidden, codes = case(1)
    losses = [
        docid_cross_entropy(model, hidden, codes, mask) for mask in ("segment", "docid_vocab", "full_vocab")
    ]
    assert losses[0] < losses[1] < losses[2]


def test_loss_of_equal_logits_is_the_log_of_their_number():
    model, hidden, codes = case(0)
    sizes = {"segment": K, "docid_vocab": M * K, "full_vocab": V + M * K}
    for mask, size in sizes.items():
        assert docid_cross_entropy(model, 0 * hidden, codes, mask).item() == pytest.approx(math.log(size))


# --------------------------------------------------------------------------------------------------------- KL


def two_models(seed: int = 0):
    """Logits of two models."""
    torch.manual_seed(seed)
    return 3 * torch.randn(4, M, K), 3 * torch.randn(4, M, K)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_kl_to_an_identical_model_is_zero(reduction):
    logits, _ = two_models()
    assert kl_to_previous(logits, logits, reduction).item() == pytest.approx(0, abs=1e-6)


def test_kl_goes_from_the_previous_model_to_this_one():
    now, before = two_models()
    expected, reverse = torch.zeros(()), torch.zeros(())
    for m in range(M):
        old, new = Categorical(logits=before[:, m]), Categorical(logits=now[:, m])
        expected += kl_divergence(old, new).mean()
        reverse += kl_divergence(new, old).mean()
    found = kl_to_previous(now, before, "sum")
    torch.testing.assert_close(found, expected)
    assert abs(found - reverse) > 0.1


def test_kl_by_hand():
    # Codes' logits ln 1, ln 3 before and ln 1, ln 1 now, at the one position of one query.
    before, now = torch.tensor([[[0.0, math.log(3)]]]), torch.zeros(1, 1, 2)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_to_previous(now, before, "sum").item() == pytest.approx(by_hand)


def test_kl_summed_over_positions_is_m_times_the_mean():
    args = two_models(1)
    torch.testing.assert_close(kl_to_previous(*args, "sum"), M * kl_to_previous(*args, "mean"))


# ---------------------------------------------------------------------------------------------- router losses


def a_route(seed: int, experts: int, newest: int) -> Route:
    torch.manual_seed(seed)
    x, router = torch.randn(4, M, D), torch.rand(experts, D)
    scores = F.normalize(x, dim=-1) @ F.normalize(router, dim=-1).T
    return Route(x, scores, mixlora.top_gates(scores, 2), router, newest)


def settings(**changes) -> SimpleNamespace:
    default = {"align_coef": 0.5, "repel_coef": 2.0, "balance_coef": 0.0, "z_coef": 0.0}
    default |= {"repel_reduction": "mean", "aux_layers": "all"}
    return SimpleNamespace(**default | changes)


ROUTES = [a_route(0, 3, 1), a_route(1, 2, 0), a_route(2, 2, 2)]


def test_router_losses_are_weighted_and_summed_over_layers():
    found = router_losses(ROUTES, settings(balance_coef=0.01, z_coef=0.001))
    wanted = {
        "align": 0.5 * sum(mixlora.align_loss(route) for route in ROUTES),
        "repel": 2.0 * sum(mixlora.repel_loss(route) for route in ROUTES),
        "balance": 0.01 * sum(mixlora.balance_loss(route) for route in ROUTES),
        "z": 0.001 * sum(mixlora.z_loss(route) for route in ROUTES),
    }
    assert found.keys() == wanted.keys() and all(value > 0 for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_router_losses_stay_in_float32_under_autocast():
    everything = settings(balance_coef=0.01, z_coef=0.001)
    with torch.autocast("cpu", torch.bfloat16):
        found = router_losses(ROUTES, everything)
    assert found == router_losses(ROUTES, everything)


def test_router_losses_without_weight_are_left_out():
    assert router_losses(ROUTES, settings()).keys() == {"align", "repel"}
    assert router_losses(ROUTES, settings(align_coef=0.0)).keys() == {"repel"}
    naive = settings(align_coef=0.0, repel_coef=0.0, balance_coef=0.01, z_coef=0.001)
    assert router_losses(ROUTES, naive).keys() == {"balance", "z"}
    assert router_losses([], settings()) == {}


def test_repel_reduction_reaches_the_loss():
    route = ROUTES[0]
    mean, total = (router_losses([route], settings(repel_reduction=r))["repel"] for r in ("mean", "sum"))
    torch.testing.assert_close(total, 2 * mean)  # two older rows


def test_expanded_aux_layers_leave_out_layers_without_a_new_row():
    found = router_losses(ROUTES, settings(aux_layers="expanded"))
    wanted = router_losses([ROUTES[0], ROUTES[2]], settings())
    assert found["align"] < router_losses(ROUTES, settings())["align"]
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])
    assert router_losses([ROUTES[1]], settings(aux_layers="expanded")) == {}


# ------------------------------------------------------------------------------------------------ what trains


def grown_model() -> T5:
    """Two mixed layers: the first has grown, the second is as it was and frozen."""
    torch.manual_seed(0)
    model = T5(SHAPE)
    add_mixture(model, MixConfig(layers=2, rank=3))
    grown, kept = mixed_layers(model)
    for layer in (grown, kept):
        torch.nn.init.normal_(layer.new.in_b)
        torch.nn.init.normal_(layer.new.out_b)
    grown.add_expert()
    kept.freeze()
    freeze_old(model)
    return model


def test_only_the_docid_table_and_the_newest_experts_and_router_rows_train():
    model = grown_model()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    expert = {f"decoder.0.ff.new.{name}": 3 * width for name, width in
              {"in_a": D, "in_b": 24, "out_a": 24, "out_b": D}.items()}  # fmt: skip
    assert trained == {"rq": M * K * D, "decoder.0.ff.router_new": D} | expert
    assert sum(expert.values()) == mixlora.expert_parameters(D, 24, 3)
    assert all(
        p.numel() for p in model.parameters() if p.requires_grad
    )  # of layers that did not grow, nothing


def test_both_first_experts_train_where_the_mixture_is_new():
    model = T5(SHAPE)
    add_mixture(model, MixConfig(layers=1, rank=3))
    freeze_old(model)
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == M * K * D + 2 * (mixlora.expert_parameters(D, 24, 3) + D)


def test_lora_on_attention_trains_beside_them_and_an_evolving_layer_s_newest_expert():
    model = grown_model()
    mixlora.add_attention_lora(model, 2)
    mixed_layers(model)[1].freeze(but=1)
    freeze_old(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    experts = {f"decoder.{i}.ff.new.{name}" for i in (0, 1) for name in ("in_a", "in_b", "out_a", "out_b")}
    sites = [f"decoder.{i}.{site}" for i in range(3) for site in mixlora.ATTENTIONS]
    lora = {f"{site}.{m}_{side}" for site in sites for m in "qkvo" for side in "ab"}
    assert trained == {"rq", "decoder.0.ff.router_new", "decoder.1.ff.router_new"} | experts | lora
    assert [len(layer.new) for layer in mixed_layers(model)] == [1, 1]


def test_training_steps_with_weight_decay_move_what_trains_and_leave_the_rest_bit_equal():
    model = grown_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5
    )
    ids, codes = torch.randint(1, V, (8, 6)), torch.randint(K, (8, M))
    for _ in range(3):
        hidden, routes = model.docid_hidden(*model.encode(ids), codes)
        loss = docid_cross_entropy(model, hidden, codes, "segment")
        loss = loss + sum(router_losses(routes, settings()).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad and p.numel()}


def test_frozen_layer_still_pulls_the_docid_table_through_its_input():
    # With all layers' losses on, a layer that did not grow has no row to move,
    # but its input depends on the docid rows.
    model = grown_model()
    ids, codes = torch.randint(1, V, (8, 6)), torch.randint(K, (8, M))
    _, routes = model.docid_hidden(*model.encode(ids), codes)
    assert [route.newest for route in routes] == [1, 0]
    mixlora.align_loss(routes[1]).backward()
    assert model.rq.grad.abs().sum() > 0


def test_given_logits_are_those_that_the_cross_entropy_would_make():
    torch.manual_seed(0)
    model = T5(T5Config(20, 8, 4, 2, 12, 1, 1, codebooks=3, centroids=5))
    hidden, codes = torch.randn(4, 3, 8), torch.randint(5, (4, 3))
    logits = segment_logits(hidden, model.rq)
    plain = docid_cross_entropy(model, hidden, codes, "segment")
    assert torch.equal(docid_cross_entropy(model, None, codes, "segment", logits), plain)
