"""What a run costs before it is started: FLOPs, bytes moved, memory and hours of every stage.

Paper    appendix E (recipes); tables 6-7 (sizes of the corpora, in published.py). The formulas are ours
In       the Config of the run, a Workload
Out      one Row per stage, and all of them as text
Next     train.py prints `table()` for --dry-run; nothing else reads it
Differs  the paper gives no hours. Matrix products only are counted, two FLOPs per multiply-add, the way this
         code computes them: K logits per position, a frozen encoder that runs once, no padding in it, keys and
         values of the source in the search alone, scans that end at the last router

Letters as in t5.py; I = H * Dh is the inner width of an attention. Training makes three products of y = x W:
itself, and backward dx = dy W^T and dW = x^T dy. Recomputation makes those within a block once more.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from dense import teacher_of_round
from mixlora import MixConfig, expert_parameters
from published import BENCHMARKS, Benchmark
from rq import ITERATIONS, MOST_POINTS, POINTS_PER_CENTROID
from t5 import T5Config

# Bytes per trained parameter and step: backward writes its gradient (4), the norm reads it (4), clipping does
# both (8), AdamW reads parameter, gradient and two moments (16) and writes all but the gradient (12).
OPTIMISER_TRAFFIC = 44
SCAN_BATCH, EMBED_BATCH = 512, 64  # texts together in scan.scan and dense.embed


@dataclass(frozen=True)
class Workload:
    """How much there is to index and search: the paper's counts, and lengths in tokens, which we assume."""

    counts: Benchmark
    document_tokens: int  # mean, before the cut of Config
    query_tokens: int = 10  # mean: a short question
    longest_query: int = 20  # of a training batch, to which the others are padded

    def lengths(self, config) -> tuple[int, int, int]:
        """Tokens of a query, of the longest one of a training batch, and of an indexed document."""
        query, longest = (min(n, config.query_length) for n in (self.query_tokens, self.longest_query))
        return query, longest, min(self.document_tokens, config.document_length)


WORKLOADS = {
    "nq320k": Workload(BENCHMARKS["nq320k"], document_tokens=256),  # pages, longer than what is indexed
    "msmarco": Workload(BENCHMARKS["msmarco"], document_tokens=75),  # passages
}


@dataclass(frozen=True)
class Accelerator:
    """Peak rates of dense products as its maker states them, and the share of them that we expect."""

    name: str
    bf16: float  # FLOP/s
    tf32: float  # FLOP/s, of float32 products
    memory: float  # bytes
    bandwidth: float  # bytes/s
    utilisation: float = 0.35  # an assumption, not a measurement


A100 = Accelerator("A100", 312e12, 156e12, 80e9, 2.039e12)
H100 = Accelerator("H100", 989e12, 494e12, 80e9, 3.35e12)


@dataclass(frozen=True)
class Row:
    """One stage of a run."""

    stage: str
    t: int | None  # of D_t, where it is one corpus's
    steps: int  # of the optimiser
    rate: str  # of the products: bf16 or tf32
    flops: float
    bytes: float  # read from and written to the accelerator's memory
    weights: float  # bytes held: parameters, gradients and the optimiser's moments
    activations: float  # bytes held at the worst moment; logits and caches too

    @property
    def memory(self) -> float:
        return self.weights + self.activations

    def hours(self, accelerator: Accelerator) -> float:
        """The slower of computing and moving bytes."""
        rate = getattr(accelerator, self.rate) * accelerator.utilisation
        return max(self.flops / rate, self.bytes / accelerator.bandwidth) / 3600


# ------------------------------------------------------------------------------------- network and parameters


def network(config) -> T5Config:
    """Shape of the run's T5, from the flags. Published weights bring their own word rows."""
    return T5Config(
        vocab=T5Config().vocab if config.t5 else config.vocab, width=config.width, heads=config.heads,
        head_width=config.width // config.heads, feed_forward=config.feed_forward, codebooks=config.M,
        centroids=config.K, encoder_blocks=config.encoder_blocks, decoder_blocks=config.decoder_blocks,
    )  # fmt: skip


def mixture(config, t: int) -> MixConfig | None:
    """The mixed layers on D_t, None for a plain T5. At most: every layer grows at every corpus but the first."""
    first = 0 if config.d0_mixture else 1  # the corpus that brings the mixture
    if not config.mixture or t < first:
        return None
    return MixConfig(config.layers, config.experts + (config.expand != "never") * (t - first), config.rank)


