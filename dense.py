"""The bi-encoder whose document embeddings become docids.

Paper    appendix C, Eq. 8; MarginMSE (Hofstaetter et al., 2020) with two rounds of negatives, as in RIPOR
In       D_0's documents and queries, a T5
Out      document embeddings (N, D), un-normalised; similarity is the inner product
Next     rq.py quantises the embeddings of D_0 and, with the same codebooks, those of every later corpus
Differs  where T5 starts from nothing, an in-batch contrastive warm-up comes first and stays as a second loss
         term, the examples include pseudo-queries, and BM25 teaches in place of a cross-encoder
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bm25 import BM25
from data import EOS, PAD, Corpus, PseudoQuerySampler, read_lines, tokenize
from optim import fit, parameter_groups
from t5 import T5


@dataclass
class Examples:
    """Queries of D_0, each with its document, its hard negatives and the teacher's scores of them."""

    queries: list[str]
    positives: Tensor  # (n,) rows
    negatives: Tensor  # (n, k) rows
    positive_scores: Tensor  # (n,) teacher scores
    negative_scores: Tensor  # (n, k)


@torch.no_grad()
def embed(model: T5, ids: Tensor, batch: int = 64) -> Tensor:
    """Token ids (N, S) -> embeddings (N, D) float32 on the CPU, in batches of like length."""
    device = next(model.parameters()).device
    model.eval()
    lengths = (ids != PAD).sum(1)
    out = torch.empty(len(ids), model.config.width)
    for rows in lengths.argsort().split(batch):
        out[rows] = model.embed(ids[rows, : lengths[rows].max()].to(device)).float().cpu()
    return out


def rank(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact inner-product search: (Q, D), (N, D) -> scores and rows (Q, k), score descending, then row
    ascending.
    """
    scores, order = (queries @ documents.T).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], order[:, :k]


def recall(queries: Tensor, relevant: list[set[int]], documents: Tensor, k: int = 10) -> float:
    """Share of the queries' relevant rows among the k nearest documents, averaged over queries."""
    if not relevant:
        return math.nan
    top = rank(queries, documents, k)[1].tolist()
    return sum(len(rows & set(found)) / len(rows) for rows, found in zip(relevant, top)) / len(relevant)


def negatives_from_bm25(bm25: BM25, queries: list[tuple[int, str]], k: int) -> Examples:
    """The first round: the k best wrong documents by BM25, scored by BM25 as the teacher."""
    chosen = torch.empty(len(queries), k, dtype=torch.long)
    positives = _positives(queries)
    for i, (_, query) in enumerate(queries):
        scores = bm25.scores(query)
        scores[positives[query]] = -1.0
        chosen[i] = torch.from_numpy(np.argpartition(-scores, k)[:k].copy())
    return _teach(bm25, queries, chosen)


def negatives_from_model(
    bm25: BM25, queries: list[tuple[int, str]], embedded: Tensor, documents: Tensor, k: int
):
    """The second round: the k best wrong documents by the first round's own index, scored by BM25."""
    chosen, positives = torch.empty(len(queries), k, dtype=torch.long), _positives(queries)
    for start in range(0, len(queries), 1024):
        scores = embedded[start : start + 1024] @ documents.T
        for i, (_, query) in enumerate(queries[start : start + 1024]):
            scores[i, positives[query]] = -torch.inf
        chosen[start : start + 1024] = scores.topk(k, dim=1).indices
    return _teach(bm25, queries, chosen)


def _positives(queries: list[tuple[int, str]]) -> dict[str, list[int]]:
    """All documents that a query text belongs to: none of them is a negative of it."""
    rows: dict[str, list[int]] = {}
    for row, query in queries:
        rows.setdefault(query, []).append(row)
    return rows


def _teach(bm25: BM25, queries: list[tuple[int, str]], negatives: Tensor) -> Examples:
    positives = torch.tensor([row for row, _ in queries])
    scored = [
        torch.from_numpy(bm25.scores(query)[[row, *rows]])
        for (row, query), rows in zip(queries, negatives.tolist())
    ]
    scores = torch.stack(scored).float()
    return Examples([query for _, query in queries], positives, negatives, scores[:, 0], scores[:, 1:])


def read_teacher(path: Path, corpus: Corpus) -> Examples:
    """Teacher scores from JSON lines {"qid", "docids": [positive, negatives..], "scores": [..]} for D_0's
    queries.

    Negatives outside D_0 are dropped, as the paper does; all lines are cut to the fewest negatives that are
    left.
    Raises ValueError with the line's number where a line is malformed, or a query or its positive is unknown.
    """
    text_of = dict(zip(corpus.train_ids, (query for _, query in corpus.train)))
    row_of = dict(zip(corpus.ids, corpus.rows))
    queries, rows, scores = [], [], []
    for place, line in read_lines(path):
        try:
            item = json.loads(line)
            pairs = list(zip(item["docids"], map(float, item["scores"]), strict=True))
            known, first = item["qid"] in text_of, pairs[0][0]
            if not all(isinstance(doc_id, str) and math.isfinite(score) for doc_id, score in pairs):
                raise ValueError("document ids must be strings and scores finite")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"{place}: wanted qid, docids and as many scores ({error})") from None
        if not known or first not in row_of:
            raise ValueError(
                f"{place}: query {item['qid']!r} or its positive {first!r} is not in D_0's training set"
            )
        kept = [(row_of[doc_id], score) for doc_id, score in pairs if doc_id in row_of]
        if len(kept) > 1:
            queries.append(text_of[item["qid"]])
            rows.append([row for row, _ in kept])
            scores.append([score for _, score in kept])
    if not queries:
        raise ValueError(f"{path}: found no query with a negative in D_0")
    k = min(map(len, rows))
    r, s = torch.tensor([row[:k] for row in rows]), torch.tensor([score[:k] for score in scores])
    return Examples(queries, r[:, 0], r[:, 1:], s[:, 0], s[:, 1:])


