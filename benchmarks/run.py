"""Ours against transformers, faiss or the plain way of doing it, in turns: time and memory of the hot paths.

    python benchmarks/run.py [--rows train_small,rq_encode] [--repeats 5] [--threads 2] [--json PATH]
    python benchmarks/run.py --small    tiny shapes, to see in half a minute that everything runs
    python benchmarks/run.py --list     the names of the rows: what is ours | what it is held against

Both sides compute the same thing in float32 from the same weights, and what they return is compared before a
clock runs. They take turns (ours, peer, products, ours, ..) after one untimed run each; the ratio is that of
neighbours: peer / ours, or ours / peer where at most is wanted ("<= 1.3"). Products are the matrix products that ours
was seen to make (measure.py), back to back; their share is their time in ours. The medians are to reach the
goal. Weights and documents are random: nothing here says how well documents are found.
Needs transformers (requirements-dev.txt) and Linux.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import mixlora
import ood
import rq
import train
from benchmarks.measure import machine, products_of, resident
from config import mix_config, parse
from losses import docid_cross_entropy, kl_to_previous, router_losses
from memory import network
from optim import keep_freed_memory, parameter_groups
from scan import SourceCache, scan
from search import beam_search, documents
from t5 import T5, FeedForward, T5Config, segment_logits
from weights import to_published

try:
    import transformers
except ImportError:
    sys.exit("benchmarks/run.py compares with transformers: pip install -r requirements-dev.txt")

RESULTS = "results.json"
SMALL = dict(width=512, heads=8, feed_forward=2048, encoder_blocks=6, decoder_blocks=6)  # T5-small
BASE = dict()  # T5-base is what T5Config defaults to
RUN = parse([], files=False).config  # `python train.py` without flags
DEFAULT = asdict(network(RUN)) | {"dropout": RUN.dropout}
TINY = dict(  # --small; transformers' cache fails where the decoder has more blocks than the encoder
    vocab=200, width=32, head_width=8, heads=4, feed_forward=64, encoder_blocks=5, decoder_blocks=5,
    codebooks=3, centroids=16,
)  # fmt: skip
# Tokens of natural queries: from 4 to 32, ten on average, few of them long.
LENGTHS = (4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 12, 13, 15, 18, 32)
NO_SLOWER, BOUND = ">= 1", ">= 1 and 70% products"  # goals: of a row, of training steps and search in batches


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    repeats: int  # timings of each side
    threads: int
    small: bool  # shrink every shape

    def pick(self, full, small):
        return small if self.small else full

    def shape(self, sizes: dict, **changes) -> T5Config:
        return T5Config(**self.pick(sizes, TINY), **changes)


@dataclass
class Row:
    """One line of the table."""

    name: str
    work: str
    unit: str
    ours: float  # the medians
    peer: float | None
    low: float  # the ratio's least, median and greatest; without a peer, our figure itself
    ratio: float
    high: float
    share: float | None  # of the products in our time, the median; None where nothing is timed
    goal: str  # as ">= 1", or nothing where the row only informs
    reached: bool | None

    def __str__(self) -> str:
        peer = " " * 14 if self.peer is None else f"{self.peer:11.4g} {self.unit:2}"
        share = "" if self.share is None else f"{self.share:.0%}"
        ratio = f"{self.low:8.3f} {self.ratio:8.3f} {self.high:8.3f} {share:>8}"
        return (
            f"{self.name:26} {self.ours:11.4g} {self.unit:2} {peer} {ratio}  {self.verdict():32} {self.work}"
        )

    def verdict(self) -> str:
        return self.goal + {None: "", True: ": reached", False: ": **missed**"}[self.reached]


def row(
    name: str,
    work: str,
    ours: list,
    peer: list | None = None,
    products: list | None = None,
    goal="",
    unit="s",
) -> Row:
    """The row of figures taken in turns."""
    less, ratios, reached = goal.startswith("<="), ours, None
    if peer:
        ratios = [a / b if less else b / a for a, b in zip(ours, peer)]
    middle = statistics.median(ratios)
    share = statistics.median(a / b for a, b in zip(products, ours)) if products else None
    if goal:
        bound = float(goal.split()[1])
        reached = middle <= bound if less else middle >= bound
        reached &= goal != BOUND or share >= 0.7
    theirs = statistics.median(peer) if peer else None
    figures = statistics.median(ours), theirs, min(ratios), middle, max(ratios), share
    return Row(name, work, unit, *figures, goal, reached)


def alternate(s: Settings, *works: Callable) -> list[list[float]]:
    """Seconds of each work, `repeats` times in turns; a short one is the mean of as many as take 0.3 s."""
    least = s.pick(0.3, 0.0)
    for work in works:
        work()
    times = [[] for _ in works]
    for _ in range(s.repeats):
        for work, seconds in zip(works, times):
            begin, runs, elapsed = time.perf_counter(), 0, 0.0
            while not runs or elapsed < least:
                work()
                runs, elapsed = runs + 1, time.perf_counter() - begin
            seconds.append(elapsed / runs)
    return times


def compared(s: Settings, name: str, work: str, ours: Callable, peer: Callable, goal: str = NO_SLOWER) -> Row:
    """The row of two works, and the products of the first, in turns."""
    return row(name, work, *alternate(s, ours, peer, products_of(ours)), goal)


def close(ours: Tensor, peer: Tensor, within: float = 1e-3) -> bool:
    """Whether two tensors differ by less than `within` of the second's largest entry."""
    return bool((ours - peer).abs().max() <= within * peer.abs().max())


