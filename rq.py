"""Residual quantisation: document embeddings become docids, and docids a trie.

Paper    section 2 and appendix C, Eq. 9: e_d is approximated by the sum of one centroid per codebook; table 9
         compares with product quantisation and with atomic docids
In       D_0's embeddings (N, D); later the embeddings of D_t, never refitted
Out      codebooks (M, K, D), docids (N, M), a report of collisions, the prefix trie of all indexed docids
Next     train.py starts the docid table from the codebooks; search.py walks the trie
Differs  the small presets fit the codebooks on embeddings of pseudo-queries and general text too (prepare.py);
         faiss's ResidualQuantizer grows its k-means through ten PCA dimensions, by 10 iterations; here each level
         is one k-means of faiss, of 25, on the residuals of the beam. Encoding and decoding are written out
"""

import math
from dataclasses import dataclass

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DISTINCT = 0.95  # docids of D_0 as a share of its different documents, at least
ITERATIONS = 25  # Lloyd iterations per level
POINTS_PER_CENTROID = 256  # of k-means, faiss's default: more are sampled
ROWS_A_CHILD = 8  # rows of a trie's node that are looked at for each of its children
CHUNK = 65_536  # embeddings reported on together
CACHED = 2**22  # partial errors of a batch of embeddings that are encoded together
MOST_POINTS = 200_000  # residuals of a level that are computed, if k-means does not sample more of them
MOST_ATOMIC = 2**15 - 1  # documents with atomic docids: codes are int16 in the trie and on disk
BEAM = 5  # partial docids kept while encoding, as in faiss


