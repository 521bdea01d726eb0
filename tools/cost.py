"""What a run costs before it is started: FLOPs, bytes moved, memory and hours of every stage.

    python -m tools.cost --data nq320k [FLAGS OF TRAIN.PY]

Paper    appendix E (recipes); tables 6-7 (sizes of the corpora, in published.py). The formulas are ours
In       flags of train.py, with --data nq320k or msmarco
Out      a table, one line per stage, and what it rests on
Next     nothing reads it; memory.py checks what a run needs when it starts
Differs  the paper gives no hours. Matrix products only are counted, two FLOPs per multiply-add, the way this code
         computes them: K logits per position, a frozen encoder that runs once, no padding in it, keys and values of
         the source in the search alone; scans as if all of them went on to the last block

Letters as in t5.py; I = H * Dh is the inner width of an attention. Training makes three products of y = x W:
itself, and backward dx = dy W^T and dW = x^T dy. Recomputation makes those within a block once more.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import command
import dream
import memory
import prepare
import rq
import search
import train
from config import check, parse
from dense import teacher_of_round
from memory import Stage, Workload, attention_parameters, kept, logits, mixture, network, parameters
from mixlora import MixConfig
from published import BENCHMARKS
from scan import BATCH as SCAN_BATCH
from t5 import T5Config

# Bytes per trained parameter and step: backward writes its gradient (4), the norm reads it (4), clipping does
# both (8), AdamW reads parameter, gradient and two moments (16) and writes all but the gradient (12).
OPTIMISER_TRAFFIC = 44
QUERY = 10  # tokens of a short question on average
GENERAL = {"": 0, "boolq": 7_128}  # documents of general text, taken to be as long as the benchmark's
WORKLOADS = {  # with mean lengths that we assume
    "nq320k": Workload(BENCHMARKS["nq320k"].documents, 256),  # pages, longer than what is indexed
    "msmarco": Workload(BENCHMARKS["msmarco"].documents, 75),  # passages
}
UNCOUNTED = ("sam_rho", "ewc", "prompts", "adapters", "joint", "insert")  # settings of baselines


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
ACCELERATORS = (A100, H100)


@dataclass(frozen=True)
class Cost:
    """What one stage of a run takes."""

    held: Stage  # its name, corpus and memory
    steps: int  # of the optimiser
    rate: str  # of the products: bf16 or tf32
    flops: float
    bytes: float  # read from and written to the accelerator's memory

    @property
    def memory(self) -> float:
        return self.held.weights + self.held.activations

    def hours(self, accelerator: Accelerator) -> float:
        """The slower of computing and moving bytes."""
        rate = getattr(accelerator, self.rate) * accelerator.utilisation
        return max(self.flops / rate, self.bytes / accelerator.bandwidth) / 3600


def block_weights(net: T5Config, attentions: int) -> int:
    """Entries of a block's matrices: 4 D I per attention, 2 D F of the feed-forward."""
    return net.width * (4 * attentions * net.heads * net.head_width + 2 * net.feed_forward)


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


def beam_search(net: T5Config, mix: MixConfig | None, batch: int, source: int, beam: int, lora=0) -> int:
    """search.beam_search: M steps of cached decoding, with K logits for each live beam.

    `lora`: parameters of LoRA on attention. W + B A of the source's keys and values is formed once, the other six of a
    block's eight in every step.
    """
    flops = math.ceil(batch / search.BATCH) * (1 + 3 * net.codebooks) * formed(net, lora) // 4
    for m in range(net.codebooks):
        live = min(beam, net.centroids**m)
        parts = products(net, mix, batch, source, live, keys=m + 1)
        if m > 0:  # the source is encoded once
            parts |= {"encoder": 0, "keys_values": 0}
        flops += sum(parts.values()) + 2 * batch * live * net.centroids * net.width
    return flops


def formed(net: T5Config, lora: int) -> int:
    """B A of the eight matrices of each block's attentions: 2 r D I each, by the number r (D + I) of parameters."""
    inner = net.heads * net.head_width
    return 2 * lora * net.width * inner // (net.width + inner)


def scan(config, net: T5Config, t: int, queries: int, dreams: int) -> int:
    """The model after D_t encodes queries and dreams, and decodes their docids."""
    batches = math.ceil((queries + dreams) / SCAN_BATCH)
    flops = batches * formed(net, attention_parameters(config, net, t))
    for texts, tokens in (queries, query_lengths(config)[0]), (dreams, tokens_of_dream(config)):
        flops += sum(products(net, mixture(config, t), texts, tokens, net.codebooks).values())
    return flops


