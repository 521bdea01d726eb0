"""What each stage of a run holds in memory: does the run fit, before any work?

Paper    none; the formulas are ours
In       the Config of a run, a Workload
Out      a Stage each, or a ValueError that names the flags with which the run fits
Next     prepare.py asks once the corpora are read; tools/cost.py adds products, traffic and hours
Differs  the shape is the flags', also where published weights bring their own
"""

from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import rq
import scan
import search
from mixlora import MixConfig, expert_parameters
from t5 import T5Config

LONGEST_QUERY = 20  # tokens, to which a batch of short questions is padded
EMBED_BATCH = 64  # texts together in dense.embed
LSA_PAIR = 80  # measured bytes of a document and a piece in it: 20 of the sparse matrix, work of its products
# documents of each of D_0..D_T, tokens of one, documents of general text
Workload = namedtuple("Workload", "documents tokens general", defaults=[0])


@dataclass(frozen=True)
class Stage:
    name: str
    t: int | None  # of D_t, where it is one corpus's
    parameters: int
    trained: int  # of these
    weights: int  # bytes of parameters, gradients and moments
    activations: int  # bytes at the worst moment, in bfloat16; logits and caches too


def network(config) -> T5Config:
    """Shape of the run's T5, from the flags; published weights bring their own word rows."""
    return T5Config(
        vocab=T5Config().vocab if config.t5 else config.vocab, width=config.width, heads=config.heads,
        head_width=config.width // config.heads, feed_forward=config.feed_forward, codebooks=config.M,
        centroids=config.K, encoder_blocks=config.encoder_blocks, decoder_blocks=config.decoder_blocks,
    )  # fmt: skip


def mixture(config, t: int) -> MixConfig | None:
    """The mixed layers on D_t, None for a plain T5. At most: every layer grows at every corpus but the first."""
    grown = t - (not config.d0_mixture)
    experts = config.experts + (config.expand in ("ood", "always")) * grown
    return MixConfig(config.layers, experts, config.lora_rank) if config.mixture and grown >= 0 else None


def trained_experts(config, t: int) -> int:
    """Of each mixed layer on D_t: all of the first mixture, then a new one, the newest (--evolve) or none."""
    mix, before = mixture(config, t), mixture(config, t - 1)
    if not mix or not before or config.expand == "fixed":
        return mix.experts if mix else 0
    return max(mix.experts - before.experts, int(config.evolve))


def attention_parameters(config, net: T5Config, t: int) -> int:
    """Of LoRA on both attentions of every decoder block, which is there from D_1 on."""
    return (t > 0) * net.decoder_blocks * 8 * config.attention_rank * (net.width + net.heads * net.head_width)


def dreams_each(config, t: int) -> int:
    """R: dreams of earlier documents beside each new query of a step on D_t."""
    return config.dream_batch // config.batch if t and config.dreams else 0


def parameters(net: T5Config, mix: MixConfig | None = None) -> dict[str, int]:
    """Parameters of each part of a model."""
    D, inner = net.width, net.heads * net.head_width
    encoder, decoder = (n * (4 * D * inner + D) + 2 * D * net.feed_forward + D for n in (1, 2))
    ends = 2 * (D + net.buckets * net.heads)  # final norms, relative positions
    parts = dict(words=net.vocab * D, docids=net.codebooks * net.centroids * D, mixture=0)
    if mix:  # experts and their router rows
        parts["mixture"] = mix.layers * mix.experts * (expert_parameters(D, net.feed_forward, mix.rank) + D)
    return parts | {"blocks": net.encoder_blocks * encoder + net.decoder_blocks * decoder + ends}


def longest_dream(config) -> int:
    """Tokens, its </s> too; where queries stand beside dreams or in their place (general text, --rehearsal), theirs."""
    if config.rehearsal or (config.general and config.dream_general):
        return min(LONGEST_QUERY, config.query_length)
    return config.dream_words + config.dream_noise + 1


def kept(net, mix, source: int, target: int, encode=True, recompute=False, tokens=0) -> int:
    """Bytes that autograd keeps under bfloat16 autocast of one text: `source` tokens, `target` docid positions. Of the
    source `tokens` are no padding (all if 0).

    Per position 4 bytes of the residual stream and of its normalised copy, 2 of every input of a product (cast anew
    for each), 1 of a dropout mask; per score 7: its softmax in both precisions, and a mask. To the source each head
    has a query and a mixture of width D; the query and cast weights are kept if the encoder trains (`encode`).
    With `recompute`, and about so without gradients, a block keeps its input, and one block is whole.
    """
    D, F, H, inner = net.width, net.feed_forward, net.heads, net.heads * net.head_width
    tokens = tokens or source
    encoder, decoder = (  # queries, keys and values are padded
        n * (26 * D + 2 * inner + 5 * F) + padded * 6 * inner + 7 * H * padded**2
        for n, padded in ((tokens, source), (target, target))
    )
    across = 11 * D + 4 * inner + (5 + 2 * encode) * H * source + (2 + 2 * encode) * H * D
    decoder += target * across + 4 * D * source
    mixed = target * (7 * D + 3 * F + 8 * mix.experts * mix.rank) if mix else 0  # beside the decoder's
    encoders, decoders, layers = encode * net.encoder_blocks, net.decoder_blocks, mix.layers if mix else 0
    ends = 14 * D * (encode * tokens + target) + encode * 4 * H * source**2  # and the encoder's bias
    if recompute:
        return ends + 4 * D * (encoders * tokens + decoders * target) + max(encode * encoder, decoder + mixed)
    return ends + encoders * encoder + decoders * decoder + layers * mixed


