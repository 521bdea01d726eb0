"""The residual quantiser against faiss and brute force; the trie against a Python set."""

import doctest
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rq
from rq import Report, Trie, decode, encode, fit, fit_to_docids, report, require_distinct


def clustered(n: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Points around 20 centres of unequal weight, as document embeddings cluster by topic."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(20, width, generator=generator)
    topic = torch.multinomial(torch.arange(1.0, 21), n, replacement=True, generator=generator)
    return centres[topic] + torch.randn(n, width, generator=generator)


@pytest.fixture(scope="module")
def fitted():
    """1,500 points, and M=4 codebooks of K=32 fitted to them."""
    x = clustered(1500)
    return x, fit(x, codebooks=4, centroids=32, seed=0)


def faiss_quantiser(books: torch.Tensor, beam: int):
    """faiss's ResidualQuantizer with our codebooks in it."""
    faiss = pytest.importorskip("faiss")
    m, k, width = books.shape
    quantiser = faiss.ResidualQuantizer(width, m, int(math.log2(k)))
    faiss.copy_array_to_vector(books.numpy().ravel(), quantiser.codebooks)
    quantiser.is_trained, quantiser.max_beam_size = True, beam
    return quantiser


def faiss_codes(quantiser, x: torch.Tensor) -> torch.Tensor:
    faiss = pytest.importorskip("faiss")
    packed = quantiser.compute_codes(x.numpy())
    return torch.from_numpy(
        faiss.unpack_bitstrings(packed, quantiser.M, quantiser.nbits.at(0)).astype(np.int64)
    )


def mse(x: torch.Tensor, books: torch.Tensor, codes: torch.Tensor) -> float:
    return (x - decode(books, codes)).double().pow(2).sum(1).mean().item()


# --------------------------------------------------------------------------------------------- encode, decode


def test_greedy_encoding_equals_faiss_with_beam_1(fitted):
    _, books = fitted
    x = clustered(2000, seed=1)  # points the codebooks have not seen
    assert torch.equal(encode(x, books, beam=1), faiss_codes(faiss_quantiser(books, 1), x))


def test_greedy_encoding_is_the_nearest_centroid_of_each_residual(fitted):
    x, books = fitted[0][:50], fitted[1]
    for point, codes in zip(x, encode(x, books, beam=1)):
        for book, code in zip(books, codes):
            assert code == (point - book).norm(dim=1).argmin()
            point = point - book[code]


def test_beam_encoding_is_no_worse_than_faiss_and_better_than_greedy(fitted):
    _, books = fitted
    x = clustered(2000, seed=1)
    ours, greedy = encode(x, books, beam=5), encode(x, books, beam=1)
    theirs = faiss_codes(faiss_quantiser(books, 5), x)
    assert mse(x, books, ours) <= mse(x, books, theirs) * (1 + 1e-6)
    assert mse(x, books, ours) < 0.99 * mse(x, books, greedy)


def test_a_beam_as_wide_as_all_codes_finds_the_least_error():
    torch.manual_seed(0)
    books, x = torch.randn(3, 4, 5), torch.randn(100, 5)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)  # all 64 docids
    best = torch.cdist(x.double(), decode(books, every).double()).argmin(1)
    assert torch.equal(encode(x, books, beam=64), every[best])


def residual_beam_encode(x: torch.Tensor, books: torch.Tensor, beam: int) -> torch.Tensor:
    """The beam search written with residuals: every partial encoding's, compared with every centroid."""
    codes, residual = torch.empty(len(x), 1, 0, dtype=torch.long), x[:, None]
    for book in books:
        error = (residual[:, :, None] - book).pow(2).sum(-1).flatten(1)
        best = error.topk(min(beam, error.shape[1]), dim=1, largest=False).indices
        parent, code = best // len(book), best % len(book)
        row = torch.arange(len(x))[:, None]
        codes = torch.cat([codes[row, parent], code[..., None]], dim=2)
        residual = residual[row, parent] - book[code]
    return codes[:, 0]


