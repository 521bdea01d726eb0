"""Metrics of rankings, and of a stream of corpora.

Paper    section 4.1: Recall@10, MRR@10, and average performance, forgetting and learning over corpora
In       rankings of D_0..D_t's test queries by the model after D_t
Out      P[t, i], AP with its interval, BWT, FWT; results.json and its table; run and qrels files for trec_eval
Next     train.py writes and prints them; `python eval.py RUN` evaluates a run again
Differs  AP divides by the number of corpora and BWT counts D_0, as the paper's tables do and its formulas do
         not
"""

import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import faiss
import numpy as np
import sentencepiece
import torch
from torch import Tensor

import command
import distributed
from arrays import Chain, strict_json
from data import Corpus
from rq import Trie
from search import Ranking, retrieve
from store import LoadedRun, live_rows
from t5 import T5

METRICS = ("recall@1", "recall@10", "mrr@10", "ndcg@10")


def score_ranking(ranking: list[str], relevant: dict[str, int]) -> dict[str, float]:
    """METRICS of one ranking of document ids against {document id: relevance > 0}, as fractions.

    Gain of nDCG is the relevance itself, discount log2(place + 1), as trec_eval has them.
    """
    gains = [relevant.get(doc_id, 0) for doc_id in ranking[:10]]
    place = next((place for place, gain in enumerate(gains, 1) if gain > 0), None)
    ideal = sorted(relevant.values(), reverse=True)[:10]
    return {
        "recall@1": sum(gain > 0 for gain in gains[:1]) / len(relevant),
        "recall@10": sum(gain > 0 for gain in gains) / len(relevant),
        "mrr@10": 1 / place if place else 0.0,
        "ndcg@10": _dcg(gains) / _dcg(ideal),
    }


def _dcg(gains: list[int]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))


@dataclass
class Evaluation:
    """Rankings of the test queries of D_0..D_t after stage t, and every metric of every query."""

    rankings: list[dict[str, list[tuple[str, float]]]]  # per corpus: query id -> [(document id, score)]
    values: list[dict[str, list[float]]]  # per corpus: metric -> one value per query

    def means(self, metric: str) -> list[float]:
        """Row t of P: the metric's mean over each corpus's queries; NaN where it has none."""
        return [float(np.mean(values[metric])) if values[metric] else math.nan for values in self.values]


def evaluate(corpora: list[Corpus], ranker) -> Evaluation:
    """Scores a ranker on every corpus: `ranker(texts) -> list[Ranking]` answers query texts with document rows."""
    doc_id = lru_cache(100_000)(Chain([corpus.ids for corpus in corpora]).__getitem__)
    rankings, values = [], []
    for corpus in corpora:
        answers: list[Ranking] = ranker(list(corpus.test.values())) if corpus.test else []
        named = {q: [(doc_id(row), s) for row, s in ranking] for q, ranking in zip(corpus.test, answers)}
        scored = [score_ranking([doc for doc, _ in named[q]], corpus.qrels[q]) for q in corpus.test]
        rankings.append(named)
        values.append({metric: [one[metric] for one in scored] for metric in METRICS})
    return Evaluation(rankings, values)


def evaluate_after(run, t: int, model: T5, docids: Tensor) -> Evaluation:
    """Searches D_0..D_t with every test query seen so far: run of prepare.py, docids (N, M)."""
    corpora = run.corpora[: t + 1]
    live = live_rows(run.folder, corpora)
    trie = Trie(docids[live], live)

    beam, length = run.config.beam, run.config.query_length
    ranker = partial(retrieve, model, trie, run.tokenizer, doc_ids=run.ids, beam=beam, max_length=length)
    begin = time.monotonic()
    evaluation = evaluate(corpora, ranker)
    rate = sum(len(corpus.test) for corpus in corpora) / (time.monotonic() - begin)
    for metric in ("recall@1", "recall@10", "mrr@10"):
        means = evaluation.means(metric)
        means = " ".join(f"D{i} {100 * means[i]:.1f}" for i in tested([evaluation]))
        run.log.line(f"after D{t}: {metric} {means}")
    run.log.line(f"after D{t}: searched at {rate:.0f} queries/s")
    return evaluation


# -------------------------------------------------------------------------------------- over the whole stream


def average_performance(p: list[list[float]]) -> float:
    """AP_T = 1/(T+1) sum_i P[T, i] over the last row of P."""
    return sum(p[-1]) / len(p[-1])


