"""Energies, thresholds and the decision to grow, by hand and on corpora with and without a shift."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood
from mixlora import top_gates
from ood import (
    SKETCH,
    Stats,
    arrive,
    decide,
    energy,
    grow,
    known_range,
    measure,
    move,
    new_stats,
    raw_score,
    reference,
    remember_base,
    routed_energy_moments,
    settle,
    sketch,
    standardised,
    tails,
)

POSITIONS = 8


def update(stats: Stats, scores: torch.Tensor, gates: torch.Tensor) -> None:
    """One whole training batch."""
    move(stats, routed_energy_moments(scores, gates))


def draw(
    queries: int, experts: int = 2, mean: float = 0.85, sigma: float = 0.05, seed: int = 0
) -> torch.Tensor:
    """Cosines (Q, 8, E) around `mean`, as of a trained router."""
    noise = torch.randn(queries, POSITIONS, experts, generator=torch.Generator().manual_seed(seed))
    return mean + sigma * noise


def with_energy(e: torch.Tensor, experts: int = 2) -> torch.Tensor:
    """Equal scores (Q, M, E) whose energies are e (Q, M)."""
    return (-e - math.log(experts))[..., None].expand(*e.shape, experts)


def with_raw(raw, experts: int = 2, positions: int = 2) -> torch.Tensor:
    """Equal scores (Q, positions, E) of queries whose raw scores are these."""
    return -torch.as_tensor(raw, dtype=torch.float32)[:, None, None].expand(-1, positions, experts)


def flagged(count: int, total: int, stats: Stats) -> torch.Tensor:
    """Scores of `total` queries, `count` of which lie far above any threshold; in mode pooled every other one below."""
    e = torch.full((total, stats.mean.shape[-1]), -5.0 if stats.mode == "paper_code" else 0.0)
    e[:count, -1] = 5.0
    if stats.mode == "pooled":
        e[:count:2, -1] = -5.0
        return -e[..., None].expand(-1, -1, stats.experts)
    return with_energy(e, stats.experts)


def fixed(mode: str, positions: int = 2) -> Stats:
    """Statistics with a threshold of 0 at every position or, of mode pooled, at both ends."""
    stats = new_stats(mode, 2, positions)
    stats.arrivals = torch.zeros(int(mode == "pooled"), SKETCH)
    return stats


def known(scores: torch.Tensor, dreams: torch.Tensor) -> Stats:
    """What a layer of mode pooled knows after its first corpus."""
    stats = new_stats("pooled", scores.shape[-1], scores.shape[1])
    measure(stats, dreams)
    settle([stats], [scores], first_mixture=True)
    return stats


# ----------------------------------------------------------------------------------------------------- energy


@pytest.mark.parametrize("c", [-1.0, 0.0, 0.3, 1.0])
def test_energy_of_two_equal_cosines(c):
    assert energy(torch.tensor([c, c])).item() == pytest.approx(-(c + math.log(2)), abs=1e-6)


@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8))
def test_energy_equals_its_formula_and_an_average_expert_lowers_it_by_a_constant(scores):
    n = len(scores)
    by_hand = -math.log(sum(math.exp(s) for s in scores))
    assert energy(torch.tensor(scores)).item() == pytest.approx(by_hand, abs=1e-5)
    average = math.log(sum(math.exp(s) for s in scores) / n)
    lowered = energy(torch.tensor([*scores, average]))
    assert by_hand - lowered.item() == pytest.approx(math.log((n + 1) / n), abs=1e-5)


# ----------------------------------------------------------------------------------- growth of the statistics


def test_grow_leaves_what_pooled_statistics_know_alone():
    stats = known(draw(100, seed=1), draw(100, seed=2))
    before = {name: getattr(stats, name).clone() for name in ("arrivals", "newest", "dreams")}
    grow(stats)
    assert stats.experts == 3
    assert all(torch.equal(getattr(stats, name), value) for name, value in before.items())


def test_grow_gives_new_experts_the_recalibrated_base_of_paper_code():
    stats = Stats("paper_code", 2, torch.tensor([[-1.5], [-1.4]]), torch.tensor([[0.1], [0.2]]))
    remember_base(stats)
    stats.mean, stats.variance = (
        torch.tensor([[-1.3], [-1.1]]),
        torch.tensor([[0.3], [0.4]]),
    )  # a later corpus
    grow(stats)
    first, second = math.log(2 / 3), math.log(3 / 4)
    assert stats.mean.flatten().tolist() == pytest.approx([-1.3 + first, -1.1 + first, -1.5 + first])
    assert stats.variance.flatten().tolist() == pytest.approx([0.3, 0.4, 0.1])
    stats.mean[2] = -2.0
    grow(stats)
    wanted = [-1.3 + first + second, -1.1 + first + second, -2.0 + second, -1.5 + first + second]
    assert stats.mean.flatten().tolist() == pytest.approx(wanted)
    assert stats.experts == 4 and stats.variance.flatten().tolist() == pytest.approx([0.3, 0.4, 0.1, 0.1])


def test_grow_without_a_base_starts_from_the_first_expert():
    stats = Stats("paper_code", 2, torch.tensor([[-1.5], [-1.4]]), torch.tensor([[0.1], [0.2]]))
    grow(stats)
    assert stats.mean[2].item() == pytest.approx(-1.5 + math.log(2 / 3))
    assert stats.variance[2].item() == pytest.approx(0.1)


@pytest.mark.parametrize("mode", ood.MODES)
def test_growth_by_an_average_expert_changes_no_verdict(mode):
    seen, new = draw(2000, seed=1), draw(2000, mean=0.83, seed=2)
    if mode == "pooled":
        stats = known(seen, draw(1000, seed=3))
    else:
        stats = new_stats(mode, 2, POSITIONS)
        for part in seen.split(32):
            update(stats, part, top_gates(part, 2))
    before = torch.stack(tails(new, stats, 0.02))
    assert 0.02 < before.float().sum(0).mean() < 0.98  # a shift that splits the queries
    grow(stats)
    average = new.logsumexp(-1, keepdim=True) - math.log(2)
    assert torch.equal(torch.stack(tails(torch.cat([new, average], -1), stats, 0.02)), before)


# ------------------------------------------------------------------------------------------ pooled, by hand


def test_raw_score_by_hand():
    scores = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]], [[-1.0, -1.0], [2.0, 2.0]]])  # (Q, M, E)
    # -log((1 + 3) / 2) and 0; 1 and -2
    assert raw_score(scores).tolist() == pytest.approx([-math.log(2) / 2, -0.5], abs=1e-6)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1.0, 30.0]), st.integers(0, 999))
def test_an_expert_of_average_score_moves_no_raw_score(experts, positions, spread, seed):
    """Whether scores are cosines or a linear router's logits."""
    torch.manual_seed(seed)
    scores = spread * torch.randn(7, positions, experts)
    average = scores.logsumexp(-1, keepdim=True) - math.log(experts)
    grown = raw_score(torch.cat([scores, average], -1))
    torch.testing.assert_close(grown, raw_score(scores), rtol=1e-5, atol=1e-5)


