"""What each stage of a run holds in memory: does the run fit, before any work?

Paper    none; the formulas are ours
In       the Config of a run, a Workload
Out      a Stage each, or a ValueError that names the flags with which the run fits
Next     train.py asks once the corpora are read; tools/cost.py adds products, traffic and hours
Differs  the shape is the flags', also where published weights bring their own
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixlora import MixConfig, expert_parameters
from rq import BEAM, MOST_POINTS, POINTS_PER_CENTROID
from search import BATCH as SEARCH_BATCH
from t5 import T5Config

LONGEST_QUERY = 20  # tokens, to which a batch of short questions is padded
SCAN_BATCH, EMBED_BATCH = 512, 64  # texts together in scan.scan and dense.embed


@dataclass(frozen=True)
class Workload:
    documents: tuple[int, ...]  # of D_0..D_T
    tokens: int  # of a document


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
    experts = config.experts + (config.expand != "never") * grown
    return MixConfig(config.layers, experts, config.lora_rank) if config.mixture and grown >= 0 else None


def parameters(net: T5Config, mix: MixConfig | None = None) -> dict[str, int]:
    """Parameters of each part of a model."""
    D, inner = net.width, net.heads * net.head_width
    encoder, decoder = (n * (4 * D * inner + D) + 2 * D * net.feed_forward + D for n in (1, 2))
    ends = 2 * (D + net.buckets * net.heads)  # final norms, relative positions
    expert = expert_parameters(D, net.feed_forward, mix.rank) + D if mix else 0  # and its router row
    blocks = net.encoder_blocks * encoder + net.decoder_blocks * decoder + ends
    mixed = mix.layers * mix.experts * expert if mix else 0
    return dict(words=net.vocab * D, docids=net.codebooks * net.centroids * D, blocks=blocks, mixture=mixed)


def kept(net, mix, source: int, target: int, encode=True, recompute=False) -> int:
    """Bytes that autograd keeps under bfloat16 autocast of one text: `source` tokens, `target` docid positions.

    Per position 4 bytes of the residual stream and of its normalised copy, 2 of every input of a product (cast anew
    for each), 1 of a dropout mask; per score 7: its softmax in both precisions, and a mask. To the source each head
    has a query and a mixture of width D; the query and cast weights are kept if the encoder trains (`encode`).
    With `recompute`, and about so without gradients, a block keeps its input, and one block is whole.
    """
    D, F, H, inner = net.width, net.feed_forward, net.heads, net.heads * net.head_width
    encoder, decoder = (n * (26 * D + 8 * inner + 5 * F) + 7 * H * n**2 for n in (source, target))
    across = 11 * D + 4 * inner + (5 + 2 * encode) * H * source + (2 + 2 * encode) * H * D
    decoder += target * across + 4 * D * source
    mixed = target * (7 * D + 3 * F + 8 * mix.experts * mix.rank) if mix else 0  # beside the decoder's
    encoders, decoders, layers = encode * net.encoder_blocks, net.decoder_blocks, mix.layers if mix else 0
    ends = 14 * D * (encode * source + target) + encode * 4 * H * source**2  # and the encoder's bias
    if recompute:
        return ends + 4 * D * (encoders * source + decoders * target) + max(encode * encoder, decoder + mixed)
    return ends + encoders * encoder + decoders * decoder + layers * mixed


def logits(net: T5Config, mask: str = "segment") -> int:
    """Logits of one docid's loss: M positions, each against the rows that the mask leaves."""
    codes = net.codebooks * net.centroids
    rows = {"segment": net.centroids, "docid_vocab": codes, "full_vocab": codes + net.vocab}
    return net.codebooks * rows[mask]