def block_weights(net: T5Config, attentions: int) -> int:
    """Entries of a block's matrices: 4 D I per attention; 2 D F, or 3 where gated, of the feed-forward."""
    attention = 4 * net.width * net.heads * net.head_width
    return attentions * attention + (3 if net.gated else 2) * net.width * net.feed_forward


def parameters(net: T5Config, mix: MixConfig | None = None) -> dict[str, int]:
    """Parameters of each part. An untied head for words is loaded, but no stage reads or trains it."""
    words, ends = net.vocab * net.width, net.width + net.buckets * net.heads  # final norm, relative positions
    expert = expert_parameters(net.width, net.feed_forward, mix.rank) + net.width if mix else 0  # and its row
    return {
        "words": words,
        "head": 0 if net.tied else words,
        "docids": net.codebooks * net.centroids * net.width,
        "encoder": net.encoder_blocks * (block_weights(net, 1) + 2 * net.width) + ends,
        "decoder": net.decoder_blocks * (block_weights(net, 2) + 3 * net.width) + ends,
        "mixture": mix.layers * mix.experts * expert if mix else 0,
    }


def trained(config, net: T5Config, t: int) -> int:
    """Parameters that train on D_t. Mixed models: all but words on D_0, then docid table and newest experts."""
    mix, before = mixture(config, t), mixture(config, t - 1)
    parts = parameters(net, mix)
    if t and config.mixture:
        return parts["docids"] + parts["mixture"] - parameters(net, before)["mixture"]
    words = 0 if mix and not config.d0_words else parts["words"]
    return words + parts["docids"] + parts["encoder"] + parts["decoder"] + parts["mixture"]


# ------------------------------------------------------------------------------------------------------ FLOPs


def products(net: T5Config, mix, batch: int, source: int, target: int, tokens=0, keys=0) -> dict[str, int]:
    """T5.encode of (B, S), with `tokens` of S on average no padding (all if 0), and T5.decode of (B, T).

    In parts, which a backward treats differently. An attention's scores and their use take I each per pair, or H D
    each to the source itself (Attention.to_source), whose T positions pass all four matrices. With `keys`, in a
    search and on D_t, a position looks at so many positions and S source positions become keys and values once.
    """
    inner, texts, positions = net.heads * net.head_width, 2 * batch, 2 * batch * target
    tokens, cross_kv = tokens or source, 2 * net.width * inner if keys else 0
    across = inner if keys else net.heads * net.width
    return {
        "encoder": net.encoder_blocks * texts * (tokens * block_weights(net, 1) + 2 * source**2 * inner),
        "keys_values": net.decoder_blocks * texts * source * cross_kv,
        "decoder": net.decoder_blocks * positions * (block_weights(net, 2) - cross_kv),
        "self": net.decoder_blocks * positions * 2 * (keys or target) * inner,
        "cross": net.decoder_blocks * positions * 2 * source * across,
        "experts": positions * parameters(net, mix)["mixture"],  # 2 r (D + F), and D of the router, each
    }


def embedding(net: T5Config, batch: int, source: int) -> int:
    """T5.embed of (B, S): the encoder and one decoder position."""
    return sum(products(net, None, batch, source, 1).values())


def routing(net: T5Config, mix: MixConfig, batch: int, source: int, target: int) -> int:
    """mixlora.routes_of, of an encoded source: L decoder blocks, the last without feed-forward and experts."""
    parts = products(replace(net, decoder_blocks=mix.layers), mix, batch, source, target)
    unused = block_weights(net, 0) + mix.experts * expert_parameters(net.width, net.feed_forward, mix.rank)
    return sum(parts.values()) - parts["encoder"] - 2 * batch * target * unused


def logits(net: T5Config, mask: str = "segment") -> int:
    """Logits of one docid's loss: M positions, each against the rows that the mask leaves."""
    codes = net.codebooks * net.centroids
    rows = {"segment": net.centroids, "docid_vocab": codes, "full_vocab": codes + net.vocab}
    return net.codebooks * rows[mask]