def test_the_scale_is_the_median_and_interquartile_range_of_dreams():
    stats = new_stats("pooled", 2, 2)
    measure(stats, with_raw([4.0, 0.0, 2.0, 1.0, 3.0]))
    assert stats.dreams.tolist() == [2.0, 2.0]
    assert standardised(with_raw([2.0, 5.0, -2.0]), stats).tolist() == [0.0, 1.5, -2.0]


def test_dreams_that_score_alike_count_as_an_interquartile_range_of_1():
    stats = new_stats("pooled", 2, 2)
    measure(stats, with_raw([3.0, 3.0, 3.0]))
    assert stats.dreams.tolist() == [3.0, 1.0] and standardised(with_raw([5.0]), stats).tolist() == [2.0]


def test_a_sketch_holds_the_quantiles_at_the_middles_of_equal_shares():
    middles = (torch.arange(SKETCH) + 0.5) / SKETCH
    torch.testing.assert_close(sketch(torch.tensor([1.0, 0.0])), middles)
    torch.testing.assert_close(sketch(torch.arange(1001.0).flip(0)), 1000 * middles)
    assert sketch(torch.tensor([7.0])).tolist() == [7.0] * SKETCH
    z = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sketch(z), torch.quantile(z, middles), rtol=1e-4, atol=1e-5)


