"""Pseudo-queries: drawn from a text by hand-checked rules, or listed in a file and stored by corpus."""

import json
import math
import random
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arrays
import queries
from data import Corpus, check_no_leak
from queries import (
    Idf,
    ListedPseudoQueries,
    PseudoQuerySampler,
    draw_pseudo_queries,
    query_digest,
    store_pseudo_queries,
)
from reading import Problems, read_pseudo_queries

FUZZ = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def digests(texts) -> frozenset[int]:
    return frozenset(map(query_digest, texts))


def two_corpora() -> list[Corpus]:
    numbers = ([0, 1], [2, 3])
    return [
        Corpus(
            part[0], [f"d{i}" for i in part], [f"title{i}" for i in part], [f"text number {i}" for i in part]
        )
        for part in numbers
    ]


def texts_of(corpora: list[Corpus]) -> list[tuple]:
    return [(corpus.ids, corpus.titles, corpus.texts) for corpus in corpora]


# ------------------------------------------------------------------------------------------------ words and IDF


def test_idf_by_hand():
    idf = Idf(["The cat", "the dog the", "a bird", "THE end"])
    assert (
        idf("the") == idf("THE") == pytest.approx(math.log(1 + 4 / 3))
    )  # in three of four documents, however often
    assert idf("cat") == pytest.approx(math.log(1 + 4 / 1))
    assert idf("unseen") == pytest.approx(math.log(1 + 4 / 0.5))


def test_idf_comes_back_as_saved(tmp_path):
    idf = Idf(["The cat", "İstanbul naïve", "a cat's \u6f22\u5b57"])
    idf.save(tmp_path / "idf.json")
    again = Idf.load(tmp_path / "idf.json")
    assert (again.n_documents, again.counts) == (3, idf.counts)
    assert [again(word) for word in ("cat", "naïve", "new")] == [
        idf(word) for word in ("cat", "naïve", "new")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"documents": 3}',
        '{"documents": 0, "counts": {}}',
        '{"documents": 2, "counts": {"a": "b"}}',
    ],
)
def test_file_without_counts_of_words_is_refused_by_name(tmp_path, text):
    (tmp_path / "idf.json").write_text(text)
    with pytest.raises(ValueError, match="idf.json: .* take it from a copy of the folder"):
        Idf.load(tmp_path / "idf.json")


def test_queries_count_as_the_same_whatever_their_case_and_punctuation():
    assert query_digest(" Who  is KING?") == query_digest("who is king") != query_digest("who is kin g")


# ---------------------------------------------------------------------------------------------- pseudo-queries


def texts_of_numbers() -> Corpus:
    """Documents of 3 sentences of 12 words each, none a question word, all different; first row 7."""
    sentences = [[" ".join(f"w{d}x{s}x{i}" for i in range(12)) + "." for s in range(3)] for d in range(4)]
    return Corpus(
        7, list("abcd"), ["Alpha Beta", "", "Gamma", "Delta"], [" ".join(parts) for parts in sentences]
    )


def sampler_of(corpus: Corpus, excluded=()) -> PseudoQuerySampler:
    idf = Idf(corpus.passages())
    return PseudoQuerySampler(corpus.titles, corpus.texts, idf, digests(excluded), corpus.first_row)


def test_pseudo_query_words_are_the_document_s_the_title_s_or_a_leading_question_word():
    corpus = texts_of_numbers()
    sampler, rng, led = sampler_of(corpus), random.Random(0), 0
    for row in corpus.rows:
        title, text = (queries.words(part[row - 7]) for part in (corpus.titles, corpus.texts))
        for _ in range(300):
            query = sampler.draw(row, rng).split()
            led += query[0] in queries.QUESTION_WORDS
            rest = query[1:] if query[0] in queries.QUESTION_WORDS else query
            assert rest and set(rest) <= {*title, *text}
            in_text = [text.index(word) for word in rest if word not in title]
            assert in_text == sorted(in_text)  # kept in text order
            assert not in_text or in_text[-1] - in_text[0] < 40
    assert 0.3 < led / 1200 < 0.45  # half of three in four


def test_words_are_drawn_by_inverse_document_frequency():
    """`rare` stands in one of 101 documents, `common` in all: weights ln 102 and ln 2, 6.7 to one."""
    corpus = Corpus(0, [str(i) for i in range(101)], [""] * 101, ["common rare", *["common"] * 100])
    sampler, rng = sampler_of(corpus), random.Random(0)
    title, document, weights, _ = sampler._document(0)
    drawn = [sampler._keywords(title, document, weights, rng) for _ in range(400)]
    assert sum("rare" in query for query in drawn) / 400 > 0.97  # 1 - (ln 2 / ln 204)^k, k >= 2
    assert 0.3 < sum("common" in query for query in drawn) / 400 < 0.65


