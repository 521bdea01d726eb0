"""Metrics of rankings against pytrec_eval, and metrics of a stream against the paper's tables."""

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

import eval as scoring
from data import Corpus

MEASURES = {"recall.1,10", "ndcg_cut.10", "recip_rank"}
THEIRS = {"recall@1": "recall_1", "recall@10": "recall_10", "ndcg@10": "ndcg_cut_10", "mrr@10": "recip_rank"}


def golden_rows() -> list:
    """(data, system, metric, the printed row in percent) of tables 1 and 2."""
    folders = [Path(__file__).parents[1] / ".." / "shared" / "golden"]
    if "MIXLORA_DATA" in os.environ:
        folders.insert(0, Path(os.environ["MIXLORA_DATA"]) / ".." / "golden")
    found = [folder / "paper_tables.json" for folder in folders if (folder / "paper_tables.json").is_file()]
    if not found:
        reason = "no golden/paper_tables.json; set MIXLORA_DATA to the folder beside golden/"
        return [pytest.param("", "", "", {}, False, marks=pytest.mark.skip(reason=reason))]
    tables = json.loads(found[0].read_text())
    assert tables["ap_differs"] == []
    rows = []
    for name, systems in tables["rows"].items():
        for system, cells in systems.items():
            for k, metric in enumerate(("Recall@10", "MRR@10")):
                row = {column: cell[k] for column, cell in zip(tables["columns"], cells, strict=True)}
                differs = [name, system, metric] in tables["bwt_differs"]
                rows.append(pytest.param(name, system, metric, row, differs, id=f"{name}-{system}-{metric}"))
    return rows


def parsed(lines: list[str]) -> dict[str, dict[str, float]]:
    run = {}
    for line in lines:
        query, _, doc_id, _, score, _ = line.split()
        run.setdefault(query, {})[doc_id] = float(score)
    return run


def random_case(seed: int, longest: int, score) -> tuple[dict, dict]:
    """Rankings and graded labels of 20 queries; `score(rng)` draws a document's score."""
    rng = random.Random(seed)
    documents = [f"doc{i}" for i in range(40)]
    rankings, qrels = {}, {}
    for query in (f"q{i}" for i in range(20)):
        found = rng.sample(documents, rng.randint(1, longest))
        scores = sorted((score(rng) for _ in found), reverse=True)
        rankings[query] = list(zip(found, scores))
        qrels[query] = {doc_id: rng.randint(1, 3) for doc_id in rng.sample(documents, rng.randint(1, 15))}
    return rankings, qrels


# ------------------------------------------------------------------------------------------------ one ranking


def test_score_ranking_by_hand():
    found = scoring.score_ranking(["a", "b", "c", "d"], {"b": 1, "d": 3, "z": 2})
    dcg = 1 / math.log2(3) + 3 / math.log2(5)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    wanted = {"recall@1": 0, "recall@10": 2 / 3, "mrr@10": 1 / 2, "ndcg@10": dcg / ideal}
    assert found == pytest.approx(wanted)


def test_a_document_beyond_rank_10_counts_for_nothing():
    ranking = [f"d{i}" for i in range(1, 12)]
    assert set(scoring.score_ranking(ranking, {"d11": 1}).values()) == {0.0}
    tenth = scoring.score_ranking(ranking, {"d10": 1})
    assert tenth == pytest.approx(
        {"recall@1": 0, "recall@10": 1, "mrr@10": 0.1, "ndcg@10": 1 / math.log2(11)}
    )


def test_an_empty_ranking_scores_zero():
    assert set(scoring.score_ranking([], {"d": 1}).values()) == {0.0}