def test_each_corpus_has_the_same_weight_in_the_reference_whatever_its_size():
    stats = new_stats("pooled", 2, 2)
    arrive(stats, with_raw([-1.0] * 1000))
    arrive(stats, with_raw([3.0]))
    stats.newest = torch.full((1, SKETCH), 2.0)
    assert reference(stats).tolist() == [-1.0] * SKETCH + [2.0] * SKETCH + [3.0] * SKETCH


def test_the_known_range_reaches_over_the_central_share_of_each_corpus():
    stats = new_stats("pooled", 2, 2)
    stats.arrivals = torch.arange(512.0)[None]
    assert known_range(stats, 0.2).tolist() == pytest.approx([51.1, 459.9], abs=1e-3)
    below, above = tails(with_raw([51.0, 51.2, 459.8, 460.0]), stats, 0.2)
    assert below.tolist() == [True, False, False, False] and above.tolist() == [False, False, False, True]
    stats.arrivals = torch.stack([torch.arange(512.0), torch.full((512,), 300.0)])
    stats.newest, stats.pool = torch.arange(512.0)[None] + 100, torch.full((9,), -1e3)
    assert known_range(stats, 0.2).tolist() == pytest.approx([51.1, 559.9], abs=1e-3)


def test_queries_of_a_corpus_that_spreads_more_than_later_ones_stay_known():
    """Drawn from it anew, about epsilon of them lie outside, however many narrow corpora came since."""
    generator = torch.Generator().manual_seed(0)
    wide, fresh = 3 * torch.randn(2, 8000, generator=generator)
    stats = new_stats("pooled", 2, 2)
    stats.arrivals = torch.stack([sketch(wide), *(sketch(wide / 3) for _ in range(5))])
    decision = decide(with_raw(fresh.tolist()), stats, 1.0, 0.02)
    assert 1.4 < decision.ood_percent < 2.6 and not decision.expand


def test_after_its_first_corpus_a_layer_holds_that_corpus_as_it_arrived_alone():
    stats = [new_stats("pooled", 2, 2), new_stats("paper_code", 2, 2)]
    settle(stats, [with_raw([1.0, 2.0])] * 2, first_mixture=True)
    assert stats[0].arrivals.shape == (1, SKETCH) and len(stats[0].newest) == 0
    torch.testing.assert_close(stats[0].arrivals[0], sketch(torch.tensor([1.0, 2.0])))
    assert stats[1].base.keys() == {"mean", "variance"} and not len(stats[1].arrivals)


def test_every_arrival_is_kept_and_of_what_is_learnt_the_newest_alone():
    stats = new_stats("pooled", 2, 2)
    settle([stats], [with_raw([0.0])], first_mixture=True)
    for t in (1.0, 2.0):
        measure(stats, with_raw([t - 1, t, t + 1]))  # median t, interquartile range 1
        arrive(stats, with_raw([11 * t]))
        settle([stats], [with_raw([6 * t])], first_mixture=False)
        assert stats.newest.tolist() == [[5 * t] * SKETCH]
    assert stats.arrivals[:, 0].tolist() == [0.0, 10.0, 20.0]


