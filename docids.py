"""Docids other than residual quantisation: product quantisation, atomic, hierarchical.

Paper    Table 9 and appendix B.1 compare residual quantisation (rq.py) with atomic docids and product quantisation
In       embeddings (N, D) by D_0's bi-encoder in order of arrival, and how many of them are D_0's
Out      books (M, K, D) that the docid table starts from, docids (N, M); nothing is fitted on a later document
Next     train.py starts the docid table from the books and trains on the docids, as it does with rq.py's
Differs  hierarchical docids are not in the table: they are those of DSI (Tay et al., 2022, "semantically structured
         identifiers") with a fixed number of levels in place of as many as a cluster needs. Atomic docids are one
         codebook with a code for each document, which int16 limits to 32,767 documents
"""

import faiss
import numpy as np
import torch
from torch import Tensor

import rq

KINDS = ("pq", "atomic", "hierarchical")
MOST_ATOMIC = 2**15 - 1  # documents: docids are int16 in the trie and on disk


def make(
    kind: str, embeddings: Tensor, first: int, codebooks: int, centroids: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Books (M, K, D) and docids (N, M) int64 of embeddings (N, D), whose rows 0..first-1 are D_0.

    The logit of code k at position m is <h, books[m, k]> for a decoder state h. Everything is fitted on D_0; later
    rows are encoded in order, and no later row changes the docid of an earlier one. "atomic" takes its M = 1 and
    K = N from the documents, not from `codebooks` and `centroids`.

    Raises ValueError on an unknown kind and on sizes that it cannot work with, and says which would do.
    """
    assert 0 < first <= len(embeddings), "D_0 holds a document at least, and no more than there are"
    if kind == "pq":
        return product(embeddings, first, codebooks, centroids, seed)
    if kind == "atomic":
        return atomic(embeddings)
    if kind == "hierarchical":
        return hierarchical(embeddings, first, codebooks, centroids, seed)
    raise ValueError(f"found the docid kind {kind!r}, wanted one of {', '.join(KINDS)}")


def product(
    embeddings: Tensor, first: int, codebooks: int, centroids: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Product quantisation (Jegou et al., 2011): codebook m is k-means on the m-th run of D / M columns.

    A centroid is 0 outside its own columns, so that a document is approximated by the sum of its centroids, as in
    residual quantisation. Raises ValueError where M does not divide D, or D_0 has fewer documents than K.
    """
    width = embeddings.shape[1]
    if width % codebooks:
        fits = [m for m in range(1, width + 1) if width % m == 0]
        nearest = min(fits, key=lambda m: abs(m - codebooks))
        raise ValueError(
            f"product quantisation cuts embeddings of {width} columns into M={codebooks} equal parts, which does not "
            f"come out even; pass --M {nearest}"
        )
    if first < centroids:
        raise ValueError(
            f"found {first} documents in D_0, fewer than K={centroids} centroids; pass --K {rq.suggest(first)[1]}"
        )
    books, columns = torch.zeros(codebooks, centroids, width), width // codebooks
    for m, book in enumerate(books):
        own = slice(m * columns, (m + 1) * columns)
        book[:, own] = kmeans(embeddings[:first, own], centroids, seed + m)
    # no two codebooks share a column, so each greedy choice is the nearest centroid of its sub-space
    return books, rq.encode(embeddings, books, beam=1)


def atomic(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """One codebook (1, N, D) of the documents' own embeddings, and as docids (N, 1) their row numbers.

    The books hold later documents too, each embedded by D_0's bi-encoder; train.py shows the model the rows of
    documents that have arrived. Raises ValueError above 32,767 documents, as docids are kept as int16.
    """
    require_few(len(embeddings))
    return embeddings[None].clone(), torch.arange(len(embeddings))[:, None]


def require_few(n: int) -> None:
    """Raises ValueError where n documents are more than atomic docids can number."""
    if n > MOST_ATOMIC:
        raise ValueError(
            f"found {n} documents, wanted at most {MOST_ATOMIC} for atomic docids, whose codes are kept as int16; take "
            "fewer documents, or docids of another kind"
        )


def hierarchical(
    embeddings: Tensor, first: int, codebooks: int, centroids: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Docids by hierarchical k-means: codes 1..M-1 say which child of a cluster a document falls into, the last
    numbers the documents of a leaf in order of arrival.

    A later document descends to the nearest child and takes the next number of its leaf. Numbers are modulo K: in a
    leaf of more than K documents, docids collide (rq.report counts them; a larger M or K helps).

    The same code means another thing under another parent, so no one vector stands for it: books[m, k] is the mean of
    e - (centroid of the cluster that code m chooses in; 0 at the root), over those documents e of D_0 whose code m
    is k. A code without documents is 0.

    Raises ValueError where M leaves no level for clusters.
    """
    if codebooks < 2:
        raise ValueError(
            f"hierarchical docids number the documents of a leaf by their last code and need a level of clusters "
            f"before it; found M={codebooks}, pass --M 2 or more"
        )
    children = branching(first, codebooks, centroids)
    codes = torch.zeros(len(embeddings), codebooks, dtype=torch.long)
    books = torch.zeros(codebooks, centroids, embeddings.shape[1])
    clusters = [torch.arange(len(embeddings))]  # rows of each, ascending; a document of D_0 at least in each
    residual = embeddings.clone()  # from the centroid of the document's cluster
    for m in range(codebooks):
        before, below = residual.clone(), []
        for rows in clusters:
            if m == codebooks - 1:
                codes[rows, m] = torch.arange(len(rows)) % centroids
            else:
                centres, code = cluster(residual[rows], int((rows < first).sum()), children, seed + m)
                codes[rows, m] = code
                residual[rows] -= centres[code]
                below += [rows[code == k] for k in range(len(centres))]
        books[m].index_add_(0, codes[:first, m], before[:first])
        books[m] /= torch.bincount(codes[:first, m], minlength=centroids).clamp(min=1)[:, None]
        clusters = below
    return books, codes


def cluster(points: Tensor, fitted: int, children: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means on the first `fitted` points (n, d): the centroids (b, d), at most `children`, and each point's nearest.

    Each centroid has one of the fitted points at least: where points repeat, some would have none, and nothing to
    descend to.
    """
    centres = kmeans(points[:fitted], min(children, fitted), seed)
    centres = centres[nearest(points[:fitted], centres).unique()]
    return centres, nearest(points, centres)


def branching(n: int, codebooks: int, centroids: int) -> int:
    """The fewest children of a cluster, 2..K, with which a leaf of average size holds at most K / 2 of n documents.

    Half of K, because leaves differ in size and later documents are to come.

    >>> branching(1551, 4, 64)  # 4^3 leaves of 24 documents; 3^3 would hold 57 each
    4
    """
    children = 2
    while children < centroids and 2 * n > centroids * children ** (codebooks - 1):
        children += 1
    return children


def kmeans(points: Tensor, centroids: int, seed: int) -> Tensor:
    """Centroids (K, d) of points (n, d), n >= K, by faiss with the iterations of rq.fit."""
    found = faiss.Kmeans(
        points.shape[1], centroids, niter=rq.ITERATIONS, seed=seed, min_points_per_centroid=1,
        max_points_per_centroid=max(rq.POINTS_PER_CENTROID, rq.MOST_POINTS // centroids),
    )  # fmt: skip
    found.train(np.ascontiguousarray(points.numpy(), dtype=np.float32))
    return torch.from_numpy(found.centroids.reshape(centroids, -1).copy())


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The centroid (K, d) nearest to each point (n, d): (n,) int64."""
    return (centroids.pow(2).sum(-1) - 2 * points @ centroids.T).argmin(1)