SCORES = {
    "distinct": lambda rng: rng.uniform(-30, 0),
    "few values": lambda rng: -float(rng.randint(0, 3)),
    "all equal": lambda rng: -1.5,
    "all zero": lambda rng: 0.0,
    "equal in float32": lambda rng: 1000 + rng.randint(0, 3) * 1e-9,
    "large": lambda rng: float(rng.choice([1e30, 3e38, -1e30])),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_pytrec_eval_with_ties_as_we_rank_them(kind, seed):
    rankings, qrels = random_case(seed, 10, SCORES[kind])
    reference = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(
        parsed(scoring.trec_lines(rankings, "ours"))
    )
    for query, ranking in rankings.items():
        found = scoring.score_ranking([doc_id for doc_id, _ in ranking], qrels[query])
        wanted = {metric: reference[query][theirs] for metric, theirs in THEIRS.items()}
        assert found == pytest.approx(wanted, abs=1e-9), query


def test_cutoffs_equal_pytrec_eval_on_long_rankings():
    rankings, qrels = random_case(3, 40, SCORES["few values"])
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, MEASURES)
    reference = evaluator.evaluate(parsed(scoring.trec_lines(rankings, "ours")))
    first_ten = {query: ranking[:10] for query, ranking in rankings.items()}
    cut = evaluator.evaluate(
        parsed(scoring.trec_lines(first_ten, "ours"))
    )  # recip_rank has no cutoff of its own
    assert max(map(len, rankings.values())) > 10
    for query, ranking in rankings.items():
        found = scoring.score_ranking([doc_id for doc_id, _ in ranking], qrels[query])
        wanted = {metric: reference[query][theirs] for metric, theirs in THEIRS.items()}
        assert found == pytest.approx(wanted | {"mrr@10": cut[query]["recip_rank"]}, abs=1e-9), query


@pytest.mark.parametrize("kind", SCORES)
def test_trec_scores_fall_strictly_in_float32_and_stay_close(kind):
    rankings, _ = random_case(0, 10, SCORES[kind])
    run = parsed(scoring.trec_lines(rankings, "ours"))
    for query, ranking in rankings.items():
        written = np.array([run[query][doc_id] for doc_id, _ in ranking], dtype=np.float32)
        assert (written[1:] < written[:-1]).all()
        np.testing.assert_allclose(
            written, np.float32([score for _, score in ranking]), rtol=1e-5, atol=1e-30
        )


# ---------------------------------------------------------------------------------------------------- corpora


def two_corpora() -> list[Corpus]:
    first = Corpus(
        0, ["a", "b", "c"], ["", "", ""], ["A", "B", "C"],
        test={"q0": "find a", "q1": "find b and c"}, qrels={"q0": {"a": 1}, "q1": {"b": 1, "c": 2}},
    )  # fmt: skip
    second = Corpus(3, ["d", "e"], ["", ""], ["D", "E"], test={"q2": "find e"}, qrels={"q2": {"e": 1}})
    return [first, second]


ANSWERS = {  # rows over the whole stream
    "find a": [(0, -1.0), (3, -2.0)],
    "find b and c": [(4, -0.5), (2, -1.0), (0, -1.0)],
    "find e": [(3, -1.0), (1, -1.0), (4, -3.0)],
}


def by_answers(queries: list[str]) -> list[list[tuple[int, float]]]:
    return [ANSWERS[query] for query in queries]


def test_evaluate_scores_every_corpus_by_hand():
    found = scoring.evaluate(two_corpora(), by_answers)
    assert found.rankings == [
        {"q0": [("a", -1.0), ("d", -2.0)], "q1": [("e", -0.5), ("c", -1.0), ("a", -1.0)]},
        {"q2": [("d", -1.0), ("b", -1.0), ("e", -3.0)]},
    ]
    assert found.values[0]["recall@1"] == [1.0, 0.0] and found.values[1]["recall@1"] == [0.0]
    assert found.means("recall@10") == pytest.approx([(1 + 1 / 2) / 2, 1.0])
    assert found.means("mrr@10") == pytest.approx([(1 + 1 / 2) / 2, 1 / 3])
    ndcg = (2 / math.log2(3)) / (2 + 1 / math.log2(3))
    assert found.means("ndcg@10") == pytest.approx([(1 + ndcg) / 2, 1 / math.log2(4)])