@pytest.mark.parametrize("scores", [with_raw([0.5]), torch.tensor([[[0.5, 0.5]]])], ids=["query", "code"])
def test_a_corpus_of_one_query_is_measured_learnt_and_judged(scores):
    stats = known(scores, scores)
    arrive(stats, scores)
    settle([stats], [scores], first_mixture=False)
    same, other = (decide(s, stats, 1.0, 0.02) for s in (scores, scores + 1))
    assert (same.ood_percent, same.expand) == (0.0, False) and (other.ood_percent, other.expand) == (
        100,
        True,
    )
    assert all(
        math.isfinite(number) for number in (same.energy_mean, same.energy_std, *same.energy_quantiles)
    )
    assert sum(ood.histogram(scores, stats, 0.02)["queries"]) == 1


# -------------------------------------------------------------------------------------------- moving averages


def by_loop(stats: Stats, scores: torch.Tensor, gates: torch.Tensor) -> None:
    """method.md section 7, expert by expert and position by position."""
    for e in range(stats.experts):
        for i in range(scores.shape[1]):
            rows = [b for b in range(len(scores)) if gates[b, i, e] > 0]
            energies = [-math.log(sum(math.exp(s) for s in scores[b, i].tolist())) for b in rows]
            n = 1 + len(rows)
            if n == 1:
                continue
            mean = sum(energies) / n
            variance = sum((x - mean) ** 2 for x in energies) / (n - 1)
            stats.mean[e, i] = 0.1 * mean + 0.9 * stats.mean[e, i]
            stats.variance[e, i] = 0.1 * variance + 0.9 * stats.variance[e, i]


@pytest.mark.parametrize("experts, batch", [(2, 1), (2, 16), (4, 2), (4, 16)])
def test_update_equals_the_released_codes_loop(experts, batch):
    found, wanted = (new_stats("paper_code", experts, POSITIONS) for _ in range(2))
    for step in range(5):
        scores = draw(batch, experts, mean=0.5, sigma=0.3, seed=step)
        gates = top_gates(scores, 2)
        update(found, scores, gates)
        by_loop(wanted, scores, gates)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variance, wanted.variance, rtol=1e-4, atol=1e-5)


def test_update_by_hand():
    stats = Stats("paper_code", 2, torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0.5], [0.25]]))
    scores = with_energy(torch.tensor([[-1.2], [-1.8]]))
    gates = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])  # both tokens to expert 0
    update(stats, scores, gates)
    # n = 3, m = -3.0 / 3 = -1, v = (0.2^2 + 0.8^2) / 2 = 0.34
    assert stats.mean.flatten().tolist() == pytest.approx([0.1 * -1.0 + 0.9 * -1.0, -2.0])
    assert stats.variance.flatten().tolist() == pytest.approx([0.1 * 0.34 + 0.9 * 0.5, 0.25], abs=1e-6)


def test_update_keeps_a_narrow_variance_at_a_large_batch():
    # Energies near -1.54 with a spread of 0.007: the terms of the expanded square nearly cancel.
    scores = draw(1024, sigma=0.01)
    found, wanted = (new_stats("paper_code", 2, POSITIONS) for _ in range(2))
    update(found, scores, top_gates(scores, 2))
    by_loop(wanted, scores, top_gates(scores, 2))
    torch.testing.assert_close(found.variance, wanted.variance, rtol=0.05, atol=0)


def test_an_expert_without_tokens_keeps_its_numbers():
    stats = Stats("paper_code", 3, -torch.rand(3, POSITIONS), torch.rand(3, POSITIONS))
    mean, variance = stats.mean.clone(), stats.variance.clone()
    scores = draw(16, 3)
    scores[..., 1] = -1.0
    update(stats, scores, top_gates(scores, 2))
    assert torch.equal(stats.mean[1], mean[1]) and torch.equal(stats.variance[1], variance[1])
    assert not torch.isclose(stats.mean[[0, 2]], mean[[0, 2]]).any()


