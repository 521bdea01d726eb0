import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bm25 import BM25
from data import read_beir
from queries import count_terms, terms

XQUAD = Path(os.environ.get("MIXLORA_DATA") or Path(__file__).parents[1] / "../shared/data") / "xquad_en"


def formula(passages: list[str], query: str) -> list[float]:
    """sum_w ln(1 + (N - n + 0.5) / (n + 0.5)) * tf / (tf + k1 (1 - b + b dl / avgdl)), k1 0.9, b 0.4."""
    documents = [list(terms(passage)) for passage in passages]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in list(terms(query)):
            n = sum(word in other for other in documents)
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(document) / average))
        scores.append(score)
    return scores


PASSAGES = ["The cat sat on the mat", "the dog", "A cat, a Cat and a dog!", "Birds"]


@pytest.mark.parametrize(
    "query", ["cat", "the", "CAT dog", "the cat's mat", "a a a", "nothing here", "", "birds birds"]
)
def test_scores_equal_the_formula(query):
    np.testing.assert_allclose(BM25(PASSAGES).scores(query), formula(PASSAGES, query), rtol=1e-12, atol=1e-15)


def test_score_by_hand():
    """Lengths 1 and 3, mean 2; `cat` is in one: idf ln(1 + 1.5 / 1.5), tf 2, norm 0.9 (0.6 + 0.4 * 1.5)."""
    assert BM25(["dog", "cat cat dog"]).scores("cat").tolist() == pytest.approx(
        [0.0, math.log(2) * 2 / (2 + 1.08)]
    )


alphabet = st.sampled_from(["a", "b", "c", "D", "e"])
passages_of_words = st.lists(st.lists(alphabet, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=8)
queries_of_words = st.lists(st.sampled_from(["a", "B", "c", "d", "z"]), max_size=5).map(" ".join)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(passages_of_words, queries_of_words, st.integers(1, 10))
def test_scores_and_top_equal_brute_force_on_random_words(passages, query, k):
    index, wanted = BM25(passages), formula(passages, query)
    np.testing.assert_allclose(index.scores(query), wanted, rtol=1e-12, atol=1e-15)
    scores = index.scores(query)
    best = sorted(range(len(passages)), key=lambda row: (-scores[row], row))[:k]
    assert index.top(query, k) == [(row, scores[row]) for row in best if wanted[row] > 0]
    n = max(1, len(passages) // 2)
    _, *counted = count_terms(passages)
    index.weigh(n, *counted)
    assert index.scores(query).tolist() == BM25(passages[:n]).scores(query).tolist()
    index.weigh(len(passages), *counted)
    assert index.scores(query).tolist() == scores.tolist()


def test_unknown_words_change_nothing():
    index = BM25(PASSAGES)
    assert not index.scores("zebra quagga").any()
    assert (index.scores("cat zebra") == index.scores("cat")).all()


def test_repeated_query_word_counts_twice():
    index = BM25(PASSAGES)
    np.testing.assert_allclose(
        index.scores("cat Cat dog"), 2 * index.scores("cat") + index.scores("dog"), rtol=1e-12
    )


def test_top_sorts_by_score_then_row_and_leaves_zero_scores_out():
    index = BM25(["x", "dog cat", "cat dog", "y", "cat", "dog cat"])
    assert [row for row, _ in index.top("cat", 10)] == [4, 1, 2, 5]  # the shortest first, then equals by row
    assert [row for row, _ in index.top("cat", 3)] == [4, 1, 2]
    assert index.top("zebra", 10) == index.top("cat", 0) == []


def test_empty_passages_score_zero_and_change_no_other_score():
    """As those of erased documents do."""
    index = BM25(["", *PASSAGES, "!"])
    assert index.scores("the cat").tolist() == [0.0, *BM25(PASSAGES).scores("the cat"), 0.0]


def test_passages_may_come_one_by_one_and_may_be_none():
    assert (BM25(iter(PASSAGES)).scores("the cat") == BM25(PASSAGES).scores("the cat")).all()
    nothing = BM25([])
    assert nothing.scores("cat").shape == (0,) and nothing.top("cat", 3) == []


@pytest.mark.skipif(not XQUAD.is_dir(), reason=f"no folder {XQUAD}; set MIXLORA_DATA")
def test_scores_equal_the_formula_on_xquad_and_find_most_documents():
    collection = read_beir(XQUAD)
    documents = collection.documents
    passages = [f"{title}. {text}" for title, text in zip(documents.titles, documents.texts)]
    index = BM25(passages)
    for query in list(collection.test.values())[:2]:
        np.testing.assert_allclose(index.scores(query), formula(passages, query), rtol=1e-9)
    found = Counter(
        next(iter(collection.qrels[query_id])) in [documents.ids[row] for row, _ in index.top(query, 10)]
        for query_id, query in collection.test.items()
    )
    assert found[True] / 240 > 0.9