def quantiser(net: T5Config, beam: int, points: int, documents: int) -> int:
    """rq.fit of `points` and rq.encode of `documents`; tables hold the products of codebooks.

    Level m multiplies K centroids with the documents once, the points in the fit of each later level, k-means' sample.
    """
    count = net.codebooks
    tables = math.comb(count, 2) * (documents > 0) + math.comb(count, 3) * (points > 0)  # pairs of codebooks
    flops = 2 * tables * net.centroids**2 * net.width
    for m in range(count):
        sample = min(points * min(beam, net.centroids**m), rq.POINTS_PER_CENTROID * net.centroids)
        encoded = documents + (count - 1 - m) * points
        flops += 2 * (encoded + rq.ITERATIONS * sample) * net.centroids * net.width
    return flops


def dense_step(config, net: T5Config, windows: int, query: tuple, window: tuple) -> int:
    """Queries, and two documents of each in a round, one in the warm-up; lengths are pairs of padded and mean ones."""
    batch, flops = config.dense_batch, 0
    contrastive = windows == 1 or config.dense_contrastive > 0  # queries by documents of the whole batch
    again = contrastive and 0 < config.micro_batch < batch  # parts are first embedded without gradients
    for texts, (source, tokens) in (batch, query), (windows * batch, window):
        flops += (3 + config.recompute + again) * sum(products(net, None, texts, source, 1, tokens).values())
    return flops + contrastive * 3 * 2 * batch * windows * batch * net.width


def docid_step(config, net: T5Config, t: int, batch: int, source: int, tokens=0) -> int:
    """A step of D_t: B new queries and R dreams beside each, of S tokens, `tokens` of them no padding on average (all
    if 0), M docid positions.

    D_0 and methods without a mixture train encoder and decoder; words at rest save nothing, since dx must reach the
    first norm. On D_t a mixture runs no encoder. Its docid table feeds the decoder, so dx runs through every block, but
    frozen weights have no dW: one product backward, not two. Self-attention multiplies x by x and keeps two;
    the source is constant, so cross-attention keeps one. Old and new experts are stacked: dW is computed for all
    of them, unless none trains. LoRA on both attentions makes them take dW too, and keys and values unformed.
    """
    rows, divergences = batch * (1 + memory.dreams_each(config, t)), t > 0 and config.kl_coef > 0
    # Logits: forward, backward. On D_t all terms share a position's, and each KL has the previous model's.
    scores = 3 * batch * logits(net, config.mask) * (t == 0 or config.mask != "segment")
    scores += (t > 0) * (3 * rows + divergences * batch + rows - batch) * logits(net)
    mix, lora = mixture(config, t), attention_parameters(config, net, t)
    resting, inner = t > 0 and config.mixture, net.heads * net.head_width
    parts = products(net, mix, rows, source, net.codebooks, tokens, (resting and not lora) * net.codebooks)
    once, adapted = parts.pop("keys_values"), formed(net, lora)  # of the source
    if resting:
        parts["encoder"] = 0
        backward = parts["decoder"] + parts["cross"] + 2 * parts["self"]
        backward += (1 + (memory.trained_experts(config, t) > 0)) * parts["experts"]
        if lora:
            backward += 2 * rows * net.codebooks * net.decoder_blocks * 8 * net.width * inner + 2 * adapted
    else:
        backward = 2 * sum(parts.values())
    forward = sum(parts.values()) + adapted
    return once + (1 + config.recompute) * forward + backward + 2 * net.width * scores


# ------------------------------------------------------------------------------------------------- the stages


def query_lengths(config) -> tuple[int, int]:
    """Tokens of a query on average, and of the longest of a batch, to which the others are padded."""
    return min(QUERY, config.query_length), min(memory.LONGEST_QUERY, config.query_length)


def tokens_of_dream(config) -> float:
    """Of a dream on average, its </s> too."""
    return (dream.FEWEST + config.dream_words + config.dream_noise) / 2 + 1