def test_sums_by_hand():
    scores = with_energy(torch.tensor([[-1.0, -3.0], [-2.0, -0.5]]))
    gates = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]])  # (B, M, E)
    tokens, total, squares = routed_energy_moments(scores, gates)
    assert tokens.tolist() == [[2, 1], [0, 2]]  # (E, M)
    assert total.flatten().tolist() == pytest.approx([-1 - 2, -3, 0, -3 - 0.5], abs=1e-6)
    assert squares.flatten().tolist() == pytest.approx([1 + 4, 9, 0, 9 + 0.25], abs=1e-6)


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(st.integers(2, 5), st.integers(1, 40), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 999))
def test_sums_of_parts_move_the_averages_as_the_whole_batch_does(experts, batch, cuts, seed):
    """As micro-batches and processes share a batch; an empty part adds nothing."""
    scores = draw(batch, experts, mean=0.5, sigma=0.3, seed=seed)
    gates = top_gates(scores, 2)
    whole, parts = (new_stats("paper_code", experts, POSITIONS) for _ in range(2))
    edges = [0, *sorted(min(cut, batch) for cut in cuts), batch]
    added = sum(routed_energy_moments(scores[a:b], gates[a:b]) for a, b in zip(edges, edges[1:]))
    assert added.dtype == torch.float64
    torch.testing.assert_close(added, routed_energy_moments(scores, gates), rtol=1e-12, atol=1e-12)
    for _ in range(2):
        update(whole, scores, gates)
        move(parts, added)
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts.variance, whole.variance, rtol=1e-6, atol=1e-7)


def test_sums_hold_on_to_no_gradient_and_moving_leaves_them_alone():
    scores = draw(6).requires_grad_()
    batch = routed_energy_moments(scores, top_gates(scores, 2))
    before = batch.clone()
    move(new_stats("paper_code", 2, POSITIONS), batch)
    assert not batch.requires_grad and torch.equal(batch, before)


# --------------------------------------------------------------------------------------------------- verdicts


def test_paper_code_flags_a_query_with_any_token_above_all_experts():
    mean = torch.tensor([[-1.5, -1.5], [-1.2, -1.6]])  # thresholds of two experts at two positions
    stats = Stats("paper_code", 2, mean, torch.full((2, 2), 0.01))
    e = torch.tensor(
        [
            [
                -1.3,
                -1.55,
            ],  # above expert 0's at position 0, above expert 1's at position 1, above both nowhere
            [-1.1, -1.9],  # above both at position 0
            [-1.3, -1.4],  # above both at position 1
            [-1.2, -1.5],  # at the thresholds
            [-1.7, -1.7],
        ]
    )
    scores = -e[..., None]  # of one expert, whose energies are exact
    assert tails(scores, stats, 0.5)[1].tolist() == [False, True, True, False, False]
    assert not tails(scores - 5, stats, 0.5)[0].any()  # however low, none is below
    decision = decide(scores, stats, delta=1.0, epsilon=0.5)
    assert decision.ood_percent == pytest.approx(40) and decision.tails == [0, decision.ood_percent]
    assert decision.expand and decision.threshold == pytest.approx([-1.2, -1.5])


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.integers(1, 700), st.sampled_from([0.001, 0.02, 0.05, 0.3]), st.integers(0, 999))
def test_a_first_corpus_has_its_share_of_false_alarms_and_would_not_grow_by_itself(queries, epsilon, seed):
    scores = draw(queries, seed=seed)
    stats = known(scores, draw(200, seed=seed + 1))
    below, above = (flags.double().mean().item() for flags in tails(scores, stats, epsilon))
    slack = 2 / queries + 1 / SKETCH  # two queries, and a value of the sketch
    assert abs(below - epsilon / 2) <= slack and abs(above - epsilon / 2) <= slack
    assert not decide(scores, stats, delta=200 * slack, epsilon=epsilon).expand


@pytest.mark.parametrize("mode", ood.MODES)
@pytest.mark.parametrize("delta", [1.0, 5.0, 7.0, 10.0, 35.0])
def test_a_share_of_exactly_delta_does_not_expand(mode, delta):
    stats, epsilon = fixed(mode), 0.02
    expected = 20 if mode == "pooled" else 0  # of 1000 queries: the false alarms
    count = round(10 * delta) + expected
    at = decide(flagged(count, 1000, stats), stats, delta, epsilon)
    assert at.ood_percent == pytest.approx(count / 10)
    assert at.tails == pytest.approx(
        [count / 20, count / 20] if mode == "pooled" else [0, count / 10], abs=0.1
    )
    assert not at.expand
    assert decide(flagged(count + 1, 1000, stats), stats, delta, epsilon).expand


