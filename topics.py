"""Order of arrival by topic: each later corpus is held out of one topic, so that it is new when it comes.

Paper    none (ours): a stream in which layers should grow because the topic shifts, to set beside section 4's splits
In       the documents' passages in file order, the sizes of D_0..D_T, a seed
Out      the rows of the documents by arrival
Next     data.split cuts them into corpora
Differs  topics are clusters of TF-IDF vectors of words after latent semantic analysis (Deerwester et al., 1990): the
         bi-encoder cannot tell them, as it is trained on D_0, which is not known before
"""

import math
import random
from array import array
from collections import Counter
from collections.abc import Iterable

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from queries import words

CHARACTERS = 4000  # of a passage that are looked at: the first ones tell the topic
DIMENSIONS = 64  # of latent semantic analysis
REPEATS = 5  # of k-means, of which the best counts
MOST_CLUSTERS = 500
NO_TOPIC = (
    "--split_by topic: no word occurs in two documents or more and in at most a third of all {} documents, so that "
    "they have no topics; pass --split_by random"
)
ONE_CORPUS = (
    "--split_by topic: found one corpus, wanted a D_1 that holds a topic of its own; pass two sizes or more to "
    "--splits, or --split_by random"
)


def topic_order(passages: Iterable[str], sizes: list[int], seed: int) -> list[int]:
    """Rows of the documents by arrival: D_0, then D_1..D_T, each of its size, then those beyond all sizes.

    Spherical k-means makes clusters as large as a later corpus on average. A D_t, t >= 1, that has a cluster gets the
    documents nearest to its centroid; where the cluster is too small, the nearest ones of clusters that no corpus
    has, and at last of any. Each takes the cluster that this tells apart best: whose documents are most similar to
    the centroid, less the similarity of as many that come next and stay behind. So a cluster of what fits nowhere is
    left to D_0, as is one of which much would remain there. The corpora choose in random order, so that a seed
    decides which topic comes when. D_0 and what is beyond all sizes are drawn from the rest, and documents within a
    corpus come in random order.

    Raises ValueError where there is no later corpus, or no word to tell topics by.
    """
    if len(sizes) < 2:
        raise ValueError(ONE_CORPUS)
    x = embed(passages, seed)
    n, later = len(x), sizes[1:]
    assert sum(sizes) <= n, f"sizes {sizes} add up to more than {n} documents"
    # one cluster at least is D_0's
    clusters = max(len(sizes), min(round(n * len(later) / sum(later)), MOST_CLUSTERS))
    similarity = similarities(x, clusters, seed)  # (N, C)
    cluster = similarity.argmax(1)
    # cosines lie in -1..1, so that a cluster's own documents stand before all others
    own = similarity + 3.0 * F.one_hot(cluster, clusters)

    def contrast(size: int, c: int) -> float:
        nearest = own[:, c].topk(min(2 * size, n)).indices
        return float(similarity[nearest[:size], c].mean() - similarity[nearest[size:], c].mean())

    rng, held = random.Random(f"{seed} topics"), [-1] * len(later)  # the cluster of each later corpus
    for t in rng.sample(range(len(later)), len(later)):
        held[t] = max(set(range(clusters)) - set(held), key=lambda c: contrast(later[t], c))
    corpus = torch.zeros(n, dtype=torch.long)  # of each document
    for t, (size, c) in enumerate(zip(later, held), 1):
        elsewhere = torch.isin(cluster, torch.tensor(held)) & (cluster != c)
        score = (own[:, c] - 6.0 * elsewhere).masked_fill(corpus > 0, -math.inf)
        corpus[score.topk(size).indices] = t
    shuffled = list(range(n))
    rng.shuffle(shuffled)
    corpus, arrival = corpus.tolist(), [[] for _ in sizes]
    for row in shuffled:
        arrival[corpus[row]].append(row)
    beyond = arrival[0][sizes[0] :]
    return [*arrival[0][: sizes[0]], *(row for rows in arrival[1:] for row in rows), *beyond]


def embed(passages: Iterable[str], seed: int) -> Tensor:
    """Passages -> (N, d), unit rows, d at most 64: TF-IDF of words after latent semantic analysis.

    Counts the words that occur in two documents or more and in at most a third of them, in either case of letters. A
    document without such a word is a row of zeros. Raises ValueError where there is none.
    """
    number: dict[str, int] = {}
    numbers, times = array("i"), array("f")  # word and weight of an entry
    lengths = array("i")  # entries of a row
    for passage in passages:
        counts = Counter(word.lower() for word in words(passage[:CHARACTERS]))
        numbers.extend(number.setdefault(word, len(number)) for word in counts)
        times.extend(1 + math.log(count) for count in counts.values())
        lengths.append(len(counts))
    n = len(lengths)
    row = torch.arange(n).repeat_interleave(torch.from_numpy(np.array(lengths)))
    column, weight = torch.from_numpy(np.array(numbers)).long(), torch.from_numpy(np.array(times))
    documents = torch.bincount(column, minlength=len(number))  # that a word occurs in
    kept = (documents >= 2) & (3 * documents <= n)
    if not kept.any():
        raise ValueError(NO_TOPIC.format(n))
    entry = kept[column]
    row, column, weight = row[entry], column[entry], weight[entry]
    weight = weight * (n / documents[column]).log()
    norm = torch.zeros(n).index_add_(0, row, weight**2).sqrt()
    shape = n, int(kept.sum())
    places = torch.stack([row, (kept.cumsum(0) - 1)[column]])
    # coalesced: within a row, words stand in order of their numbers, which the products ask for
    tfidf = torch.sparse_coo_tensor(places, weight / norm[row], shape, check_invariants=True).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(tfidf, q=min(DIMENSIONS, *shape))
    # rows of zeros come back as rounding errors, which must not grow to unit length
    return F.normalize(u * s, dim=1) * (norm > 0)[:, None]


def similarities(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Cosines (N, C) of unit rows (N, d) with the centroids of spherical k-means."""
    options = dict(nredo=REPEATS, spherical=True, seed=seed, min_points_per_centroid=1)
    kmeans = faiss.Kmeans(x.shape[1], clusters, **options)
    kmeans.train(np.ascontiguousarray(x.numpy()))
    return x @ torch.from_numpy(kmeans.centroids.reshape(clusters, -1)).T
