"""Energy-based out-of-distribution detection: does a layer need a new expert?

Paper    section 3.2, Eq. 2 and Table 5: energy of the router's scores, a threshold per docid position, delta
         percent
In       router scores (Q, M, E) of one layer for all pseudo-queries of D_t; statistics of earlier corpora
Out      a Decision: the share of OOD queries, and True if the layer should grow
Next     train.py acts on it through MixedFeedForward.add_expert(), and settles the statistics after each corpus
Differs  two modes. `paper_code` follows the released code: moving averages gathered in training, one
         threshold for each (expert, position), a query is OOD if one of its tokens lies above all of them.
         Its mean sits where half of all tokens are, so without any shift it flags from 0 % to 99.6 % of
         queries, depending on the batch size. A new expert starts from expert 0's statistics after the first
         corpus; the released code never stores these where D_0 trained the mixture, and starts from zeros.
         `calibrated`, the default, measures D_t once after training on it and allows a stated share of false
         alarms.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODES = ("calibrated", "paper_code")
MERGE = 0.5  # calibrated: weight of the newest corpus in the statistics


def energy(scores: Tensor) -> Tensor:
    """E = -logsumexp_e(scores), at temperature 1: (.., E) -> (..,). Higher is more out-of-distribution. Paper Eq. 2."""
    return -scores.float().logsumexp(-1)


@dataclass
class Stats:
    """What a layer remembers of the energies it has seen; positions are those of the docid."""

    mode: str
    experts: int  # E of the layer when these numbers hold
    mean: Tensor  # calibrated: (M,); paper_code: (E, M)
    variance: Tensor  # the same shape
    threshold: float = math.inf  # calibrated: the (1 - epsilon) quantile of the queries' standardised energy
    base: dict[str, Tensor] = field(default_factory=dict)  # paper_code: expert 0's (M,) after corpus 1

    def state(self) -> dict:
        return vars(self).copy()


@dataclass
class Decision:
    """One layer's verdict on a corpus, with the numbers that led to it."""

    expand: bool
    ood_percent: float  # share of the corpus's queries that are OOD
    delta: float  # percent beyond the expected share that it takes to expand
    threshold: list[float]  # calibrated: [c]; paper_code: max_e of the thresholds, per position
    energy_mean: float
    energy_std: float
    energy_quantiles: list[float]  # 5, 50 and 95 %


def new_stats(mode: str, experts: int, positions: int) -> Stats:
    """Statistics of a layer before its first corpus. `paper_code` starts at zero, as the released code does."""
    if mode not in MODES:
        raise ValueError(f"found ood_mode={mode!r}, wanted one of {', '.join(MODES)}")
    shape = (experts, positions) if mode == "paper_code" else (positions,)
    return Stats(mode, experts, torch.zeros(shape), torch.zeros(shape))


def query_score(e: Tensor, stats: Stats) -> Tensor:
    """How far out of what the layer has seen each query lies: energies (Q, M) -> (Q,).

    Calibrated: the largest standardised energy of its positions; paper_code: the largest excess over its position's
    threshold.
    """
    if stats.mode == "paper_code":
        return (e - _paper_threshold(stats, 0.0)).max(dim=1).values
    return ((e - stats.mean) / stats.variance.sqrt().clamp(min=1e-6)).max(dim=1).values


def calibrate(e: Tensor, experts: int, epsilon: float) -> Stats:
    """Statistics of energies (Q, M) that count as in-distribution; a share `epsilon` of them lies beyond the threshold."""
    stats = Stats("calibrated", experts, e.mean(0), e.var(0))
    stats.threshold = float(torch.quantile(query_score(e, stats), 1 - epsilon, interpolation="higher"))
    return stats


def merge(old: Stats, new: Stats, weight: float = MERGE) -> Stats:
    """Moving average over corpora of calibrated statistics; `weight` is the new one's share."""
    if old.experts != new.experts:
        raise ValueError(
            f"found statistics of {old.experts} experts, wanted {new.experts}; call grow() first"
        )

    def mix(a, b):
        return (1 - weight) * a + weight * b

    variance, threshold = mix(old.variance, new.variance), mix(old.threshold, new.threshold)
    return Stats("calibrated", new.experts, mix(old.mean, new.mean), variance, threshold)


def routed_energy_moments(scores: Tensor, gates: Tensor) -> Tensor:
    """paper_code: what `move` needs of a part of a batch, scores and gates (B, M, E) -> (3, E, M) float64.

    Over the tokens routed to expert e at position i: their number, sum E and sum E^2. Parts add up.
    """
    e, routed = energy(scores.detach()).double(), (gates.detach() > 0).double()  # (B, M), (B, M, E)
    return torch.stack([
        routed.sum(0).T, torch.einsum("bm,bme->em", e, routed), torch.einsum("bm,bme->em", e.pow(2), routed)
    ])  # fmt: skip


def move(stats: Stats, batch: Tensor, momentum: float = 0.1) -> None:
    """paper_code: one training batch, given by its `routed_energy_moments`, moves the averages, in place.

    For expert e at position i, over the n - 1 tokens routed to e: m = sum E / n, v = sum (E - m)^2 / (n - 1); the count
    n = 1 + tokens is the released code's, and biases m towards zero.
    """
    tokens, total, squares = batch.cpu()
    n = 1 + tokens
    mean = total / n
    variance = (squares - 2 * mean * total + mean.pow(2) * tokens) / tokens.clamp(min=1)
    seen, mean, variance = tokens > 0, mean.float(), variance.float()
    stats.mean = torch.where(seen, momentum * mean + (1 - momentum) * stats.mean, stats.mean)
    stats.variance = torch.where(seen, momentum * variance + (1 - momentum) * stats.variance, stats.variance)