def logits(net: T5Config, mask: str = "segment") -> int:
    """Logits of one docid's loss: M positions, each against the rows that the mask leaves."""
    every = net.codebooks * net.centroids
    rows = {"segment": net.centroids, "docid_vocab": every, "full_vocab": every + net.vocab}
    return net.codebooks * rows[mask]


def stages(config, workload: Workload):
    """Yields every Stage of a run; mining holds what document embeddings do."""
    if atomic := config.docid_kind == "atomic":  # a row for each document, in place of a quantiser
        config = replace(config, M=1, K=sum(workload.documents))
    net, query, again = network(config), min(LONGEST_QUERY, config.query_length), config.recompute

    def training(name, t, n, trains, batch, example, copies=0) -> Stage:
        """`example`: its activations; weights in both precisions, gradients, two moments, and copies in float32."""
        activations = min(batch, config.micro_batch or batch) * example
        return Stage(name, t, n, trains, (4 + 2 + 4 * copies) * n + 12 * trains, activations)

    parts, length = parameters(net), min(workload.tokens, config.document_length)
    first = workload.documents[0] + workload.general  # documents that are read first
    n, trains = sum(parts.values()), parts["words"] + parts["blocks"]
    if not config.t5:  # at most, all tokens of a document differ; the factors of the SVD and work on them
        pairs, factors = first * length, (first + net.vocab) * net.width
        yield Stage("latent semantic analysis", None, n, 0, 4 * n + LSA_PAIR * pairs + 16 * factors, 0)
    asked, window = (kept(net, None, tokens, 1, True, again) for tokens in (query, config.dense_length))
    rounds = config.dense_rounds * config.dense_steps  # a positive and a negative each
    for name, steps, windows in ("dense warm-up", config.dense_warmup_steps, 1), ("dense rounds", rounds, 2):
        if steps:
            yield training(name, None, n, trains, config.dense_batch, asked + windows * window)
    document = kept(net, None, length, 1, recompute=True)
    yield Stage("document embeddings", None, n, 0, 4 * n, EMBED_BATCH * document)
    most = max(rq.POINTS_PER_CENTROID * config.K, rq.MOST_POINTS)
    points = min(workload.documents[0] * config.rq_pseudo + first, most)
    held = points + 3 * min(points * rq.BEAM, most)  # residuals and their two terms
    yield Stage(
        "codebooks and docids", None, 0, 0, 0, 0 if config.docids or atomic else 4 * config.width * held
    )
    for t in range(len(workload.documents)):
        mix, old, kl = mixture(config, t), dreams_each(config, t), t and config.kl_coef > 0
        parts, whole = parameters(net, mix), t == 0 or not config.mixture
        attention = attention_parameters(config, net, t)
        n = sum(parts.values()) + attention
        newest = parts["mixture"] * trained_experts(config, t) // mix.experts if mix else 0
        trains = n - bool(mix) * parts["words"] if whole else parts["docids"] + newest + attention
        scores = logits(net, config.mask) + 2 * (old + kl) * logits(net)  # a KL has the previous model's too
        padded = max(query, longest_dream(config)) if old else query  # dreams share a batch with queries
        asked, dreamt = (
            kept(net, mix, padded, config.M, whole, again, tokens)
            for tokens in (query, longest_dream(config))
        )
        example = 14 * scores + asked + old * dreamt
        copies = 2 * max(0, t - (not config.ewc_protect_d0)) if config.ewc else 0  # EWC's F and theta
        copies += t > 0 and config.sam_rho > 0  # the values before SAM climbs
        batch = config.batch if t and not config.joint else config.d0_batch
        yield training("training", t, n, trains, batch, example, copies)
        if mix or t and (config.dreams or config.kl_coef):
            yield Stage("scans", t, n, 0, 4 * n, scan.BATCH * kept(net, mix, query, config.M, recompute=True))
        beam = min(config.beam, sum(workload.documents[: t + 1]))
        cached = query + 2 * beam * config.M  # positions, the beams' twice, since they are reordered
        cached *= net.decoder_blocks * 2 * config.width * 4  # keys and values in float32
        beams = kept(net, mix, query, beam, recompute=True)
        yield Stage("evaluation", t, n, 0, 4 * n, search.BATCH * (beams + cached))


def require_memory(config, workload: Workload, available: float, where: str, left: int | None = None) -> None:
    """Raises ValueError where a stage needs more than the `available` bytes, with the flags that make it fit. With `left`
    it looks at the stages of so many corpora, the last, alone.
    """
    gib, share = 2**30, 1 if config.precision == "bf16" else 2  # float32: up to twice what is counted
    first = len(workload.documents) - left if left else None

    def worst(config) -> tuple[float, str]:
        held = [s for s in stages(config, workload) if first is None or s.t is not None and s.t >= first]
        return max((s.weights + share * s.activations, s.name) for s in held)

    most, name = worst(config)
    if most <= available:
        return
    smaller = [(2**i, again) for again in (config.recompute, True) for i in range(14, -1, -1)]
    held = {(i, again): worst(replace(config, micro_batch=i, recompute=again))[0] for i, again in smaller}
    advice = f"take a smaller T5 or D_0, or a machine with {held[1, True] / gib:.1f} GiB"
    if fits := [pair for pair in smaller if held[pair] <= available]:
        advice = f"pass --micro_batch {fits[0][0]}" + " --recompute" * fits[0][1]
    needs = f"{name} needs about {most / gib:.1f} GiB, {where} has {available / gib:.1f} GiB free"
    raise ValueError(f"{needs}: {advice}, or --no-check_memory to try all the same")


def free_memory(device: str) -> float:
    """Bytes that this process could still take, on CUDA or of the machine; infinite where that is not told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return float("inf")