def beam_search(net: T5Config, mix: MixConfig | None, batch: int, source: int, beam: int) -> int:
    """search.beam_search: M steps of cached decoding, with K logits for each live beam."""
    flops = 0
    for m in range(net.codebooks):
        live = min(beam, net.centroids**m)
        parts = products(net, mix, batch, source, live, keys=m + 1)
        if m > 0:  # the source is encoded once
            parts |= {"encoder": 0, "keys_values": 0}
        flops += sum(parts.values()) + 2 * batch * live * net.centroids * net.width
    return flops


def quantiser(net: T5Config, beam: int, points: int, documents: int) -> int:
    """rq.fit of `points` and rq.encode of `documents`. Level m multiplies K centroids with the documents once, with
    the points in the fit of each later level, and with k-means' sample often; tables hold the products of codebooks.
    """
    count = net.codebooks
    tables = math.comb(count, 2) * (documents > 0) + math.comb(count, 3) * (points > 0)  # pairs of codebooks
    flops = 2 * tables * net.centroids**2 * net.width
    for m in range(count):
        sample = min(points * min(beam, net.centroids**m), POINTS_PER_CENTROID * net.centroids)
        encoded = documents + (count - 1 - m) * points
        flops += 2 * (encoded + ITERATIONS * sample) * net.centroids * net.width
    return flops


def dense_step(config, net: T5Config, windows: int, query: tuple, window: tuple) -> int:
    """Queries and `windows` documents of each: two in a round (positive, negative), one in the warm-up. Their
    lengths are padded and mean ones.
    """
    batch, micro = config.dense_batch, min(config.dense_batch, config.micro_batch or config.dense_batch)
    flops = 0
    for texts, (source, tokens) in (batch, query), (windows * batch, window):
        flops += (3 + config.recompute) * sum(products(net, None, texts, source, 1, tokens).values())
    contrastive = windows == 1 or config.dense_contrastive > 0  # queries by documents, within a micro-batch
    return flops + contrastive * 3 * 2 * batch * windows * micro * net.width


def docid_terms(config, t: int) -> tuple[int, int]:
    """Decoder passes of a step of D_t (along its docids, along older ones), and how many of them have a KL."""
    old = t > 0 and config.kl_old_coef > 0
    return 1 + old, old + (t > 0 and config.kl_coef > 0)


def docid_step(config, net: T5Config, t: int, batch: int, source: int, tokens=0) -> int:
    """A step of D_t: B queries of S tokens, `tokens` of them no padding on average (all if 0), M docid positions.

    D_0 and BASE train encoder and decoder; words at rest save nothing, since dx must reach the first norm.
    Later corpora run no encoder. Their docid table feeds the decoder, so dx runs through every block, but
    frozen weights have no dW: one product backward, not two. Self-attention multiplies x by x and keeps two;
    the source is constant, so cross-attention keeps one. Old and new experts are stacked: dW is computed for all
    of them, unless none is new.
    """
    passes, divergences = docid_terms(config, t)
    # Logits: forward, backward. On D_t all terms share a position's, and each KL has the previous model's.
    rows = 3 * logits(net, config.mask) * (t == 0 or config.mask != "segment")
    rows += (t > 0) * (3 * passes + divergences) * logits(net)
    loss = 2 * batch * net.width * rows
    mix, grown = mixture(config, t), mixture(config, t) != mixture(config, t - 1)
    resting = t > 0 and config.mixture
    parts = products(net, mix, batch, source, net.codebooks, tokens, keys=resting * net.codebooks)
    once = parts.pop("keys_values")  # of the source, for all passes
    if resting:
        parts["encoder"] = 0
        backward = parts["decoder"] + parts["cross"] + 2 * parts["self"] + (1 + grown) * parts["experts"]
    else:
        backward = 2 * sum(parts.values())
    return once + passes * ((1 + config.recompute) * sum(parts.values()) + backward) + loss


# ----------------------------------------------------------------------------------------------------- memory