def fit(embeddings: Tensor, codebooks: int, centroids: int, seed: int, beam: int = BEAM) -> Tensor:
    """Codebooks (M, K, D) of a residual quantiser: level m is k-means on what levels 1..m-1 leave of each point (N, D).

    As in faiss, level m sees the residuals of all `beam` partial encodings of a point, not of the best alone.
    Raises ValueError where there are fewer points than centroids.
    """
    n, width = embeddings.shape
    require_points(n, centroids)
    most = max(POINTS_PER_CENTROID * centroids, MOST_POINTS)
    generator = torch.Generator().manual_seed(seed)
    if n > most:
        embeddings = embeddings[torch.randperm(n, generator=generator)[:most].sort().values]
    books = torch.empty(0, centroids, width)
    for m in range(codebooks):
        crossed, batch = cross_products(books), max(1, CACHED // (beam * centroids))
        partial = torch.cat([_beam_encode(part, books, crossed, beam) for part in embeddings.split(batch)])
        partial = partial.flatten(0, 1)  # (N * beam, m), or (N, 0)
        chosen = torch.arange(len(partial))
        if len(partial) > most:
            chosen = torch.randperm(len(partial), generator=generator)[:most].sort().values
        residuals = embeddings[chosen // (len(partial) // len(embeddings))] - decode(books, partial[chosen])
        books = torch.cat([books, kmeans(residuals, centroids, seed + m)[None]])
    return books


def kmeans(points: Tensor, centroids: int, seed: int, most: int = POINTS_PER_CENTROID) -> Tensor:
    """Centroids (K, d) of points (n, d), n >= K, by faiss; of more than `most` points a centroid, a sample."""
    clusters = faiss.Kmeans(
        points.shape[1], centroids, niter=ITERATIONS, seed=seed, max_points_per_centroid=most,
        min_points_per_centroid=1,
    )  # fmt: skip
    clusters.train(np.ascontiguousarray(points.numpy(), dtype=np.float32))
    return torch.from_numpy(clusters.centroids.reshape(centroids, -1).copy())


def require_points(documents: int, centroids: int, pseudo: int = 0) -> None:
    """Raises ValueError where D_0's documents, and `pseudo` pseudo-queries of each, are fewer than the centroids that are
    to be fitted on them.
    """
    if documents * (1 + pseudo) < centroids:
        held = (
            f"D_0 has {documents} documents"
            + f" and {pseudo} pseudo-quer{'y' if pseudo == 1 else 'ies'} of each" * (pseudo > 0)
        )
        smaller = max(2, 2 ** (documents.bit_length() - 1))
        raise ValueError(f"K={centroids} centroids need {centroids} points, {held}: pass --K {smaller}")


def fit_to_docids(embeddings: Tensor, codes: Tensor, centroids: int, sweeps: int = 6) -> Tensor:
    """Codebooks (M, K, D) of docids (N, M) that came from elsewhere, for the least squared error on embeddings (N, D).

    Codebook by codebook, each centroid becomes the mean, over the documents that have its code, of what the other
    codebooks leave of them; the sweeps after the first correct the earlier codebooks by the later ones. A code without
    documents is 0.
    """
    books = torch.zeros(codes.shape[1], centroids, embeddings.shape[1])
    residual = embeddings.clone()
    for _ in range(sweeps):
        for book, code in zip(books, codes.T):
            residual += book[code]
            book.zero_().index_add_(0, code, residual)
            book /= torch.bincount(code, minlength=centroids).clamp(min=1)[:, None]
            residual -= book[code]
    return books


def encode(embeddings: Tensor, books: Tensor, beam: int = BEAM, batch: int = 0, device="cpu") -> Tensor:
    """Docids (N, M) int64 of embeddings (N, D): the best of a beam search for the least squared error.

    With beam 1 this is the greedy argmin_k || residual - C^m[k] ||^2, level by level. `batch` embeddings are encoded
    together, by default as many as keep their errors (batch, beam, K) within a cache.
    """
    books = books.to(device)
    crossed, batch = cross_products(books), batch or max(1, CACHED // (beam * books.shape[1]))
    parts = embeddings.split(batch)
    return torch.cat([_beam_encode(part.to(device), books, crossed, beam)[:, 0].cpu() for part in parts])


def cross_products(books: Tensor) -> list[Tensor]:
    """Of each codebook (K, D), 2 <c, c'> of every centroid c of the codebooks before it with its own c': (m * K, K)."""
    return [2 * books[:m].flatten(0, 1) @ book.T for m, book in enumerate(books)]


def _beam_encode(x: Tensor, books: Tensor, crossed: list[Tensor], beam: int) -> Tensor:
    """(N, D) -> the `beam` best partial encodings of each row, (N, beam or fewer, m), best first.

    The residuals themselves are never formed. One more centroid c changes the squared error of a partial encoding by ||
    c ||^2 - 2 <x, c> + 2 sum_j <c_j, c>: one product with x, which all of the beam share, and rows of a table.
    """
    n, (_, centroids, _) = len(x), books.shape
    codes, error = torch.empty(n, 1, 0, dtype=torch.long, device=x.device), x.new_zeros(n, 1)
    for m, (book, table) in enumerate(zip(books, crossed)):
        change = (book.pow(2).sum(-1) - 2 * x @ book.T)[:, None]  # (N, 1, K)
        if m:
            rows = codes + torch.arange(m, device=x.device) * centroids  # (N, b, m)
            past = F.embedding_bag(rows.flatten(0, 1), table, mode="sum").unflatten(0, codes.shape[:2])
            change = past + change
        total = (change + error[..., None]).flatten(1)  # (N, b * K)
        error, best = total.topk(min(beam, total.shape[1]), dim=1, largest=False)  # (N, b')
        parent, code = best // centroids, best % centroids
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, m)), code[..., None]], dim=2)
    return codes


def decode(books: Tensor, codes: Tensor) -> Tensor:
    """Docids (..., M) -> reconstructed embeddings (..., D), the sum of their centroids."""
    out = torch.zeros(*codes.shape[:-1], books.shape[-1])
    for m, book in enumerate(books):
        out += book[codes[..., m]]
    return out


# -------------------------------------------------------------------------------- docids of other kinds (table 9)