def test_trec_files_score_as_we_do(tmp_path):
    corpora = two_corpora()
    found = scoring.evaluate(corpora, by_answers)
    scoring.write_trec(tmp_path / "trec", 1, corpora, found, "ours")
    assert sorted(path.name for path in (tmp_path / "trec").iterdir()) == [
        "D0.qrels",
        "D1.qrels",
        "after_D1.run",
    ]
    with (tmp_path / "trec" / "after_D1.run").open() as file:
        run = pytrec_eval.parse_run(file)
    assert set(run) == {"q0", "q1", "q2"}
    for i, corpus in enumerate(corpora):
        with (tmp_path / "trec" / f"D{i}.qrels").open() as file:
            qrels = pytrec_eval.parse_qrel(file)
        assert qrels == corpus.qrels
        reference = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
        for metric, theirs in THEIRS.items():
            wanted = [reference[query][theirs] for query in corpus.test]
            assert found.values[i][metric] == pytest.approx(wanted)


def test_trec_files_keep_apart_what_corpora_call_alike(tmp_path):
    corpora = [
        Corpus(t, [doc], [""], ["text"], test=dict.fromkeys(ids, "text"), qrels={q: {doc: 1} for q in ids})
        for t, (doc, ids) in enumerate({"a": ["q", "D1.q"], "b": ["q"]}.items())
    ]
    found = scoring.evaluate(corpora, lambda queries: [[(1, -1.0), (0, -2.0)]] * len(queries))
    scoring.write_trec(tmp_path, 1, corpora, found, "ours")
    first = [line.split()[:3] for line in (tmp_path / "after_D1.run").read_text().splitlines()[::2]]
    assert first == [["q", "Q0", "b"], ["D1.q", "Q0", "b"], ["D1.D1.q", "Q0", "b"]]
    assert (tmp_path / "D0.qrels").read_text() == "q 0 a 1\nD1.q 0 a 1\n"
    assert (tmp_path / "D1.qrels").read_text() == "D1.D1.q 0 b 1\n"


def test_trec_files_hold_only_the_corpora_seen_so_far(tmp_path):
    corpora = two_corpora()
    found = scoring.evaluate(corpora[:1], lambda queries: [[(0, -1.0)], [(2, -2.0)]])
    scoring.write_trec(tmp_path, 0, corpora, found, "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["D0.qrels", "after_D0.run"]
    first = (tmp_path / "after_D0.run").read_text().splitlines()[0]
    assert first == "q0 Q0 a 1 -1 ours"


# ---------------------------------------------------------------------------------------------- over a stream

P = [[0.9], [0.7, 0.8], [0.75, 0.5, 0.6]]


def test_stream_metrics_by_hand():
    assert scoring.average_performance(P) == pytest.approx((0.75 + 0.5 + 0.6) / 3)
    assert scoring.forgetting(P) == pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2)
    assert scoring.learning(P) == pytest.approx((0.8 + 0.6) / 2)


def test_forgetting_counts_from_the_best_earlier_stage_and_may_be_negative():
    better_later = [[0.5], [0.9, 0.8], [0.6, 0.8, 0.1]]
    assert scoring.forgetting(better_later) == pytest.approx(((0.9 - 0.6) + 0.0) / 2)
    improved = [[0.5], [0.7, 0.1]]  # the last stage is not among the earlier ones
    assert scoring.forgetting(improved) == pytest.approx(-0.2)


def test_one_corpus_has_no_forgetting_and_nothing_learned_later():
    assert scoring.average_performance([[0.4]]) == pytest.approx(0.4)
    assert scoring.forgetting([[0.4]]) is None
    assert scoring.learning([[0.4]]) is None


@pytest.mark.parametrize("data, system, metric, row, differs", golden_rows())
def test_ap_bwt_and_fwt_reproduce_the_papers_tables(data, system, metric, row, differs):
    last = [row[f"D{i}"] for i in range(5)]
    # The tables give P[i, i] for i = 1..3 only as a sum, through FWT; any split of it will do. What lies
    # between the diagonal and the last row is not printed, and 0 leaves the diagonal the maximum.
    diagonal = [row["M0_on_D0"], *[(4 * row["FWT"] - last[4]) / 3] * 3]
    p = [[*[0.0] * i, diagonal[i]] for i in range(4)] + [last]
    assert scoring.average_performance(p) == pytest.approx(row["AP"], abs=0.11)
    assert scoring.learning(p) == pytest.approx(row["FWT"])
    off = abs(scoring.forgetting(p) - row["BWT"])
    assert off > 0.36 if differs else off <= 0.36


# -------------------------------------------------------------------------------------------------- intervals


