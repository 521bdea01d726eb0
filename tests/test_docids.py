"""Docids of other kinds against brute force, faiss, and values worked out by hand."""

import doctest
import math

import pytest
import torch

import docids
import rq
from docids import branching, make


def clustered(n: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    """Points around 20 centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(20, width, generator=generator)
    return centres[torch.randint(20, (n,), generator=generator)] + torch.randn(n, width, generator=generator)


def sizes(kind: str) -> dict:
    return dict(kind=kind, first=400, codebooks=3, centroids=32)


# ----------------------------------------------------------------------------------------------- of every kind


@pytest.mark.parametrize("kind", docids.KINDS)
def test_later_documents_change_neither_books_nor_earlier_docids(kind):
    x = clustered(600)
    books, codes = make(embeddings=x, seed=0, **sizes(kind))
    for n in (400, 401, 500):
        fewer, earlier = make(embeddings=x[:n], seed=0, **sizes(kind))
        known = fewer.shape[1]  # atomic docids: one for each document
        assert torch.equal(earlier, codes[:n]) and torch.equal(fewer, books[:, :known])
    other = torch.cat([x[:400], 5 + clustered(200, seed=1)])  # other documents arrive
    books_2, codes_2 = make(embeddings=other, seed=0, **sizes(kind))
    assert torch.equal(codes_2[:400], codes[:400])
    assert kind == "atomic" or torch.equal(books_2, books)


@pytest.mark.parametrize("kind", docids.KINDS)
def test_docids_are_the_seed_s_and_leave_the_embeddings_alone(kind):
    x = clustered(600)
    before, state = x.clone(), torch.get_rng_state()
    one, same, other = (make(embeddings=x, seed=seed, **sizes(kind)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert kind == "atomic" or not torch.equal(one[0], other[0])
    one[0][:] = 7
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", docids.KINDS)
def test_codes_are_within_the_books_and_ready_for_the_trie(kind):
    x = clustered(600)
    books, codes = make(embeddings=x, seed=0, **sizes(kind))
    assert codes.dtype == torch.int64 and codes.shape == (600, len(books)) and books.shape[2] == 12
    assert codes.min() >= 0 and codes.max() < books.shape[1]
    trie = rq.Trie(codes)
    node = trie.root()
    for depth, code in enumerate(codes[17]):
        node = trie.child(depth, node, code[None])
    assert 17 in trie.documents_at(node[0].tolist())


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="found the docid kind 'opq', wanted one of pq, atomic, hierarchical"
    ):
        make("opq", clustered(50), 50, 2, 4, 0)


# ---------------------------------------------------------------------------------------- product quantisation


def test_pq_codes_are_the_nearest_centroid_of_each_sub_space():
    x = clustered(600)
    books, codes = make("pq", x, 400, codebooks=3, centroids=32, seed=0)
    for m in range(3):
        own = slice(4 * m, 4 * m + 4)
        assert torch.equal(codes[:, m], torch.cdist(x[:, own].double(), books[m, :, own].double()).argmin(1))
        outside = books[m].clone()
        outside[:, own] = 0
        assert not outside.any()


def test_pq_equals_faiss_s_with_the_same_centroids_and_is_fitted_as_well():
    faiss = pytest.importorskip("faiss")
    x = clustered(600)
    books, codes = make("pq", x, 600, codebooks=3, centroids=32, seed=0)
    theirs = faiss.ProductQuantizer(12, 3, 5)
    theirs.train(x.numpy())
    least = (x - torch.from_numpy(theirs.decode(theirs.compute_codes(x.numpy())))).pow(2).sum()
    centroids = torch.stack([book[:, 4 * m : 4 * m + 4] for m, book in enumerate(books)])
    faiss.copy_array_to_vector(centroids.numpy().ravel(), theirs.centroids)
    packed = theirs.compute_codes(x.numpy())
    assert torch.equal(torch.from_numpy(faiss.unpack_bitstrings(packed, 3, 5).astype("int64")), codes)
    torch.testing.assert_close(rq.decode(books, codes), torch.from_numpy(theirs.decode(packed)))
    assert (x - rq.decode(books, codes)).pow(2).sum() < 1.05 * least


def test_pq_of_as_many_centroids_as_documents_reconstructs_them_exactly():
    x = clustered(16)
    books, codes = make("pq", x, 16, codebooks=4, centroids=16, seed=0)
    torch.testing.assert_close(rq.decode(books, codes), x, atol=1e-5, rtol=0)
    assert [sorted(column) for column in codes.T.tolist()] == [list(range(16))] * 4


@pytest.mark.parametrize("m, fits", [(5, 4), (8, 6), (11, 12), (13, 12)])
def test_pq_refuses_parts_of_unequal_width_with_one_that_fits(m, fits):
    with pytest.raises(ValueError, match=rf"12 columns into M={m} equal parts.*--M {fits}$"):
        make("pq", clustered(100), 100, m, 16, 0)


def test_pq_refuses_fewer_documents_in_d0_than_centroids():
    with pytest.raises(ValueError, match=r"found 100 documents in D_0, fewer than K=128 .*--K 4$"):
        make("pq", clustered(500), 100, 2, 128, 0)


# ------------------------------------------------------------------------------------------------------ atomic


def test_atomic_docids_are_row_numbers_and_books_the_embeddings():
    x = clustered(30)
    books, codes = make("atomic", x, 10, codebooks=4, centroids=8, seed=0)
    assert torch.equal(books, x[None]) and codes.tolist() == [[i] for i in range(30)]
    assert torch.equal(rq.decode(books, codes), x)


def test_atomic_docids_stop_where_int16_does():
    most = torch.zeros(32_767, 1)
    assert make("atomic", most, 5, 1, 1, 0)[1].max() == 32_766
    with pytest.raises(ValueError, match="found 32768 documents, wanted at most 32767 .*int16; take fewer"):
        make("atomic", torch.zeros(32_768, 1), 5, 1, 1, 0)


# ------------------------------------------------------------------------------------------------ hierarchical


def by_prefix(codes: torch.Tensor, m: int) -> dict[tuple, list[int]]:
    """Documents by their first m codes, in order of arrival."""
    found: dict[tuple, list[int]] = {}
    for row, docid in enumerate(codes[:, :m].tolist()):
        found.setdefault(tuple(docid), []).append(row)
    return found


@pytest.mark.parametrize("m, k", [(2, 64), (3, 64), (4, 64), (3, 16)])
def test_hierarchical_docids_number_each_leaf_in_order_and_are_distinct_where_it_holds_them(m, k):
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    codes = make("hierarchical", x, 400, m, k, seed=0)[1]
    leaves = by_prefix(codes, m - 1)
    assert len(leaves) == branching(400, m, k) ** (m - 1) > 1
    for rows in leaves.values():
        assert codes[rows, -1].tolist() == [i % k for i in range(len(rows))]
    docids_of = [len(torch.unique(part, dim=0)) for part in (codes, codes[:400])]
    assert docids_of[0] == sum(min(len(rows), k) for rows in leaves.values())
    assert docids_of[1] == 400 or k == 16  # leaves of 40 at K = 64 leave room for uneven ones


def test_each_document_descends_to_the_nearest_centroid_fitted_on_d0(monkeypatch):
    """Every k-means is told apart by its points: those of D_0 in one cluster, each as often as it lies there."""
    x, fits, kmeans = clustered(500), [], docids.kmeans

    def spy(points, centroids, seed):
        fits.append((points, kmeans(points, centroids, seed)))
        return fits[-1][1]

    monkeypatch.setattr(docids, "kmeans", spy)
    codes = make("hierarchical", x, 400, 3, 32, seed=0)[1]
    b = branching(400, 3, 32)
    assert len(fits) == 1 + b  # the root's and each of its children's
    origin = torch.zeros(500, 12)
    for m in range(2):
        for rows in by_prefix(codes, m).values():
            rows = torch.tensor(rows)
            wanted = x[rows] - origin[rows]
            known = wanted[rows < 400]
            centroids = next(
                c for p, c in fits if p.shape == known.shape and torch.allclose(p, known, atol=1e-5)
            )
            assert torch.equal(codes[rows, m], torch.cdist(wanted.double(), centroids.double()).argmin(1))
            origin[rows] += centroids[codes[rows, m]]


def test_cluster_centroids_are_means_and_books_are_means_of_what_parents_leave():
    """k-means that has settled, so that a centroid is the mean of its documents: three far groups of three."""
    offsets = torch.tensor([[-4.0, 0], [0, 1], [4, -1]])
    groups = torch.tensor([[0.0, 0], [100, 0], [0, 100]])
    x = (groups[:, None] + offsets).flatten(0, 1)[
        torch.randperm(9, generator=torch.Generator().manual_seed(0))
    ]
    assert branching(9, 2, 6) == 3
    books, codes = make("hierarchical", x, 9, 2, 6, seed=0)
    means = torch.stack([x[codes[:, 0] == k].mean(0) for k in range(3)])
    torch.testing.assert_close(books[0, :3], means)
    torch.testing.assert_close(means.sort(0).values, groups.sort(0).values)
    left = x - means[codes[:, 0]]
    for k in range(3):
        torch.testing.assert_close(books[1, k], left[codes[:, 1] == k].mean(0), atol=1e-4, rtol=0)
    assert not books[:, 3:].any()


def test_books_of_deeper_levels_are_loops_over_codes():
    x = clustered(300)
    books, codes = make("hierarchical", x, 200, 4, 32, seed=0)
    left, d0 = x[:200].clone(), codes[:200]
    for m in range(4):
        for k in range(32):
            chosen = d0[:, m] == k
            wanted = left[chosen].mean(0) if chosen.any() else torch.zeros(12)
            torch.testing.assert_close(books[m, k], wanted, atol=0.05, rtol=0)
        left = x[:200].clone()
        for rows in by_prefix(d0, m + 1).values():  # a settled centroid is its documents' mean
            left[rows] -= x[rows].mean(0)


def test_a_later_document_takes_the_next_number_of_its_leaf():
    x = torch.tensor([[0.0], [1], [100], [101], [102]])
    books, codes = make(
        "hierarchical", torch.cat([x, torch.tensor([[99.0], [3], [103], [2]])]), 5, 2, 6, seed=0
    )
    low, high = codes[0, 0].item(), codes[2, 0].item()
    assert low != high and books.shape == (2, 6, 1)
    assert codes[5:].tolist() == [[high, 3], [low, 2], [high, 4], [low, 3]]


def test_a_leaf_beyond_k_counts_from_0_again():
    x = torch.cat([torch.zeros(7, 2), torch.full((2, 2), 9.0)])
    codes = make("hierarchical", x, 9, 2, 4, seed=0)[1]
    assert codes[:7, 1].tolist() == [0, 1, 2, 3, 0, 1, 2] and codes[7:, 1].tolist() == [0, 1]
    assert rq.report(x, torch.zeros(2, 4, 2), codes).distinct == pytest.approx(6 / 9)


@pytest.mark.parametrize("n, first", [(1, 1), (2, 1), (6, 2), (40, 30)])
def test_documents_that_repeat_or_are_few_still_have_docids(n, first):
    x = torch.zeros(n, 3)
    books, codes = make("hierarchical", x, first, 3, 8, seed=0)
    assert codes[:, :2].eq(0).all() and codes[:, 2].tolist() == [i % 8 for i in range(n)]
    assert not books.any()


def test_branching_is_the_least_with_which_average_leaves_are_half_full():
    assert doctest.testmod(docids).failed == 0
    for n in (1, 50, 1551, 98_743, 1_000_000):
        for m, k in ((2, 64), (3, 64), (4, 64), (8, 2048), (2, 2)):
            b = branching(n, m, k)
            assert 2 <= b <= k
            assert b == k or math.ceil(n / b ** (m - 1)) <= k / 2 or n / b ** (m - 1) <= k / 2
            assert b == 2 or n / (b - 1) ** (m - 1) > k / 2


def test_hierarchical_docids_need_a_level_of_clusters():
    with pytest.raises(ValueError, match="found M=1, pass --M 2"):
        make("hierarchical", clustered(50), 50, 1, 16, 0)