def test_decision_reports_the_energies_it_saw():
    e = -1.5 + torch.arange(100.0)[:, None].expand(100, 2) / 100
    decision = decide(with_energy(e), fixed("pooled"), 1.0, 0.02)
    assert decision.energy_mean == pytest.approx(-1.005, abs=1e-5)
    assert decision.energy_std == pytest.approx(e.double().std(correction=0).item(), rel=1e-5)
    assert decision.energy_quantiles == pytest.approx([-1.5, -1.0, -0.6], abs=0.06)
    assert (decision.delta, decision.threshold) == (1.0, [0.0, 0.0])


def test_unknown_mode_is_refused_by_name():
    with pytest.raises(ValueError, match="found ood_mode='quantile', wanted one of pooled, paper_code"):
        new_stats("quantile", 2, 8)


def test_before_any_corpus_pooled_statistics_are_empty_and_paper_code_starts_at_zero():
    assert len(reference(new_stats("pooled", 2, POSITIONS))) == 0
    stats = new_stats("paper_code", 2, POSITIONS)
    assert stats.mean.shape == (2, POSITIONS) and not stats.mean.any() and not stats.variance.any()


# ------------------------------------------------------------------------------------------ shift or no shift


@pytest.mark.parametrize("queries, delta", [(32, 10.0), (128, 5.0), (1024, 2.0), (8192, 1.0)])
@pytest.mark.parametrize("experts, scale", [(2, 1.0), (3, 1.0), (3, 40.0)], ids=["cosine", "three", "linear"])
def test_pooled_grows_for_a_shift_either_way_and_only_then_whatever_the_size(queries, delta, experts, scale):
    """A handful of queries cannot measure 1 %, so delta is larger there. A linear router's scores have any size."""

    def scores(queries: int, seed: int, mean: float = 0.5) -> torch.Tensor:
        return scale * draw(queries, experts, mean=mean, seed=seed)

    stats = known(scores(4096, 1), scores(4000, 2, mean=0.55))
    for seed in range(10, 15):
        assert not decide(scores(queries, seed), stats, delta, 0.02).expand
        for mean, tail in ((0.8, 0), (0.2, 1)):  # higher scores are lower energies
            shifted = decide(scores(queries, seed, mean), stats, delta, 0.02)
            assert shifted.expand and shifted.tails[tail] == shifted.ood_percent == 100


@pytest.mark.parametrize("measured", [True, False])
def test_energies_of_models_of_different_ages_compare_only_on_the_scale_of_dreams(measured):
    """Each corpus moves and widens the scores of all queries alike; without a shift, none is to grow."""
    stats, grown = known(draw(2048, seed=1), draw(2000, mean=0.8, seed=2)), 0
    for t in (1, 2, 3):
        aged = [0.2 * t + (1 + 0.1 * t) * draw(2048, mean=mean, seed=10 * t + seed)
                for seed, mean in enumerate((0.8, 0.85, 0.85))]  # fmt: skip
        dreams, arriving, learnt = aged
        if measured:
            measure(stats, dreams)
        grown += decide(arriving, stats, 1.0, 0.02).expand
        arrive(stats, arriving)
        settle([stats], [learnt], first_mixture=False)
    assert grown == (0 if measured else 3)


def trained_on(batch: int, experts: int, sigma: float, steps: int = 150) -> Stats:
    """paper_code statistics after that many training batches of one distribution."""
    stats = new_stats("paper_code", experts, POSITIONS)
    for step in range(steps):
        scores = draw(batch, experts, sigma=sigma, seed=1000 + step)
        update(stats, scores, top_gates(scores, 2))
    return stats