def block_bytes(net: T5Config, target: int, source=0, mix=None, encode=True, cached=False) -> int:
    """What autograd keeps of (T, D) in a block under bfloat16 autocast; with a source, in a decoder's block.

    Per position 4 bytes of the residual stream and of its normalised copy, 2 of every input of a product (cast
    anew for each), 1 of a dropout mask; per score 7: its softmax in both precisions, and a mask. To the source
    itself each head has a query and a mixture of width D; unless the source has a gradient (`encode`), the query
    and the cast weights are not kept. Of a `cached` source keys and values are.
    """
    D, F, H, inner = net.width, net.feed_forward, net.heads, net.heads * net.head_width
    position = 15 * D + 8 * inner + (13 * D + 9 * F if net.gated else 11 * D + 5 * F)
    position += 7 * D + 3 * F + 8 * mix.experts * mix.rank if mix else 0
    found = target * position + 7 * H * target**2
    if source:  # cross-attention
        found += target * (11 * D + 4 * inner) + 4 * D * source + (5 + 2 * encode) * H * target * source
        found += 4 * inner * source if cached else (2 + 2 * encode) * H * D * target
    return found


def kept(net, mix, source: int, target: int, encode=True, recompute=False, cached=False) -> int:
    """Bytes kept of one text for the backward: S tokens encoded (unless frozen) and T decoded, with `cached` from
    the source's keys and values. Within 5%, but a frozen decoder keeps less. With `recompute` a block keeps its
    input, and one block is whole.
    """
    layers = mix.layers if mix else 0
    blocks = encode * net.encoder_blocks * [block_bytes(net, source)]
    blocks += layers * [block_bytes(net, target, source, mix, encode, cached)]
    blocks += (net.decoder_blocks - layers) * [block_bytes(net, target, source, None, encode, cached)]
    ends = 14 * net.width * (encode * source + target) + encode * 4 * net.heads * source**2  # and its bias
    if not recompute:
        return ends + sum(blocks)
    streams = encode * net.encoder_blocks * source + net.decoder_blocks * target
    return ends + 4 * net.width * streams + max(blocks)


# ------------------------------------------------------------------------------------------------- the stages


def training(config, stage, t, steps, batch, flops, n, n_trained, made, held) -> Row:
    """Steps of `flops`; n parameters, some trained; bytes of an example's activations, and those held at once."""
    micro = min(batch, config.micro_batch or batch)
    each_pass = batch * made + math.ceil(batch / micro) * 4 * n  # activations, and weights read for each part
    traffic = OPTIMISER_TRAFFIC * n_trained + (2 + config.recompute) * each_pass  # forward, again, backward
    weights = (4 + 2) * n + 3 * 4 * n_trained  # parameters and their bfloat16 copies; gradients, two moments
    return Row(stage, t, steps, "bf16", steps * flops, steps * traffic, weights, micro * held)


def inference(stage, t, flops, net, mix, batch, texts, source, target, caches=0, rate="tf32") -> Row:
    """Texts of S tokens and T positions; bytes of the keys and values that a search caches. Without gradients about as
    much is alive as with recomputation.
    """
    weights = 4 * sum(parameters(net, mix).values())
    made, held = (kept(net, mix, source, target, True, again, caches > 0) for again in (False, True))
    traffic = math.ceil(texts / batch) * weights + 2 * texts * made
    return Row(stage, t, 0, rate, flops, traffic, weights, batch * held + caches)


def first_rows(config, workload: Workload) -> Iterator[Row]:
    """What comes once: the bi-encoder, the mining of its negatives, embeddings and docids of documents."""
    net, counts, (query, longest, document) = network(config), workload.counts, workload.lengths(config)
    parts, d0, window = parameters(net), counts.documents[0], config.dense_length
    n, n_trained = sum(parts.values()), parts["words"] + parts["encoder"] + parts["decoder"]
    rounds = config.dense_rounds * config.dense_steps
    for stage, steps, windows in ("dense warm-up", config.dense_warmup_steps, 1), ("dense rounds", rounds, 2):
        lengths = (longest, query), (window, min(workload.document_tokens, window))
        batch, flops = config.dense_batch, dense_step(config, net, windows, *lengths)
        made, held = (
            kept(net, None, longest, 1, True, again) + windows * kept(net, None, window, 1, True, again)
            for again in (False, config.recompute)
        )
        yield training(config, stage, None, steps, batch, flops, n, n_trained, made, held)

    rounds = range(2, config.dense_rounds + 1)  # that may rank all queries against all of D_0
    mined = sum(not teacher_of_round(config.teacher, number) for number in rounds)
    queries, texts = counts.annotated + config.dense_pseudo * d0, mined * d0
    flops = texts * embedding(net, 1, document)
    flops += mined * queries * (embedding(net, 1, query) + 2 * d0 * net.width)
    yield inference("mining", None, flops, net, None, EMBED_BATCH, texts, document, 1, rate="bf16")

    texts = sum(counts.documents) + config.d0_fragments * d0
    flops = texts * embedding(net, 1, document) + config.rq_pseudo * d0 * embedding(net, 1, query)
    yield inference("document embeddings", None, flops, net, None, EMBED_BATCH, texts, document, 1)

    D, K, most = net.width, net.centroids, max(POINTS_PER_CENTROID * net.centroids, MOST_POINTS)
    points = min(d0 * (1 + config.rq_pseudo), most)  # that fit the codebooks
    flops = 0 if config.docids else quantiser(net, config.rq_beam, points, texts)
    traffic = flops / (2 * K * D) * 4 * (D + 2 * K)  # a point, and its K distances, written and read
    held = 4 * D * (points + 3 * min(points * config.rq_beam, most))  # points; residuals and their two terms
    yield Row("codebooks and docids", None, 0, "tf32", flops, traffic, 0, held)