def forgetting(p: list[list[float]]) -> float | None:
    """BWT_T = 1/T sum_{i<T} max_{i <= i' < T} (P[i', i] - P[T, i]); positive means forgotten, lower is better. None
    where there is no later corpus.
    """
    last = len(p) - 1
    if last == 0:
        return None
    return sum(max(p[row][i] for row in range(i, last)) - p[last][i] for i in range(last)) / last


def learning(p: list[list[float]]) -> float | None:
    """FWT_T = 1/T sum_{1<=i<=T} P[i, i]: how well each later corpus is known right after training on it; None where
    there is no later corpus.
    """
    return sum(p[i][i] for i in range(1, len(p))) / (len(p) - 1) if len(p) > 1 else None


def bootstrap_interval(values: list[list[float]], seed: int, draws: int = 1000) -> list[float]:
    """95 % interval of AP: queries are drawn anew, with replacement, within each corpus."""
    rng = np.random.default_rng(seed)
    means = [np.array(v)[rng.integers(len(v), size=(draws, len(v)))].mean(1) for v in values if v]
    return np.quantile(np.mean(means, axis=0), [0.025, 0.975]).tolist()


def summarise(evaluations: list[Evaluation], seed: int) -> dict[str, dict]:
    """{metric: {"P", "AP", "BWT", "FWT", "AP_micro", "AP_ci95"}} of the evaluations after D_0..D_T, or after those of them
    that have test queries (`tested`). P has a row and a column for each of these. Where the last evaluation is after
    another corpus, it is P's last row; then, or where one is missing, as of a checkpoint that was dropped, there is no BWT
    and FWT.
    """
    columns, summary = tested(evaluations), {}
    rows = [e for e in evaluations if len(e.values) - 1 in columns or e is evaluations[-1]]
    whole = [len(e.values) - 1 for e in rows] == columns
    for metric in METRICS if columns else ():
        means = [evaluation.means(metric) for evaluation in rows]
        p = [[row[i] for i in columns if i < len(row)] for row in means]
        last = [values[metric] for values in evaluations[-1].values]
        summary[metric] = {
            "P": p,
            "AP": average_performance(p),
            "BWT": forgetting(p) if whole else None,
            "FWT": learning(p) if whole else None,
            "AP_micro": float(np.mean(sum(last, []))),
            "AP_ci95": bootstrap_interval(last, seed),
        }
    return summary


def tested(evaluations: list[Evaluation]) -> list[int]:
    """Numbers t of the corpora of which test queries were scored last."""
    last = evaluations[-1].values if evaluations else []
    return [t for t, values in enumerate(last) if values["recall@10"]]


# ------------------------------------------------------------------------------------------------- TREC files


def trec_lines(rankings: dict[str, list[tuple[str, float]]], tag: str) -> list[str]:
    """Lines of a TREC run. trec_eval sorts by score alone, so equal scores are told apart by the least float32 step."""
    lines = []
    for query_id, ranking in rankings.items():
        previous = np.float32(np.inf)
        for place, (doc_id, score) in enumerate(ranking, 1):
            previous = min(np.float32(score), np.nextafter(previous, np.float32(-np.inf)))
            lines.append(f"{query_id} Q0 {doc_id} {place} {previous:.9g} {tag}")
    return lines