def margin_mse(q: Tensor, positive: Tensor, negative: Tensor, teacher_margin: Tensor) -> Tensor:
    """mean_b [ (<q, p+> - <q, p->) - (s(q, p+) - s(q, p-)) ]^2 over embeddings (B, D) and teacher margins
    (B,).
    """
    margin = (q * (positive - negative)).sum(1)
    return (margin - teacher_margin).pow(2).mean()


def in_batch_contrastive(q: Tensor, documents: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Cross-entropy of each query's own document against all documents of the batch.

    q (B, D); documents (B or 2B, D), the first B being the positives; rows (B or 2B,) tell equal documents,
    which are no negatives of each other. `scale` multiplies the inner products.
    """
    logits = scale * (q @ documents.T)  # (B, B or 2B)
    target = torch.arange(len(q), device=q.device)
    same = rows[: len(q), None] == rows[None, :]
    same[target, target] = False
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), target)


class Windows:
    """Documents as token ids, of which training sees a window and indexing the whole (up to a length)."""

    def __init__(self, ids: Tensor):
        self.ids = ids  # (N, S)
        self.lengths = (ids != PAD).sum(1)

    def draw(self, rows: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """A window of `length` tokens, closed by </s>, of each row: half start at the title, half anywhere."""
        room = (self.lengths[rows] - length).clamp(min=0)
        start = (torch.rand(len(rows), generator=generator) * (room + 1)).long()
        start[torch.rand(len(rows), generator=generator) < 0.5] = 0
        at = start[:, None] + torch.arange(length)
        window = self.ids[rows[:, None], at.clamp(max=self.ids.shape[1] - 1)]
        window = window.masked_fill(at >= self.lengths[rows, None], PAD)
        last = torch.minimum(self.lengths[rows], torch.tensor(length)) - 1
        window[torch.arange(len(rows)), last] = EOS
        return window


def batches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices below n without end, each index once per epoch; the last batch of an epoch may be
    smaller.
    """
    while True:
        yield from torch.randperm(n, generator=generator).split(batch)


def train(
    model: T5, tokenizer, corpus: Corpus, documents: Tensor, sampler: PseudoQuerySampler | None, config, log
) -> None:
    """Trains the bi-encoder on D_0, in place: a contrastive warm-up, then MarginMSE in rounds of harder
    negatives.

    Args:
        documents: (N, S) token ids of D_0's passages.
        sampler: draws pseudo-queries for warm-up and rounds; None where none are to be used.
        config: the fields of train.Config whose names begin with `dense_`, and a few more.
    """
    device, rng = next(model.parameters()).device, random.Random(f"{config.seed} dense")
    generator = torch.Generator().manual_seed(config.seed)
    windows, bm25 = Windows(documents), BM25(corpus.passages())

    def embed_windows(rows: Tensor) -> Tensor:
        return model.embed(windows.draw(rows, config.dense_length, generator).to(device))

    def embed_queries(queries: list[str]) -> Tensor:
        return model.embed(tokenize(tokenizer, queries, config.query_length).to(device))

    def contrastive(q: Tensor, passages: Tensor, rows: Tensor) -> Tensor:
        return in_batch_contrastive(q, passages, rows.to(device), config.dense_scale)

    def warmup_loss():
        batch = rng.choices(corpus.train, k=config.dense_batch // 2) if corpus.train else []
        batch += [
            (r, sampler.draw(r, rng)) for r in rng.choices(corpus.rows, k=config.dense_batch - len(batch))
        ]
        rows = torch.tensor([row for row, _ in batch])
        loss = contrastive(embed_queries([query for _, query in batch]), embed_windows(rows), rows)
        return loss, {"contrastive": loss}, len(batch)

    def round_loss(examples: Examples, order: Iterator[Tensor]):
        i = next(order)
        pick = torch.randint(examples.negatives.shape[1], (len(i),), generator=generator)
        positive, negative = examples.positives[i], examples.negatives[i, pick]
        q = embed_queries([examples.queries[j] for j in i.tolist()])
        rows = torch.cat([positive, negative])
        passages = embed_windows(rows)  # (2B, D)
        teacher = (examples.positive_scores[i] - examples.negative_scores[i, pick]).to(device)
        margin = margin_mse(config.dense_scale * q, passages[: len(i)], passages[len(i) :], teacher)
        terms = {"margin": config.dense_margin * margin}
        if config.dense_contrastive:
            terms["contrastive"] = config.dense_contrastive * contrastive(q, passages, rows)
        return sum(terms.values()), terms, len(i)

    def fit_phase(name: str, steps: int, next_loss) -> None:
        model.train()
        named = [(n, p) for n, p in model.named_parameters() if n != "rq"]
        fit(name, parameter_groups(named, config.dense_lr, 0.0), steps, 0.04, config.clip, next_loss, log)

    if config.dense_warmup_steps:
        if sampler is None:
            raise ValueError(
                "the contrastive warm-up draws pseudo-queries and has none; pass --dense_warmup_steps 0"
            )
        fit_phase("dense warm-up", config.dense_warmup_steps, warmup_loss)
    for number in range(1, config.dense_rounds + 1):
        queries = list(corpus.train)
        if sampler and config.dense_pseudo:
            queries += [
                (row, sampler.draw(row, rng)) for row in corpus.rows for _ in range(config.dense_pseudo)
            ]
        if not queries:
            raise ValueError(
                "D_0 has no annotated query and --dense_pseudo is 0: the bi-encoder has nothing to learn from"
            )
        k = min(config.negatives, len(documents) - 1)
        if config.teacher:
            examples = read_teacher(Path(config.teacher), corpus)
        elif number == 1:
            examples = negatives_from_bm25(bm25, queries, k)
        else:
            embedded = embed(
                model, tokenize(tokenizer, [query for _, query in queries], config.query_length), 1024
            )
            examples = negatives_from_model(bm25, queries, embedded, embed(model, documents), k)
        order = batches(len(examples.queries), config.dense_batch, generator)
        fit_phase(f"dense round {number}", config.dense_steps, lambda e=examples, o=order: round_loss(e, o))
    model.eval()