def remember_base(stats: Stats) -> None:
    """paper_code: keeps expert 0's statistics after the first mixed corpus; later experts start from them."""
    stats.base = {"mean": stats.mean[0].clone(), "variance": stats.variance[0].clone()}


class MovingEnergies:
    """paper_code: statistics of all layers, moved once a step by the whole batch. In the other mode, nothing."""

    def __init__(self, stats: list[Stats], only_new: bool = False):
        """After D_0 only layers that grew take part (`only_new`)."""
        self.stats = [stat for stat in stats if stat.mode == "paper_code"]
        self.only_new, self.moments = only_new, {}

    def see(self, routes: list) -> None:
        """One part of a batch: the layers' routes (mixlora.Route)."""
        for number, (_, route) in enumerate(zip(self.stats, routes)):
            if route.newest or not self.only_new:
                moments = routed_energy_moments(route.scores, route.gates)
                self.moments[number] = self.moments.get(number, 0) + moments

    def step(self, add_up=lambda tensors: None) -> None:
        """Moves the statistics; `add_up` sums the parts of several processes in place."""
        add_up(self.moments.values())
        for number, batch in self.moments.items():
            if batch.isfinite().all():  # a step without a finite gradient is skipped
                move(self.stats[number], batch)
        self.moments = {}

    def get_state(self) -> list[dict]:
        """For store.Resume."""
        return [stat.state() for stat in self.stats]

    def set_state(self, states: list[dict]) -> None:
        for stat, state in zip(self.stats, states):
            vars(stat).update(state)


def settle(stats: list[Stats], scores: list[Tensor], epsilon: float, first_mixture: bool) -> list[Stats]:
    """The layers' statistics after a corpus, from its router scores (Q, M, E) by the model that has learnt it.

    `first_mixture`: there were no statistics before it.
    """
    if all(stat.mode == "paper_code" for stat in stats):
        for stat in stats if first_mixture else []:
            remember_base(stat)
        return stats
    new = [calibrate(energy(s), s.shape[-1], epsilon) for s in scores]
    return new if first_mixture else list(map(merge, stats, new))


def grow(stats: Stats) -> None:
    """One expert more, in place: one of average score lowers every energy by ln((N + 1) / N), and so do the means."""
    shift = math.log(stats.experts) - math.log(stats.experts + 1)
    stats.experts += 1
    stats.mean = stats.mean + shift
    if stats.mode == "paper_code":
        base = stats.base or {"mean": stats.mean[0] - shift, "variance": stats.variance[0]}
        stats.base = {"mean": base["mean"] + shift, "variance": base["variance"]}
        stats.mean = torch.cat([stats.mean, stats.base["mean"][None]])
        stats.variance = torch.cat([stats.variance, stats.base["variance"][None]])


def is_ood(e: Tensor, stats: Stats, sigmas: float = 0.0) -> Tensor:
    """Which queries are out-of-distribution for a layer: energies (Q, M) -> (Q,) bool.

    `sigmas` raises paper_code's thresholds to mean + sigmas * standard deviation; it is 0 in every published run.
    """
    if stats.mode == "calibrated":
        return query_score(e, stats) > stats.threshold
    return (e > _paper_threshold(stats, sigmas)).any(1)


def _paper_threshold(stats: Stats, sigmas: float) -> Tensor:
    """(M,): an energy above this lies above the threshold of every expert."""
    return (stats.mean + sigmas * stats.variance.clamp(min=0).sqrt()).max(0).values


def histogram(e: Tensor, control: Tensor, stats: Stats, bins: int = 60) -> dict:
    """Counts of query scores for tools/plot.py: energies of a corpus (Q, M) and of a control (Q', M), in the same bins.

    Scores beyond the middle 99.8 % are counted in the outermost bins.
    """
    scores = [query_score(part, stats) for part in (e, control)]
    threshold = stats.threshold if stats.mode == "calibrated" else 0.0
    both = torch.cat(scores).sort().values
    ends = both[[round(q * (len(both) - 1)) for q in (0.001, 0.999)]].tolist()
    low, high = min(*ends, threshold), max(*ends, threshold)
    edges = torch.linspace(low, high if high > low else low + 1, bins + 1)
    counts = [torch.histogram(s.clamp(low, float(edges[-1])), edges).hist.int().tolist() for s in scores]
    return {"edges": edges.tolist(), "queries": counts[0], "control": counts[1], "threshold": threshold}


def decide(scores: Tensor, stats: Stats, delta: float, epsilon: float, sigmas: float = 0.0) -> Decision:
    """Is the layer to grow for this corpus? The one place that decides.

    Args:
        scores: (Q, M, E) router scores of the corpus's pseudo-queries, in evaluation mode.
        delta: percent of queries, beyond the expected false alarms, above which the layer expands.
        epsilon: the share of false alarms that calibration allowed; paper_code expects none.
    """
    e = energy(scores)  # (Q, M)
    percent = 100 * is_ood(e, stats, sigmas).sum().item() / len(e)
    calibrated = stats.mode == "calibrated"
    expand = percent - (100 * epsilon if calibrated else 0.0) > delta
    threshold = [stats.threshold] if calibrated else _paper_threshold(stats, sigmas).tolist()
    sample = e.flatten()[:: max(1, e.numel() // 1_000_000)]  # torch.quantile takes 16 million values at most
    quantiles = torch.quantile(sample, torch.tensor([0.05, 0.5, 0.95])).tolist()
    return Decision(expand, percent, delta, threshold, e.mean().item(), e.std().item(), quantiles)