def general_documents(source: str) -> int:
    """Of general text, by the lines of a folder's corpus.jsonl, of which a run leaves out those that it indexes."""
    if source in GENERAL:
        return GENERAL[source]
    path = Path(source) / "corpus.jsonl"
    if not path.is_file():
        raise ValueError(f"--general {source}: found no {path}; wanted a folder that holds it, or boolq")
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def costs_once(config, held: dict) -> Iterator[Cost]:
    """What comes once: the bi-encoder, the mining of its negatives, embeddings and docids of documents."""
    net, counts, tokens = network(config), BENCHMARKS[config.data], WORKLOADS[config.data].tokens
    query, longest = query_lengths(config)
    document, window = min(tokens, config.document_length), min(tokens, config.dense_length)
    d0, general = counts.documents[0], general_documents(config.general)
    first, texts = d0 + general, sum(counts.documents) + (general or config.d0_fragments * d0)
    rounds = config.dense_rounds * config.dense_steps
    for stage, steps, windows in ("dense warm-up", config.dense_warmup_steps, 1), ("dense rounds", rounds, 2):
        if steps:
            flops = dense_step(config, net, windows, (longest, query), (config.dense_length, window))
            yield training(config, *held[stage, None], steps, config.dense_batch, flops)

    later = range(2, config.dense_rounds + 1)  # rounds that may rank all queries against all of D_0
    mined = sum(not teacher_of_round(config.teacher, number) for number in later)
    queries = counts.annotated + config.dense_pseudo * d0 + general
    flops = mined * queries * (embedding(net, 1, query) + 2 * first * net.width)
    flops += mined * first * embedding(net, 1, document)
    stage, made = held["document embeddings", None][0], kept(net, None, document, 1)
    mining = replace(stage, name="mining")
    yield inference(mining, flops, mined * first, memory.EMBED_BATCH, made, rate="bf16")
    flops = texts * embedding(net, 1, document) + config.rq_pseudo * d0 * embedding(net, 1, query)
    yield inference(stage, flops, texts, memory.EMBED_BATCH, made)

    points = min(d0 * config.rq_pseudo + first, max(rq.POINTS_PER_CENTROID * net.centroids, rq.MOST_POINTS))
    flops = 0 if config.docids else quantiser(net, rq.BEAM, points, texts)
    distances = flops / (2 * net.centroids * net.width)  # of a point to K centroids, written and read
    traffic = distances * 4 * (net.width + 2 * net.centroids)
    yield Cost(held["codebooks and docids", None][0], 0, "tf32", flops, traffic)