def test_crops_are_contiguous_in_one_sentence_of_the_document():
    corpus = texts_of_numbers()
    sampler, rng, lengths = sampler_of(corpus), random.Random(0), set()
    sentences = [[queries.words(s) for s in text.split(". ")] for text in corpus.texts]
    for i in range(4):
        for _ in range(100):
            crop = sampler._crop(sampler._document(corpus.first_row + i)[3], rng)
            lengths.add(len(crop))
            assert any(crop == s[k : k + len(crop)] for s in sentences[i] for k in range(12))
    assert lengths == set(range(5, 13))  # a sentence has 12 words, a crop 5 to 14


def test_same_seed_gives_the_same_list_of_every_row():
    corpus = texts_of_numbers()
    one, same = (draw_pseudo_queries(sampler_of(corpus), corpus.rows, 6, "a") for _ in range(2))
    assert one == same != draw_pseudo_queries(sampler_of(corpus), corpus.rows, 6, "b")
    assert [row for row, _ in one] == [row for row in corpus.rows for _ in range(6)]


def test_draws_of_a_document_are_the_same_whatever_was_drawn_of_others_before():
    corpus = texts_of_numbers()
    fresh = [sampler_of(corpus).draw(9, random.Random(i)) for i in range(20)]
    sampler = sampler_of(corpus)
    for row in [10, 7, 9, 8, 7]:
        sampler.draw(row, random.Random(row))
    assert [sampler.draw(9, random.Random(i)) for i in range(20)] == fresh


def test_excluded_queries_are_never_drawn():
    corpus = Corpus(0, ["a"], [""], ["Rome"])
    asked = [f"{word} rome" for word in queries.QUESTION_WORDS]
    rng = random.Random(0)
    free = {queries.normalise(sampler_of(corpus).draw(0, rng)) for _ in range(400)}
    assert free == {"rome", *asked}
    sampler = sampler_of(corpus, set(asked[::2]))
    kept = {queries.normalise(sampler.draw(0, rng)) for _ in range(400)}
    assert kept == free - set(asked[::2])


@pytest.mark.parametrize(
    "title, text", [("", "Rome"), ("Rome", ""), ("Rome", "Rome"), ("", "Rome!"), ("Rome", "...")]
)
def test_document_of_one_word_has_pseudo_queries(title, text):
    sampler, rng = sampler_of(Corpus(0, ["a"], [title], [text])), random.Random(0)
    assert all("Rome" in sampler.draw(0, rng).split() for _ in range(100))


def test_document_without_words_is_refused_with_the_clear_error():
    """Reading refuses documents of punctuation or emoji alone."""
    with pytest.raises(AssertionError, match="row 0 has no word"):
        sampler_of(Corpus(0, ["a"], [""], ["!!!"])).draw(0, random.Random(0))


@pytest.mark.parametrize("row", [-1, 6, 11])
def test_row_of_another_corpus_is_not_drawn(row):
    with pytest.raises(AssertionError, match=rf"row {row} is of another corpus than range\(7, 11\)"):
        sampler_of(texts_of_numbers()).draw(row, random.Random(0))


def test_fragments_are_contiguous_spans_of_their_document_half_of_them_titled():
    texts = [" ".join(f"w{d}x{i}" for i in range(length)) for d, length in enumerate((300, 60, 3))]
    given = ["Alpha Beta", "", "Gamma"]
    titles, spans = queries.fragments(given, texts, 200, random.Random(0))
    assert len(titles) == len(spans) == 600
    titled = 0
    for title, text in zip(titles, spans):
        d = int(text.split("x")[0][1:])
        length = len(text.split())
        assert f" {text} " in f" {texts[d]} " and min(25, (300, 60, 3)[d]) <= length <= 100
        assert title in ("", given[d])
        titled += bool(title)
    assert 0.4 < titled / 400 < 0.6  # of the two documents that have a title


def test_a_fragment_has_a_word_where_its_document_has_one():
    titles, spans = queries.fragments(["Moon"], [". " * 200], 50, random.Random(0))
    assert all(queries.has_word(span) for span in spans)


def pseudo(path: Path, lines: list[tuple[str, str]]) -> Path:
    path.write_text(jsonl([{"doc_id": doc_id, "query": query} for doc_id, query in lines]))
    return path


EVERY = [("d3", "three"), ("d0", "zero"), ("d1", "one"), ("d2", "two"), ("d0", "nought")]


def pairs_in(folder: Path, corpora: list[Corpus]) -> list[list[tuple[int, str]]]:
    return [ListedPseudoQueries(folder / f"D{t}", c.first_row).pairs() for t, c in enumerate(corpora)]