# ------------------------------------------------------------------------------------------------- both sides


def plain_t5(config: T5Config) -> T5:
    """Our T5 from seed 0, its docid table small enough for logits of size 1: they have no D^-1/2 scale."""
    torch.manual_seed(0)
    model = T5(config)
    with torch.no_grad():
        model.rq *= config.width**-0.5
    return model


def transformers_t5(config: T5Config):
    """transformers' T5 of the same shape, one tied table of V + M * K rows."""
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=config.vocab + config.codebooks * config.centroids, d_model=config.width,
        d_kv=config.head_width, num_heads=config.heads, d_ff=config.feed_forward, dropout_rate=config.dropout,
        num_layers=config.encoder_blocks, num_decoder_layers=config.decoder_blocks,
        relative_attention_num_buckets=config.buckets, relative_attention_max_distance=config.max_distance,
        decoder_start_token_id=0,
        tie_word_embeddings=False,  # means: no D^-1/2 scale of logits, as of our docids; it ties all the same
    ))  # fmt: skip


def copy_weights(ours: T5, peer) -> None:
    """Our weights into transformers' model: words and then docids are the rows of its one table."""
    assert peer.lm_head.weight is peer.shared.weight is peer.decoder.embed_tokens.weight
    table = torch.cat([ours.word, ours.rq.flatten(0, 1)]).detach()
    loaded = peer.load_state_dict(to_published(ours) | {"shared.weight": table}, strict=False)
    assert not loaded.unexpected_keys, f"transformers' T5 lacks {loaded.unexpected_keys}"


def in_table(codes: Tensor, config: T5Config) -> Tensor:
    """Docids (.., M) as rows of transformers' table."""
    return codes + config.vocab + torch.arange(config.codebooks) * config.centroids


def segment_mask(config: T5Config) -> Tensor:
    """(M, V + M * K), added to logits: 0 on the codes of a position, -inf elsewhere."""
    mask = torch.full((config.codebooks, config.vocab + config.codebooks * config.centroids), -torch.inf)
    codes = in_table(torch.arange(config.centroids)[:, None].expand(-1, config.codebooks), config)  # (K, M)
    return mask.scatter(1, codes.T, 0.0)