def write_trec(folder: Path, t: int, corpora: list[Corpus], evaluation: Evaluation, tag: str) -> None:
    """after_D{t}.run, and per corpus i its D{i}.qrels, in the formats that trec_eval reads. The id of a query of D_i that an
    earlier corpus has too is written as D{i}.ID.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, used = [], set()
    for i, (corpus, rankings) in enumerate(zip(corpora, evaluation.rankings)):
        names = {}
        for q in corpus.qrels:
            names[q] = q
            while names[q] in used:
                names[q] = f"D{i}.{names[q]}"
            used.add(names[q])
        lines += trec_lines({names[q]: ranking for q, ranking in rankings.items()}, tag)
        pairs = [
            f"{names[q]} 0 {doc_id} {rel}"
            for q, relevant in corpus.qrels.items()
            for doc_id, rel in relevant.items()
        ]
        (folder / f"D{i}.qrels").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    (folder / f"after_D{t}.run").write_text("\n".join(lines) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------- the table


def table(title: str, rows: dict[str, dict], corpora: list[int]) -> str:
    """The last row of P for each system, of these corpora, with AP, BWT and FWT, in percent: `Recall@10/MRR@10` in each cell."""
    heads = [f"D{t}" for t in corpora] + ["AP", "BWT", "FWT"]
    width = max(map(len, rows)) + 2
    lines = [title, " " * width + "".join(f"{head:>12}" for head in heads)]
    for name, summary in rows.items():
        shown = summary["recall@10"], summary["mrr@10"]
        cells = [[*of["P"][-1], of["AP"], of["BWT"], of["FWT"]] for of in shown]
        text = ["/".join("-" if v is None else f"{100 * v:.1f}" for v in cell) for cell in zip(*cells)]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in text))
    return "\n".join(lines)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (ru_maxrss counts KiB on Linux, bytes on macOS)."""
    import resource  # POSIX has it, as command.py says

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def results(config, done: dict[str, dict], evaluations: list, references: dict, peak: int) -> dict:
    """The contents of results.json: `done` is what the stages recorded, `peak` bytes of memory."""
    corpora = sorted((stage for stage in done if stage[1:].isdigit()), key=lambda stage: int(stage[1:]))
    later = corpora[1:]
    return {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "evaluated": tested(evaluations),
        "metrics": summarise(evaluations, config.seed),
        "baselines": references,
        "experts": {stage: done[stage]["experts"] for stage in corpora},
        "ood_percent": {s: [d["ood_percent"] for d in done[s]["decisions"]] for s in later},
        "routing": {s: done[s].get("routing", []) for s in later},
        "first_choice": {s: done[s].get("first_choice", []) for s in later},
        "trainable_parameters": {s: done[s]["trainable_parameters"] for s in later},
        "seconds": {stage: record["seconds"] for stage, record in done.items()},
        "peak_memory_bytes": peak,
        "docids": done["rq"]["docids"],
        "config": asdict(config),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "faiss": faiss.__version__, "sentencepiece": sentencepiece.__version__,
            "threads": torch.get_num_threads(), "processes": distributed.world_size(),
        },
    }  # fmt: skip


def report(results: dict) -> list[str]:
    """Lines for people: the results table and what grew where."""
    systems = {results["method"]: results["metrics"]} | results["baselines"]
    lines = ["no test queries: nothing is evaluated"]
    if results["evaluated"]:
        about = "Recall@10/MRR@10 in percent after the last corpus with test queries"
        lines = [table(about, systems, results["evaluated"])]
        low, high = results["metrics"]["recall@10"]["AP_ci95"]
    for stage, experts in results["experts"].items():
        shares = ", ".join(f"{percent:.1f}%" for percent in results["ood_percent"].get(stage, []))
        lines.append(f"{stage}: experts per layer {experts}" + (f", OOD queries {shares}" if shares else ""))
    if results["evaluated"]:
        lines.append(f"AP in Recall@10: 95% interval {100 * low:.1f} to {100 * high:.1f} over queries")
    minutes, gib = sum(results["seconds"].values()) / 60, results["peak_memory_bytes"] / 2**30
    return [*lines, f"{minutes:.1f} minutes, peak memory {gib:.2f} GiB"]


def main(argv: list[str]) -> None:
    parser = command.Parser(description="Evaluate the checkpoints of a run again.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--trec", type=Path, help="folder for run and qrels files that trec_eval reads")
    parser.add_argument("--beam", type=int, help="beams kept at each docid position (default: the run's)")
    parser.add_argument("--device", default=command.default_device(), help="default: cuda where present")
    args = parser.parse_args(argv)
    run = LoadedRun(args.run, command.check_device(args.device))
    beam = run.config["beam"] if args.beam is None else args.beam
    if beam < 1:
        raise ValueError(f"--beam {beam}: wanted a positive number")
    if not any(corpus.test for corpus in run.corpora[: run.finished[-1] + 1]):
        raise ValueError(
            f"{args.run}: no corpus of this run has test queries, so there is nothing to evaluate"
        )
    evaluations, length = [], run.config["query_length"]
    for t in run.finished:
        model, trie = run.at(t)
        ranker = partial(retrieve, model, trie, run.tokenizer, doc_ids=run.ids, beam=beam, max_length=length)
        evaluations.append(evaluate(run.corpora[: t + 1], ranker))
        means = evaluations[-1].means("recall@10")
        shown = " ".join(f"{100 * means[i]:.1f}" for i in tested(evaluations))
        print(f"D{t}: recall@10 {shown}", flush=True)
        if args.trec:
            write_trec(args.trec, t, run.corpora, evaluations[-1], run.config["method"])
    summary = summarise(evaluations, run.config["seed"])
    about = "Recall@10/MRR@10, percent, after the last finished corpus"
    print(table(about, {run.config["method"]: summary}, tested(evaluations)))
    print(strict_json({metric: summary[metric]["AP_ci95"] for metric in METRICS}))


if __name__ == "__main__":
    command.run(main, "eval.py")