def stored(path: Path, folder: Path, excluded=(), skip_invalid: bool = False):
    """What a file of pseudo-queries becomes for two_corpora(): (row, query) pairs of each corpus, and the counts."""
    corpora, problems = two_corpora(), Problems(skip_invalid)
    lines = read_pseudo_queries(path, problems)
    counts = store_pseudo_queries(lines, folder, texts_of(corpora), digests(excluded), problems)
    return pairs_in(folder, corpora), counts


@pytest.mark.parametrize("skip_invalid", [True, False])
def test_pseudo_queries_of_a_file_go_to_their_corpus_without_the_test_queries(tmp_path, skip_invalid):
    path = pseudo(tmp_path / "p", [*EVERY, ("d2", "TEST  1?")])
    lists, counts = stored(path, tmp_path / "store", {"test 0", "test 1"}, skip_invalid)
    assert lists == [[(0, "zero"), (0, "nought"), (1, "one")], [(2, "two"), (3, "three")]]  # by document
    assert counts == {"kept": 5, "left out as test queries": 1}


def test_pseudo_queries_of_a_store_are_drawn_evenly_and_by_the_generator(tmp_path):
    stored(pseudo(tmp_path / "p", EVERY), tmp_path / "store")
    first, second = (ListedPseudoQueries(tmp_path / "store" / f"D{t}", 2 * t) for t in (0, 1))
    rng = random.Random(0)
    drawn = Counter(first.draw(0, rng) for _ in range(400))
    assert set(drawn) == {"zero", "nought"} and 150 < drawn["zero"] < 250
    assert {second.draw(3, rng) for _ in range(20)} == {"three"}
    one, same = (draw_pseudo_queries(first, range(2), 8, "seed") for _ in range(2))
    assert one == same


@pytest.mark.parametrize("row", [1, 4])
def test_listed_queries_of_another_corpus_s_row_are_not_drawn(tmp_path, row):
    stored(pseudo(tmp_path / "p", EVERY), tmp_path / "store")
    with pytest.raises(IndexError):
        ListedPseudoQueries(tmp_path / "store" / "D1", 2).draw(row, random.Random(0))


def test_pseudo_queries_of_an_unknown_document_are_refused_with_line(tmp_path):
    with pytest.raises(ValueError, match=r"p:6: pseudo-query of a missing document \('d9'\)"):
        stored(pseudo(tmp_path / "p", [*EVERY, ("d9", "nine")]), tmp_path / "store")


def test_documents_that_no_pseudo_query_covers_are_counted_and_the_first_is_named(tmp_path):
    path = pseudo(tmp_path / "p", [("d0", "zero"), ("d1", "test 1"), ("d3", "three")])
    with pytest.raises(
        ValueError, match=r"p: document without a pseudo-query \('d1'\); \S+/p: .* \('d2'\)\. "
    ):
        stored(path, tmp_path / "store", {"test 1"})


@pytest.mark.parametrize("line", ["{", '{"doc_id": "d0"}', '{"doc_id": 0, "query": "a"}', "[]"])
def test_malformed_pseudo_query_is_refused_with_line_or_left_out(tmp_path, line):
    path = pseudo(tmp_path / "p", EVERY)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="p:6: "):
        stored(path, tmp_path / "store")
    lists, counts = stored(path, tmp_path / "store", skip_invalid=True)
    assert sum(map(len, lists)) == counts["kept"] == 5


def test_pseudo_query_without_a_word_covers_no_document(tmp_path):
    with pytest.raises(ValueError, match=r"p:4: pseudo-query without a word \('d2'\)"):
        stored(pseudo(tmp_path / "p", [*EVERY[:3], ("d2", " ")]), tmp_path / "store")


def test_all_that_is_wrong_in_a_file_of_pseudo_queries_is_in_one_message(tmp_path):
    path = pseudo(tmp_path / "p", [("d9", "nine"), *EVERY[:2], ("d1", "?!")])
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError) as error:
        stored(path, tmp_path / "store")
    for place in ("p:1: ", "p:4: ", "p:5: malformed JSON", "('d1')", "('d2')", "pass --skip_invalid"):
        assert place in str(error.value)
    assert "\n" not in str(error.value)


def test_skipped_or_published_pseudo_queries_leave_out_and_count_what_a_file_may_not_hold(tmp_path):
    lines = [("d9", "nine"), *EVERY[:3], ("d1", " ?! "), ("d9", ""), ("d2", "Test 1"), ("d3", "drei")]
    lists, counts = stored(pseudo(tmp_path / "p", lines), tmp_path / "store", {"test 1"}, skip_invalid=True)
    assert lists == [[(0, "zero"), (1, "one")], [(2, "title2 text number 2"), (3, "three"), (3, "drei")]]
    assert counts == {
        "kept": 4,
        "left out: without a word, or of documents left out": 3,
        "left out as test queries": 1,
        "made of a document's first words, where it had none": 1,
    }