@pytest.mark.parametrize("beam", [1, 2, 5, 40])
def test_encoding_by_inner_products_equals_encoding_by_residuals(fitted, beam):
    x, books = fitted[0][:200], fitted[1]
    assert torch.equal(encode(x, books, beam), residual_beam_encode(x, books, beam))


def test_cross_products_are_those_of_all_earlier_centroids():
    books = torch.tensor([[[1.0, 2], [0, 1]], [[3.0, 0], [1, 1]], [[0.0, 5], [2, 2]]])
    first, second, third = rq.cross_products(books)
    assert first.shape == (0, 2) and second.tolist() == [[6, 6], [0, 2]]
    assert third.tolist() == [[20, 12], [10, 4], [0, 12], [10, 8]]


def test_encoding_by_hand():
    books = torch.tensor([[[0.0, 0], [10, 0], [0, 10]], [[1.0, 0], [0, 1], [-2, -2]]])
    x = torch.tensor([[10.0, 1.2], [0.9, 0], [-2, 8.5]])
    assert encode(x, books, beam=1).tolist() == [[1, 1], [0, 0], [2, 2]]
    assert decode(books, torch.tensor([[1, 1], [2, 2]])).tolist() == [[10, 1], [-2, 8]]


def test_decode_is_the_sum_of_the_centroids(fitted):
    _, books = fitted
    codes = torch.randint(32, (3, 7, 4), generator=torch.Generator().manual_seed(0))
    want = (
        books[0, codes[..., 0]] + books[1, codes[..., 1]] + books[2, codes[..., 2]] + books[3, codes[..., 3]]
    )
    torch.testing.assert_close(decode(books, codes), want)
    quantiser = faiss_quantiser(books, 1)
    x = clustered(20)
    theirs = torch.from_numpy(quantiser.decode(quantiser.compute_codes(x.numpy())))
    torch.testing.assert_close(decode(books, encode(x, books, beam=1)), theirs, atol=1e-5, rtol=1e-5)


def test_encoding_does_not_depend_on_the_batch(fitted):
    x, books = fitted
    assert torch.equal(encode(x, books, batch=7), encode(x, books))


# -------------------------------------------------------------------------------------------------------- fit


def test_each_codebook_lowers_the_error(fitted):
    x, books = fitted
    errors = [mse(x, books[:m], encode(x, books[:m])) for m in range(1, 5)]
    assert x.var(0, unbiased=False).sum() > errors[0] and errors == sorted(set(errors), reverse=True)
    assert errors[3] < 0.5 * errors[0]


