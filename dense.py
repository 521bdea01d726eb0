"""The bi-encoder whose document embeddings become docids.

Paper    appendix C, Eq. 8; MarginMSE (Hofstaetter et al., 2020) with two rounds of negatives, as in RIPOR
In       D_0's documents and queries, a T5
Out      document embeddings (N, D), un-normalised; similarity is the inner product
Next     rq.py quantises the embeddings of D_0 and, with the same codebooks, those of every later corpus
Differs  where T5 starts from nothing, an in-batch contrastive warm-up comes first and stays as a second loss
         term, and the examples include pseudo-queries; BM25 teaches unless --teacher names a cross-encoder's scores
"""

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from arrays import Tokens, read_tensors, write_tensors, writing
from bm25 import BM25
from data import EOS, Corpus, read_lines, tokenize
from optim import Stage, fit, parameter_groups
from t5 import T5

WARMUP = 0.04  # share of a round's steps in which the learning rate rises (paper)
CHUNK = 65_536  # documents that are embedded or ranked together
LARGEST = float(np.finfo(np.float32).max)  # score of a teacher


@dataclass
class Examples:
    """Queries of D_0, each with its document, its hard negatives and the teacher's scores of them."""

    queries: list[str]
    positives: Tensor  # (n,) rows
    negatives: Tensor  # (n, k) rows
    positive_scores: Tensor  # (n,) teacher scores
    negative_scores: Tensor  # (n, k)


@torch.no_grad()
def embed(model: T5, texts: Tensor | Tokens, batch: int = 64, out: Tensor | None = None) -> Tensor:
    """Token ids, padded (N, S) or a store, -> embeddings (N, D) float32 on the CPU, in batches of like length.

    `out` (N, D) receives them where they are to lie on disk.
    """
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
    first = 0
    for chunk in chunks:
        chunk = chunk.to(device)
        parts = [_best(q.to(device) @ chunk.T, k) for q in queries.split(1024)]
        scores, rows = (torch.cat(values) for values in zip(*parts))
        scores, rows = torch.cat([best[0], scores], 1), torch.cat([best[1], rows + first], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)  # earlier rows stand first already
        best = scores[:, :k], rows.gather(1, order)[:, :k]
        first += len(chunk)
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


def negatives_from_bm25(bm25: BM25, queries: list[tuple[int, str]], k: int) -> Examples:
    """The first round: the k best wrong documents by BM25, scored by BM25 as the teacher."""
    chosen = torch.empty(len(queries), k, dtype=torch.long)
    positives = _positives(queries)
    for i, (_, query) in enumerate(queries):
        scores = bm25.scores(query)
        scores[list(positives[query])] = -1.0
        chosen[i] = torch.from_numpy(np.argpartition(-scores, k)[:k].copy())
    return _teach(bm25, queries, chosen)


def negatives_from_model(
    bm25: BM25, queries: list[tuple[int, str]], embedded: Tensor, documents: Tensor, k: int, device="cpu"
) -> Examples:
    """The second round: the k best wrong documents by the first round's own index, scored by BM25."""
    positives = _positives(queries)
    retrieved = nearest(embedded, documents, k + max(map(len, positives.values())), device)[1]
    wrong = [
        [row for row in rows if row not in positives[query]]
        for rows, (_, query) in zip(retrieved.tolist(), queries)
    ]
    return _teach(bm25, queries, torch.from_numpy(np.stack([np.resize(rows, k) for rows in wrong])))


def _positives(queries: list[tuple[int, str]]) -> dict[str, set[int]]:
    """All documents that a query text belongs to: none of them is a negative of it."""
    rows: dict[str, set[int]] = {}
    for row, query in queries:
        rows.setdefault(query, set()).add(row)
    return rows


def _teach(bm25: BM25, queries: list[tuple[int, str]], negatives: Tensor) -> Examples:
    positives = torch.tensor([row for row, _ in queries])
    scored = [
        torch.from_numpy(bm25.scores(query)[[row, *rows]])
        for (row, query), rows in zip(queries, negatives.tolist())
    ]
    scores = torch.stack(scored).float()
    return Examples([query for _, query in queries], positives, negatives, scores[:, 0], scores[:, 1:])