def draw(config: T5Config, queries: int, length: int, natural: bool = False) -> tuple[Tensor, Tensor]:
    """Random token ids (Q, S), all S long or of natural length and padded with 0, and docids (Q, M)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab, (queries, length), generator=generator)
    if natural:
        lengths = torch.tensor(LENGTHS)[torch.randint(len(LENGTHS), (queries,), generator=generator)]
        ids *= torch.arange(length) < lengths[:, None]
    return ids, torch.randint(config.centroids, (queries, config.codebooks), generator=generator)


def step_of(loss_of: Callable, groups, before_clip: Callable = lambda: None, **kind) -> Callable:
    """One training step: forward, backward, gradient norm clipped at 1, AdamW."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3, **kind)
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        before_clip()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def peak_memory(build: Callable, case: tuple, threads: int) -> float:
    """MB that a model and two training steps take at most, in this process, which did nothing before."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    _, _, step = build(T5Config(**TINY), *case[1:])  # torch and transformers import parts of themselves late
    step()
    before = resident("VmRSS")
    _, _, step = build(*case)
    step()
    step()
    return (resident("VmHWM") - before) / 1000


def training_rows(s: Settings, name: str, work: str, ours, peer, case: tuple) -> list[Row]:
    """Time and peak memory of training steps; `ours` and `peer` build (model, loss, step) of a case each."""
    peaks = []
    if not s.small:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
            peaks = [[mb] for mb in fresh.map(peak_memory, (ours, peer), [case] * 2, [s.threads] * 2)]
    (model, loss, step), (their_model, their_loss, their_step) = ours(*case), peer(*case)
    plain = isinstance(their_model, T5)
    if not plain:
        copy_weights(model, their_model)
    values = []
    for net, value in ((model, loss), (their_model, their_loss)):
        net.eval()  # no dropout
        values.append(value().detach())
        values.append(torch.autograd.grad(value(), net.rq if net is model or plain else net.shared.weight)[0])
        net.train()
    gradient = values[3] if plain else values[3][model.config.vocab :].view_as(values[1])
    assert close(values[0], values[2]), f"{name}: losses {values[0]:.4f} and {values[2]:.4f}"
    error = (values[1] - gradient).norm() / gradient.norm()
    assert error < 1e-3, f"{name}: gradients of the docid table differ by {error:.1e}"
    memory = [row(f"{name}_memory", "peak of the above", *peaks, unit="MB")] if peaks else []
    return [compared(s, name, work, step, their_step, BOUND), *memory]


# ------------------------------------------------------------------------------------------- training on D_0


def our_training(config: T5Config, batch: int, natural: bool):
    model = plain_t5(config).train()
    model.word.requires_grad_(False)
    ids, codes = draw(config, batch, 32, natural)

    def loss() -> Tensor:
        hidden, _ = model.docid_hidden(*model.encode(ids), codes)
        return docid_cross_entropy(model, hidden, codes, "segment")

    return model, loss, step_of(loss, parameter_groups(model.named_parameters(), 1e-3, 0.01), fused=True)


def transformers_training(config: T5Config, batch: int, natural: bool):
    model = transformers_t5(config).train()
    ids, codes = draw(config, batch, 32, natural)
    labels, mask = in_table(codes, config), segment_mask(config)

    def loss() -> Tensor:
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        out = model(ids, attention_mask=(ids != 0).long(), decoder_input_ids=shifted, use_cache=False)
        return F.cross_entropy((out.logits + mask).flatten(0, 1), labels.flatten())

    def freeze_words() -> None:
        model.shared.weight.grad[: config.vocab] = 0

    return model, loss, step_of(loss, model.parameters(), freeze_words)


def training_on_d0(s: Settings, name: str, config: T5Config, batch: int, natural: bool) -> list[Row]:
    lengths = "4 to 32 tokens" if natural else "32 tokens"
    work = f"docid training step, D={config.width}, batch {batch}, queries of {lengths} | transformers"
    return training_rows(s, name, work, our_training, transformers_training, (config, batch, natural))


def train_small(s: Settings) -> list[Row]:
    """Docid training step at T5-small's shape, words frozen | transformers with all 48,484 logits, masked."""
    return training_on_d0(s, "train_small", s.shape(SMALL), s.pick(64, 4), False)