# method.md section 7: percent of queries that paper_code flags without any shift
@pytest.mark.parametrize(
    "experts, sigma, percent",
    [
        (2, 0.01, {1024: 98.6, 128: 31, 32: 0.0}),
        (2, 0.05, {1024: 99.5, 128: 98, 32: 56}),
        (3, 0.05, {1024: 99, 128: 85, 32: 0.6}),
    ],
)
def test_paper_code_flags_by_batch_size_where_nothing_shifts(experts, sigma, percent):
    found = {}
    for batch in percent:
        stats = trained_on(batch, experts, sigma)
        found[batch] = decide(draw(4000, experts, sigma=sigma, seed=9), stats, 1.0, 0.0).ood_percent
        assert decide(draw(500, experts, mean=0.5, sigma=sigma, seed=8), stats, 1.0, 0.0).ood_percent == 100
    assert found[1024] > 50 and found[1024] > found[128] > found[32]
    assert found == pytest.approx(percent, abs=10)


# ---------------------------------------------------------------------------------------------------- Table 5

PT = [[81.2, 43.1, 33.0, 35.8, 47.2], [55.8, 19.3, 6.9, 5.9, 14.6], [22.0, 5.6, 7.1, 5.3, 2.8]]  # D_2..D_4
FULL = [[3.6, 1.6, 1.2, 1.3, 2.0], [0.0] * 5, [0.0] * 5, [0.0] * 5]  # D_1..D_4


@pytest.mark.parametrize(
    "percents, delta, experts",
    [
        (PT, 10.0, [10, 15, 18, 19]),
        (PT, 5.0, [10, 15, 20, 24]),
        (FULL, 1.0, [10, 15, 15, 15, 15]),
        (FULL, 5.0, [10, 10, 10, 10, 10]),
    ],
)
def test_growth_follows_table_5(percents, delta, experts):
    stats, total = fixed("paper_code"), [10]
    for corpus in percents:
        decisions = [decide(flagged(round(10 * p), 1000, stats), stats, delta, 0.005) for p in corpus]
        assert [decision.ood_percent for decision in decisions] == pytest.approx(corpus)
        total.append(total[-1] + sum(decision.expand for decision in decisions))
    assert total == experts


def test_a_histogram_counts_each_query_on_its_side_of_the_ends_of_what_is_known():
    """Queries beyond an end lie in the bins beyond it or in the one that holds it."""
    scores, epsilon = draw(400, mean=0.84, seed=3), 0.3
    stats = known(draw(300, seed=1), draw(300, seed=2))
    found = ood.histogram(scores, stats, epsilon, bins=20)
    assert sum(found["queries"]) == 400 and sum(found["reference"]) == SKETCH and len(found["edges"]) == 21
    assert found["thresholds"] == known_range(stats, epsilon).tolist()
    left, right = torch.tensor(found["edges"][:-1]), torch.tensor(found["edges"][1:])
    counts, (low, high) = torch.tensor(found["queries"]), found["thresholds"]
    for flags, beyond, touching in zip(
        tails(scores, stats, epsilon), (right <= low, left >= high), (left < low, right > high)
    ):
        assert 0 < counts[beyond].sum() <= flags.sum() <= counts[touching].sum() < 400


def test_a_histogram_of_paper_code_counts_the_largest_excess_over_the_thresholds():
    stats = Stats("paper_code", 2, torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.zeros(2, 2))
    e = torch.tensor([[-1.5, -3.0], [-1.0, -0.5], [-3.0, -1.15]])  # excess -.5, .5 and -.15
    found = ood.histogram(-e[..., None], stats, 0.02, bins=10)
    assert found["thresholds"] == [0.0] and found["queries"] == [1, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert "reference" not in found


def test_a_histogram_of_equal_scores_is_one_bar():
    scores = with_raw([1.0] * 7)
    found = ood.histogram(scores, known(scores, scores), 0.02)
    assert sum(found["queries"]) == max(found["queries"]) == 7 and max(found["reference"]) == SKETCH
