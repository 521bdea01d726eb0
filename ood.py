"""Energy-based out-of-distribution detection: does a layer need a new expert?

Paper    section 3.2, Eq. 2 and Table 5: energy of the router's scores, a threshold per docid position, delta
         percent
In       router scores (Q, M, E) of one layer for all pseudo-queries of D_t, and for dreams; statistics of earlier
         corpora
Out      a Decision: the share of OOD queries, and True if the layer should grow
Next     train.py acts on it through MixedFeedForward.add_expert(), and settles the statistics after each corpus
Differs  two modes. `paper_code` follows the released code: moving averages gathered in training, one
         threshold for each (expert, position), a query is OOD if one of its tokens lies above all of them.
         Its mean sits where half of all tokens are, so without any shift it flags from 0 % to 99.6 % of
         queries, depending on the batch size. On D_0 it gathers whole batches, general text and fragments
         included. A new expert starts from expert 0's statistics after the first corpus; the released code
         never stores these where D_0 trained the mixture, and starts from zeros.
         `pooled` is ours: unseen documents have lower energies than learnt ones, so both tails count;
         energies are measured on the scale of dreams by the same model (dream.py), so those of different
         ages compare; and a query is OOD if it lies below the ranges of all earlier corpora or above them,
         as each looked when it arrived (D_0, and the newest too: once learnt). Corpora of few documents that
         a finished run takes in decide together, once they are enough; by `paper_code`, not at all.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODES = ("pooled", "paper_code")
SKETCH = 512  # quantiles that stand for a corpus's queries in the pooled reference
MOMENTUM = 0.1  # of a batch in the moving averages (released code)
FEW = 128  # documents: added corpora of fewer share a sketch, and grow a layer only once that is full (ours)


def energy(scores: Tensor) -> Tensor:
    """E = -logsumexp_e(scores), at temperature 1: (.., E) -> (..,). Higher is more out-of-distribution. Paper Eq. 2."""
    return -scores.float().logsumexp(-1)


@dataclass
class Stats:
    """What a layer remembers of the energies it has seen; positions are those of the docid."""

    mode: str
    experts: int  # E of the layer when these numbers hold
    mean: Tensor  # paper_code: (E, M)
    variance: Tensor  # paper_code: (E, M)
    base: dict[str, Tensor] = field(default_factory=dict)  # paper_code: expert 0's (M,) after corpus 1
    # pooled: sketches of z, (n, SKETCH) of each corpus on arrival (D_0: once learnt), (0 or 1, SKETCH) of the newest
    # once learnt; z of arrivals of few documents, at most (SKETCH,); the dreams' median and interquartile range, (2,)
    arrivals: Tensor = field(default_factory=lambda: torch.empty(0, SKETCH))
    newest: Tensor = field(default_factory=lambda: torch.empty(0, SKETCH))
    pool: Tensor = field(default_factory=lambda: torch.empty(0))
    dreams: Tensor = field(default_factory=lambda: torch.tensor([0.0, 1.0]))

    def state(self) -> dict:
        return vars(self).copy()


@dataclass
class Decision:
    """One layer's verdict on a corpus, with the numbers that led to it."""

    expand: bool
    ood_percent: float  # share of the corpus's queries that are OOD
    tails: list[float]  # percent of them below and above what is known
    pool_percent: float | None  # of the pool that decides for few documents, None: the corpus decides alone
    delta: float  # percent beyond the expected share that it takes to expand
    threshold: list[float]  # pooled: z of both ends; paper_code: max_e of the thresholds, per position
    energy_mean: float
    energy_std: float
    energy_quantiles: list[float]  # 5, 50 and 95 %


def new_stats(mode: str, experts: int, positions: int) -> Stats:
    """Statistics of a layer before its first corpus. `paper_code` starts at zero, as the released code does."""
    if mode not in MODES:
        raise ValueError(f"found ood_mode={mode!r}, wanted one of {', '.join(MODES)}")
    return Stats(mode, experts, torch.zeros(experts, positions), torch.zeros(experts, positions))


# --------------------------------------------------------------------------------------------------------- pooled


def raw_score(scores: Tensor) -> Tensor:
    """-log mean_e exp(score_e), mean over positions: (Q, M, E) -> (Q,). An expert more does not move it by itself."""
    return (energy(scores) + math.log(scores.shape[-1])).mean(1)


def measure(stats: Stats, dreams: Tensor) -> None:
    """pooled: takes the scale from dreams of known docids (Q, M, E), scored by the same model. In place.

    Where all dreams score alike, their interquartile range of 0 counts as 1.
    """
    low, middle, high = torch.quantile(raw_score(dreams), torch.tensor([0.25, 0.5, 0.75]))
    stats.dreams = torch.stack([middle, high - low if high > low else torch.tensor(1.0)])


def standardised(scores: Tensor, stats: Stats) -> Tensor:
    """z: how far each query lies from the dreams' median, in interquartile ranges: (Q, M, E) -> (Q,)."""
    return (raw_score(scores) - stats.dreams[0]) / stats.dreams[1]


