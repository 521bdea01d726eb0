"""Energies, thresholds and the decision to grow, by hand and on corpora with and without a shift."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ood
from mixlora import top_gates
from ood import (
    Stats,
    calibrate,
    decide,
    energy,
    grow,
    is_ood,
    merge,
    move,
    new_stats,
    query_score,
    remember_base,
    routed_energy_moments,
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


def flagged(count: int, total: int, stats: Stats) -> torch.Tensor:
    """Scores of `total` queries, the first `count` of which are far above any threshold."""
    e = torch.full((total, stats.mean.shape[-1]), -5.0)
    e[:count, -1] = 5.0
    return with_energy(e, stats.experts)


def fixed(mode: str, positions: int = 2) -> Stats:
    """Statistics with a threshold of 0 in the one mode and of 3 standard deviations of 1 in the other."""
    shape = (2, positions) if mode == "paper_code" else (positions,)
    return Stats(mode, 2, torch.zeros(shape), torch.ones(shape), threshold=3.0)


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


def test_grow_shifts_calibrated_means_and_nothing_else():
    stats = Stats("calibrated", 2, torch.tensor([-1.5, -1.2]), torch.tensor([0.1, 0.2]), 2.5)
    grow(stats)
    assert (
        stats.experts == 3 and stats.threshold == 2.5 and stats.variance.tolist() == pytest.approx([0.1, 0.2])
    )
    assert stats.mean.tolist() == pytest.approx([-1.5 + math.log(2 / 3), -1.2 + math.log(2 / 3)])
    grow(stats)
    assert stats.experts == 4
    assert stats.mean.tolist() == pytest.approx([-1.5 + math.log(2 / 4), -1.2 + math.log(2 / 4)])


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


@pytest.mark.parametrize("mode", ["calibrated", "paper_code"])
def test_growth_by_an_average_expert_changes_no_verdict(mode):
    seen, new = draw(2000, seed=1), draw(2000, mean=0.83, seed=2)
    if mode == "calibrated":
        stats = calibrate(energy(seen), 2, 0.01)
    else:
        stats = new_stats(mode, 2, POSITIONS)
        for part in seen.split(32):
            update(stats, part, top_gates(part, 2))
    before = is_ood(energy(new), stats)
    assert (
        0.02 < before.float().mean() < 0.98
    )  # a shift that splits the queries, or this test would say little
    grow(stats)
    average = new.logsumexp(-1, keepdim=True) - math.log(2)
    assert torch.equal(is_ood(energy(torch.cat([new, average], -1)), stats), before)


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
    assert is_ood(e, stats).tolist() == [False, True, True, False, False]
    assert is_ood(e, stats, sigmas=1.2).tolist() == [False, False, False, False, False]  # 0.12 higher
    assert is_ood(e, stats, sigmas=0.8).tolist() == [False, True, True, False, False]  # 0.08 higher
    decision = decide(with_energy(e), stats, delta=1.0, epsilon=0.5)
    assert decision.ood_percent == pytest.approx(40) and decision.expand
    assert decision.threshold == pytest.approx([-1.2, -1.5])


def test_calibrated_scores_a_query_by_its_most_unusual_position():
    stats = Stats("calibrated", 2, torch.tensor([-1.0, -2.0]), torch.tensor([0.04, 0.25]), threshold=2.0)
    e = torch.tensor([[-0.8, -1.5], [-0.5, -3.0], [-1.5, -0.9]])  # (1, 1), (2.5, -2), (-2.5, 2.2)
    assert query_score(e, stats).tolist() == pytest.approx([1.0, 2.5, 2.2], abs=1e-5)
    assert is_ood(e, stats).tolist() == [False, True, True]
    assert decide(with_energy(e), stats, delta=60.0, epsilon=0.005).expand
    assert not decide(with_energy(e), stats, delta=60.0, epsilon=0.08).expand  # 66.7 - 8 < 60


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.integers(2, 700), st.sampled_from([0.001, 0.005, 0.01, 0.05, 0.3]), st.integers(0, 999))
def test_calibration_data_has_at_most_its_share_of_false_alarms(queries, epsilon, seed):
    scores = draw(queries, seed=seed)
    stats = calibrate(energy(scores), 2, epsilon)
    share = is_ood(energy(scores), stats).float().mean().item()
    assert epsilon - 2 / queries < share <= epsilon + 1e-6
    assert not decide(scores, stats, delta=0.0, epsilon=epsilon).expand


def test_calibration_equals_its_definition():
    e = energy(draw(1000))
    stats = calibrate(e, 2, 0.01)
    columns = [e[:, i].double() for i in range(POSITIONS)]
    means = [float(column.sum()) / 1000 for column in columns]
    variances = [float((column - m).pow(2).sum()) / 999 for column, m in zip(columns, means)]
    assert stats.mean.tolist() == pytest.approx(means, abs=1e-5)
    assert stats.variance.tolist() == pytest.approx(variances, rel=1e-3)
    z = sorted(
        max((row[i] - means[i]) / variances[i] ** 0.5 for i in range(POSITIONS))
        for row in e.double().tolist()
    )
    assert stats.threshold == pytest.approx(z[990], rel=1e-3)  # 9 of 1000 lie beyond it
    assert int((query_score(e, stats) > stats.threshold).sum()) == 9


def test_constant_energies_calibrate_to_no_false_alarm():
    e = torch.full((50, POSITIONS), -1.5)
    stats = calibrate(e, 2, 0.01)
    assert not is_ood(e, stats).any() and is_ood(e + 0.01, stats).all()


@pytest.mark.parametrize("mode", ["calibrated", "paper_code"])
@pytest.mark.parametrize("delta", [1.0, 5.0, 7.0, 10.0, 35.0])
def test_a_share_of_exactly_delta_does_not_expand(mode, delta):
    stats, epsilon = fixed(mode), 0.005
    expected = 5 if mode == "calibrated" else 0  # of 1000 queries: the false alarms that calibration allows
    count = round(10 * delta) + expected
    at = decide(flagged(count, 1000, stats), stats, delta, epsilon)
    assert at.ood_percent == pytest.approx(count / 10)
    assert not at.expand
    assert decide(flagged(count + 1, 1000, stats), stats, delta, epsilon).expand


def test_decision_reports_the_energies_it_saw():
    e = -1.5 + torch.arange(100.0)[:, None].expand(100, 2) / 100
    decision = decide(with_energy(e), fixed("calibrated"), 1.0, 0.005)
    assert decision.energy_mean == pytest.approx(-1.005, abs=1e-5)
    assert decision.energy_std == pytest.approx(e.double().std().item(), rel=1e-5)
    assert decision.energy_quantiles == pytest.approx([-1.5, -1.0, -0.6], abs=0.06)
    assert (decision.delta, decision.threshold) == (1.0, [3.0])


def test_unknown_mode_is_refused_by_name():
    with pytest.raises(ValueError, match="found ood_mode='quantile', wanted one of calibrated, paper_code"):
        new_stats("quantile", 2, 8)


def test_before_any_corpus_calibrated_statistics_flag_nothing_and_paper_code_starts_at_zero():
    assert not is_ood(energy(draw(10, mean=-1.0)), new_stats("calibrated", 2, POSITIONS)).any()
    stats = new_stats("paper_code", 2, POSITIONS)
    assert stats.mean.shape == (2, POSITIONS) and not stats.mean.any() and not stats.variance.any()


# ---------------------------------------------------------------------------------------------------- merging


def test_merge_weights_the_newer_corpus():
    old = Stats("calibrated", 3, torch.tensor([-1.0]), torch.tensor([0.1]), 2.0)
    new = Stats("calibrated", 3, torch.tensor([-2.0]), torch.tensor([0.3]), 4.0)
    merged = merge(old, new, 0.25)
    assert merged.mean.item() == pytest.approx(-1.25) and merged.variance.item() == pytest.approx(0.15)
    assert merged.threshold == pytest.approx(2.5) and merged.experts == 3
    assert torch.equal(merge(old, new, 1.0).mean, new.mean) and torch.equal(
        merge(old, new, 0.0).mean, old.mean
    )


def test_merge_refuses_statistics_of_another_number_of_experts():
    two, three = (Stats("calibrated", n, torch.zeros(1), torch.ones(1), 2.0) for n in (2, 3))
    with pytest.raises(ValueError, match=r"found statistics of 2 experts, wanted 3; call grow\(\)"):
        merge(two, three, 0.5)
    grow(two)
    assert merge(two, three, 0.5).experts == 3


# ------------------------------------------------------------------------------------------ shift or no shift


@pytest.mark.parametrize("queries, delta", [(32, 10.0), (128, 5.0), (1024, 1.0), (8192, 1.0)])
@pytest.mark.parametrize("experts, sigma", [(2, 0.01), (2, 0.05), (3, 0.05)])
def test_calibrated_expands_for_a_shift_and_only_then_whatever_the_size(queries, delta, experts, sigma):
    # A handful of queries cannot measure 1 %, so delta is larger there.
    stats = calibrate(energy(draw(4096, experts, sigma=sigma, seed=1)), experts, 0.005)
    for seed in range(10, 15):
        assert not decide(draw(queries, experts, sigma=sigma, seed=seed), stats, delta, 0.005).expand
        shifted = decide(draw(queries, experts, mean=0.5, sigma=sigma, seed=seed), stats, delta, 0.005)
        assert shifted.expand and shifted.ood_percent == 100


@pytest.mark.parametrize("batch", [32, 128, 1024])
def test_calibrated_statistics_after_corpora_without_shift_still_do_not_expand(batch):
    # Statistics of three corpora merged, the layer grown between them by an expert like the others.
    stats = calibrate(energy(draw(4096, 2, seed=1)), 2, 0.005)
    for t in (2, 3):
        grow(stats)
        scores = draw(4 * batch + 2048, 2, seed=t)
        scores = torch.cat(
            [scores, (scores.logsumexp(-1, keepdim=True) - math.log(2)).expand(-1, -1, t - 1)], -1
        )
        assert not decide(scores, stats, 1.0, 0.005).expand
        stats = merge(stats, calibrate(energy(scores), t + 1, 0.005), 0.5)


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


@pytest.mark.parametrize("mode", ood.MODES)
def test_a_histogram_counts_each_query_on_its_side_of_the_threshold(mode):
    """Where the threshold is an edge of the bins, those to its right hold just the queries that are OOD."""
    e, control = torch.randn(400, 3) + 1.0, torch.randn(300, 3)
    stats = ood.new_stats(mode, 2, 3)
    stats.mean, stats.variance = stats.mean + 0.3, stats.variance + 4.0
    stats.threshold = 50.0  # beyond every score, and so the last edge
    found = ood.histogram(e, control, stats, bins=20)
    assert sum(found["queries"]) == 400 and sum(found["control"]) == 300 and len(found["edges"]) == 21
    scores = query_score(e, stats)
    if mode == "calibrated":
        assert found["threshold"] == found["edges"][-1] == 50.0
    else:
        assert found["threshold"] == 0 and torch.equal(scores > 0, ood.is_ood(e, stats))
    low, high = found["edges"][5], found["edges"][10]
    inside = ((scores >= low) & (scores < high)).sum().item()
    assert abs(sum(found["queries"][5:10]) - inside) <= 1  # one may fall on an edge by rounding


def test_a_histogram_of_equal_scores_is_one_bar():
    stats = ood.Stats("calibrated", 2, torch.zeros(2), torch.ones(2), threshold=1.0)
    found = ood.histogram(torch.ones(7, 2), torch.ones(3, 2), stats)
    assert sum(found["queries"]) == max(found["queries"]) == 7 and max(found["control"]) == 3