def train_small_natural(s: Settings) -> list[Row]:
    """The same with queries of natural length, padded to 32 on both sides."""
    return training_on_d0(s, "train_small_natural", s.shape(SMALL), s.pick(64, 4), True)


def train_base(s: Settings) -> list[Row]:
    """Docid training step at T5-base's shape | transformers, as train_small."""
    return training_on_d0(s, "train_base", s.shape(BASE), s.pick(16, 4), False)


def train_base_natural(s: Settings) -> list[Row]:
    """The same with queries of natural length, padded to 32 on both sides."""
    return training_on_d0(s, "train_base_natural", s.shape(BASE), s.pick(16, 4), True)


# ------------------------------------------------------------------------------------------- training on D_t


def mixed_t5(config: T5Config, mix: mixlora.MixConfig) -> T5:
    """`plain_t5` with experts, as if trained: their B is not 0."""
    model = plain_t5(config)
    mixlora.add_mixture(model, mix)
    for layer in mixlora.mixed_layers(model):
        nn.init.normal_(layer.new.in_b, std=0.01)
        nn.init.normal_(layer.new.out_b, std=0.01)
    return model


def grow(model: T5) -> None:
    """As on D_1: one more expert in each mixed layer and LoRA on attention; beside these the docid table trains."""
    torch.manual_seed(2)
    for layer in mixlora.mixed_layers(model):
        layer.add_expert()
    mixlora.add_attention_lora(model, RUN.attention_rank)
    train.freeze_old(model)
    model.train()


def continual_step(
    model: T5, source_of: Callable, teacher_of: Callable, rq_before: Tensor, codes: Tensor, new: int
):
    """The loss of train.LaterCorpus on `new` queries and, of the others, dreams; a teacher's hidden states of all."""

    def loss() -> Tensor:
        hidden, routes = model.docid_hidden(*source_of(), codes)
        logits = segment_logits(hidden, model.rq)
        kl = kl_to_previous(logits[new:], segment_logits(teacher_of()[new:], rq_before), RUN.kl_reduction)
        terms = router_losses([route.rows(slice(new)) for route in routes], RUN).values()
        ce = docid_cross_entropy(model, hidden[:new], codes[:new], RUN.mask, logits[:new])
        return ce + RUN.dream_kl * kl + sum(terms)

    return model, loss, step_of(loss, parameter_groups(model.named_parameters(), 1e-3, 0.01), fused=True)


def cached_training(config: T5Config, new: int, old: int):
    model = mixed_t5(config, mix_config(RUN))
    ids, codes = draw(config, new + old, 32, natural=True)
    cache = SourceCache(model, ids)
    teacher, rq_before = scan(model, cache, codes).hidden, model.rq.detach().clone()
    grow(model)
    rows = torch.arange(new + old)
    return continual_step(
        model, lambda: cache.get(rows, ids.device), lambda: teacher[rows], rq_before, codes, new
    )


def two_model_training(config: T5Config, new: int, old: int):
    model = mixed_t5(config, mix_config(RUN))
    before = copy.deepcopy(model).eval().requires_grad_(False)
    grow(model)
    ids, codes = draw(config, new + old, 32, natural=True)

    @torch.no_grad()
    def teacher() -> Tensor:
        return before.docid_hidden(*before.encode(ids), codes)[0]

    return continual_step(model, lambda: model.encode(ids), teacher, before.rq, codes, new)


def continual_default(s: Settings) -> list[Row]:
    """The default's step on D_t, from cached encoder and teacher states | both models run in every step."""
    new, old = s.pick((RUN.batch, RUN.dream_batch), (4, 8))
    work = f"step on D_t from the cache, {new} queries and {old} dreams | with a copied model as teacher"
    case = s.shape(DEFAULT), new, old
    return training_rows(s, "continual_default", work, cached_training, two_model_training, case)