def corpus_rows(config, workload: Workload, t: int) -> Iterator[Row]:
    """Training on D_t; scans before it (OOD, KL) and after it (calibration); evaluation on D_0..D_t."""
    net, counts, (query, longest, _) = network(config), workload.counts, workload.lengths(config)
    mix, before, M, queries = mixture(config, t), mixture(config, t - 1), config.M, counts.pseudo_queries[t]
    passes, divergences = docid_terms(config, t)

    batch, steps = (config.batch, config.steps) if t else (config.d0_batch, config.d0_steps)
    steps = steps if steps or t == 0 else math.ceil(config.epochs * queries / batch)
    n, n_trained = sum(parameters(net, mix).values()), trained(config, net, t)
    flops = docid_step(config, net, t, batch, longest, query)
    encode, n_logits = t == 0 or not config.mixture, logits(net, config.mask) + 2 * divergences * logits(net)
    made, held = (passes * kept(net, mix, longest, M, encode, again) for again in (False, config.recompute))
    loss = (2 + 4 + 4 + 4) * n_logits  # bytes: in both precisions, their log-softmax and gradient
    row = training(config, "training", t, steps, batch, flops, n, n_trained, made + loss, held + loss)
    protected = max(0, t - (not config.ewc_protect_d0)) if config.ewc else 0
    copies = 2 * protected + (
        t > 0 and config.sam_rho > 0
    )  # F and theta of EWC; the values before SAM climbs
    yield replace(row, weights=row.weights + 4 * n * copies)

    if mix:
        old = products(net, before, 1, query, M)
        encoder, whole = old.pop("encoder"), sum(old.values())
        first = passes * queries if t else 0  # decoded to the end, by the model before D_t
        control = config.control_queries if before else 0  # to the last router, by that model,
        last = queries if t else min(queries, config.calibration_queries)  # and by the one after D_t
        flops = (last + control) * encoder + first * whole + last * routing(net, mix, 1, query, M)
        flops += control * routing(net, before, 1, query, M) if before else 0
        texts = first + control + last  # bytes at most: as if each were encoded and decoded to the end
        yield inference("scans", t, flops, net, mix, SCAN_BATCH, texts, query, M)

    tests, batch, beam = sum(counts.test_queries[: t + 1]), config.eval_batch, config.beam
    cached = 2 * beam * M + query  # positions, the beams' twice, since they are reordered
    caches = batch * cached * net.decoder_blocks * 2 * net.heads * net.head_width * 4  # float32
    flops = beam_search(net, mix, tests, query, beam)
    yield inference("evaluation", t, flops, net, mix, batch, tests, query, beam * M, caches)


def rows(config, workload: Workload) -> list[Row]:
    """What each stage of a run costs."""
    later = (corpus_rows(config, workload, t) for t in range(len(workload.counts.documents)))
    return [row for row in chain(first_rows(config, workload), *later) if row.flops]


# ---------------------------------------------------------------------------------------------------- as text