def read_teacher(path: Path, corpus: Corpus, most: int = 200) -> Examples:
    """Teacher scores from JSON lines {"qid", "docids": [positive, negatives..], "scores": [..]} for D_0's
    queries.

    Negatives outside D_0 are dropped and at most `most` kept, as the paper does; a line with fewer than the
    longest repeats its own. Raises ValueError with the line's number where a line is malformed, or a query or its
    positive is unknown.
    """
    text_of = dict(zip(corpus.train_ids, (query for _, query in corpus.train)))
    row_of, queries, rows, scores = {doc_id: row for row, doc_id in enumerate(corpus.ids)}, [], [], []
    for place, line in read_lines(path):
        try:
            item = json.loads(line)
            json.dumps(item, ensure_ascii=False).encode()  # half surrogates
            pairs = list(zip(item["docids"], map(float, item["scores"]), strict=True))
            known, first = item["qid"] in text_of, pairs[0][0]
            if not (isinstance(item["docids"], list) and isinstance(item["scores"], list)):
                raise ValueError("both must be lists")
            if not all(isinstance(doc_id, str) and abs(score) <= LARGEST for doc_id, score in pairs):
                raise ValueError("document ids must be strings and scores finite float32 numbers")
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(f"{place}: wanted qid, docids and as many scores ({error})") from None
        if not known or row_of.get(first) is None:
            raise ValueError(
                f"{place}: query {item['qid']!r} or its positive {first!r} is not in D_0's training set"
            )
        found = [(row, score) for doc_id, score in pairs if (row := row_of.get(doc_id)) is not None][: most + 1]
        if len(found) > 1:
            queries.append(text_of[item["qid"]])
            rows.append(np.array([row for row, _ in found]) + corpus.first_row)
            scores.append(np.array([score for _, score in found], np.float32))
    if not queries:
        raise ValueError(f"{path}: found no query with a negative in D_0")
    k = max(map(len, rows)) - 1
    negatives = torch.from_numpy(np.stack([np.resize(row[1:], k) for row in rows]))
    negative_scores = torch.from_numpy(np.stack([np.resize(score[1:], k) for score in scores]))
    positives = torch.tensor([int(row[0]) for row in rows])
    return Examples(
        queries, positives, negatives, torch.tensor([s[0].item() for s in scores]), negative_scores
    )


def teacher_of_round(teachers: str, number: int) -> str:
    """One file serves every round, of `a,b` each serves its own; where there is none, as in `a,`, BM25 teaches."""
    files = teachers.split(",")
    return files[min(number, len(files)) - 1]


def write_teacher(path: Path, corpus: Corpus, examples: Examples) -> None:
    """The annotated queries of a round in --teacher's format: what a cross-encoder is to score in BM25's place."""
    qid_of = {query: query_id for query_id, (_, query) in zip(corpus.train_ids, corpus.train)}
    with writing(path) as file:
        for i, query in enumerate(examples.queries):
            if query in qid_of:
                rows = [int(examples.positives[i]), *examples.negatives[i].tolist()]
                scores = [float(examples.positive_scores[i]), *examples.negative_scores[i].tolist()]
                docids = [corpus.ids[row - corpus.first_row] for row in rows]
                line = {
                    "qid": qid_of[query],
                    "docids": docids,
                    "scores": [round(score, 4) for score in scores],
                }
                file.write((json.dumps(line) + "\n").encode())


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

    def __init__(self, documents: Tokens, length: int):
        self.documents, self.length = documents, length

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """First token (B,) of a window of each row: half start at the title, half anywhere."""
        room = (self.documents.lengths[rows] - self.length).clamp(min=0)
        first = (torch.rand(len(rows), generator=generator) * (room + 1)).long()
        first[torch.rand(len(rows), generator=generator) < 0.5] = 0
        return first

    def cut(self, rows: Tensor, first: Tensor) -> Tensor:
        """The windows' token ids (B, length), closed by </s>."""
        window = self.documents.window(rows, first, self.length)
        last = torch.minimum(self.documents.lengths[rows], torch.tensor(self.length)) - 1
        window[torch.arange(len(rows)), last] = EOS
        return window