# ----------------------------------------------------------------------------------------------------- search


def generate_as_we_score(peer, generate: Callable, config: T5Config) -> Tensor:
    """What transformers finds once its probabilities are over the codes of a position, as the method's are.

    By itself it normalises over the whole table.
    """
    mask = segment_mask(config)

    def mask_logits(module, inputs, output):
        output.logits = output.logits + mask[output.past_key_values.get_seq_length() - 1]
        return output

    hook = peer.register_forward_hook(mask_logits)
    docids = generate()
    hook.remove()
    return docids


def search_row(
    s: Settings, name: str, config: T5Config, size: int, batch: int, length: int, beam: int
) -> list[Row]:
    """Beam search for the 10 best documents against transformers' generate."""
    model, peer = plain_t5(config).eval(), transformers_t5(config).eval()
    copy_weights(model, peer)
    ids, _ = draw(config, batch, length)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(config.centroids, (size, config.codebooks), generator=generator).unique(dim=0)
    trie, tokens, tree = rq.Trie(codes), in_table(codes, config), {}
    for docid in tokens.tolist():
        node = tree
        for token in docid:
            node = node.setdefault(token, {})

    def allowed(_, prefix: Tensor) -> list[int]:
        node = tree
        for token in prefix.tolist()[1:]:
            node = node.get(token, {})
        return list(node) or [0]

    def ours() -> tuple[Tensor, Tensor]:
        return beam_search(model, trie, ids, beam)

    def theirs() -> Tensor:
        """(B * 10, M) rows of the table"""
        return peer.generate(
            ids, attention_mask=(ids != 0).long(), num_beams=beam, num_return_sequences=10, do_sample=False,
            max_new_tokens=config.codebooks, prefix_allowed_tokens_fn=allowed,
        )[:, 1:]  # fmt: skip

    rankings = documents(trie, *ours(), [str(i) for i in range(len(codes))], 10)
    docids = {(query, *tokens[doc].tolist()) for query, best in enumerate(rankings) for doc, _ in best}
    scored = generate_as_we_score(peer, theirs, config).tolist()
    same = len(docids & {(i // 10, *docid) for i, docid in enumerate(scored)}) / (10 * batch)
    assert same >= 0.99, f"{name}: {100 * same:.1f}% of docids are the same"  # scores may tie to the last bit
    stray = set(map(tuple, theirs().tolist())) - set(map(tuple, tokens.tolist()))
    assert not stray, f"{name}: transformers found docids that are not indexed"

    work = f"beam {beam}, {len(codes):,} docids, batch {batch} of {length} tokens | transformers generate"
    return [compared(s, name, work, ours, theirs, BOUND)]


def search_small(s: Settings) -> list[Row]:
    """Constrained beam search at T5-small's shape | generate."""
    return search_row(s, "search_small", s.shape(SMALL), s.pick(100_000, 500), s.pick(32, 4), 32, 10)


def search_default(s: Settings) -> list[Row]:
    """Constrained beam search at the default corpus's shape | generate."""
    shape = s.shape(DEFAULT), s.pick(2585, 300), s.pick(128, 4)
    return search_row(s, "search_default", *shape, length=12, beam=s.pick(RUN.beam, 12))


def search_growth(s: Settings) -> list[Row]:
    """Beam search over 10^7 docids | over 10^4; the trie's bytes a document, time to build."""
    config, batch = s.shape(SMALL), s.pick(32, 4)
    model, sizes = plain_t5(config).eval(), s.pick((10**4, 10**7), (100, 800))
    ids, _ = draw(config, batch, 32)
    generator, tries = torch.Generator().manual_seed(3), []
    for size in sizes:
        codes = torch.randint(config.centroids, (size, config.codebooks), generator=generator)
        begin = time.perf_counter()
        tries.append(rq.Trie(codes))
        seconds = time.perf_counter() - begin  # the last one's is reported
    few, many = (lambda trie=trie: beam_search(model, trie, ids, 10) for trie in tries)
    work = f"beam 10, batch {batch}, {sizes[1]:,} docids | {sizes[0]:,}"
    growth = compared(s, "search_growth", work, many, few, "<= 1.3")
    each = tries[-1].nbytes() / size
    work = f"a trie of {size:,} docids, M={config.codebooks}:"
    size_row = row("trie_bytes", f"{work} bytes a document", [each], goal="<= 24", unit="B")
    return [growth, size_row, row("trie_build", f"{work} seconds to build it", [seconds])]


# ----------------------------------------------------------------------------------- detector and mixed layer


def ood_scan(s: Settings) -> list[Row]:
    """What the OOD decision needs of cached queries, to the last mixed layer | whole decoder, full head."""
    config, queries = s.shape(BASE, dropout=0.0), s.pick(64, 8)
    model = mixed_t5(config, mixlora.MixConfig(layers=5)).eval()
    ids, codes = draw(config, queries, 32)
    cache = SourceCache(model, ids)
    stats = [ood.new_stats("pooled", len(layer), len(model.rq)) for layer in mixlora.mixed_layers(model)]
    ood.settle(stats, scan(model, cache, codes, hidden=False).scores, first_mixture=True)
    table = torch.cat([model.word, model.rq.flatten(0, 1)]).detach().T

    def is_ood(layer: int, scores: Tensor) -> Tensor:
        below, above = ood.tails(scores, stats[layer], epsilon=0.02)
        return below | above

    def ours():
        return scan(model, cache, codes, is_ood, queries, hidden=False).scores

    @torch.no_grad()
    def theirs():
        hidden, routes = model.docid_hidden(*cache.get(torch.arange(queries), ids.device), codes)
        return [route.scores for route in routes], hidden @ table

    assert all(close(a, b) for a, b in zip(ours(), theirs()[0], strict=True)), "router scores differ"
    work = f"router scores of {queries} cached queries, D={config.width} | all blocks and the full head"
    return [compared(s, "ood_scan", work, ours, theirs)]


def dispatched(layer: mixlora.MixedFeedForward, x: Tensor, gates: Tensor, side: str) -> Tensor:
    """sum_e g_e B_e A_e x by a loop over experts, each on the tokens that chose it."""
    x, gates, shape = x.flatten(0, 1), gates.flatten(0, 1), x.shape[:2]
    out = x.new_zeros(len(x), getattr(layer.new, f"{side}_b").shape[1])
    for e in range(len(layer)):
        experts, i = (layer.old, e) if e < len(layer.old) else (layer.new, e - len(layer.old))
        tokens = gates[:, e].nonzero()[:, 0]
        z = x.index_select(0, tokens) @ getattr(experts, f"{side}_a")[i].T
        y = z @ getattr(experts, f"{side}_b")[i].T
        out.index_add_(0, tokens, y * gates[tokens, e, None] * layer.scale)
    return out.unflatten(0, shape)


def one_product(layer: mixlora.MixedFeedForward, x: Tensor, gates: Tensor, side: str) -> Tensor:
    """The same by `mixed_delta`."""
    a, b = layer.stacked(f"{side}_a"), layer.stacked(f"{side}_b")
    onto = x.new_zeros(*x.shape[:2], b.shape[1])
    return mixlora.mixed_delta(x, a, b, layer.scale * gates, onto)


def mixed_works(config: T5Config, n: int, shape: tuple[int, int]) -> list[Callable]:
    """Forward and backward of a layer of n experts: whole, whole by loop, experts alone, these by loop.

    As on D_t: one expert trains. No dropout, so that outputs and gradients, which each returns, are the same.
    """
    torch.manual_seed(0)
    plain = FeedForward(config).requires_grad_(False)
    layer = mixlora.MixedFeedForward(plain, mixlora.MixConfig(dropout=0.0), frozen=n - 1, trainable=1)
    for b in (layer.old.in_b, layer.old.out_b, layer.new.in_b, layer.new.out_b):
        nn.init.normal_(b, std=0.1)
    x, grad = torch.randn(2, *shape, config.width)
    u, grad_u = torch.randn(2, *shape, config.feed_forward)
    x.requires_grad_(), u.requires_grad_()
    gates = layer.route(x.detach()).gates.detach()
    experts = list(layer.new.parameters())

    def whole() -> list[Tensor]:
        out = layer(x)[0]
        return [out, *torch.autograd.grad(out, [x, layer.router_new, *experts], grad)]

    def whole_loop() -> list[Tensor]:
        own = layer.route(x).gates
        hidden = layer.plain.hidden(x) + dispatched(layer, x, own, "in")
        out = hidden @ layer.plain.w_out.T + dispatched(layer, hidden, own, "out")
        return [out, *torch.autograd.grad(out, [x, layer.router_new, *experts], grad)]

    def alone_by(delta: Callable) -> list[Tensor]:
        """Routes and the inputs of both adapters given."""
        both = [delta(layer, x, gates, "in"), delta(layer, u, gates, "out")]
        return [*both, *torch.autograd.grad(both, [x, u, *experts], [grad_u, grad])]

    return [whole, whole_loop, lambda: alone_by(one_product), lambda: alone_by(dispatched)]


def mixed_ff(s: Settings) -> list[Row]:
    """Mixed feed-forward, forward and backward, whole and (mixed_experts) experts alone | loop over them."""
    config, shape, rows = s.shape(BASE, dropout=0.0), (s.pick(32, 16), 8), []
    for n in (2, 4, 8, 16):
        work = f"{n} experts, {math.prod(shape)} tokens, D={config.width}, F={config.feed_forward}"
        whole, whole_loop, alone, alone_loop = mixed_works(config, n, shape)
        for name, what, ours, theirs in (
            ("mixed_ff", f"mixed layer, {work} | loop over experts", whole, whole_loop),
            ("mixed_experts", "its experts alone | loop", alone, alone_loop),
        ):
            same = all(close(a, b) for a, b in zip(ours(), theirs(), strict=True))
            assert same, f"outputs or gradients of {n} mixed experts differ"
            rows.append(compared(s, f"{name}_{n}", what, ours, theirs))
    return rows


# ---------------------------------------------------------------------------------------------------- quantiser


def rq_encode(s: Settings) -> list[Row]:
    """Residual quantisation with beam 5 of clustered points, codebooks given | faiss's ResidualQuantizer."""
    points, width, m, k = s.pick((4096, 768, 8, 2048), (200, 16, 3, 16))
    generator = torch.Generator().manual_seed(0)
    centres, spread = torch.randn(64, 24, generator=generator), torch.randn(24, width, generator=generator)

    def drawn(n: int) -> Tensor:
        cluster = torch.randint(64, (n,), generator=generator)
        inner = centres[cluster] + 0.5 * torch.randn(n, 24, generator=generator)
        return inner @ spread + 0.1 * torch.randn(n, width, generator=generator)

    books = torch.empty(0, k, width)
    for _ in range(m):  # each level is what the levels before leave of K fresh points
        fresh = drawn(k)
        left = fresh - rq.decode(books, rq.encode(fresh, books, 1)) if len(books) else fresh
        books = torch.cat([books, left[None]])
    x = drawn(points)
    peer = faiss.ResidualQuantizer(width, m, int(math.log2(k)))
    faiss.copy_array_to_vector(books.numpy().ravel(), peer.codebooks)
    peer.is_trained, peer.max_beam_size = True, 5

    def error(codes: Tensor) -> list[float]:
        return [float((x - rq.decode(books, codes)).pow(2).sum(1).mean())]

    packed = peer.compute_codes(x.numpy())
    theirs = torch.from_numpy(faiss.unpack_bitstrings(packed, m, peer.nbits.at(0)).astype(np.int64))
    errors = error(rq.encode(x, books, 5)), error(theirs)
    work = f"{points:,} points, D={width}, M={m}, K={k}, beam 5 | faiss"
    return [
        compared(s, "rq_encode", work, lambda: rq.encode(x, books, 5), lambda: peer.compute_codes(x.numpy())),
        # faiss rounds elsewhere, so that of two codes equal to the last bits either may win
        row("rq_encode_error", "squared error of the above", *errors, goal="<= 1.0001", unit=""),
    ]


# ------------------------------------------------------------------------------------------------------ table

ROWS = {
    work.__name__: work
    for work in (
        train_small, train_small_natural, train_base, train_base_natural, continual_default, search_small,
        search_default, search_growth, ood_scan, mixed_ff, rq_encode,
    )
}  # fmt: skip


def figure(value: float, unit: str) -> str:
    """0.0123 s -> 12.3 ms; three digits."""
    if unit == "s" and value < 1:
        value, unit = 1000 * value, "ms"
    return (f"{value:.3g} " if value < 1000 else f"{value:.0f} ") + unit


def markdown(results: dict) -> str:
    """A results file as the table of docs/speed.md."""
    lines = [
        "| work \\| peer | ours | peer | ratio: min / median / max | its products | goal |",
        "|---|---|---|---|---|---|",
    ]
    for item in (Row(**fields) for fields in results["rows"]):
        ours, work = figure(item.ours, item.unit), item.work.replace("|", "\\|")
        peer = figure(item.peer, item.unit) if item.peer else ""
        ratio = f"{item.low:.3g}, {item.ratio:.3g}, {item.high:.3g}" if peer else ""
        share = "–" if item.share is None else f"{item.share:.0%}"
        lines.append(f"| `{item.name}` {work} | {ours} | {peer} | {ratio} | {share} | {item.verdict()} |")
    names = ("threads", "repeats", "torch", "transformers", "faiss")
    with_what = ", ".join(f"{name} {results[name]}" for name in names)
    return "\n".join([*lines, "", f"{results['date'][:10]}, {results['cpu']}, {with_what}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="names with commas between; --list shows them")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each side (default 5)")
    parser.add_argument("--threads", type=int, default=2)
    text = f"where the figures go (default: {RESULTS} beside this file, where all rows run at their whole shapes)"
    parser.add_argument("--json", type=Path, help=text)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument(
        "--show", action="store_true", help="print what --json holds as the table of docs/speed.md and end"
    )
    args = parser.parse_args()
    whole = args.show or not args.small and args.rows == ",".join(ROWS)
    place = args.json or (Path(__file__).with_name(RESULTS) if whole else None)
    if args.show:
        print(markdown(json.loads(place.read_text())))
        return
    if args.list:
        for name, work in ROWS.items():
            print(f"{name:20} {work.__doc__.splitlines()[0]}")
        return
    wanted = args.rows.split(",")
    if unknown := set(wanted) - set(ROWS):
        sys.exit(f"run.py: --rows {','.join(sorted(unknown))}: wanted some of {','.join(ROWS)}")
    if args.repeats < 1 or args.threads < 1:
        sys.exit(f"run.py: --repeats {args.repeats} --threads {args.threads}: wanted 1 or more")
    settings = Settings(args.repeats, args.threads, args.small)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    faiss.omp_set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    where = asdict(settings) | machine()
    where |= {"transformers": transformers.__version__, "faiss": faiss.__version__}
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{'':26} {'ours':>14} {'peer':>14} {'min':>8} {'median':>8} {'max':>8} {'products':>8}  goal")
    rows: list[Row] = []
    for name in wanted:
        for line in ROWS[name](settings):
            if args.small:
                line.reached = None  # the figures are for the whole shapes
            print(line, flush=True)
            rows.append(line)
        gc.collect()
    if place:
        place.write_text(json.dumps(where | {"rows": [asdict(line) for line in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