def fit_product(embeddings: Tensor, codebooks: int, centroids: int, seed: int) -> Tensor:
    """Codebooks (M, K, D) of product quantisation (Jegou et al., 2011): number m is k-means on the m-th run of D / M
    columns of D_0's embeddings (N, D).

    A centroid is 0 outside its own columns, so that a document is approximated by the sum of its centroids and `encode`
    with beam 1 takes the nearest centroid of each sub-space. Raises ValueError where M does not divide D, or D_0 has
    fewer documents than K.
    """
    n, width = embeddings.shape
    if width % codebooks:
        divisors = [m for m in range(1, width + 1) if width % m == 0]
        raise ValueError(
            f"product quantisation cuts embeddings of {width} columns into M={codebooks} equal parts, which does not "
            f"come out even; pass --M {min(divisors, key=lambda m: abs(m - codebooks))}"
        )
    require_points(n, centroids)
    books, columns = torch.zeros(codebooks, centroids, width), width // codebooks
    for m, book in enumerate(books):
        own = slice(m * columns, (m + 1) * columns)
        most = max(POINTS_PER_CENTROID, MOST_POINTS // centroids)
        book[:, own] = kmeans(embeddings[:, own], centroids, seed + m, most)
    return books


def require_few(n: int) -> None:
    """Raises ValueError where n documents are more than atomic docids, one code a document, can number."""
    if n > MOST_ATOMIC:
        raise ValueError(
            f"found {n} documents, wanted at most {MOST_ATOMIC} for atomic docids, whose codes are kept as int16; take "
            "fewer documents, or docids of another kind"
        )


# ------------------------------------------------------------------------------------------------- collisions


@dataclass
class Report:
    """How well docids tell documents apart."""

    documents: int
    distinct: float  # distinct docids / documents
    used: list[float]  # share of each codebook's centroids in use
    entropy: list[float]  # bits per codebook, log2 K at most
    error: float  # mean squared error relative to the embeddings' variance

    def __str__(self) -> str:
        used = " ".join(f"{100 * share:.0f}%" for share in self.used)
        bits = " ".join(f"{h:.1f}" for h in self.entropy)
        return (
            f"{self.documents} documents, {100 * self.distinct:.1f}% distinct docids, relative error {self.error:.3f}, "
            f"centroids used {used}, entropy {bits} bits"
        )


def report(embeddings: Tensor, books: Tensor, codes: Tensor) -> Report:
    """Collisions, use and entropy of docids (N, M) of embeddings (N, D)."""
    n, centroids = len(codes), books.shape[1]
    used, entropy = [], []
    for column in codes.T:
        counts = torch.bincount(column, minlength=centroids).double()
        p = counts[counts > 0] / n
        used.append(len(p) / centroids)
        entropy.append(max(0.0, float(-(p * p.log2()).sum())))
    centre, error, spread, size = embeddings.mean(0), 0.0, 0.0, 0.0
    for e, c in zip(embeddings.split(CHUNK), codes.split(CHUNK)):
        error += float((e - decode(books, c)).pow(2).sum())
        spread += float((e - centre).pow(2).sum())
        size += float(e.pow(2).sum())
    if spread <= 1e-9 * size:  # equal documents, whose embeddings differ by rounding alone
        spread = size or 1.0
    return Report(n, len(torch.unique(codes, dim=0)) / n, used, entropy, error / spread)


def suggest(n: int) -> tuple[int, int]:
    """M and K for n documents: K a power of two with some 16 documents a centroid, and at least twice log2 n bits.

    >>> suggest(1551)
    (4, 64)
    """
    centroids = 2 ** min(11, max(2, math.floor(math.log2(max(n, 64) / 16))))
    return max(4, math.ceil(2 * math.log2(max(n, 2)) / math.log2(centroids))), centroids


def are_distinct(report: Report, documents: int) -> bool:
    """Are there docids for 95 % of the different `documents` of D_0, or for all but one?"""
    docids = round(report.distinct * report.documents)
    return docids >= min(DISTINCT * documents, documents - 1)


def require_distinct(report: Report, documents: int) -> None:
    """Raises ValueError, with a suggestion of M and K, where docids of D_0 are not distinct."""
    if not are_distinct(report, documents):
        share = report.distinct * report.documents / documents
        m, k = suggest(documents)
        m = max(m, len(report.used) + 1)
        raise ValueError(
            f"D_0's {documents} different documents have only {100 * share:.1f}% as many docids, wanted {100 * DISTINCT:.0f}% "
            f"({report}). Use more or larger codebooks, as --M {m} --K {k}"
        )


# ------------------------------------------------------------------------------------------------------- trie


class Trie:
    """The prefix tree of all docids, as sorted rows: at most 2 M + M / 2 + 4 bytes a document, 24 at M = 8.

    rows (N, M) int16 holds the docids in lexicographic order and documents (N,) int32 the row of each in the stream;
    equal docids stand in order of document. A node at depth m is a run [first, end) of rows that share their first m
    codes. Its children are the runs of equal codes m within it, found by looking at each of its rows, but where that
    would be more than 8 rows a child: of such nodes, `starts[m]` holds the children's first rows, in order.
    """

    def __init__(self, codes: Tensor, documents: Tensor | None = None):
        """codes (N, M), below 2^15; documents (N,) rows of the stream, 0..N-1 where None."""
        codes = codes.to(torch.int16)
        documents = torch.arange(len(codes)) if documents is None else documents
        order = torch.from_numpy(np.lexsort((documents.numpy(), *codes.numpy().T[::-1])))
        columns = torch.stack([column[order] for column in codes.T])  # (M, N): a run's codes lie side by side
        self.rows, self.documents = columns.T, documents[order].to(torch.int32)
        n = len(codes)
        first, self.starts = torch.tensor([0]), []  # first rows of the nodes at this depth
        differs = torch.zeros(n, dtype=torch.bool)  # row differs from the one before in its first m codes
        differs[:1] = True
        for column in columns:
            differs[1:] |= column[1:] != column[:-1]
            child = differs.nonzero()[:, 0]
            parent = torch.searchsorted(first, child, right=True) - 1
            rows = torch.diff(first, append=torch.tensor([n]))
            crowded = rows > ROWS_A_CHILD * torch.bincount(parent, minlength=len(first))
            self.starts.append(child[crowded[parent]].to(torch.int32))
            first = child

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.rows, self.documents, *self.starts))

    def root(self, count: int = 1) -> Tensor:
        """The run of all rows, as often as asked for: (count, 2)."""
        return torch.tensor([0, len(self.rows)]).expand(count, 2)

    def children(self, depth: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All that is below the nodes (R, 2) at `depth`, by node, then by code: places (C,) of the nodes, codes (C,) and
        runs (C, 2). An empty run has none.
        """
        (first, end), starts = nodes.T.contiguous(), self.starts[depth]
        begin, stop = torch.searchsorted(starts, nodes.to(torch.int32)).T
        listed = begin < stop
        count = torch.where(listed, stop - begin, end - first)  # rows to look at
        node = torch.arange(len(nodes)).repeat_interleave(count)
        at = torch.arange(len(node)) + (torch.where(listed, begin, first) - count.cumsum(0) + count)[node]
        if len(starts):
            listed = listed[node]
            at[listed] = starts[at[listed]].long()
        code = self.rows[:, depth][at].long()
        begins = torch.ones(len(at), dtype=torch.bool)
        begins[1:] = (node[1:] != node[:-1]) | (code[1:] != code[:-1])
        node, code, at = node[begins], code[begins], at[begins]
        until = end[node]
        until[:-1] = torch.where(node[1:] == node[:-1], at[1:], until[:-1])
        return node, code, torch.stack([at, until], dim=1)

    def allowed(self, depth: int, nodes: Tensor, centroids: int) -> Tensor:
        """Which codes go on from the nodes (R, 2) at `depth`: (R, K) bool."""
        node, code, _ = self.children(depth, nodes)
        mask = torch.zeros(len(nodes), centroids, dtype=torch.bool)
        mask[node, code] = True
        return mask

    def child(self, depth: int, nodes: Tensor, codes: Tensor) -> Tensor:
        """The nodes below `nodes` (R, 2) at `depth` along one code (R,) each: (R, 2), empty where there is none."""
        node, code, runs = self.children(depth, nodes)
        along, below = code == codes[node], torch.zeros(len(nodes), 2, dtype=torch.long)
        below[node[along]] = runs[along]
        return below

    def documents_at(self, leaf: list[int]) -> list[int]:
        """Documents (rows of the stream) of a node at depth M, ascending: those that have its docid."""
        first, end = leaf
        return self.documents[first:end].tolist()
