"""Words, terms and the comparison of queries in any script: what a reader would call a word stays one, and no letter is lost."""

import os
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import store
import train
from bm25 import BM25
from queries import QUESTION_WORDS, Idf, PseudoQuerySampler, fragments, normalise, query_digest, terms, words

CASES = Path(os.environ.get("MIXLORA_CASES") or Path(__file__).parents[1] / "../shared/cases")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"no folder {CASES}; set MIXLORA_CASES")

# A block of letters (and combining marks) of each of ten scripts.
SCRIPTS = {
    "latin": (0x61, 0x24F), "greek": (0x391, 0x3C9), "cyrillic": (0x410, 0x45F), "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x652), "devanagari": (0x904, 0x94D), "tamil": (0xB85, 0xBCD), "thai": (0xE01, 0xE4E),
    "hangul": (0xAC00, 0xAC80), "han": (0x4E00, 0x4E80),
}  # fmt: skip


def letters(script: str) -> str:
    first, last = SCRIPTS[script]
    return "".join(c for c in map(chr, range(first, last + 1)) if unicodedata.category(c)[0] in "LM")


@st.composite
def texts(draw) -> str:
    """Some words of one script, each of which begins with a letter."""
    alphabet = letters(draw(st.sampled_from(list(SCRIPTS))))
    bases = "".join(c for c in alphabet if unicodedata.category(c)[0] == "L")
    word = st.tuples(st.sampled_from(bases), st.text(alphabet, max_size=6)).map("".join)
    return " ".join(draw(st.lists(word, min_size=1, max_size=5)))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(texts())
def test_no_letter_and_no_mark_is_lost(text):
    assert "".join(words(text)) == text.replace(" ", "")
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = {
        c for c in folded if unicodedata.category(c)[0] in "LM"
    }  # Ŀ is an L with a dot, which is no letter
    assert set("".join(terms(text))) >= kept
    assert normalise(text).replace(" ", "") == folded.replace(" ", "")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(texts(), texts())
def test_texts_that_differ_after_nfkc_and_case_folding_stay_different(one, other):
    folded = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (one, other)]
    assert (normalise(one) == normalise(other)) == (folded[0] == folded[1])


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("किताब कुतुब", ["किताब", "कुतुब"]),
        ("don't stop the U.S.-based co-op's", ["don't", "stop", "the", "U.S", "based", "co-op's"]),
        ("C++ or C#, 3.14 e.g.", ["C++", "or", "C#", "3.14", "e.g"]),
        ("می‌خواهم", ["می‌خواهم"]),  # a zero-width non-joiner inside a word
        ("!? ... -", []),
    ],
)
def test_words_by_hand(text, wanted):
    assert words(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("今天天气好", ["今天", "天天", "天气", "气好"]),
        ("水", ["水"]),
        ("ＡＢＣ Straße", ["abc", "strasse"]),
        ("iPhone手机", ["iphone", "手机"]),
        ("กินข้าว", ["กิ", "กิน", "นข้", "ข้า", "าว"][1:]),  # a mark stays with its letter
        ("서울 날씨", ["서울", "날씨"]),  # Korean has spaces
    ],
)
def test_terms_by_hand(text, wanted):
    assert list(terms(text)) == wanted


def test_queries_are_the_same_but_for_case_width_space_and_the_marks_of_a_sentence():
    assert normalise("  Who wrote  “Hamlet”? ") == normalise("who wrote hamlet") == "who wrote hamlet"
    assert normalise("ＷＨＯ wrote it") == "who wrote it"
    assert len({normalise(q) for q in ("C++", "C#", "C", "c+", "किताब", "कुतुब", "कतब")}) == 7
    assert query_digest("What is C++?") == query_digest("what is c++") != query_digest("what is c#")


def test_bm25_finds_chinese_by_what_is_inside_a_clause():
    documents = ["北京是中国的首都。", "上海是中国最大的城市。", "长城位于北京以北。"]
    assert [row for row, _ in BM25(documents).top("中国的首都是哪里", 3)][0] == 0
    assert BM25(documents).top("长城在哪里", 1)[0][0] == 2


@pytest.mark.parametrize(
    "text, longest, glued",
    [
        ("北京是中国的首都也是一座有着三千年历史的古城。" * 3 + "长城位于北京以北。" * 3, 45, True),
        ("กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและมีประชากรมากที่สุด" * 3, 90, True),
        ("दिल्ली भारत की राजधानी है और यह यमुना नदी के किनारे बसा एक पुराना शहर है। " * 3, 120, False),
    ],
)
def test_pseudo_queries_have_a_query_s_length_and_the_words_of_their_language(text, longest, glued):
    sampler, rng = PseudoQuerySampler([""], [text], Idf([text])), random.Random(0)
    drawn = [sampler.draw(0, rng) for _ in range(100)]
    assert max(map(len, drawn)) <= longest and len(set(drawn)) > 50
    assert not any(c.isascii() and c.isalpha() for query in drawn for c in query)  # no English question word
    assert any(" " not in query and len(query) > 4 for query in drawn) == glued
    whole = set(words(text))
    if not glued:
        assert all(word in whole for query in drawn for word in query.split())


def test_a_document_whose_words_are_a_test_query_is_asked_for_by_them_twice():
    excluded = frozenset(map(query_digest, ("rome", "Rome?", *(f"{w} rome" for w in QUESTION_WORDS))))
    sampler, rng = PseudoQuerySampler([""], ["Rome"], Idf(["Rome"]), excluded), random.Random(0)
    drawn = {normalise(sampler.draw(0, rng)) for _ in range(20)}
    assert drawn and all(
        query_digest(query) not in excluded and set(query.split()) >= {"rome"} for query in drawn
    )


def test_fragments_of_chinese_are_parts_of_a_document_without_spaces():
    text = "北京是中国的首都也是一座有着三千年历史的古城。" * 30
    _, spans = fragments([""], [text], 20, random.Random(0))
    assert all(40 < len(span) < 250 and " " not in span and set(span) <= set(text) for span in spans)


SMALL = """--dense_warmup_steps 10 --dense_rounds 1 --dense_steps 5 --d0_steps 20 --steps 10 --width 64 --heads 4
    --feed_forward 128 --encoder_blocks 1 --decoder_blocks 2 --layers 1 --vocab 500 --rq_pseudo 4 --dense_batch 16
    --d0_batch 16 --batch 16 --pseudo_per_document 4 --splits 60,40 --K 4 --M 3""".split()  # those of the table of cases


@needs_cases
@pytest.mark.parametrize("case", ["chinese_bm25_zero/l_zh", "combining_marks/l_hi"])
def test_a_corpus_in_chinese_and_one_in_hindi_are_trained_on_and_found_by_bm25(case, tmp_path):
    train.main(["--data", str(CASES / case), "--run", str(tmp_path / "run"), *SMALL])
    results = store.read_json(tmp_path / "run" / "results.json")
    assert results["baselines"]["bm25"]["recall@1"]["AP"] > 0.7  # it was 0.0 in Chinese


@needs_cases
def test_two_hindi_words_that_differ_in_their_marks_are_two_queries():
    collection = data.read_beir(CASES / "combining_marks" / "c_hi")
    corpora, left_out = data.split(collection, "50,50", "random", 0)
    texts = [text for corpus in corpora for text in corpus.test.values()]
    assert len({normalise(text) for text in texts}) == len(texts)
    assert "annotated queries that are also test queries" not in left_out