class Batches:
    """Batches of indices below n without end, each index once per epoch; the last batch of an epoch may be
    smaller.
    """

    def __init__(self, n: int, batch: int, generator: torch.Generator):
        self.n, self.batch, self.generator = n, batch, generator
        self.order, self.at = torch.empty(0, dtype=torch.long), 0  # this epoch's, and how much of it is used

    def __iter__(self):
        return self

    def __next__(self) -> Tensor:
        if self.at >= len(self.order):
            self.order, self.at = torch.randperm(self.n, generator=self.generator), 0
        self.at += self.batch
        return self.order[self.at - self.batch : self.at]

    def state(self) -> tuple:
        """Where it stands, for store.Resume."""
        return self.order, self.at, self.generator.get_state()

    def restore(self, state: tuple) -> None:
        self.order, self.at, generator = state
        self.generator.set_state(generator)


class Training:
    """What the warm-up and the rounds share: the run, its D_0, windows of documents and the draws of chance."""

    def __init__(self, run, model: T5, documents: Tokens):
        """run: of prepare.py; documents: token ids of D_0's passages."""
        self.run, self.config, self.model, self.documents = run, run.config, model, documents
        self.corpus, self.sampler = run.corpora[0], run.sampler(0)
        self.windows = Windows(documents, self.config.dense_length)
        self.rng = random.Random(f"{self.config.seed} dense")
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.device = next(model.parameters()).device

    def tokens(self, queries: list[str]) -> Tensor:
        return tokenize(self.run.tokenizer, queries, self.config.query_length)

    def embed_queries(self, queries: list[str]) -> Tensor:
        return self.model.embed(self.tokens(queries).to(self.device))

    def embed_windows(self, rows: Tensor, first: Tensor) -> Tensor:
        return self.model.embed(self.windows.cut(rows, first).to(self.device))

    def contrastive(self, q: Tensor, passages: Tensor, rows: Tensor) -> Tensor:
        return in_batch_contrastive(q, passages, rows.to(self.device), self.config.dense_scale)

    def drawn(self, rows: list[int]) -> list[tuple[int, str]]:
        """A pseudo-query of each of these documents."""
        return [(row, self.sampler.draw(row, self.rng)) for row in rows]

    def warmup_batch(self) -> list[tuple[int, str, int]]:
        """(row, query, first token of the document's window): half annotated queries, where there are some."""
        train, n = self.corpus.train, self.config.dense_batch
        batch = self.rng.choices(train, k=n // 2) if train else []
        batch += self.drawn(self.rng.choices(self.corpus.rows, k=n - len(batch)))
        first = self.windows.draw(torch.tensor([row for row, _ in batch]), self.generator)
        return [(*pair, at) for pair, at in zip(batch, first.tolist())]

    def warmup_loss(self, batch: list[tuple[int, str, int]]):
        rows, queries, first = zip(*batch)
        q = self.embed_queries(list(queries))
        loss = self.contrastive(
            q, self.embed_windows(torch.tensor(rows), torch.tensor(first)), torch.tensor(rows)
        )
        return loss, {"contrastive": loss}

    def round_batch(self, examples: Examples, order: Iterator[Tensor]) -> Tensor:
        """(B, 4): the query's index, which of its negatives, first tokens of the positive's and negative's window."""
        i = next(order)
        pick = torch.randint(examples.negatives.shape[1], (len(i),), generator=self.generator)
        rows = torch.cat([examples.positives[i], examples.negatives[i, pick]])
        return torch.stack([i, pick, *self.windows.draw(rows, self.generator).chunk(2)], dim=1)

    def round_loss(self, examples: Examples, batch: Tensor):
        config, (i, pick, *first) = self.config, batch.unbind(1)
        q = self.embed_queries([examples.queries[j] for j in i.tolist()])
        rows = torch.cat([examples.positives[i], examples.negatives[i, pick]])
        passages = self.embed_windows(rows, torch.cat(first))  # (2B, D)
        teacher = (examples.positive_scores[i] - examples.negative_scores[i, pick]).to(self.device)
        margin = margin_mse(config.dense_scale * q, passages[: len(i)], passages[len(i) :], teacher)
        terms = {"margin": config.dense_margin * margin}
        if config.dense_contrastive:
            terms["contrastive"] = config.dense_contrastive * self.contrastive(q, passages, rows)
        return sum(terms.values()), terms

    def examples(self, number: int, bm25: BM25 | None) -> Examples:
        """The queries of a round with their negatives: from the teacher's file, or from BM25, then self-mined."""
        config = self.config
        if path := teacher_of_round(config.teacher, number):
            return read_teacher(Path(path), self.corpus)
        queries = list(self.corpus.train)
        if config.dense_pseudo:
            queries += self.drawn([row for row in self.corpus.rows for _ in range(config.dense_pseudo)])
        if not queries:
            raise ValueError(
                "D_0 has no annotated query and --dense_pseudo is 0: the bi-encoder has nothing to learn from"
            )
        k = min(config.negatives, len(self.documents) - 1)
        if number == 1:
            return negatives_from_bm25(bm25, queries, k)
        embedded = embed(self.model, self.tokens([query for _, query in queries]), 1024)
        return negatives_from_model(
            bm25, queries, embedded, embed(self.model, self.documents), k, self.device
        )

    def fit(self, name: str, steps: int, next_batch, loss, **chance) -> None:
        self.model.train()
        named = [(n, p) for n, p in self.model.named_parameters() if n != "rq"]
        groups = parameter_groups(named, self.config.dense_lr, weight_decay=0.0)
        chance = {"rng": self.rng, "generator": self.generator} | chance
        stage = Stage(name, groups, steps, WARMUP, next_batch, loss, chance)
        fit(stage, self.config, self.run.log, self.run.resume)


def train(run, model: T5, documents: Tokens) -> None:
    """Trains the bi-encoder on D_0, in place: a contrastive warm-up, then MarginMSE in rounds of harder negatives.

    Args:
        run: the run of prepare.py, with its config, corpora, samplers, log and folder. Each round's examples are kept
            in the folder, for a run that is stopped within it, and with `save_negatives` for a cross-encoder.
        documents: token ids of D_0's passages.
    """
    config, training = run.config, Training(run, model, documents)
    numbers = range(0 if config.dense_warmup_steps else 1, config.dense_rounds + 1)
    names = {number: f"dense round {number}" if number else "dense warm-up" for number in numbers}
    stopped = next((number for number, name in names.items() if name == run.resume.stage), -1)
    taught = all(teacher_of_round(config.teacher, number) for number in numbers if number)
    bm25 = None if taught else BM25(run.corpora[0].passages())
    for number in range(max(numbers.start, stopped), numbers.stop):
        if number == 0:
            training.fit(names[0], config.dense_warmup_steps, training.warmup_batch, training.warmup_loss)
            continue
        path = run.folder / f"examples_{number}.pt"
        if number == stopped:
            examples = read_examples(path)
        else:
            examples = training.examples(number, bm25)
            if distributed.is_main_process():
                write_tensors(path, vars(examples))
        if config.save_negatives and distributed.is_main_process():
            write_teacher(run.folder / f"negatives_{number}.jsonl", run.corpora[0], examples)
        order = Batches(len(examples.queries), config.dense_batch, training.generator)
        training.fit(
            names[number], config.dense_steps, lambda e=examples, o=order: training.round_batch(e, o),
            lambda batch, e=examples: training.round_loss(e, batch), order=order,
        )  # fmt: skip
    model.eval()


def read_examples(path: Path) -> Examples:
    """A round's examples as the stopped run drew them."""
    if not path.is_file():
        raise ValueError(
            f"found no {path}, without which the stopped round cannot go on; remove latest.pt too"
        )
    return Examples(**read_tensors(path))
