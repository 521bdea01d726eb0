"""Dreams against brute force: which words a docid has, how they are drawn, and for which docids."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from toy import TOY

import data
import dream
import prepare
import store
import train
from config import parse
from dream import FEWEST, LEAST, MOST, NOISE, TOP, Dreams, choose, dreams, word_pieces
from t5 import T5, T5Config

WORDS, WIDTH, M, K = 60, 8, 2, 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def some() -> Dreams:
    """Dreams of 60 words, whose token ids are 100, 103, .., by embeddings and a prior that are drawn."""
    g = seeded()
    embeddings, books = torch.randn(WORDS, WIDTH, generator=g), torch.randn(M, K, WIDTH, generator=g)
    prior = torch.rand(WORDS, generator=g).log()
    return Dreams(100 + 3 * torch.arange(WORDS), embeddings, prior, books)


CODES = torch.tensor([[a, b] for a in range(K) for b in range(K)])


# ---------------------------------------------------------------------------------------------- words of a docid


def test_words_of_a_docid_are_those_of_the_largest_inner_products_with_its_vector(some):
    numbers, _ = some.words(CODES)
    for codes, found in zip(CODES.tolist(), numbers.tolist()):
        vector = some.books[0, codes[0]] + some.books[1, codes[1]]
        products = [float(vector @ word) for word in some.embeddings]
        assert found == sorted(range(WORDS), key=lambda word: -products[word])[:TOP]


def test_a_word_s_probability_falls_with_its_inner_product_and_the_last_is_e_to_minus_3_of_the_first(some):
    numbers, p = some.words(CODES)
    torch.testing.assert_close(p.sum(1), torch.ones(len(CODES)))
    torch.testing.assert_close((p[:, -1] / p[:, 0]).log(), torch.full((len(CODES),), -3.0))
    vector = some.books[0, 0] + some.books[1, 0]
    products = some.embeddings[numbers[0]] @ vector
    share = (products - products[-1]) / (products[0] - products[-1])  # 1 for the first, 0 for the last
    torch.testing.assert_close((p[0] / p[0, 0]).log(), 3 * (share - 1), rtol=1e-4, atol=1e-5)


def test_words_that_are_equally_near_are_equally_likely():
    same = Dreams(torch.arange(TOP), torch.ones(TOP, 3), torch.zeros(TOP), torch.ones(1, 2, 3))
    torch.testing.assert_close(same.words(torch.tensor([[1]]))[1], torch.full((1, TOP), 1 / TOP))


# ------------------------------------------------------------------------------------------------- what is drawn


def parts(dream: list[int]) -> tuple[list[int], list[int]]:
    """The words of a dream, which end with </s>, and what follows them."""
    end = dream.index(data.EOS)
    return dream[:end], dream[end + 1 :]


@pytest.fixture(scope="module")
def apart() -> Dreams:
    """Dreams whose noise is of the words 140 to 148, which no docid has, 140 the most likely."""
    g, n = seeded(1), TOP + 9
    embeddings, books = torch.randn(n, WIDTH, generator=g), torch.randn(M, K, WIDTH, generator=g)
    embeddings[:, 0], embeddings[TOP:], books[:, :, 0] = 50.0, 0.0, 50.0  # 40 words are near all docids
    prior = torch.full((n,), -torch.inf)
    prior[TOP:] = -0.5 * torch.arange(9)
    return Dreams(100 + torch.arange(n), embeddings, prior, books)


def test_a_dream_holds_2_to_4_words_of_its_docid_and_0_to_4_of_noise_then_eos_then_padding(apart):
    drawn = apart.draw(CODES.repeat(40, 1), seeded())
    assert drawn.shape == (1000, MOST + NOISE + 1)
    counts, noise_first = {}, 0
    for row in drawn.tolist():
        words, rest = parts(row)
        assert set(rest) <= {data.PAD} and min(words) >= 100 and max(words) < 149
        own = [word for word in words if word < 140]
        assert len(set(own)) == len(own)  # a docid's words are drawn without repetition
        size = len(own), len(words) - len(own)
        counts[size] = counts.get(size, 0) + 1
        noise_first += words[0] >= 140
    sizes = [(own, noise) for own in range(FEWEST, MOST + 1) for noise in range(NOISE + 1)]
    assert counts.keys() == set(sizes)
    assert chisquare([counts[size] for size in sizes]).pvalue > 0.01
    share = sum(noise / (own + noise) for own, noise in sizes) / len(sizes)  # where the order is a shuffle
    assert noise_first / 1000 == pytest.approx(share, abs=0.05)


def with_sizes(some: Dreams, most: int, noise: int) -> Dreams:
    return Dreams(some.pieces, some.embeddings, some.prior.log(), some.books, most, noise)


def test_words_follow_the_docid_s_probabilities_and_noise_the_prior(apart):
    codes, one = (
        torch.tensor([[1, 3]]),
        with_sizes(apart, most=1, noise=4),
    )  # so that no word is left out for another
    (numbers,), (p,) = one.words(codes)
    drawn = one.draw(codes.expand(20_000, -1), seeded())
    counts = torch.bincount(drawn[drawn >= 100] - 100, minlength=TOP + 9).double()
    assert counts[:TOP].sum() == 20_000
    wanted = torch.zeros(TOP, dtype=torch.double).index_put((numbers,), p.double())
    assert chisquare(counts[:TOP], 20_000 * wanted / wanted.sum()).pvalue > 0.01
    prior = one.prior[TOP:] / one.prior.sum()
    assert chisquare(counts[TOP:], counts[TOP:].sum() * prior).pvalue > 0.01


@pytest.mark.parametrize("most, noise", [(1, 0), (2, 0), (3, 8), (8, 1)])
def test_other_numbers_of_words_and_of_noise_are_all_drawn(apart, most, noise):
    drawn = with_sizes(apart, most, noise).draw(CODES.repeat(40, 1), seeded())
    sizes = set()
    for row in drawn.tolist():
        words, _ = parts(row)
        own = sum(100 <= word < 140 for word in words)
        sizes.add((own, len(words) - own))
    assert sizes == {(a, b) for a in range(min(FEWEST, most), most + 1) for b in range(noise + 1)}


def test_the_same_seed_draws_the_same_dreams_in_whatever_chunks_of_another_seed_others(some, monkeypatch):
    codes = CODES.repeat(4, 1)
    one, same, other = (some.draw(codes, seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    monkeypatch.setattr("dream.CHUNK", 30)
    chunks = some.draw(codes, seeded(7))
    assert chunks.shape == one.shape
    for drawn, (near, _) in zip(chunks.tolist(), zip(*some.words(codes))):
        own = {some.pieces[number].item() for number in near.tolist()}
        assert len(own & set(drawn)) >= FEWEST  # each of its own docid


# -------------------------------------------------------------------------------------------- for which docids


def test_half_of_the_rows_are_balanced_by_corpus_and_half_by_document():
    """Corpora of 600, 10 and 30 documents."""
    ends, n = [600, 610, 640], 60_000
    rows = choose(ends, n, seeded())
    assert len(rows) == n and rows.min() == 0 and rows.max() == 639
    corpus = torch.bucketize(rows, torch.tensor(ends), right=True)
    balanced, by_document = corpus[: n // 2], corpus[n // 2 :]
    assert chisquare(torch.bincount(balanced)).pvalue > 0.01
    assert chisquare(torch.bincount(by_document), n / 2 * torch.tensor([60, 1, 3]) / 64).pvalue > 0.01
    for t, (first, end) in enumerate(zip([0, *ends], ends)):  # within a corpus every document alike
        counts = torch.bincount(rows[: n // 2][balanced == t] - first, minlength=end - first)
        assert len(counts) == end - first and chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("ends, count", [([1], 5), ([3, 4], 1), ([2, 3, 10_000], 7)])
def test_any_number_of_rows_is_chosen_and_none_beyond_the_last_document(ends, count):
    for seed in range(50):
        rows = choose(ends, count, seeded(seed))
        assert len(rows) == count and rows.min() >= 0 and rows.max() < ends[-1]


# --------------------------------------------------------------------------------------------------------- words


def vocabulary(*pieces: str) -> SimpleNamespace:
    """A tokenizer with these pieces."""
    return SimpleNamespace(
        vocab_size=lambda: len(pieces), id_to_piece=pieces.__getitem__, get_score=lambda piece: -float(piece)
    )


@pytest.mark.parametrize(
    "piece, kept",
    [
        ("▁word", True), ("▁Été", True), ("▁cat", True), ("▁слово", True),
        ("▁is", False), ("▁", False), ("word", False), ("▁word's", False), ("▁1989", False), ("▁c3po", False),
        ("</s>", False), ("<unk>", False), ("▁---", False),
        ("東京", True), ("▁東", True), ("の", True), ("ไทย", True), ("。", False),
        ("▁हिन्दी", True), ("▁கிளி", True), ("▁दो", False), ("ที่", True), ("ี่", False), ("▁e\u0301te\u0301", True),
    ],
)  # fmt: skip
def test_words_begin_with_a_space_and_have_three_letters_or_are_of_a_script_without_spaces(piece, kept):
    assert word_pieces(vocabulary("<pad>", "</s>", piece)).tolist() == [2] * kept


def test_dreams_of_a_tokenizer_use_its_words_their_scores_and_their_embeddings_as_queries():
    names = [f"▁word{'abcdefgh'[i // 8]}{'abcdefgh'[i % 8]}" for i in range(TOP)]
    model = T5(T5Config(TOP + 3, 16, 8, 2, 32, 1, 1, dropout=0.1, codebooks=1, centroids=4))
    made = dreams(model, vocabulary("<pad>", "</s>", "x", *names), torch.randn(1, 4, 16))
    assert made.pieces.tolist() == list(range(3, TOP + 3))
    torch.testing.assert_close(made.prior.log(), -made.pieces.double())
    asked = torch.tensor([[5, data.EOS]])
    torch.testing.assert_close(made.embeddings[2], model.eval().embed(asked)[0])
    assert dreams(model, vocabulary("<pad>", "</s>", "x", *names[: LEAST - 1]), torch.randn(1, 4, 16)) is None


def test_a_docid_has_as_many_words_as_there_are():
    one = Dreams(torch.arange(12), torch.randn(12, 3), torch.zeros(12), torch.randn(2, 4, 3))
    words, p = one.words(torch.tensor([[1, 2]]))
    assert sorted(words[0].tolist()) == list(range(12)) and p.shape == (1, 12)


def test_too_few_words_are_a_warning_or_where_dreams_were_asked_for_an_error(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(dream, "LEAST", 500)
    flags = ["--data", str(toy), "--splits", "80,20", *TOY, "--no-baselines", "--vocab", "60", "--steps", "2"]
    asked = parse([*flags, "--run", str(tmp_path / "run")])
    train.execute(asked, quiet=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "warning: the tokenizer has fewer than 500 words, too few for dreams; going on without" in log
    assert "D1 step 2/2" in log and " dream " not in log
    run = prepare.Run(asked.config, tmp_path / "run", store.Log(tmp_path, quiet=True))
    made = run.after(0)[0], store.read_tensors(tmp_path / "run" / "rq.pt")
    with pytest.raises(ValueError, match="fewer than 500 words, .*pass a larger --vocab, or --dreams 0"):
        prepare.find_dreams(run, *made, wanted=True)
    run.config.dreams = 0  # as asked for; pooled energies would be measured by dreams, and go without
    assert prepare.find_dreams(run, *made, wanted=True) is None
    run.config.ood_mode = "paper_code"
    run.tokenizer = None  # dreams are not even looked for
    assert prepare.find_dreams(run, *made, wanted=True) is None
