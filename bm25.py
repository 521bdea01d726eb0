"""BM25: hard negatives and default teacher of the dense stage, and a baseline row of the results.

Paper    sections 4.1 and appendix C use BM25 (Pyserini, k1 = 0.9, b = 0.4) for both
In       passages of the documents indexed so far
Out      scores (N,) of a query; the ranking of its best documents
Next     dense.py trains on its negatives, prepare.py ranks with it beside the method, serve.py on its page
Differs  whole words in one case (and pairs of letters in scripts without spaces) in place of Pyserini's stemmer and stop list
"""

from collections.abc import Iterable

import numpy as np

from queries import count_terms, terms

K1, B = 0.9, 0.4


class BM25:
    """An inverted index: for each word the documents that hold it and its weight in them, in flat arrays."""

    def __init__(self, passages: Iterable[str]):
        self.weigh(*count_terms(passages))

    def weigh(self, n_documents: int, vocabulary: dict[str, int], rows, numbers, counts) -> None:
        """Makes it the index of the first so many of the documents that `queries.count_terms` counted: (n,) arrays."""
        self.n_documents, self.vocabulary = n_documents, vocabulary
        rows, numbers, counts = (x[: np.searchsorted(rows, n_documents)] for x in (rows, numbers, counts))
        lengths = np.bincount(rows, counts, self.n_documents)
        live = np.count_nonzero(lengths)  # of an erased document no word is left
        length_norm = K1 * (1 - B + B * lengths / max(lengths.sum() / max(live, 1), 1))
        order = np.argsort(numbers, kind="stable")  # postings of one word side by side, rows ascending
        self.rows = rows[order]
        self.starts = np.searchsorted(numbers[order], np.arange(len(self.vocabulary) + 1))
        n, tf = np.diff(self.starts), counts[order].astype(float)
        idf = np.log(1 + (live - n + 0.5) / (n + 0.5))
        self.weights = np.repeat(idf, n) * tf / (tf + length_norm[self.rows])

    def scores(self, query: str) -> np.ndarray:
        """BM25 of the query with every document, (N,) float64; repeated query words count repeatedly."""
        scores = np.zeros(self.n_documents)
        for word in terms(query):
            term = self.vocabulary.get(word)
            if term is not None:
                posting = slice(self.starts[term], self.starts[term + 1])
                scores[self.rows[posting]] += self.weights[posting]
        return scores

    def top(self, query: str, k: int) -> list[tuple[int, float]]:
        """The k best (row, score) by (score descending, row ascending), of documents that hold a query word."""
        scores = self.scores(query)
        least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        candidates = np.flatnonzero(scores >= max(least, np.nextafter(0, 1)))
        best = candidates[np.lexsort((candidates, -scores[candidates]))[:k]]
        return [(int(row), float(scores[row])) for row in best]