def costs_of_corpus(config, held: dict, t: int) -> Iterator[Cost]:
    """Training on D_t; scans by the model before it and by the one after it; evaluation on D_0..D_t."""
    net, counts, M = network(config), BENCHMARKS[config.data], config.M
    mix, queries, (query, longest) = mixture(config, t), counts.pseudo_queries[t], query_lengths(config)
    batch, steps = (config.batch, config.steps) if t else (config.d0_batch, config.d0_steps)
    steps = steps if steps or t == 0 else config.epochs * math.ceil(queries / batch)
    old, each, dreamt = config.dreams * (t > 0), memory.dreams_each(config, t), tokens_of_dream(config)
    styled = int(config.dream_style * queries) * (old > 0)  # of D_t's own queries are dreams too
    # Queries that stand in place of dreams: of earlier documents, or of general text
    asked = old if config.rehearsal else int(config.dream_general * old * bool(config.general))
    of_old = dreamt + asked / max(1, old) * (query - dreamt)  # tokens on average
    tokens = (query + styled / queries * (dreamt - query) + each * of_old) / (1 + each)
    longest = max(longest, memory.longest_dream(config)) if old else longest
    flops = docid_step(config, net, t, batch, longest, tokens)
    yield training(config, *held["training", t], steps, batch, flops)

    if ("scans", t) in held:
        yardstick = train.YARDSTICK * (config.ood_mode == "pooled")
        fresh = counts.documents[t] * (train.FRESH_QUERIES // counts.documents[t]) or train.FRESH_QUERIES
        before = queries - styled + asked, styled + old - asked
        scans = [(t - 1, *before)] * (t > 0) + [(t, fresh, yardstick)] * bool(mix)
        flops, texts = sum(scan(config, net, *one) for one in scans), sum(n + m for _, n, m in scans)
        yield inference(held["scans", t][0], flops, texts, SCAN_BATCH, kept(net, mix, query, M))

    tests, lora = sum(counts.test_queries[: t + 1]), attention_parameters(config, net, t)
    flops = beam_search(net, mix, tests, query, config.beam, lora)
    made = kept(net, mix, query, config.beam * M)
    yield inference(held["evaluation", t][0], flops, tests, search.BATCH, made)


def training(config, held: Stage, made: int, steps: int, batch: int, flops: int) -> Cost:
    """Steps of `flops`; each pass reads the weights for every part, and writes and reads what the part `made`."""
    parts = math.ceil(batch / min(batch, config.micro_batch or batch))
    passes = (2 + config.recompute) * parts  # forward, again, backward
    traffic = OPTIMISER_TRAFFIC * held.trained + passes * (4 * held.parameters + made)
    return Cost(held, steps, "bf16", steps * flops, steps * traffic)


def inference(held: Stage, flops: float, texts: int, batch: int, made: int, rate="tf32") -> Cost:
    """`texts` in batches, `made`: the bytes that each one's pass writes and reads."""
    return Cost(held, 0, rate, flops, math.ceil(texts / batch) * held.weights + 2 * texts * made)


def costs(config) -> list[Cost]:
    """What each stage of a run takes."""
    workload = WORKLOADS[config.data]._replace(general=general_documents(config.general))
    both = zip(memory.stages(config, workload), memory.stages(replace(config, recompute=False), workload))
    held = {(stage.name, stage.t): (stage, whole.activations) for stage, whole in both}
    stages = list(costs_once(config, held))
    for t in range(len(workload.documents)):
        stages += costs_of_corpus(config, held, t)
    return [cost for cost in stages if cost.flops]


def table(config) -> str:
    """A run's stages, and what the numbers rest on. D_1 to D_T share lines: sums, but the largest memory."""
    every, groups = costs(config), {}
    for cost in every:
        t, last = cost.held.t, len(WORKLOADS[config.data].documents) - 1
        corpus = "" if t is None else "D0 " if t == 0 else f"D1..D{last} "
        groups.setdefault(corpus + cost.held.name, []).append(cost)
    names = ["PFLOP", "TB moved", "GiB weights", "GiB activ.", *(f"hours {a.name}" for a in ACCELERATORS)]
    lines = [f"{'stage':22}{'steps':>9}{''.join(f'{name:>13}' for name in names)}  fits"]
    for name, group in [*groups.items(), ("total", every)]:
        large, steps = max(group, key=lambda cost: cost.memory), sum(cost.steps for cost in group)
        cells = [sum(cost.flops for cost in group) / 1e15, sum(cost.bytes for cost in group) / 1e12]
        cells += [large.held.weights / 2**30, large.held.activations / 2**30]
        cells += [sum(cost.hours(a) for cost in group) for a in ACCELERATORS]
        fits = ", ".join(a.name for a in ACCELERATORS if large.memory <= a.memory) or "none"
        lines.append(f"{name:22}{steps or '-':>9}{''.join(f'{cell:13.3f}' for cell in cells)}  {fits}")
    return "\n".join([*lines, "", *assumptions(config)])


def assumptions(config) -> list[str]:
    """What the numbers rest on, in plain words."""
    query, longest = query_lengths(config)
    document = min(WORKLOADS[config.data].tokens, config.document_length)
    rates = [
        f"  {a.name}: one, at {a.utilisation:.0%} (assumed, not measured) of {a.bf16 / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{a.tf32 / 1e12:.0f} in TF32; {a.bandwidth / 1e12:.2f} TB/s, {a.memory / 1e9:.0f} GB"
        for a in ACCELERATORS
    ]
    return [
        "assumptions", *rates,
        "  hours: the slower of products and traffic; launches, host and disk take none",
        "  products: of matrices; no tokenisation, BM25, cross-encoder, baselines, words of dreams or docids of general text on "
        "D_t; k-means as if on the accelerator",
        "  precision: training and mining in bfloat16 whatever --precision says, the rest in TF32",
        f"  network: {config.encoder_blocks} + {config.decoder_blocks} blocks of width {config.width}, by the flags, not by --t5",
        "  growth: every mixed layer at every corpus, an upper bound; none with --expand never",
        f"  tokens: a query {query} on average, {longest} when padded, a dream {tokens_of_dream(config):g}, an indexed document {document} "
        f"on average, a window of dense training at most {config.dense_length}",
        "  padding: the encoder leaves it out; bytes and cross-attention do not",
        "  traffic: weights once per pass, activations written and read once, the optimiser; about",
        f"  memory: micro-batch {config.micro_batch or 'as the batch'}, activations "
        f"{'recomputed' if config.recompute else 'kept'}; about; if none fits: --micro_batch, --recompute",
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    config = parse(argv, files=False).config  # files need not be there yet
    if config.data not in WORKLOADS:
        raise ValueError(f"tools.cost counts --data {' or '.join(WORKLOADS)}, not --data {config.data}")
    if uncounted := [f"--{name}" for name in UNCOUNTED if getattr(config, name)]:
        raise ValueError(f"tools.cost counts no {uncounted[0]}; take --method base or mixlora-dsi")
    check(replace(config, t5=""), files=False)  # the network is that of the flags
    if config.docid_kind != "rq":
        raise ValueError(f"tools.cost counts no --docid_kind {config.docid_kind}; take rq")
    print(table(prepare.sized(config, WORKLOADS[config.data].documents[0])))


if __name__ == "__main__":
    command.run(main, "tools.cost")