def test_document_without_a_published_query_gets_its_first_twelve_words(tmp_path):
    text = "One, two; three - four five six. Seven eight nine ten eleven twelve thirteen"
    corpora = [
        Corpus(0, ["a", "b"], ["", "It's a"], [text, text]),
        Corpus(2, ["c"], ["Title only"], [""]),
    ]
    lines = [("f:1", "a", "asked")]
    counts = store_pseudo_queries(lines, tmp_path, texts_of(corpora), frozenset())
    assert pairs_in(tmp_path, corpora) == [
        [(0, "asked"), (1, "It's a One two three four five six Seven eight nine ten")],
        [(2, "Title only")],
    ]
    assert counts["made of a document's first words, where it had none"] == 2


def test_a_made_query_is_neither_empty_nor_a_test_query(tmp_path):
    corpora = [Corpus(0, ["a", "b"], ["", ""], ["Moon", "Mars rover"])]
    excluded = frozenset(map(queries.query_digest, ("moon", "mars rover")))
    store_pseudo_queries([("f:1", "b", "asked")], tmp_path, texts_of(corpora), excluded)
    assert pairs_in(tmp_path, corpora) == [[(0, "Moon Moon"), (1, "asked")]]


document_and_query = st.tuples(
    st.sampled_from(["d0", "d1", "d2", "d3"]), st.sampled_from(["x", "Y z", "test 1"])
)


@FUZZ
@given(
    st.lists(document_and_query, max_size=12), st.lists(st.sampled_from(["x", "Y z"]), min_size=4, max_size=4)
)
def test_stored_pseudo_queries_are_those_of_the_file_sorted_by_document_in_file_order(lines, last):
    lines = [*lines, *zip(["d3", "d1", "d0", "d2"], last)]
    with tempfile.TemporaryDirectory() as folder:
        places = [(f"f:{i}", *line) for i, line in enumerate(lines, 1)]
        documents = texts_of(two_corpora())
        counts = store_pseudo_queries(places, Path(folder), documents, digests(["test 1"]), Problems())
        pairs = list(chain(*pairs_in(Path(folder), two_corpora())))
    wanted = [(int(doc_id[1]), query) for doc_id, query in lines if query != "test 1"]
    assert pairs == sorted(wanted, key=lambda pair: pair[0])
    assert counts["kept"] == len(pairs) and counts["left out as test queries"] == len(lines) - len(pairs)


def test_pseudo_queries_that_stop_midway_leave_no_store_that_counts(tmp_path):
    def cut_short():
        yield "f:1", "d0", "zero"
        raise ValueError("f:2: malformed")

    with pytest.raises(ValueError, match="f:2: malformed"):
        store_pseudo_queries(cut_short(), tmp_path, texts_of(two_corpora()), frozenset(), Problems())
    for t in (0, 1):
        with pytest.raises(ValueError, match="queries.bin"):
            ListedPseudoQueries(tmp_path / f"D{t}")
        assert not (tmp_path / f"D{t}" / "starts.npy").exists()


def test_file_without_any_pseudo_query_is_named_or_at_least_called_one(tmp_path):
    (tmp_path / "p").write_text("\n")
    with pytest.raises(ValueError, match=r"^\S+: document without a pseudo-query \('d0'\); .*\('d3'\)"):
        stored(tmp_path / "p", tmp_path / "store")


def test_first_words_that_are_a_test_query_become_no_pseudo_query(tmp_path):
    """A short document whose whole text somebody asked; check_no_leak would stop the run at its stage."""
    corpora = [Corpus(0, ["a", "b"], ["", ""], ["Who is King?", "second"])]
    excluded = digests(["who is king"])
    store_pseudo_queries([("f:1", "b", "asked")], tmp_path, texts_of(corpora), excluded)
    (pairs,) = pairs_in(tmp_path, corpora)
    check_no_leak(0, corpora[0].rows, pairs, excluded)
    assert pairs == [(0, "Who is"), (1, "asked")]


def test_store_of_pseudo_queries_that_was_cut_short_does_not_count_beside_an_earlier_one(
    tmp_path, monkeypatch
):
    stored(pseudo(tmp_path / "p", EVERY), tmp_path / "store")

    def full(path, values):
        if path.name == "starts.npy":
            raise OSError("No space left on device")
        save(path, values)

    save = arrays.write_array
    monkeypatch.setattr(arrays, "write_array", full)
    with pytest.raises(OSError, match="No space"):
        stored(pseudo(tmp_path / "p", [*EVERY, *EVERY]), tmp_path / "store")
    for t in (0, 1):
        with pytest.raises(ValueError, match="starts.npy|queries.bin"):
            ListedPseudoQueries(tmp_path / "store" / f"D{t}")