def values(seed: int, sizes: tuple[int, ...], p: float = 0.5) -> list[list[float]]:
    rng = random.Random(seed)
    return [[float(rng.random() < p) for _ in range(size)] for size in sizes]


def test_interval_contains_ap_and_repeats_by_seed():
    found = values(0, (50, 30, 80), p=0.7)
    low, high = scoring.bootstrap_interval(found, seed=1)
    assert low < np.mean([np.mean(v) for v in found]) < high
    assert scoring.bootstrap_interval(found, seed=1) == [low, high]
    assert scoring.bootstrap_interval(found, seed=2) != [low, high]


def test_interval_has_the_width_of_the_normal_approximation():
    found = [[0.0, 1.0] * 200, [0.0, 0.0, 0.0, 1.0] * 50]
    deviation = math.sqrt(0.25 / 400 + 0.1875 / 200) / 2  # of the mean of the two means
    low, high = scoring.bootstrap_interval(found, seed=0, draws=5000)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.08)
    assert (low + high) / 2 == pytest.approx(0.375, abs=0.01)


def test_interval_of_constant_values_is_a_point_that_weights_corpora_equally():
    assert scoring.bootstrap_interval([[1.0] * 10, [0.0] * 1000], seed=0) == [0.5, 0.5]


# ------------------------------------------------------------------------------------------ summary and table


def evaluation(*corpora: list[float]) -> scoring.Evaluation:
    """Every metric of every query is the number given."""
    return scoring.Evaluation([], [{metric: list(v) for metric in scoring.METRICS} for v in corpora])


def test_summary_by_hand():
    stages = [evaluation([1, 1, 0, 1]), evaluation([1, 0, 0, 1], [1.0])]
    summary = scoring.summarise(stages, seed=0)
    assert set(summary) == set(scoring.METRICS)
    for one in summary.values():
        assert one["P"] == [[0.75], [0.5, 1.0]]
        assert (one["AP"], one["BWT"], one["FWT"]) == pytest.approx((0.75, 0.25, 1.0))
        assert one["AP_micro"] == pytest.approx(3 / 5)  # by queries, where AP is by corpora
        assert one["AP_ci95"][0] < 0.75 < one["AP_ci95"][1]
    json.dumps(summary, allow_nan=False)


def test_after_a_corpus_without_test_queries_the_last_row_is_that_of_the_last_model():
    """AP and its interval are of the same evaluation; forgetting between other models is not told."""
    stages = [evaluation([1.0]), evaluation([1.0], [1.0]), evaluation([0.0], [1.0], [])]
    summary = scoring.summarise(stages, seed=0)["recall@10"]
    assert summary["P"] == [[1.0], [1.0, 1.0], [0.0, 1.0]]
    assert (summary["AP"], summary["BWT"], summary["FWT"]) == (0.5, None, None)
    dropped = scoring.summarise([stages[0], stages[2]], seed=0)["recall@10"]  # the checkpoint between
    assert dropped["P"] == [[1.0], [0.0, 1.0]] and dropped["BWT"] is None
    assert len(scoring.table("", {"ours": scoring.summarise(stages, 0)}, [0, 1]).splitlines()[2].split()) == 6


def test_table_prints_percent_of_both_metrics_in_every_cell():
    def system(recall: float, mrr: float) -> dict:
        return {
            "recall@10": {"P": [[0.9], [recall, 0.25]], "AP": 0.5012, "BWT": -0.1, "FWT": 0.25},
            "mrr@10": {"P": [[0.8], [mrr, 0.125]], "AP": 0.3, "BWT": 0.2, "FWT": 0.125},
        }

    lines = scoring.table(
        "a title", {"ours": system(0.7516, 0.5), "a longer name": system(1.0, 0.0)}, [0, 1]
    ).splitlines()
    assert lines[0] == "a title"
    assert lines[1].split() == ["D0", "D1", "AP", "BWT", "FWT"]
    assert lines[2].split() == ["ours", "75.2/50.0", "25.0/12.5", "50.1/30.0", "-10.0/20.0", "25.0/12.5"]
    assert lines[3].startswith("a longer name") and lines[3].split()[3] == "100.0/0.0"
    assert len(lines) == 4 and len({len(line) for line in lines[1:]}) == 1