def sketch(z: Tensor) -> Tensor:
    """(Q,) -> (512,) quantiles, at the middles of as many equal shares."""
    values = z.sort().values
    at = (torch.arange(SKETCH) + 0.5) / SKETCH * (len(values) - 1)
    return values[at.floor().long()].lerp(values[at.ceil().long()], at.frac())


def reference(stats: Stats) -> Tensor:
    """z of everything that is known, ascending: every sketch with equal weight, few documents by their number."""
    return torch.cat([stats.arrivals.flatten(), stats.newest.flatten(), stats.pool]).sort().values


def known_range(stats: Stats, epsilon: float) -> Tensor:
    """(2,): from the lowest to the highest end of the central 1 - epsilon of each known corpus.

    Of all corpora together it would be narrower than that of a corpus that spreads more than the others, such as D_0,
    whose own queries would then lie outside. The pool takes no part before it is a sketch.
    """
    known = torch.cat([stats.arrivals, stats.newest])
    low, high = torch.quantile(known, torch.tensor([epsilon / 2, 1 - epsilon / 2]), dim=1)
    return torch.stack([low.min(), high.max()])


def arrival(stats: Stats, scores: Tensor, documents: int) -> Tensor:
    """z of an arriving corpus, (Q, M, E) -> (Q,): of few documents, some of them in proportion, after those in the pool."""
    z = standardised(scores, stats)
    if documents >= FEW:
        return z
    points = max(1, SKETCH * documents // FEW)
    return torch.cat([stats.pool, z[:: max(1, len(z) // points)][:points]])


def arrive(stats: Stats, scores: Tensor, documents: int = FEW) -> None:
    """pooled: keeps how D_t (Q, M, E) looks to the model that has not trained on it. In place.

    Fewer documents than FEW join the pool; a full pool becomes a sketch of its own.
    """
    z, few = arrival(stats, scores, documents), documents < FEW
    if few and len(z) < SKETCH:
        stats.pool = z
        return
    stats.arrivals = torch.cat([stats.arrivals, sketch(z)[None]])
    stats.pool = stats.pool[: 0 if few else None]


# ----------------------------------------------------------------------------------------------------- paper_code


def routed_energy_moments(scores: Tensor, gates: Tensor) -> Tensor:
    """paper_code: what `move` needs of a part of a batch, scores and gates (B, M, E) -> (3, E, M) float64.

    Over the tokens routed to expert e at position i: their number, sum E and sum E^2. Parts add up.
    """
    e, routed = energy(scores.detach()).double(), (gates.detach() > 0).double()  # (B, M), (B, M, E)
    return torch.stack([
        routed.sum(0).T, torch.einsum("bm,bme->em", e, routed), torch.einsum("bm,bme->em", e.pow(2), routed)
    ])  # fmt: skip


def move(stats: Stats, batch: Tensor) -> None:
    """paper_code: one training batch, given by its `routed_energy_moments`, moves the averages, in place.

    For expert e at position i, over the n - 1 tokens routed to e: m = sum E / n, v = sum (E - m)^2 / (n - 1); the count
    n = 1 + tokens is the released code's, and biases m towards zero.
    """
    tokens, total, squares = batch.cpu()
    n = 1 + tokens
    m = total / n
    v = (squares - 2 * m * total + m.pow(2) * tokens) / tokens.clamp(min=1)
    seen, m, v = tokens > 0, m.float(), v.float()
    stats.mean = torch.where(seen, stats.mean + MOMENTUM * (m - stats.mean), stats.mean)
    stats.variance = torch.where(seen, stats.variance + MOMENTUM * (v - stats.variance), stats.variance)


def remember_base(stats: Stats) -> None:
    """paper_code: keeps expert 0's statistics after the first mixed corpus; later experts start from them."""
    stats.base = {"mean": stats.mean[0].clone(), "variance": stats.variance[0].clone()}


class MovingEnergies:
    """Statistics of all layers, moved once a step by the whole batch. In mode `pooled`, nothing."""

    def __init__(self, stats: list[Stats], only_new: bool = False):
        """With `only_new`, as on D_1.., only layers with experts that train take part."""
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
            if batch.isfinite().all():  # not where the states of a batch overflowed
                move(self.stats[number], batch)
        self.moments = {}

    def get_state(self) -> list[dict]:
        """For store.Resume."""
        return [stat.state() for stat in self.stats]

    def set_state(self, states: list[dict]) -> None:
        for stat, state in zip(self.stats, states):
            vars(stat).update(state)


def _paper_threshold(stats: Stats) -> Tensor:
    """(M,): an energy above this lies above the threshold of every expert, its mean (no published run adds deviations)."""
    return stats.mean.max(0).values


# ------------------------------------------------------------------------------------------------------ both modes


def settle(stats: list[Stats], scores: list[Tensor], first_mixture: bool) -> None:
    """After a corpus: what its queries (Q, M, E) look like to the model that has learnt it. In place.

    `first_mixture`: there were no statistics before it.
    """
    for stat, of_layer in zip(stats, scores):
        if stat.mode == "paper_code":
            if first_mixture:
                remember_base(stat)
        elif first_mixture:
            arrive(stat, of_layer)
        else:
            stat.newest = sketch(standardised(of_layer, stat))[None]


def grow(stats: Stats) -> None:
    """One expert more, in place. paper_code: one of average score lowers every energy by ln((N + 1) / N), and so do the
    means.
    """
    shift = math.log(stats.experts) - math.log(stats.experts + 1)
    stats.experts += 1
    if stats.mode == "paper_code":
        stats.mean = stats.mean + shift
        base = stats.base or {"mean": stats.mean[0] - shift, "variance": stats.variance[0]}
        stats.base = {"mean": base["mean"] + shift, "variance": base["variance"]}
        stats.mean = torch.cat([stats.mean, stats.base["mean"][None]])
        stats.variance = torch.cat([stats.variance, stats.base["variance"][None]])


def outside(z: Tensor, stats: Stats, epsilon: float) -> tuple[Tensor, Tensor]:
    """pooled: which z (Q,) lie below and which above the known range."""
    low, high = known_range(stats, epsilon)
    return z < low, z > high


def tails(scores: Tensor, stats: Stats, epsilon: float) -> tuple[Tensor, Tensor]:
    """Which queries (Q, M, E) lie below and which above what is known: two (Q,) bool, that is OOD. paper_code: above alone."""
    if stats.mode == "pooled":
        return outside(standardised(scores, stats), stats, epsilon)
    above = (energy(scores) > _paper_threshold(stats)).any(1)
    return torch.zeros_like(above), above


def histogram(scores: Tensor, stats: Stats, epsilon: float, bins: int = 60) -> dict:
    """Counts for tools/plot.py: z of a corpus's queries and of the reference or, of paper_code, the largest excess of a
    query's energies over their thresholds. Values beyond the middle 99.8 % are counted in the outermost bins.
    """
    if stats.mode == "pooled":
        values, ends = [standardised(scores, stats), reference(stats)], known_range(stats, epsilon).tolist()
    else:
        values, ends = [(energy(scores) - _paper_threshold(stats)).max(1).values], [0.0]
    every = torch.cat(values).sort().values
    outer = every[[round(q * (len(every) - 1)) for q in (0.001, 0.999)]].tolist()
    low, high = min(*outer, *ends), max(*outer, *ends)
    edges = torch.linspace(low, high if high > low else low + 1, bins + 1)
    counts = [torch.histogram(v.clamp(low, float(edges[-1])), edges).hist.int().tolist() for v in values]
    return {"edges": edges.tolist(), "thresholds": ends} | dict(zip(("queries", "reference"), counts))


def needed_percent(mode: str, delta: float, epsilon: float) -> float:
    """Percent of OOD queries above which a layer grows: delta and, of pooled, the false alarms that are expected."""
    return delta + 100 * epsilon * (mode == "pooled")


def rule(decision: Decision, documents: int, needed: float) -> str:
    """For the log: above how many percent, `needed`, a layer grows, and of few documents what has to happen before."""
    if documents >= FEW:
        return f"grows above {needed:g}%"
    if decision.pool_percent is None:  # paper_code
        return "too few documents to grow"
    return f"{decision.pool_percent:.1f}% of the pool of small additions, grows above {needed:g}% once that is full"


def decide(scores: Tensor, stats: Stats, delta: float, epsilon: float, documents: int = FEW) -> Decision:
    """Is the layer to grow for this corpus? The one place that decides.

    Args:
        scores: (Q, M, E) router scores of the corpus's pseudo-queries, in evaluation mode.
        delta: percent of queries, beyond the expected false alarms, above which the layer expands.
        epsilon: the share of the reference that counts as false alarms; paper_code expects none.
        documents: of the corpus. Fewer than FEW decide together with those in the pool, and once that is full; by
            paper_code, which has no pool, they never grow a layer.
    """
    pooled, e, enough, of_pool = stats.mode == "pooled", energy(scores), documents >= FEW, None  # e (Q, M)
    below, above = (100 * flag.sum().item() / len(flag) for flag in tails(scores, stats, epsilon))
    deciding = percent = below + above
    if pooled and not enough:
        z = arrival(stats, scores, documents)
        deciding = of_pool = 100 * sum(flag.sum().item() for flag in outside(z, stats, epsilon)) / len(z)
        enough = len(z) >= SKETCH  # the pool is full
    expand = enough and deciding > needed_percent(stats.mode, delta, epsilon)
    threshold = known_range(stats, epsilon) if pooled else _paper_threshold(stats)
    sample = e.flatten()[:: max(1, e.numel() // 1_000_000)]  # torch.quantile takes 16 million values at most
    quantiles = torch.quantile(sample, torch.tensor([0.05, 0.5, 0.95])).tolist()
    numbers = e.mean().item(), e.std(correction=0).item(), quantiles
    return Decision(expand, percent, [below, above], of_pool, delta, threshold.tolist(), *numbers)
