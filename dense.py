"""The bi-encoder whose document embeddings become docids.

Paper    appendix C, Eq. 8; MarginMSE (Hofstaetter et al., 2020) with two rounds of negatives, as in RIPOR
In       D_0's documents and queries, a T5
Out      document embeddings (N, D), un-normalised; similarity is the inner product
Next     rq.py quantises the embeddings of D_0 and, with the same codebooks, those of every later corpus
Differs  half of the windows of documents that it trains on start anywhere in them; in the small presets an
         in-batch contrastive warm-up comes first and stays as a second loss term, and the examples include
         pseudo-queries, of general text too where there is some; BM25 teaches unless --teacher names a cross-encoder's scores
"""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from arrays import Tokens, read_tensors, write_tensors, writing
from bm25 import BM25
from data import EOS, Corpus, tokenize
from optim import Stage, fit, parameter_groups
from reading import Problems, read_lines
from t5 import T5

WARMUP = 0.04  # share of a round's steps in which the learning rate rises (paper)
CHUNK = 65_536  # documents that are embedded or ranked together


@dataclass
class Examples:
    """Queries of D_0, each with its document, its hard negatives and the teacher's scores of them."""

    queries: list[str]
    documents: Tensor  # (n, 1 + k) rows, the positive first
    scores: Tensor  # (n, 1 + k)


@torch.no_grad()
def embed(model: T5, texts: Tensor | Tokens, batch: int = 64, out: Tensor | None = None) -> Tensor:
    """Token ids, padded (N, S) or a store, -> embeddings (N, D) float32 on the CPU; `out` (N, D) receives them."""
    device = next(model.parameters()).device
    model.eval()
    texts = texts if isinstance(texts, Tokens) else Tokens.of(texts)
    out = torch.empty(len(texts), model.config.width) if out is None else out
    for part in torch.arange(len(texts)).split(CHUNK):
        for rows in part[texts.lengths[part].argsort()].split(batch):
            out[rows] = model.embed(texts.batch(rows).to(device)).float().cpu()
    return out


def nearest(
    queries: Tensor, documents: Tensor | Iterable[Tensor], k: int, device="cpu"
) -> tuple[Tensor, Tensor]:
    """Exact inner-product search: (Q, D), (N, D) -> scores and rows (Q, k), score descending, then row ascending.

    The documents may come in chunks, so that neither they nor Q * N scores need fit into memory.
    """
    chunks = documents.split(CHUNK) if isinstance(documents, Tensor) else documents
    best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    n_seen = 0
    for chunk in chunks:
        chunk = chunk.to(device)
        parts = [_best(q.to(device) @ chunk.T, k) for q in queries.split(1024)]
        scores, rows = (torch.cat(values) for values in zip(*parts))
        scores, rows = torch.cat([best[0], scores], 1), torch.cat([best[1], rows + n_seen], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)  # earlier rows stand first already
        best = scores[:, :k], rows.gather(1, order)[:, :k]
        n_seen += len(chunk)
    return best


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (Q, N), ties by column: values and columns, on the CPU."""
    k = min(k, scores.shape[1])
    least = scores.topk(k, dim=1).values[:, -1:]
    query, column = (scores >= least).nonzero(as_tuple=True)  # few more than k of each, and columns ascending
    query, column, value = query.cpu(), column.cpu(), scores[query, column].cpu()
    order = torch.from_numpy(np.lexsort((column, -value, query)))
    starts = torch.searchsorted(query, torch.arange(len(scores)))
    chosen = order[starts[:, None] + torch.arange(k)]
    return value[chosen], column[chosen]


def recall(
    queries: Tensor, relevant: list[set[int]], documents: Tensor | Iterable[Tensor], k: int = 10, device="cpu"
) -> float:
    """Share of the queries' relevant rows among the k nearest documents, averaged over queries."""
    if not relevant:
        return math.nan
    retrieved = nearest(queries, documents, k, device)[1].tolist()
    return sum(len(rows & set(top)) / len(rows) for rows, top in zip(relevant, retrieved)) / len(relevant)