def require_memory(config, workload: Workload, available: float, where: str) -> None:
    """Raises ValueError where some stage would need more than the `available` bytes; it names the flags that would
    make it fit. Activations in float32 take up to twice the bytes that are counted for bfloat16.
    """

    def worst(**flags) -> tuple[float, str]:
        found = rows(replace(config, **flags), workload)
        return max(
            (row.weights + row.activations * (1 + (config.precision != "bf16")), row.stage) for row in found
        )

    most, stage = worst()
    if most <= available:
        return
    largest = max(config.d0_batch, config.dense_batch, config.batch)
    sizes = [2**i for i in range(largest.bit_length() - 1, -1, -1)]
    tries = [{"micro_batch": size} | more for more in ({}, {"recompute": True}) for size in sizes]
    if flags := next((flags for flags in tries if worst(**flags)[0] <= available), None):
        advice = f"pass --micro_batch {flags['micro_batch']}" + " --recompute" * ("recompute" in flags)
    else:
        advice = f"take a smaller --t5, or a machine with {worst(**tries[-1])[0] / 2**30:.1f} GiB"
    raise ValueError(
        f"{stage} needs about {most / 2**30:.1f} GiB, {where} has {available / 2**30:.1f} GiB free: {advice}, or "
        "--no-check_memory to try all the same"
    )


def free_memory(device: str) -> float:
    """Bytes that this process could still take, on CUDA or of the machine; infinite where that is not told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return math.inf


def table(config, workload: Workload, accelerators=(A100, H100)) -> str:
    """A run's stages, and what the numbers rest on. D_1 to D_T share lines: sums, but the largest memory."""
    found, groups, last = rows(config, workload), {}, len(workload.counts.documents) - 1
    for row in found:
        corpus = "" if row.t is None else "D0 " if row.t == 0 else f"D1..D{last} "
        groups.setdefault(corpus + row.stage, []).append(row)
    names = ["PFLOP", "TB moved", "GiB weights", "GiB activ.", *(f"hours {a.name}" for a in accelerators)]
    lines = [f"{'stage':22}{'steps':>9}{''.join(f'{name:>13}' for name in names)}  fits"]
    for name, group in [*groups.items(), ("total", found)]:
        large, steps = max(group, key=lambda row: row.memory), sum(row.steps for row in group)
        cells = [sum(row.flops for row in group) / 1e15, sum(row.bytes for row in group) / 1e12]
        cells += [large.weights / 2**30, large.activations / 2**30]
        cells += [sum(row.hours(a) for row in group) for a in accelerators]
        fits = ", ".join(a.name for a in accelerators if large.memory <= a.memory) or "none"
        lines.append(f"{name:22}{steps or '-':>9}{''.join(f'{cell:13.3f}' for cell in cells)}  {fits}")
    return "\n".join([*lines, "", *assumptions(config, workload, accelerators)])


def assumptions(config, workload: Workload, accelerators=(A100, H100)) -> list[str]:
    """What the numbers rest on, in plain words."""
    net, (query, longest, document) = network(config), workload.lengths(config)
    rates = [
        f"  {a.name}: one, at {a.utilisation:.0%} (assumed, not measured) of {a.bf16 / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{a.tf32 / 1e12:.0f} in TF32; {a.bandwidth / 1e12:.2f} TB/s, {a.memory / 1e9:.0f} GB"
        for a in accelerators
    ]
    return [
        "assumptions", *rates,
        "  hours: the slower of products and traffic; launches, host and disk take none",
        "  products: of matrices; no tokenisation, BM25, cross-encoder or baselines; k-means as if on the accelerator",
        "  precision: training and mining in bfloat16 whatever --precision says, the rest in TF32",
        f"  network: {net.encoder_blocks} + {net.decoder_blocks} blocks of width {net.width}, by the flags, not by --t5",
        "  growth: every mixed layer at every corpus, an upper bound; none with --expand never",
        f"  tokens: a query {query} on average, {longest} when padded for training, an indexed document {document} "
        f"on average, a window of dense training at most {config.dense_length}",
        "  padding: the encoder leaves it out; bytes and cross-attention do not",
        "  traffic: weights once per pass, activations written and read once, the optimiser; about",
        f"  memory: micro-batch {config.micro_batch or 'as the batch'}, activations "
        f"{'recomputed' if config.recompute else 'kept'}; about; if none fits: --micro_batch, --recompute",
    ]  # fmt: skip