def test_fit_is_decided_by_the_seed():
    x = clustered(300)
    a, b, c = (fit(x, codebooks=2, centroids=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_fit_is_no_worse_than_faiss_on_the_same_points(fitted):
    faiss = pytest.importorskip("faiss")
    x, books = fitted
    theirs = faiss.ResidualQuantizer(16, 4, 5)
    theirs.train(x.numpy())
    error = np.square(x.numpy() - theirs.decode(theirs.compute_codes(x.numpy()))).sum(1).mean()
    assert mse(x, books, encode(x, books)) <= 1.1 * error


def test_as_many_centroids_as_points_leave_no_error():
    x = clustered(16)
    books = fit(x, codebooks=1, centroids=16, seed=0)
    assert sorted(encode(x, books)[:, 0].tolist()) == list(range(16))
    assert mse(x, books, encode(x, books)) < 1e-9


def test_fewer_points_than_centroids_are_refused_with_a_k_that_fits():
    with pytest.raises(
        ValueError, match=r"^K=128 centroids need 128 points, D_0 has 100 documents: pass --K 64$"
    ):
        fit(clustered(100), codebooks=2, centroids=128, seed=0)


class SpyKmeans:
    """faiss's k-means, and the points that each level gave it."""

    def __init__(self, faiss, monkeypatch):
        self.points = []
        spy, kmeans = self, faiss.Kmeans

        class Recording(kmeans):
            def train(self, points):
                spy.points.append(torch.from_numpy(points.copy()))
                return super().train(points)

        monkeypatch.setattr(faiss, "Kmeans", Recording)


@pytest.mark.parametrize("most", [40, 100, 150])
def test_more_points_than_k_means_would_take_are_sampled_and_are_residuals_still(monkeypatch, most):
    monkeypatch.setattr(rq, "POINTS_PER_CENTROID", 1)
    monkeypatch.setattr(rq, "MOST_POINTS", most)
    spy, x = SpyKmeans(rq.faiss, monkeypatch), clustered(120)
    books = fit(x, codebooks=2, centroids=8, seed=0, beam=3)
    first, second = spy.points
    assert len(first) == min(most, 120) and len(second) == min(most, 3 * min(most, 120))
    assert len(torch.unique(first, dim=0)) == len(first)  # drawn without putting back
    assert (torch.cdist(first.double(), x.double()).min(1).values < 1e-4).all()
    left = (x[:, None] - books[0]).flatten(0, 1)  # of any point by any first centroid
    assert (torch.cdist(second.double(), left.double()).min(1).values < 1e-4).all()


def test_a_sample_is_the_seed_s_and_fits_nearly_as_well(monkeypatch):
    x = clustered(3000)
    whole = fit(x, codebooks=2, centroids=16, seed=0)
    monkeypatch.setattr(rq, "POINTS_PER_CENTROID", 40)
    monkeypatch.setattr(rq, "MOST_POINTS", 600)
    one, same, other = (fit(x, codebooks=2, centroids=16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert mse(x, one, encode(x, one)) < 1.15 * mse(x, whole, encode(x, whole))


# --------------------------------------------------------------------------------------- docids from elsewhere


def test_codebooks_of_given_docids_are_means_by_hand():
    x = torch.tensor([[1.0, 0], [3, 0], [10, 4], [0, 8]])
    codes = torch.tensor([[0, 1], [0, 2], [2, 1], [1, 1]])
    first = [[2.0, 0], [0, 8], [10, 4], [0, 0]]  # code 3 has no document
    # what is left: (-1, 0), (1, 0), (0, 0), (0, 0); second codes 1, 2, 1, 1
    second = [[0.0, 0], [-1 / 3, 0], [1, 0], [0, 0]]
    books = fit_to_docids(x, codes, 4, sweeps=1)
    torch.testing.assert_close(books, torch.tensor([first, second]))
    assert x.tolist() == [[1, 0], [3, 0], [10, 4], [0, 8]]  # the embeddings are left alone


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codebooks_of_given_docids_equal_a_loop_over_codes(seed):
    generator = torch.Generator().manual_seed(seed)
    x, codes = torch.randn(60, 5, generator=generator), torch.randint(6, (60, 3), generator=generator)
    books, left = fit_to_docids(x, codes, 7, sweeps=1), x.double().clone()
    for m in range(3):
        for k in range(7):
            chosen = codes[:, m] == k
            mean = left[chosen].mean(0) if chosen.any() else torch.zeros(5, dtype=torch.double)
            torch.testing.assert_close(books[m, k].double(), mean, atol=1e-5, rtol=0)
            left[chosen] -= mean
    assert not books[:, 6].any()


def test_codebooks_of_given_docids_have_less_error_than_those_that_made_them(fitted):
    """Each sweep is a least-squares step, so that none raises the error; and no small change lowers it much."""
    x, original = fitted
    codes = encode(x, original)
    errors = [mse(x, fit_to_docids(x, codes, 32, sweeps), codes) for sweeps in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < mse(x, original, codes)
    books = fit_to_docids(x, codes, 32)
    for seed in range(5):
        moved = books + 0.05 * torch.randn(books.shape, generator=torch.Generator().manual_seed(seed))
        assert mse(x, books, codes) < mse(x, moved, codes)


def test_docids_that_tell_all_documents_apart_leave_no_error():
    x = clustered(16)
    codes = torch.stack([torch.arange(16), torch.zeros(16, dtype=torch.long)], dim=1)
    books = fit_to_docids(x, codes, 16)
    torch.testing.assert_close(decode(books, codes), x, atol=1e-6, rtol=0)
    assert books[1].abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------- report


def test_report_by_hand():
    books = torch.zeros(2, 5, 2)
    books[0, 1], books[1, 2] = torch.tensor([2.0, 0]), torch.tensor([0, 1.0])
    codes = torch.tensor([[0, 0], [0, 0], [1, 2], [1, 3]])
    x = torch.tensor(
        [[0.0, 0], [0, 0], [2, 1], [2, 3]]
    )  # only the last is off, by (0, 3); mean (1, 1), squares 4 + 6
    found = report(x, books, codes)
    assert (found.documents, found.distinct, found.used) == (4, 0.75, [0.4, 0.6])
    assert found.entropy == pytest.approx([1.0, 1.5])  # (1/2, 1/2), and (1/2, 1/4, 1/4)
    assert found.error == pytest.approx(9 / 10)
    assert "4 documents, 75.0% distinct" in str(found) and "used 40% 60%, entropy 1.0 1.5 bits" in str(found)


def test_report_in_chunks_is_that_of_all(fitted, monkeypatch):
    x, books = fitted
    codes = encode(x, books)
    whole = report(x, books, codes)
    wanted = (x - decode(books, codes)).double().pow(2).sum() / (x - x.mean(0)).double().pow(2).sum()
    assert whole.error == pytest.approx(wanted.item(), rel=1e-5)
    monkeypatch.setattr(rq, "CHUNK", 7)
    parts = report(x, books, codes)
    assert vars(parts) | {"error": None} == vars(whole) | {"error": None}
    assert parts.error == pytest.approx(whole.error, rel=1e-5)


def test_one_docid_for_all_has_no_entropy():
    found = report(torch.randn(5, 2), torch.zeros(1, 4, 2), torch.zeros(5, 1, dtype=torch.long))
    assert (found.distinct, found.used, found.entropy) == (0.2, [0.25], [0.0])


def test_too_many_collisions_are_refused_with_a_larger_docid():
    found = Report(1000, 0.9, used=[1.0] * 6, entropy=[5.0] * 6, error=0.2)
    with pytest.raises(
        ValueError, match=r"D_0's 1000 different documents have only 90.0% as many .* 95%.* --M 7 --K 32"
    ):
        require_distinct(found, 1000)
    require_distinct(replace(found, distinct=0.95), 1000)  # exactly as many as wanted will do


def test_of_few_documents_one_may_share_its_docid_and_two_may_not():
    require_distinct(Report(12, 11 / 12, used=[1.0] * 4, entropy=[1.5] * 4, error=0.2), 12)
    with pytest.raises(ValueError, match=r"D_0's 12 different documents have only 83\.3% as many docids"):
        require_distinct(Report(12, 10 / 12, used=[1.0] * 4, entropy=[1.5] * 4, error=0.2), 12)


def test_equal_documents_may_share_a_docid():
    """Of 1000 documents 100 are copies: 900 docids tell all of the others apart."""
    require_distinct(Report(1000, 0.9, used=[1.0] * 6, entropy=[5.0] * 6, error=0.2), 900)


def test_error_of_equal_documents_is_a_finite_number():
    x = torch.full((10, 4), 0.3) + 1e-8 * torch.randn(10, 4)
    assert 0 <= report(x, torch.full((1, 2, 4), 0.3), torch.zeros(10, 1, dtype=torch.long)).error < 1
    assert report(0 * x, torch.zeros(1, 2, 4), torch.zeros(10, 1, dtype=torch.long)).error == 0


def test_suggested_docids_have_twice_the_bits_that_tell_documents_apart():
    assert doctest.testmod(rq).failed == 0 and rq.suggest(1551) == (4, 64)
    for n in (1, 5, 64, 1000, 98_743, 8_841_823):
        m, k = rq.suggest(n)
        assert m * math.log2(k) >= 2 * math.log2(n) and m >= 4 and k in [2**bits for bits in range(2, 12)]
        assert n < 64 or 16 * k <= n  # sixteen documents a centroid to learn it from


# ------------------------------------------------------------------------------------------------------- trie


def brute_children(docids: list[tuple], prefix: tuple) -> list[int]:
    return sorted({docid[len(prefix)] for docid in docids if docid[: len(prefix)] == prefix})


def check_against_brute_force(trie: Trie, codes: list[tuple], documents: list[int]) -> None:
    """Walks the whole trie level by level and compares every node's children, and every leaf's documents."""
    centroids = max(max(docid) for docid in codes) + 2
    prefixes, nodes = [()], trie.root()
    for depth in range(len(codes[0])):
        allowed = trie.allowed(depth, nodes, centroids)
        assert [row.nonzero()[:, 0].tolist() for row in allowed] == [
            brute_children(codes, p) for p in prefixes
        ]
        parent, code = (torch.ones_like(allowed)).nonzero().T  # those that do not exist too
        below = trie.child(depth, nodes[parent], code)
        assert torch.equal((below[:, 0] < below[:, 1]).view(len(nodes), -1), allowed)
        prefixes = [(*prefixes[p], c) for p, c in allowed.nonzero().tolist()]
        nodes = below[allowed.flatten()]
    assert prefixes == sorted(set(codes))
    for leaf, docid in zip(nodes.tolist(), prefixes, strict=True):
        found = trie.documents_at(leaf)
        assert found == sorted(doc for doc, code in zip(documents, codes) if code == docid)


# few values, so that prefixes and whole docids repeat; up to five codes
docids = st.integers(1, 5).flatmap(
    lambda m: st.lists(st.tuples(*[st.integers(0, 2)] * m), min_size=1, max_size=30)
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(docids, st.randoms(use_true_random=False))
def test_trie_equals_a_set_of_tuples(codes, random):
    documents = random.sample(range(100), len(codes))
    trie = Trie(torch.tensor(codes), torch.tensor(documents))
    rows = list(zip(map(tuple, trie.rows.tolist()), trie.documents.tolist()))
    assert rows == sorted(zip(codes, documents))
    check_against_brute_force(trie, codes, documents)


def test_documents_are_numbered_by_row_where_none_are_given():
    trie = Trie(torch.tensor([[1, 0], [0, 2], [1, 0]]))
    assert [trie.documents_at(leaf) for leaf in ([0, 1], [1, 3])] == [[1], [0, 2]]


def test_codes_sort_as_numbers_up_to_the_papers_k():
    codes = torch.randint(2048, (500, 8), generator=torch.Generator().manual_seed(0))
    codes[250:, :4] = codes[:250, :4]  # shared prefixes
    trie = Trie(codes)
    assert trie.rows.tolist() == sorted(codes.tolist())
    check_against_brute_force(trie, list(map(tuple, codes.tolist())), list(range(500)))


def test_one_document_is_one_path():
    trie, node = Trie(torch.tensor([[3, 1, 2]]), torch.tensor([7])), torch.tensor([[0, 1]])
    assert torch.equal(trie.root(), node)
    for depth, code in enumerate((3, 1, 2)):
        assert trie.allowed(depth, node, 4)[0].nonzero().tolist() == [[code]]
        assert torch.equal(trie.child(depth, node, torch.tensor([code])), node)
    assert trie.documents_at([0, 1]) == [7]


def test_documents_that_all_share_a_docid_are_one_leaf():
    trie = Trie(torch.tensor([[3, 1]] * 4), torch.tensor([9, 2, 5, 4]))
    assert trie.documents_at([0, 4]) == [2, 4, 5, 9] and trie.documents_at([2, 2]) == []


def test_an_empty_run_has_no_children():
    trie, nowhere = Trie(torch.tensor([[0, 1], [2, 1]])), torch.tensor([[1, 1], [0, 2]])
    assert trie.allowed(0, nowhere, 3).tolist() == [[False] * 3, [True, False, True]]
    below = trie.child(0, nowhere, torch.tensor([2, 2]))
    assert below[0, 0] == below[0, 1] and below[1].tolist() == [1, 2]


@pytest.mark.parametrize("shape", ["few prefixes", "random", "one long tail", "all alike"])
def test_crowded_nodes_list_their_children_and_equal_a_search_through_their_rows(shape):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(7, (3000, 4), generator=generator)
    if shape == "few prefixes":
        codes[:, :3] %= 2
    elif shape == "one long tail":
        codes[100:, :3] = 1
    elif shape == "all alike":
        codes[:] = 5
    trie = Trie(codes)
    assert trie.nbytes() <= len(codes) * (2 * 4 + 4 + 4 / 2) + 64
    check_against_brute_force(trie, list(map(tuple, codes.tolist())), list(range(3000)))
    plain = Trie(codes)
    plain.starts = [starts[:0] for starts in plain.starts]  # every row is looked at
    assert sum(map(len, trie.starts)) > 0
    check_against_brute_force(plain, list(map(tuple, codes.tolist())), list(range(3000)))


def test_a_trie_of_the_papers_docid_takes_at_most_24_bytes_a_document():
    generator = torch.Generator().manual_seed(2)
    for n in (1000, 30_000, 300_000):
        assert Trie(torch.randint(2048, (n, 8), generator=generator)).nbytes() <= 24 * n


def clustered_12(n: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    """Points around 20 centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(20, width, generator=generator)
    return centres[torch.randint(20, (n,), generator=generator)] + torch.randn(n, width, generator=generator)


# ---------------------------------------------------------------------------------------- product quantisation


def test_pq_codes_are_the_nearest_centroid_of_each_sub_space():
    x = clustered_12(600)
    books = rq.fit_product(x[:400], 3, 32, seed=0)
    codes = rq.encode(x, books, beam=1)
    for m in range(3):
        own = slice(4 * m, 4 * m + 4)
        assert torch.equal(codes[:, m], torch.cdist(x[:, own].double(), books[m, :, own].double()).argmin(1))
        outside = books[m].clone()
        outside[:, own] = 0
        assert not outside.any()


def test_pq_equals_faiss_s_with_the_same_centroids_and_is_fitted_as_well():
    faiss = pytest.importorskip("faiss")
    x = clustered_12(600)
    books = rq.fit_product(x, 3, 32, seed=0)
    codes = rq.encode(x, books, beam=1)
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
    x = clustered_12(16)
    books = rq.fit_product(x, 4, 16, seed=0)
    codes = rq.encode(x, books, beam=1)
    torch.testing.assert_close(rq.decode(books, codes), x, atol=1e-5, rtol=0)
    assert [sorted(column) for column in codes.T.tolist()] == [list(range(16))] * 4


@pytest.mark.parametrize("m, fits", [(5, 4), (8, 6), (11, 12), (13, 12)])
def test_pq_refuses_parts_of_unequal_width_with_one_that_fits(m, fits):
    with pytest.raises(ValueError, match=rf"12 columns into M={m} equal parts.*--M {fits}$"):
        rq.fit_product(clustered_12(100), m, 16, 0)


def test_pq_refuses_fewer_documents_in_d0_than_centroids():
    with pytest.raises(
        ValueError, match=r"^K=128 centroids need 128 points, D_0 has 100 documents: pass --K 64$"
    ):
        rq.fit_product(clustered_12(100), 2, 128, 0)


def test_pq_is_the_seed_s_and_leaves_the_embeddings_alone():
    x = clustered_12(600)
    before, state = x.clone(), torch.get_rng_state()
    one, same, other = (rq.fit_product(x, 3, 32, seed) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


def test_atomic_docids_stop_where_int16_does():
    rq.require_few(32_767)
    with pytest.raises(ValueError, match="found 32768 documents, wanted at most 32767 .*int16; take fewer"):
        rq.require_few(32_768)
