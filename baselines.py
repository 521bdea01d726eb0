"""The methods that the paper compares with, each in the fewest lines that show how it works.

Paper    the rows beside its own in the results: CorpusBrain++ (adapters), PromptDSI (prompts), DSI++ (adaptive SAM,
         Kwon et al. 2021), CLEVER (EWC); and IncDSI (Kishore et al. 2023)
In       a plain T5 after D_0, its gradients, or hidden states (n, D) of pseudo-queries
Out      modules that T5 calls where they are, moved parameters, a penalty, rows of a docid table
Next     train.py trains with them; store.py keeps adapters and prompts in checkpoints
Differs  DSI++ is without its generative replay, as in the paper. PromptDSI's released code compares topics with the
         mean of the decoder's input embeddings, which in training holds the docid that is asked for: here it is
         the mean of the query's encoder outputs, the same in training and search. Topics come from k-means of
         these in place of BERTopic; the word rows, which its frozen encoder reads, do not train, so that the
         encoder's outputs are computed once. EWC's F is the square of one mean gradient, as released, not Fisher's
         mean of squares. IncDSI inserts all documents of a corpus at once, by Adam in place of L-BFGS, and its old
         documents' mean queries are computed again from their text instead of stored.

`run` is prepare.Run: config, corpora, and pseudo-queries of each corpus.
"""

import random
from dataclasses import replace

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dense
from losses import docid_cross_entropy
from mixlora import kaiming
from t5 import T5, Attention, DecoderBlock, FeedForward, T5Config

REDUCTION = 96  # of an adapter's bottleneck: 8 at T5-base's width (released code)
PROMPT_LENGTH = 10  # keys and values of a prompt (paper)
TOPIC_QUERIES = 20_000  # pseudo-queries of D_0 whose topics PromptDSI finds (ours)
MARGIN, GUARD = 1.0, 1.0  # of IncDSI's hinges, and the weight of those of old documents
INSERT_STEPS, INSERT_LR = 200, 0.02  # of Adam; a share of the standard size of the tables' entries (ours)
CHUNK = 1024  # rows of scores that insertion holds at a time


