"""The stream by topic, on made-up corpora whose topics are known."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import topics
from arrays import Documents
from data import Collection, check_no_leak, excluded_queries, split
from topics import topic_order


def planted(counts: list[int], seed: int = 0, length: int = 40) -> tuple[list[str], list[int]]:
    """Passages, shuffled, and their topics: each topic has 60 words of its own, and all share twenty more."""
    rng = random.Random(seed)
    topic = [t for t, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(topic)
    vocabulary = [[f"t{t}w{i}" for i in range(60)] for t in range(len(counts))]
    common = [f"the{i}" for i in range(20)]
    return [
        " ".join(rng.choices(vocabulary[t], k=length) + rng.choices(common, k=length // 2)) for t in topic
    ], topic


def cut(order: list[int], sizes: list[int], topic: list[int]) -> list[Counter]:
    """How many documents of each topic each corpus holds."""
    rows = iter(order)
    return [Counter(topic[next(rows)] for _ in range(size)) for size in sizes]


@pytest.mark.parametrize("seed", range(4))
def test_a_later_corpus_is_one_topic_and_d0_holds_none_of_it(seed):
    passages, topic = planted([30] * 8, seed)
    sizes = [120, 30, 30, 30, 30]
    d0, *later = cut(topic_order(passages, sizes, seed), sizes, topic)
    assert [len(held) for held in later] == [1] * 4 and len({t for held in later for t in held}) == 4
    assert not set(d0) & {t for held in later for t in held}


def test_corpora_of_unequal_sizes_find_the_topics_that_fit():
    passages, topic = planted([60, 60, 60, 20, 40, 30])
    sizes = [180, 40, 20, 30]
    d0, *later = cut(topic_order(passages, sizes, 0), sizes, topic)
    assert later == [{4: 40}, {3: 20}, {5: 30}] and d0 == {0: 60, 1: 60, 2: 60}


def test_of_a_larger_topic_d0_keeps_the_rest_and_a_smaller_one_is_filled_up():
    passages, topic = planted([40] * 4)
    for size, beyond in ((35, 0), (44, 4)):
        sizes = [160 - 2 * size, size, size]
        d0, *later = cut(topic_order(passages, sizes, 0), sizes, topic)
        for held in later:
            ((t, count),) = held.most_common(1)
            assert count == size - beyond and d0[t] == 40 - count
        assert not later[0].keys() & later[1].keys() or beyond  # not filled up with what another corpus holds


def test_a_topic_that_fills_up_leaves_those_of_other_later_corpora_alone():
    passages, topic = planted([40] * 5)
    sizes = [200 - 3 * 44, 44, 44, 44]
    later = cut(topic_order(passages, sizes, 1), sizes, topic)[1:]
    own = [held.most_common(1)[0] for held in later]
    assert [count for _, count in own] == [40] * 3
    for held in later:
        assert sum(held[t] > 0 for t, _ in own) == 1


def test_documents_that_fit_nowhere_stay_in_d0():
    passages, topic = planted([30] * 6)
    rng = random.Random(0)
    mixed = [" ".join(rng.choice(passages).split()[i % 40] for i in range(40)) for _ in range(30)]
    sizes = [120, 30, 30, 30]
    topic += [6] * 30
    for seed in range(3):
        d0, *later = cut(topic_order(passages + mixed, sizes, seed), sizes, topic)
        assert all(held.most_common(1)[0][0] != 6 and held.most_common(1)[0][1] >= 28 for held in later)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=5), st.integers(0, 5), st.integers(0, 9))
def test_an_order_names_each_document_once_whatever_the_sizes(sizes, spare, seed):
    n = max(sum(sizes) + spare, 12)
    order = topic_order(planted([n // 3, n // 3, n - 2 * (n // 3)])[0], sizes, seed)
    assert sorted(order) == list(range(n))


def test_an_order_is_the_seed_s_and_leaves_the_random_state_alone():
    passages, topic = planted([30] * 8)
    sizes, state = [150, 30, 30, 30], torch.get_rng_state()
    one, same = (topic_order(passages, sizes, 5) for _ in range(2))
    assert one == same and torch.equal(torch.get_rng_state(), state)
    streams = [cut(topic_order(passages, sizes, seed), sizes, topic) for seed in range(5)]
    assert len({tuple(next(iter(held)) for held in found[1:]) for found in streams}) > 1
    rows = one[:150]
    assert rows != sorted(rows) and one[150:180] != sorted(one[150:180])  # no order within a corpus


def test_spare_documents_are_of_no_later_topic():
    passages, topic = planted([30] * 8)
    sizes = [100, 30, 30, 30]
    found = cut(topic_order(passages, sizes, 0), [*sizes, 50], topic)
    assert all(len(held) == 1 for held in found[1:4])
    assert not set(found[4]) & {t for held in found[1:4] for t in held}
    assert len(found[4]) == 5  # a random part of what is D_0's


# --------------------------------------------------------------------------------------------- words and vectors


def test_vectors_are_tf_idf_by_hand_where_nothing_is_reduced():
    passages = ["a a b x", "a c X", "b c y", "d d d x z", "e x", "e d x", "f f x", "f x"]
    counts = [
        {"a": 2, "b": 1},
        {"a": 1, "c": 1},
        {"b": 1, "c": 1},
        {"d": 3},
        {"e": 1},
        {"e": 1, "d": 1},
        {"f": 2},
    ]
    counts.append({"f": 1})  # x is in seven of eight, in either case of letters; y and z are in one
    words = "abcdef"
    tf = torch.tensor([[row.get(word, 0.0) for word in words] for row in counts])
    tfidf = torch.where(tf > 0, 1 + tf.clamp(min=1).log(), 0.0) * torch.tensor(8 / 2).log()
    wanted = tfidf / tfidf.norm(dim=1, keepdim=True)
    found = topics.embed(iter(passages), 0)
    assert found.shape == (8, 6)
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, atol=1e-5, rtol=0)


def test_rarer_words_weigh_more():
    passages = ["p r", "p s", "p", "p", "r", "s", "t", "t", "u", "u", "v", "v"]  # p in 4 of 12, r and s in 2
    found = topics.embed(passages, 0)
    log3, log6 = torch.tensor(3.0).log(), torch.tensor(6.0).log()
    assert float(found[0] @ found[4]) == pytest.approx(float(log6 / (log3**2 + log6**2).sqrt()), abs=1e-5)


def test_only_the_first_characters_of_a_passage_count():
    passages, _ = planted([10] * 4)
    padded = [p + " " * topics.CHARACTERS + f" end{i % 2}" * 50 for i, p in enumerate(passages)]
    assert torch.equal(topics.embed(padded, 0), topics.embed(passages, 0))


def test_documents_without_a_counted_word_are_zeros_and_end_in_some_corpus():
    passages, _ = planted([12] * 3)
    passages += ["", "hapax", "the0"]
    found = topics.embed(passages, 0)
    assert found[36:38].eq(0).all() and torch.isfinite(found).all()
    torch.testing.assert_close(found[:36].norm(dim=1), torch.ones(36))
    assert sorted(topic_order(passages, [15, 12, 12], 0)) == list(range(39))


@pytest.mark.parametrize(
    "passages", [["", "", ""], ["a b"] * 10, [f"w{i}" for i in range(20)], ["a", "a", "b"]]
)
def test_passages_that_share_no_telling_word_are_refused(passages):
    message = f"--split_by topic: no word tells topics in {len(passages)} documents; pass --split_by random"
    with pytest.raises(ValueError, match=message):
        topic_order(passages, [1, 1, 1], 0)


def test_a_stream_of_one_corpus_is_refused():
    with pytest.raises(ValueError, match="--split_by topic: found one corpus"):
        topic_order(planted([20, 20])[0], [40], 0)


# --------------------------------------------------------------------------------------------- data.split by topic


def collection(counts: list[int]) -> tuple[Collection, dict[str, int]]:
    """Documents of known topics, with one test and one annotated query each; and the topic of each document id."""
    passages, topic = planted(counts)
    documents = Documents()
    for i, passage in enumerate(passages):
        documents.add(f"d{i}", f"title{i}", passage)
    documents.close()
    n = len(passages)
    return Collection(
        documents,
        [(f"d{i}", f"question {i}", f"a{i}") for i in range(n)],
        {f"q{i}": f"test {i}" for i in range(n)},
        {f"q{i}": {f"d{i}": 1} for i in range(n)},
    ), {f"d{i}": t for i, t in enumerate(topic)}


def test_split_by_topic_gives_corpora_of_their_sizes_and_queries_follow_their_documents():
    held, topic_of = collection([24] * 8)
    held.qrels["q0"] = {"d0": 1, "d1": 1}
    corpora, left_out = split(held, "62.5,12.5,12.5,12.5", "topic", 3)
    assert [len(corpus.ids) for corpus in corpora] == [120, 24, 24, 24]
    assert [row for corpus in corpora for row in corpus.rows] == list(range(192))
    assert {doc_id for corpus in corpora for doc_id in corpus.ids} == set(held.documents.ids)
    later = [{topic_of[doc_id] for doc_id in corpus.ids} for corpus in corpora[1:]]
    assert all(len(found) == 1 for found in later)
    assert not {topic_of[doc_id] for doc_id in corpora[0].ids} & set.union(*later)
    at = {doc_id: t for t, corpus in enumerate(corpora) for doc_id in corpus.ids}
    for t, corpus in enumerate(corpora):
        assert all(max(at[doc_id] for doc_id in held.qrels[query_id]) == t for query_id in corpus.test)
        for doc_id, title in zip(corpus.ids, corpus.titles):
            assert title == f"title{doc_id[1:]}"
    assert sum(len(corpus.test) for corpus in corpora) == 192
    assert left_out == {"annotated queries of documents outside D0": 72}
    check_no_leak(0, corpora[0].rows, corpora[0].train, excluded_queries(corpora))
    again, _ = split(held, "62.5,12.5,12.5,12.5", "topic", 3)
    assert again == corpora


def test_split_by_topic_takes_spare_documents_from_d0_and_no_heed_of_an_order():
    held, topic_of = collection([24] * 8)
    corpora, left_out = split(held, "90,24,24,24", "topic", 0, spare=30)
    assert [len(corpus.ids) for corpus in corpora] == [90, 24, 24, 24]
    assert all(len({topic_of[doc_id] for doc_id in corpus.ids}) == 1 for corpus in corpora[1:])
    assert left_out["documents beyond the sizes of the split"] == 30
    assert left_out["test queries of documents left out"] == 30
    held.order = list(held.documents.ids)[::-1]
    assert split(held, "90,24,24,24", "topic", 0, spare=30)[0] == corpora


def test_split_by_topic_passes_its_errors_on():
    held, _ = collection([10, 10])
    for splits, message in (("100", "found one corpus"), ("50,20", "--splits '?50,20")):
        with pytest.raises(ValueError, match=message):
            split(held, splits, "topic", 0)