def hard_negatives(
    bm25: BM25, pairs: list[tuple[int, str]], k: int, index: tuple[Tensor, Tensor] | None = None, device="cpu"
) -> Examples:
    """The k best wrong documents of each (document row, query), repeated where there are fewer, scored by BM25 as the
    teacher. Raises ValueError where no query has any.

    BM25 ranks them or, where `index` holds the queries' and the documents' embeddings, their inner products do.
    """
    right: dict[str, set[int]] = {}  # all documents that a query text belongs to
    for row, query in pairs:
        right.setdefault(query, set()).add(row)
    if index:
        ranking = nearest(*index, k + max(map(len, right.values())), device)[1].tolist()
    queries, documents, scores = [], [], []
    for i, (row, query) in enumerate(pairs):
        by_bm25 = bm25.scores(query)
        if index:
            wrong = [j for j in ranking[i] if j not in right[query]]
        else:
            others = by_bm25.copy()
            others[list(right[query])] = -1.0
            wrong = np.argpartition(-others, k)[:k]
            wrong = wrong[others[wrong] >= 0]
        if len(wrong):  # not where the query belongs to all documents
            queries.append(query)
            documents.append([row, *np.resize(wrong, k)])
            scores.append(by_bm25[documents[-1]])
    if not queries:
        raise ValueError("every query of D_0 belongs to all of its documents; wanted documents that differ")
    scores = torch.from_numpy(np.array(scores, np.float32))
    return Examples(queries, torch.tensor(np.array(documents)), scores)


def read_teacher(path: Path, corpus: Corpus, skip_invalid: bool = False, most: int = 200) -> Examples:
    """Teacher scores from JSON lines {"qid", "docids": [positive, negatives..], "scores": [..]} for D_0's queries.

    Negatives outside D_0 are dropped and at most `most` kept, as the paper does; a shorter line repeats its own.
    Raises ValueError with the places of lines that are malformed or whose query or positive is unknown, or leaves them
    out.
    """
    text_of = dict(zip(corpus.train_ids, (query for _, query in corpus.train)))
    row_of, queries, documents, scores = {doc_id: row for row, doc_id in enumerate(corpus.ids)}, [], [], []
    problems = Problems(skip_invalid)
    for place, line in read_lines(path, problems):
        try:
            item = json.loads(line)
            docids, values = item["docids"], np.array(item["scores"], float)
            query, rows = text_of.get(item["qid"]), [row_of.get(doc_id) for doc_id in docids]
            paired = isinstance(docids, list) and values.shape == (len(docids),)
            if not (paired and (abs(values) <= np.finfo(np.float32).max).all()) or bool in map(
                type, item["scores"]
            ):
                raise ValueError("both must be lists, and the scores finite float32 numbers")
            known = query is not None and rows[0] is not None
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            problems.add(place, "wanted qid, docids and as many scores", error)
            continue
        if not known:
            problems.add(
                place, "query or its positive is not in D_0's training set", f"{item['qid']}, {docids[0]}"
            )
            continue
        kept = [i for i, row in enumerate(rows) if row is not None][: most + 1]
        if len(kept) > 1:
            queries.append(query)
            documents.append([rows[i] for i in kept])
            scores.append(values[kept])
    problems.check()
    if not queries:
        raise ValueError(f"{path}: found no query with a negative in D_0")
    k = max(map(len, documents)) - 1
    documents, scores = ([[row[0], *np.resize(row[1:], k)] for row in part] for part in (documents, scores))
    return Examples(queries, torch.tensor(np.array(documents)), torch.tensor(np.array(scores, np.float32)))


def teacher_of_round(teachers: str, number: int) -> str:
    """One file serves every round, of `a,b` each serves its own; where there is none, as in `a,`, BM25 teaches."""
    files = teachers.split(",")
    return files[min(number, len(files)) - 1]


def write_teacher(path: Path, corpus: Corpus, examples: Examples) -> None:
    """The annotated queries of a round in --teacher's format: what a cross-encoder is to score in BM25's place."""
    qid_of = {query: query_id for query_id, (_, query) in zip(corpus.train_ids, corpus.train)}
    with writing(path) as file:
        for query, rows, scores in zip(examples.queries, examples.documents, examples.scores):
            if query in qid_of:
                own = rows < len(corpus.ids)  # general text has no place in a teacher's file
                line = {"qid": qid_of[query], "docids": [corpus.ids[row] for row in rows[own].tolist()]}
                line["scores"] = [round(score, 4) for score in scores[own].tolist()]
                file.write((json.dumps(line) + "\n").encode())


def margin_mse(q: Tensor, positive: Tensor, negative: Tensor, teacher_margin: Tensor) -> Tensor:
    """mean_b [ (<q, p+> - <q, p->) - (s(q, p+) - s(q, p-)) ]^2: embeddings (B, D), the teacher's margins (B,)."""
    margin = (q * (positive - negative)).sum(1)
    return (margin - teacher_margin).pow(2).mean()


