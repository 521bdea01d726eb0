"""Metrics of rankings, and of a stream of corpora.

Paper    section 4.1: Recall@10, MRR@10, and average performance, forgetting and learning over corpora
In       rankings of D_0..D_t's test queries by the model after D_t
Out      P[t, i], AP, BWT, FWT with intervals; run and qrels files for trec_eval; `python eval.py RUN`
Next     train.py prints the table
Differs  AP divides by the number of corpora and BWT counts D_0, as the paper's tables do and its formulas do
         not
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arrays import Chain
from data import Corpus
from search import Ranking, retrieve

METRICS = ("recall@1", "recall@10", "mrr@10", "ndcg@10")


def score_ranking(ranking: list[str], relevant: dict[str, int]) -> dict[str, float]:
    """METRICS of one ranking of document ids against {document id: relevance > 0}, as fractions.

    Gain of nDCG is the relevance itself, discount log2(rank + 1), as trec_eval has them.
    """
    found = [relevant.get(doc_id, 0) for doc_id in ranking[:10]]
    first = next((rank for rank, gain in enumerate(found, 1) if gain > 0), None)
    ideal = sorted(relevant.values(), reverse=True)[:10]
    return {
        "recall@1": sum(gain > 0 for gain in found[:1]) / len(relevant),
        "recall@10": sum(gain > 0 for gain in found) / len(relevant),
        "mrr@10": 1 / first if first else 0.0,
        "ndcg@10": _dcg(found) / _dcg(ideal),
    }


def _dcg(gains: list[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


@dataclass
class Evaluation:
    """Rankings of the test queries of D_0..D_t after stage t, and every metric of every query."""

    rankings: list[dict[str, list[tuple[str, float]]]]  # per corpus: query id -> [(document id, score)]
    values: list[dict[str, list[float]]]  # per corpus: metric -> one value per query

    def means(self, metric: str) -> list[float]:
        """Row t of P: the metric's mean over each corpus's queries."""
        return [float(np.mean(values[metric])) if values[metric] else math.nan for values in self.values]


def evaluate(corpora: list[Corpus], rank) -> Evaluation:
    """Scores a ranker on every corpus. `rank(texts) -> list[Ranking]` answers a list of query texts with row
    numbers.
    """
    ids = Chain([corpus.ids for corpus in corpora])
    rankings, values = [], []
    for corpus in corpora:
        found: list[Ranking] = rank(list(corpus.test.values()))
        named = {q: [(ids[row], score) for row, score in ranking] for q, ranking in zip(corpus.test, found)}
        scored = [score_ranking([doc for doc, _ in named[q]], corpus.qrels[q]) for q in corpus.test]
        rankings.append(named)
        values.append({metric: [one[metric] for one in scored] for metric in METRICS})
    return Evaluation(rankings, values)


# -------------------------------------------------------------------------------------- over the whole stream


def average_performance(p: list[list[float]]) -> float:
    """AP_T = 1/(T+1) sum_i P[T, i] over the last row of P."""
    return sum(p[-1]) / len(p[-1])


def forgetting(p: list[list[float]]) -> float:
    """BWT_T = 1/T sum_{i<T} max_{i <= i' < T} (P[i', i] - P[T, i]); positive means forgotten, lower is
    better.
    """
    last = len(p) - 1
    if last == 0:
        return 0.0
    return sum(max(p[row][i] for row in range(i, last)) - p[last][i] for i in range(last)) / last


def learning(p: list[list[float]]) -> float:
    """FWT_T = 1/T sum_{1<=i<=T} P[i, i]: how well each later corpus is known right after training on it."""
    return sum(p[i][i] for i in range(1, len(p))) / (len(p) - 1) if len(p) > 1 else math.nan


def bootstrap_interval(values: list[list[float]], seed: int, draws: int = 1000) -> list[float]:
    """95 % interval of AP: queries are drawn anew, with replacement, within each corpus."""
    rng = np.random.default_rng(seed)
    means = [np.array(v)[rng.integers(len(v), size=(draws, len(v)))].mean(1) for v in values if v]
    return np.quantile(np.mean(means, axis=0), [0.025, 0.975]).tolist()


def summarise(evaluations: list[Evaluation], seed: int) -> dict[str, dict]:
    """{metric: {"P", "AP", "BWT", "FWT", "AP_micro", "AP_ci95"}} of the evaluations after D_0..D_T."""
    summary = {}
    for metric in METRICS:
        p = [evaluation.means(metric) for evaluation in evaluations]
        last = [values[metric] for values in evaluations[-1].values]
        summary[metric] = {
            "P": p,
            "AP": average_performance(p),
            "BWT": forgetting(p),
            "FWT": learning(p),
            "AP_micro": float(np.mean(sum(last, []))),
            "AP_ci95": bootstrap_interval(last, seed),
        }
    return summary


# ------------------------------------------------------------------------------------------------- TREC files


def trec_lines(rankings: dict[str, list[tuple[str, float]]], tag: str) -> list[str]:
    """Lines of a TREC run. trec_eval sorts by score alone, so equal scores are told apart by the least
    float32 step.
    """
    lines = []
    for query_id, ranking in rankings.items():
        previous = np.float32(np.inf)
        for place, (doc_id, score) in enumerate(ranking, 1):
            previous = min(np.float32(score), np.nextafter(previous, np.float32(-np.inf)))
            lines.append(f"{query_id} Q0 {doc_id} {place} {previous:.9g} {tag}")
    return lines


def write_trec(folder: Path, t: int, corpora: list[Corpus], evaluation: Evaluation, tag: str) -> None:
    """after_D{t}.run, and per corpus i its D{i}.qrels, in the formats that trec_eval reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for rankings in evaluation.rankings for line in trec_lines(rankings, tag)]
    (folder / f"after_D{t}.run").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for i, corpus in enumerate(corpora[: t + 1]):
        pairs = [
            f"{q} 0 {doc_id} {rel}"
            for q, relevant in corpus.qrels.items()
            for doc_id, rel in relevant.items()
        ]
        (folder / f"D{i}.qrels").write_text("\n".join(pairs) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------- the table


def table(title: str, rows: dict[str, dict], metrics: tuple[str, ...] = ("recall@10", "mrr@10")) -> str:
    """The last row of P for each system, with AP, BWT and FWT, in percent: `Recall@10/MRR@10` in each cell."""
    corpora = len(next(iter(rows.values()))[metrics[0]]["P"])
    heads = [f"D{i}" for i in range(corpora)] + ["AP", "BWT", "FWT"]
    width = max(map(len, rows)) + 2
    lines = [title, " " * width + "".join(f"{head:>12}" for head in heads)]
    for name, summary in rows.items():
        cells = [
            [*summary[m]["P"][-1], summary[m]["AP"], summary[m]["BWT"], summary[m]["FWT"]] for m in metrics
        ]
        text = ["/".join(f"{100 * value:.1f}" for value in cell) for cell in zip(*cells)]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in text))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    from store import LoadedRun

    parser = argparse.ArgumentParser(description="Evaluate the checkpoints of a run again.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--trec", type=Path, help="folder for run and qrels files that trec_eval reads")
    parser.add_argument("--beam", type=int, help="beams kept at each docid position (default: the run's)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    run = LoadedRun(args.run, args.device)
    beam = args.beam or run.config["beam"]
    evaluations = []
    for t in run.finished:
        model, trie = run.at(t)

        def rank(queries: list[str], model=model, trie=trie) -> list[Ranking]:
            length = run.config["query_length"]
            return retrieve(model, trie, run.tokenizer, queries, run.ids, 10, beam, max_length=length)

        evaluations.append(evaluate(run.corpora[: t + 1], rank))
        print(
            f"D{t}: recall@10 " + " ".join(f"{100 * p:.1f}" for p in evaluations[-1].means("recall@10")),
            flush=True,
        )
        if args.trec:
            write_trec(args.trec, t, run.corpora, evaluations[-1], run.config["method"])
    summary = summarise(evaluations, run.config["seed"])
    print(table("Recall@10/MRR@10, percent, after the last finished corpus", {run.config["method"]: summary}))
    print(json.dumps({metric: summary[metric]["AP_ci95"] for metric in METRICS}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
