"""BM25: hard negatives and default teacher of the dense stage, and a baseline row of the results.

Paper    sections 4.1 and appendix C use BM25 (Pyserini, k1 = 0.9, b = 0.4) for both
In       passages of the documents indexed so far
Out      scores (N,) of a query; the ranking of its best documents
Next     dense.py trains on its negatives; train.py prints it beside the method
Differs  whole lower-case words in place of Pyserini's stemmer and stop list
"""

import numpy as np

from data import words

K1, B = 0.9, 0.4


class BM25:
    """An inverted index: for each word the documents that hold it and its weight in them."""

    def __init__(self, passages: list[str]):
        self.n_documents = len(passages)
        postings: dict[str, dict[int, int]] = {}
        lengths = np.zeros(self.n_documents)
        for row, passage in enumerate(passages):
            terms = [word.lower() for word in words(passage)]
            lengths[row] = len(terms)
            for term in terms:
                counts = postings.setdefault(term, {})
                counts[row] = counts.get(row, 0) + 1
        length_norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1))
        self.postings = {}
        for term, counts in postings.items():
            rows, tf = np.fromiter(counts, int), np.fromiter(counts.values(), float)
            idf = np.log(1 + (self.n_documents - len(rows) + 0.5) / (len(rows) + 0.5))
            self.postings[term] = rows, idf * tf / (tf + length_norm[rows])

    def scores(self, query: str) -> np.ndarray:
        """BM25 of the query with every document, (N,) float64; repeated query words count repeatedly."""
        scores = np.zeros(self.n_documents)
        for word in words(query):
            if posting := self.postings.get(word.lower()):
                scores[posting[0]] += posting[1]
        return scores

    def top(self, query: str, k: int) -> list[tuple[int, float]]:
        """The k best (row, score) by (score descending, row ascending); documents without a query word are
        left out.
        """
        scores = self.scores(query)
        best = np.lexsort((np.arange(self.n_documents), -scores))[:k]
        return [(int(row), float(scores[row])) for row in best if scores[row] > 0]