def stages(config, workload: Workload) -> Iterator[Stage]:
    """Every stage of a run; mining holds what document embeddings do."""
    net, query, again = network(config), min(LONGEST_QUERY, config.query_length), config.recompute

    def training(name, t, n, trains, batch, example, copies=0) -> Stage:
        """`example`: its activations; weights in both precisions, gradients, two moments, and copies in float32."""
        micro = min(batch, config.micro_batch or batch)
        return Stage(name, t, n, trains, (4 + 2 + 4 * copies) * n + 12 * trains, micro * example)

    parts = parameters(net)
    n, trains = sum(parts.values()), parts["words"] + parts["blocks"]
    asked, window = (kept(net, None, tokens, 1, True, again) for tokens in (query, config.dense_length))
    if config.dense_warmup_steps:
        yield training("dense warm-up", None, n, trains, config.dense_batch, asked + window)
    if config.dense_rounds * config.dense_steps:  # a positive and a negative
        yield training("dense rounds", None, n, trains, config.dense_batch, asked + 2 * window)
    document = kept(net, None, min(workload.tokens, config.document_length), 1, recompute=True)
    yield Stage("document embeddings", None, n, 0, 4 * n, EMBED_BATCH * document)
    most = max(POINTS_PER_CENTROID * config.K, MOST_POINTS)
    points = min(workload.documents[0] * (1 + config.rq_pseudo), most)
    held = points + 3 * min(points * BEAM, most)  # residuals and their two terms
    yield Stage("codebooks and docids", None, 0, 0, 0, 0 if config.docids else 4 * config.width * held)
    for t in range(len(workload.documents)):
        mix, before = mixture(config, t), parameters(net, mixture(config, t - 1))
        parts, whole = parameters(net, mix), t == 0 or not config.mixture
        n = sum(parts.values())
        trains = parts["docids"] + parts["mixture"] - before["mixture"]  # docid table and newest experts
        if whole:  # but for the words of a mixed model
            trains = n - bool(mix) * parts["words"]
        old, kl = t and config.kl_old_coef > 0, t and config.kl_coef > 0
        scores = logits(net, config.mask) + 2 * (old + kl) * logits(net)  # a KL has the previous model's too
        example = 14 * scores + (1 + old) * kept(net, mix, query, config.M, whole, again)
        copies = 2 * max(0, t - (not config.ewc_protect_d0)) if config.ewc else 0  # EWC's F and theta
        copies += t > 0 and config.sam_rho > 0  # the values before SAM climbs
        yield training("training", t, n, trains, config.batch if t else config.d0_batch, example, copies)
        if mix:
            yield Stage("scans", t, n, 0, 4 * n, SCAN_BATCH * kept(net, mix, query, config.M, recompute=True))
        cached = query + 2 * config.beam * config.M  # positions, the beams' twice, since they are reordered
        search = kept(net, mix, query, config.beam, recompute=True)
        search += cached * net.decoder_blocks * 2 * config.width * 4  # keys and values in float32
        yield Stage("evaluation", t, n, 0, 4 * n, SEARCH_BATCH * search)


def require_memory(config, workload: Workload, available: float, where: str) -> None:
    """Raises ValueError where a stage needs more than the `available` bytes, with the flags that make it fit.

    Activations in float32 take up to twice the bytes that are counted for bfloat16.
    """
    share, gib = 1 if config.precision == "bf16" else 2, 2**30

    def worst(**flags) -> tuple[float, str]:
        every = stages(replace(config, **flags), workload)
        return max((stage.weights + share * stage.activations, stage.name) for stage in every)

    most, name = worst()
    if most <= available:
        return
    for micro, again in [(2**i, again) for again in (config.recompute, True) for i in range(14, -1, -1)]:
        advice = f"pass --micro_batch {micro}" + " --recompute" * again
        least, _ = worst(micro_batch=micro, recompute=again)
        if least <= available:
            break
    else:
        advice = f"take a smaller --t5, or a machine with {least / gib:.1f} GiB"
    raise ValueError(
        f"{name} needs about {most / gib:.1f} GiB, {where} has {available / gib:.1f} GiB free: {advice}, or "
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
        return float("inf")