def add_parts(run, model: T5) -> None:
    """Puts in what PromptDSI and CorpusBrain++ train beside the shared table, on D_1; for the others nothing."""
    config = run.config
    if config.prompts and model.prefix is None:
        model.eval()
        with torch.no_grad():
            tokens = run.tokens(run.sample(0, TOPIC_QUERIES, "topics"))
            means = [representation(*model.encode(part.to(run.device))).cpu() for part in tokens.split(128)]
        add_prompts(model, topic_keys(torch.cat(means), config.prompts, config.seed))
    if config.adapters and not adapters(model):
        add_adapters(model, max(1, model.config.width // REDUCTION))


def unfreeze_parts(model: T5) -> None:
    """Of a frozen model, lets these parts train; CorpusBrain++ trains the whole shared table, words too."""
    for adapter in adapters(model):
        model.word.requires_grad_(True)
        adapter.requires_grad_(True)
    if model.prefix:
        model.prefix.keys_values.requires_grad_(True)


# ------------------------------------------------------------------------------------- CorpusBrain++: adapters


class Adapter(nn.Module):
    """y + W_up W_down y of a sub-layer's output y (.., D): a bottleneck without activation. Starts as the identity."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down = kaiming(inner, width)
        self.up = nn.Parameter(torch.zeros(width, inner))

    def forward(self, y: Tensor) -> Tensor:
        return y + y @ self.down.T @ self.up.T


def add_adapters(model: T5, inner: int) -> None:
    """Puts an adapter behind each attention and feed-forward: two in an encoder block, three in a decoder block."""
    for sub_layer in list(model.modules()):
        if isinstance(sub_layer, (Attention, FeedForward)):
            sub_layer.after = Adapter(model.config.width, inner).to(model.word.device)


def adapters(model: T5) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


# ------------------------------------------------------------------------------------------ PromptDSI: prompts


class Prompts(nn.Module):
    """P prompts: a model's prefix of keys and values in the self-attention of its second decoder block.

    A query takes the prompt whose topic is nearest to its `representation` by cosine. Topics never train.
    """

    def __init__(self, topics: Tensor, length: int, config: T5Config):
        """topics (P, D)."""
        super().__init__()
        self.length, self.blocks = length, config.decoder_blocks
        self.topics = nn.Parameter(topics.clone(), requires_grad=False)
        keys_values = torch.randn(len(topics), 2, config.heads, length, config.head_width) * 0.02
        self.keys_values = nn.Parameter(keys_values)

    def choose(self, source: Tensor, padding: Tensor) -> Tensor:
        """The prompt of each query (B,), from what T5.encode gives."""
        topics = F.normalize(self.topics, dim=-1)
        with torch.autocast(source.device.type, enabled=False):  # bfloat16 would take near topics for equal
            return (F.normalize(representation(source, padding), dim=-1) @ topics.T).argmax(-1)

    def forward(self, source: Tensor, padding: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """What T5.past gives: keys and values (B, H, length, Dh) of the second block, None for all others."""
        past: list[tuple[Tensor, Tensor] | None] = [None] * self.blocks
        past[1] = self.keys_values[self.choose(source, padding)].unbind(1)
        return past


class PromptedBlock(DecoderBlock):
    """A decoder block whose past begins with a prompt, which is at no position and has no relative bias."""

    def __init__(self, block: DecoderBlock):
        """Takes over the parts of `block`, under their names."""
        nn.Module.__init__(self)
        self.dropout, self.training = block.dropout, block.training
        for name, part in block.named_children():
            self.add_module(name, part)

    def attend(self, x: Tensor, bias: Tensor, past, cross, cross_bias: Tensor):
        """As DecoderBlock; docids that share a query, of which past has one row, share its prompt."""
        assert past is not None, "a model with prompts decodes from model.past(..)"
        past = [part.repeat_interleave(len(x) // len(part), 0) for part in past]
        prompt = past[0].shape[2] + x.shape[1] - bias.shape[3]
        return super().attend(x, F.pad(bias, (prompt, 0)), past, cross, cross_bias)


def representation(source: Tensor, padding: Tensor) -> Tensor:
    """Mean of a query's encoder outputs (B, S, D) where its padding bias (B, 1, 1, S) is 0 -> (B, D) float32."""
    real = (padding[:, 0, 0] == 0).float()  # (B, S)
    return (source.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def topic_keys(representations: Tensor, topics: int, seed: int) -> Tensor:
    """Unit centroids (P, D) of spherical k-means over D_0's query representations (Q, D).

    Raises ValueError where there are fewer queries than topics.
    """
    if len(representations) < topics:
        raise ValueError(f"found {len(representations)} queries for {topics} topics; pass fewer --prompts")
    points = np.ascontiguousarray(F.normalize(representations.float().cpu(), dim=-1).numpy())
    options = dict(niter=20, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans = faiss.Kmeans(points.shape[1], topics, **options)
    kmeans.train(points)
    return torch.from_numpy(kmeans.centroids.reshape(topics, -1).copy())


def add_prompts(model: T5, topics: Tensor, length: int = PROMPT_LENGTH) -> None:
    """Gives a plain T5 a pool of prompts, one of each topic (P, D), in its second decoder block.

    Its decoder then starts from `model.past(source, padding)`. Raises ValueError where there is no such block.
    """
    if len(model.decoder) < 2:
        raise ValueError("prompts go into the second decoder block, this T5 has one; pass --decoder_blocks 2")
    model.prefix = Prompts(topics, length, model.config).to(model.word.device)
    model.decoder[1] = PromptedBlock(model.decoder[1])


# ---------------------------------------------------------------------------------------- DSI++: adaptive SAM


@torch.no_grad()
def climb(parameters: list[Tensor], rho: float) -> list[Tensor]:
    """To where the loss is worst nearby: w + rho * w^2 g / || |w| g ||, g being w.grad and the norm that of all
    parameters together. Kwon et al., 2021.

    Returns the values before, for optim.fit to put back. Nothing moves where the norm is 0 or not finite.
    """
    before = [w.detach().clone() for w in parameters]
    moved = [w for w in parameters if w.grad is not None]
    norms = [(w.abs() * w.grad).norm() for w in moved]
    norm = torch.stack(norms).norm().item() if norms else 0.0
    if 0 < norm < float("inf"):
        for w in moved:
            w += (rho / norm) * w.square() * w.grad
    return before


# ------------------------------------------------------------------------------------------------ CLEVER: EWC


def fisher(model: T5, ids: Tensor, codes: Tensor, batch: int = 64) -> dict[str, Tensor]:
    """F of every parameter that trains, from n queries (n, S) of a corpus and their docids (n, M).

    As released: the squared gradient of one cross-entropy, the mean over all n, without a mask; so queries whose
    gradients oppose each other cancel, which they do not in Fisher's mean of squared gradients. Computed in parts
    of `batch`, in evaluation mode. Takes no part in a step: gradients are cleared before and after.
    """
    training, device = model.training, model.word.device
    model.eval().zero_grad()
    for part, docids in zip(ids.to(device).split(batch), codes.to(device).split(batch)):
        source, padding = model.encode(part)
        hidden, _ = model.docid_hidden(source, padding, docids, model.past(source, padding))
        loss = docid_cross_entropy(model, hidden, docids, "full_vocab")
        (loss * len(part) / len(ids)).backward()
    squares = {name: p.grad.square() for name, p in model.named_parameters() if p.grad is not None}
    model.train(training).zero_grad()
    return squares


def ewc_memory(run, t: int, codes: Tensor) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """F and theta* of each corpus that EWC protects on D_t, from its checkpoint and a fixed sample of its queries."""
    memory = []
    for i in range(0 if run.config.ewc_protect_d0 else 1, t):
        model, rng = run.ready(run.after(i)[0]), random.Random(f"{run.config.seed} ewc {i}")
        rows = rng.choices(run.corpora[i].rows, k=run.config.ewc_samples)
        tokens = run.tokens([(row, run.sampler(i).draw(row, rng)) for row in rows])
        weights = fisher(model, tokens, codes[rows].to(run.device))
        memory.append((weights, {name: p.detach() for name, p in model.named_parameters()}))
    return memory


def ewc_penalty(model: T5, memory: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Tensor:
    """sum over earlier corpora's (F, theta*) of F (theta - theta*)^2; the loss takes it times lambda = 0.5."""
    parameters = dict(model.named_parameters())
    terms = [
        (weight * (parameters[name] - theta[name]).square()).sum()
        for weights, theta in memory
        for name, weight in weights.items()
    ]
    return sum(terms, start=model.rq.new_zeros(()))


# ----------------------------------------------------------------------------------- IncDSI: insertion of rows


@torch.enable_grad()
def insert_rows(table: Tensor, represented: Tensor, rows: Tensor, queries: Tensor, owner: Tensor) -> Tensor:
    """Rows (n, D) of new documents in a table of one row per document (atomic docids), without training a model.

    A new row e shall win its own queries q, and must not win those of old documents j, for which their mean z_j
    stands. As in IncDSI, with c = MARGIN and summed over q and j:

        sum_q max(0, c + max_{other} <q, e_other> - <q, e>)^2 + GUARD * sum_j max(0, c + <z_j, e> - <z_j, e_j>)^2

    IncDSI inserts one document after another by L-BFGS, and one of its corpus is old for those that follow. Here all n
    move at once by Adam, so `other` runs over the old rows and the other new ones, which give way too.

    Args:
        table: (N, D) rows e_j of the old documents; they stay.
        represented: (N, D) their z_j, means of hidden states, as they were when those were inserted.
        rows: (n, D) where the new ones start, e.g. their embeddings.
        queries: (Q, D) hidden states of the new documents' pseudo-queries.
        owner: (Q,) which of the n each belongs to.
    """
    best_old = torch.cat([(part @ table.T).amax(1) for part in queries.split(CHUNK)])  # (Q,)
    kept = (represented * table).sum(1)  # (N,) what z_j gives its own document
    size = torch.cat([table, rows]).square().mean().sqrt().item()
    rows = rows.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([rows], INSERT_LR * size)
    for _ in range(INSERT_STEPS):
        optimiser.zero_grad()
        for part, mine, best in zip(queries.split(CHUNK), owner[:, None].split(CHUNK), best_old.split(CHUNK)):
            scores = part @ rows.T  # (q, n)
            others = torch.maximum(scores.scatter(1, mine, -torch.inf).amax(1), best)
            short = MARGIN + others - scores.gather(1, mine)[:, 0]
            short.clamp(min=0).square().sum().backward()
        for part, own in zip(represented.split(CHUNK), kept[:, None].split(CHUNK)):
            (GUARD * (MARGIN + part @ rows.T - own).clamp(min=0).square().sum()).backward()
        optimiser.step()
    return rows.detach()


def insert(run, t: int, embeddings: Tensor, model: T5) -> Tensor:
    """The docid table of D_0..D_t: the model's own rows and one for each new document, which its queries find.

    embeddings (N, D), where the new rows start. The model stays as D_0 left it and the draw of four queries for each
    older document has a fixed seed, so that their means are what they were when the document came.
    """
    run.ready(model).eval()
    new, pairs = run.corpora[t].rows, run.training_queries(t)
    queries = dense.embed(model, run.tokens(pairs))
    owner = torch.tensor([row for row, _ in pairs]) - new.start
    old = [pair for i in range(t) for pair in run.sample(i, 4 * len(run.corpora[i].rows), "insertion")]
    rows = torch.tensor([row for row, _ in old])
    means = torch.zeros(new.start, queries.shape[1]).index_add_(0, rows, dense.embed(model, run.tokens(old)))
    means /= torch.bincount(rows, minlength=new.start)[:, None]
    table = model.rq.detach()[0].cpu()
    return torch.cat([table, insert_rows(table, means, embeddings[new.start : new.stop], queries, owner)])


# --------------------------------------------------------------------------------- atomic docids: a growing table


def table_so_far(run, t: int, books: Tensor) -> Tensor:
    """What the docid table of D_0..D_t starts from: all codebooks or, if atomic, a row for each document so far."""
    return books[:, : run.corpora[t].rows.stop] if run.config.docid_kind == "atomic" else books


def extend_table(model: T5, table: Tensor) -> None:
    """Appends to the docid table (M, K, D) those columns of a longer `table` that it lacks: new atomic docids."""
    missing = table[:, model.rq.shape[1] :].to(model.rq)
    if missing.shape[1]:
        model.rq = nn.Parameter(torch.cat([model.rq.detach(), missing], dim=1))
        model.config = replace(model.config, centroids=model.rq.shape[1])
