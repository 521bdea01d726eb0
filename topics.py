"""Order of arrival by topic: each later corpus is held out of one topic, so that it is new when it comes.

Paper    none (ours): a stream in which layers should grow because the topic shifts, to set beside section 4's splits
In       the documents' passages in file order, the sizes of D_0..D_T, a seed
Out      the rows of the documents by arrival
Next     data.split cuts them into corpora
Differs  topics are clusters of TF-IDF vectors after latent semantic analysis (Deerwester et al., 1990): there is no
         bi-encoder to tell them before D_0 is known
"""

import random
from collections.abc import Iterable

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from queries import count_terms

CHARACTERS = 4000  # of a passage that are looked at: the first ones tell the topic
DIMENSIONS = 64  # of latent semantic analysis
MOST_CLUSTERS = 500


def topic_order(passages: Iterable[str], sizes: list[int], seed: int) -> list[int]:
    """Rows of the documents by arrival: D_0, then D_1..D_T, each of its size, then those beyond all sizes.

    Spherical k-means makes clusters as large as a later corpus on average. In random order, each D_t, t >= 1, takes the
    cluster that it tells apart best: whose documents are most similar to the centroid, less the similarity of as many
    that come next and stay behind. So D_0 keeps a cluster of what fits nowhere. D_t gets the documents nearest to its
    centroid: the cluster's own, then those of clusters that no later corpus has, then any. D_0 and what is beyond all
    sizes are drawn from the rest, and documents within a corpus come in random order. Raises ValueError where there
    is no later corpus, or no word to tell topics by.
    """
    if len(sizes) < 2:
        raise ValueError("--split_by topic: found one corpus; pass two sizes or more to --splits")
    x = embed(passages, seed)
    n, later = len(x), sizes[1:]
    as_large = round(n * len(later) / sum(later))
    clusters = max(len(sizes), min(as_large, MOST_CLUSTERS))  # one at least is D_0's
    kmeans = faiss.Kmeans(x.shape[1], clusters, nredo=5, spherical=True, seed=seed, min_points_per_centroid=1)
    kmeans.train(np.ascontiguousarray(x.numpy()))
    similarity = x @ torch.from_numpy(kmeans.centroids.reshape(clusters, -1)).T  # (N, C), cosines in -1..1
    cluster = similarity.argmax(1)
    own = similarity + 3.0 * F.one_hot(cluster, clusters)  # a cluster's own documents stand before all others

    def contrast(size: int, c: int) -> float:
        nearest = own[:, c].topk(min(2 * size, n)).indices
        return float(similarity[nearest[:size], c].mean() - similarity[nearest[size:], c].mean())

    rng, held = random.Random(f"{seed} topics"), [-1] * len(later)  # the cluster of each later corpus
    for t in rng.sample(range(len(later)), len(later)):
        held[t] = max(set(range(clusters)) - set(held), key=lambda c: contrast(later[t], c))
    corpus = torch.zeros(n, dtype=torch.long)  # of each document
    for t, (size, c) in enumerate(zip(later, held), 1):
        elsewhere = torch.isin(cluster, torch.tensor(held)) & (cluster != c)
        score = (own[:, c] - 6.0 * elsewhere).masked_fill(corpus > 0, -torch.inf)
        corpus[score.topk(size).indices] = t
    arrival = list(range(n))
    rng.shuffle(arrival)
    arrival.sort(key=corpus.tolist().__getitem__)  # stable
    d0, end = sizes[0], n - sum(later)
    return arrival[:d0] + arrival[end:] + arrival[d0:end]


def embed(passages: Iterable[str], seed: int) -> Tensor:
    """TF-IDF of words after latent semantic analysis: passages -> (N, d), d at most 64, rows of length 1.

    Words, in either case, count that two documents or more and at most a third of them hold. A document without one
    is a row of zeros. Raises ValueError where there is none at all.
    """
    n, vocabulary, row, column, counts = count_terms(passage[:CHARACTERS] for passage in passages)
    row, column = torch.from_numpy(row).long(), torch.from_numpy(column).long()
    weight = torch.from_numpy((1 + np.log(counts)).astype(np.float32))
    documents = torch.bincount(column, minlength=len(vocabulary))  # that a word occurs in
    kept = (documents >= 2) & (3 * documents <= n)
    if not kept.any():
        raise ValueError(f"--split_by topic: no word tells topics in {n} documents; pass --split_by random")
    row, column, weight = (values[kept[column]] for values in (row, column, weight))
    weight = weight * (n / documents[column]).log()
    norm = torch.zeros(n).index_add_(0, row, weight**2).sqrt()
    shape, places = (n, int(kept.sum())), torch.stack([row, (kept.cumsum(0) - 1)[column]])
    # coalesced: within a row, words stand in order of their numbers, which the products ask for
    tfidf = torch.sparse_coo_tensor(places, weight / norm[row], shape, check_invariants=True).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(tfidf, q=min(DIMENSIONS, *shape))
    # rows of zeros come back as rounding errors, which must not grow to unit length
    return F.normalize(u * s, dim=1) * (norm > 0)[:, None]