def in_batch_contrastive(q: Tensor, documents: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Cross-entropy of each query's own document against all documents of the batch.

    q (B, D); documents (B or 2B, D), the first B the positives; rows (B or 2B,) tell equal documents, which are no
    negatives of each other. `scale` multiplies the inner products.
    """
    logits = scale * (q @ documents.T)  # (B, B or 2B)
    target = torch.arange(len(q), device=q.device)
    same = (rows[: len(q), None] == rows[None, :]).to(q.device)
    same[target, target] = False
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), target)


def draw_windows(documents: Tokens, rows: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """First token (B,) of a window of `length` of each document: half start at the title, half anywhere."""
    room = (documents.lengths[rows] - length).clamp(min=0)
    start = (torch.rand(len(rows), generator=generator) * (room + 1)).long()
    start[torch.rand(len(rows), generator=generator) < 0.5] = 0
    return start


def cut_windows(documents: Tokens, rows: Tensor, start: Tensor, length: int) -> Tensor:
    """The windows' token ids (B, length), closed by </s>."""
    window = documents.window(rows, start, length)
    window[torch.arange(len(rows)), documents.lengths[rows].clamp(max=length) - 1] = EOS
    return window


class Batches:
    """Batches of indices below n without end, each index once an epoch, whose last batch may be smaller."""

    def __init__(self, n: int, batch: int, generator: torch.Generator):
        self.n, self.batch, self.generator = n, batch, generator
        self.order, self.at = torch.empty(0, dtype=torch.long), 0  # this epoch's, and how much of it is used

    def __next__(self) -> Tensor:
        if self.at >= len(self.order):
            self.order, self.at = torch.randperm(self.n, generator=self.generator), 0
        self.at += self.batch
        return self.order[self.at - self.batch : self.at]

    def get_state(self) -> tuple:  # for store.Resume
        return self.order, self.at, self.generator.get_state()

    def set_state(self, state: tuple) -> None:
        self.order, self.at, generator = state
        self.generator.set_state(generator)


class Training:
    """What the warm-up and the rounds share: the run, its D_0 and the draws of chance."""

    def __init__(self, run, model: T5, documents: Tokens):
        self.run, self.config, self.model, self.documents = run, run.config, model, documents
        self.corpus = run.corpora[0]
        self.rows = range(len(documents))  # of D_0's documents, then of general text
        self.rng = random.Random(f"{self.config.seed} dense")
        self.generator = torch.Generator().manual_seed(self.config.seed)

    @cached_property
    def bm25(self) -> BM25:
        return BM25(chain(*(corpus.passages() for corpus in self.run.read_first)))

    def embed(self, queries: list[str], rows: Tensor, start: Tensor) -> Tensor:
        """Embeddings (B, 1 + k, D): of each query and of the windows of its documents (B, k), which begin at `start`."""
        asked = tokenize(self.run.tokenizer, queries, self.config.query_length)
        windows = cut_windows(self.documents, rows.T.flatten(), start.T.flatten(), self.config.dense_length)
        q, passages = (self.model.embed(ids.to(self.run.device)) for ids in (asked, windows))
        return torch.stack([q, *passages.split(len(q))], dim=1)

    def pseudo(self, rows: list[int]) -> list[tuple[int, str]]:
        """A pseudo-query of each of these documents."""
        n, run = len(self.corpus.rows), self.run
        return [
            (row, run.draw(row, self.rng) if row < n else run.general_sampler.draw(row - n, self.rng))
            for row in rows
        ]

    def warmup_batch(self) -> list[tuple[int, str, int]]:
        """(row, query, first token of the document's window): half annotated queries, where there are some."""
        train, n, length = self.corpus.train, self.config.dense_batch, self.config.dense_length
        batch = self.rng.choices(train, k=n // 2) if train else []
        batch += self.pseudo(self.rng.choices(self.rows, k=n - len(batch)))
        start = draw_windows(self.documents, torch.tensor([row for row, _ in batch]), length, self.generator)
        return [(*pair, token) for pair, token in zip(batch, start.tolist())]

    def warmup_embed(self, batch: list[tuple[int, str, int]]) -> Tensor:
        rows, queries, start = zip(*batch)
        return self.embed(list(queries), torch.tensor(rows)[:, None], torch.tensor(start)[:, None])

    def warmup_loss(self, batch: list[tuple[int, str, int]], embedded: Tensor) -> tuple[Tensor, dict]:
        rows = torch.tensor([row for row, _, _ in batch])
        loss = in_batch_contrastive(*embedded.unbind(1), rows, self.config.dense_scale)
        return loss, {"contrastive": loss}

    def round_batch(self, examples: Examples, order: Batches) -> Tensor:
        """(B, 5): the query's index, columns of its positive (0) and negative, first tokens of their windows."""
        i = next(order)
        column = 1 + torch.randint(examples.documents.shape[1] - 1, (len(i),), generator=self.generator)
        rows = torch.cat([examples.documents[i, 0], examples.documents[i, column]])
        start = draw_windows(self.documents, rows, self.config.dense_length, self.generator)
        return torch.stack([i, torch.zeros_like(i), column, *start.chunk(2)], dim=1)

    def round_embed(self, examples: Examples, batch: Tensor) -> Tensor:
        i, columns, start = batch.split((1, 2, 2), dim=1)
        queries = [examples.queries[j] for j in i[:, 0].tolist()]
        return self.embed(queries, examples.documents[i, columns], start)

    def round_loss(self, examples: Examples, batch: Tensor, embedded: Tensor) -> tuple[Tensor, dict]:
        config, (q, *passages) = self.config, embedded.unbind(1)
        i, columns, _ = batch.split((1, 2, 2), dim=1)
        positive, negative = examples.scores[i, columns].to(self.run.device).unbind(1)
        margin = margin_mse(config.dense_scale * q, *passages, positive - negative)
        terms = {"margin": config.dense_margin * margin}
        if config.dense_contrastive:
            rows = examples.documents[i, columns].T.flatten()  # the positives first
            contrastive = in_batch_contrastive(q, torch.cat(passages), rows, config.dense_scale)
            terms["contrastive"] = config.dense_contrastive * contrastive
        return sum(terms.values()), terms

    def examples(self, number: int) -> Examples:
        """The queries of a round with their negatives: from the teacher's file, or from BM25, then self-mined."""
        config = self.config
        if path := teacher_of_round(config.teacher, number):
            return read_teacher(Path(path), self.corpus, config.skip_invalid)
        general = self.rows[len(self.corpus.rows) :]  # of each one is enough
        rows = [row for row in self.corpus.rows for _ in range(config.dense_pseudo)]
        pairs = [*self.corpus.train, *self.pseudo([*rows, *general])]
        if not pairs:
            raise ValueError("D_0 has no annotated query and --dense_pseudo is 0; pass --dense_pseudo 1")
        k = min(config.negatives, len(self.documents) - 1)
        index = None
        if number > 1:
            index = embed(self.model, self.run.tokens(pairs), 1024), embed(self.model, self.documents)
        return hard_negatives(self.bm25, pairs, k, index, self.run.device)

    def fit(self, name: str, steps: int, next_batch, embed, loss, in_batch=True, **chance) -> None:
        """in_batch: the loss compares the examples of a batch; otherwise it is a mean over them."""
        self.model.train()
        named = [(n, p) for n, p in self.model.named_parameters() if n != "rq"]
        groups = parameter_groups(named, self.config.dense_lr, weight_decay=0.0)
        chance |= {"rng": self.rng, "generator": self.generator}
        stage = Stage(name, groups, steps, WARMUP, next_batch, loss, chance, embed=embed)
        if not in_batch:  # no part of a batch need be embedded twice
            stage.loss, stage.embed = lambda part: loss(part, embed(part)), None
        fit(stage, self.config, self.run.log, self.run.resume)


def train(run, model: T5, documents: Tokens) -> None:
    """Trains the bi-encoder on D_0, in place: a contrastive warm-up, then MarginMSE in rounds of harder negatives.

    documents: token ids of the passages of D_0 and of general text. Each round's examples are kept in the folder of `run`
    (prepare.Run), for when it is stopped within the round, and with `save_negatives` for a cross-encoder.
    """
    config, training = run.config, Training(run, model, documents)
    stages = ["dense warm-up", *(f"dense round {number}" for number in range(1, config.dense_rounds + 1))]
    stopped = stages.index(run.resume.stage) if run.resume.stage in stages else 0
    if not stopped:
        warmup = training.warmup_batch, training.warmup_embed, training.warmup_loss
        training.fit(stages[0], config.dense_warmup_steps, *warmup)
    for number in range(max(1, stopped), len(stages)):
        path = run.folder / f"examples_{number}.pt"
        if number != stopped:
            examples = training.examples(number)
            if distributed.is_main_process():
                write_tensors(path, vars(examples))
                if config.save_negatives:
                    write_teacher(run.folder / f"negatives_{number}.jsonl", run.corpora[0], examples)
            distributed.wait()  # of several processes' examples, which rounding may tell apart, all take the main one's
        elif not path.is_file():
            to_do = "remove latest.pt and latest.previous.pt too, to train the bi-encoder anew"
            raise ValueError(f"found no {path}; {to_do}")
        examples = Examples(**read_tensors(path))
        order = Batches(len(examples.queries), config.dense_batch, training.generator)
        embedding, loss = (partial(of, examples) for of in (training.round_embed, training.round_loss))
        draw, in_batch = partial(training.round_batch, examples, order), config.dense_contrastive != 0
        training.fit(stages[number], config.dense_steps, draw, embedding, loss, in_batch, order=order)
    model.eval()
