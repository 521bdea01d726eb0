import json
import math
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import dense
import queries
from arrays import Documents, Tokens
from bm25 import BM25
from data import EOS, PAD, Corpus
from dense import cut_windows, draw_windows, in_batch_contrastive, margin_mse, nearest, recall
from t5 import T5, T5Config

# ----------------------------------------------------------------------------------------------------- search


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 15))
def test_nearest_equals_brute_force_with_ties_by_row(seed, n, k):
    generator = torch.Generator().manual_seed(seed)
    queries, documents = (
        torch.randint(-1, 2, (size, 3), generator=generator).float() for size in (4, n)
    )  # many ties
    scores, rows = nearest(queries, documents, k)
    for query, found, order in zip(queries.tolist(), scores.tolist(), rows.tolist()):
        exact = [sum(a * b for a, b in zip(query, document)) for document in documents.tolist()]
        assert order == sorted(range(n), key=lambda row: (-exact[row], row))[:k]
        assert found == [exact[row] for row in order]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=6)
)  # fmt: skip
def test_nearest_in_chunks_equals_one_stable_sort_of_all_scores(seed, chunk, k, sizes):
    """Few different scores, so that ties reach over the edges of chunks."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-1, 2, (5, 2), generator=generator).float()
    documents = torch.randint(-1, 2, (sum(sizes), 2), generator=generator).float()
    scores, rows = (queries @ documents.T).sort(dim=1, descending=True, stable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "CHUNK", chunk)
        for found in (
            nearest(queries, documents, k),
            nearest(queries, (part for part in documents.split(sizes)), k),
        ):
            assert torch.equal(found[0], scores[:, :k]) and torch.equal(found[1], rows[:, :k])
            assert found[1].dtype == torch.int64


def test_nearest_of_more_queries_than_are_scored_together(monkeypatch):
    monkeypatch.setattr(dense, "CHUNK", 4)
    queries, documents = torch.arange(-1200.0, 1300)[:, None], torch.arange(11.0)[:, None]
    _, rows = nearest(queries, documents, 3)
    wanted = {-1.0: [0, 1, 2], 0.0: [0, 1, 2], 1.0: [10, 9, 8]}
    assert rows.tolist() == [wanted[float(sign)] for sign in queries.sign()[:, 0]]


def test_recall_of_documents_in_chunks_is_that_of_all(monkeypatch):
    torch.manual_seed(0)
    queries, documents = torch.randn(30, 4), torch.randn(50, 4)
    relevant = [{i, i + 7} for i in range(30)]
    wanted = recall(queries, relevant, documents)
    assert 0 < wanted < 1
    assert recall(queries, relevant, iter(documents.split(7))) == wanted
    monkeypatch.setattr(dense, "CHUNK", 9)
    assert recall(queries, relevant, documents) == wanted


def test_recall_by_hand():
    documents = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    queries = torch.tensor([[1.0], [-1.0], [1.0]])  # rank 0 1 2 3; 3 2 1 0; 0 1 2 3
    relevant = [{1}, {3, 0}, {2, 3}]
    assert recall(queries, relevant, documents, k=1) == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert recall(queries, relevant, documents, k=2) == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert recall(queries, relevant, documents, k=3) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert recall(queries, relevant, documents) == 1.0  # the default of 10 takes all


def test_recall_of_no_queries_is_nan():
    assert math.isnan(recall(torch.empty(0, 1), [], torch.ones(3, 1)))


# -------------------------------------------------------------------------------------------------- negatives


TEXTS = [
    "red cat sat",
    "blue dog",
    "red dog and red cat",
    "green bird sat",
    "blue bird",
    "red fox",
    "white owl",
]
QUERIES = [(0, "red cat"), (3, "bird sat"), (2, "red dog cat"), (6, "zebra")]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_bm25_negatives_are_the_best_wrong_documents(k):
    bm25 = BM25(TEXTS)
    found = dense.hard_negatives(bm25, QUERIES, k)
    assert found.queries == [query for _, query in QUERIES] and found.documents[:, 0].tolist() == [0, 3, 2, 6]
    for (row, query), documents, taught in zip(QUERIES, found.documents.tolist(), found.scores):
        scores, negatives = bm25.scores(query), documents[1:]
        assert row not in negatives and len(set(negatives)) == k
        best = sorted(np.delete(scores, row), reverse=True)[:k]
        assert sorted(scores[negatives], reverse=True) == best  # equals may be exchanged
        np.testing.assert_allclose(taught, scores[documents], rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_self_mined_negatives_are_the_best_wrong_documents_and_bm25_teaches(k):
    torch.manual_seed(0)
    queries = QUERIES * 300  # more than one part of 1,024
    embedded, documents, bm25 = torch.randn(len(queries), 5), torch.randn(7, 5), BM25(TEXTS)
    before = embedded.clone()
    found = dense.hard_negatives(bm25, queries, k, (embedded, documents))
    for i, (row, query) in enumerate(queries):
        scores = embedded[i] @ documents.T
        wrong = [j for j in sorted(range(7), key=lambda j: -scores[j].item()) if j != row]
        assert found.documents[i].tolist() == [row, *wrong[:k]]
        if i < len(QUERIES):
            taught = torch.from_numpy(bm25.scores(query)).float()
            assert torch.equal(found.scores[i], taught[found.documents[i]])
    assert torch.equal(embedded, before)


D0 = Corpus(0, ["a", "b", "c"], [""] * 3, ["one", "two", "three"], [(0, "first"), (2, "third")], ["q1", "q3"])


def teacher(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line(qid, docids, scores) -> dict:
    return {"qid": qid, "docids": docids, "scores": scores}


def test_teacher_file_is_read_as_written(tmp_path):
    path = teacher(
        tmp_path / "t", line("q3", ["c", "a", "b"], [9, 1.5, -2]), line("q1", ["a", "b", "c"], [4, 3, 2])
    )
    found = dense.read_teacher(path, D0)
    assert found.queries == ["third", "first"]
    assert found.documents.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert found.scores.tolist() == [[9, 1.5, -2], [4, 3, 2]]


def test_teacher_s_negatives_outside_d0_are_dropped_and_short_lines_repeat_their_own(tmp_path):
    lines = (
        line("q1", ["a", "later", "b", "c"], [4, 3, 2, 1]),
        line("q3", ["c", "b", "later", "gone"], [8, 7, 6, 5]),
        line("q3", ["c", "later", "gone"], [8, 7, 6]),  # no negative is left: no example
    )
    found = dense.read_teacher(teacher(tmp_path / "t", *lines), D0)
    assert found.queries == ["first", "third"]
    assert found.documents.tolist() == [[0, 1, 2], [2, 1, 1]]
    assert found.scores.tolist() == [[4, 2, 1], [8, 7, 7]]


def test_teacher_s_short_lines_are_repeated_in_a_circle_up_to_the_longest(tmp_path):
    ids = [f"d{i}" for i in range(8)]
    corpus = Corpus(0, ids, [""] * 8, ids, [(0, "first"), (1, "second")], ["q1", "q2"])
    lines = line("q1", ["d0", "d3", "d2", "d1"], [9, 3, 2, 1]), line("q2", ["d1", *ids[2:]], [8, *range(6)])
    found = dense.read_teacher(teacher(tmp_path / "t", *lines), corpus)
    assert found.documents.tolist() == [[0, 3, 2, 1, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7]]
    assert found.scores.tolist() == [[9, 3, 2, 1, 3, 2, 1], [8, 0, 1, 2, 3, 4, 5]]
    cut = dense.read_teacher(tmp_path / "t", corpus, most=2)
    assert cut.documents.tolist() == [[0, 3, 2], [1, 2, 3]]  # the first of each line
    for examples in (found, cut):
        assert examples.documents.dtype == torch.int64 and examples.scores.dtype == torch.float32


@pytest.mark.parametrize("mined", [False, True])
def test_negatives_that_are_written_out_are_read_back_as_the_same_examples(tmp_path, mined):
    """As they come from BM25 and from the model; drawn queries among them are left out."""
    train = [(0, "red cat"), (3, "bird sat"), (2, "red dog cat"), (2, "red cat")]
    corpus = Corpus(0, list("abcdefg"), [""] * 7, TEXTS, train, ["q1", "q2", "q3", "q4"])
    queries = [train[0], (6, "a drawn query"), *train[1:]]
    torch.manual_seed(0)
    index = (torch.randn(5, 4), torch.randn(7, 4)) if mined else None
    examples = dense.hard_negatives(BM25(TEXTS), queries, 3, index)
    dense.write_teacher(tmp_path / "t", corpus, examples)
    found, kept = dense.read_teacher(tmp_path / "t", corpus), [0, 2, 3, 4]  # those of the annotated queries
    assert found.queries == [examples.queries[i] for i in kept]
    assert torch.equal(found.documents, examples.documents[kept])
    torch.testing.assert_close(found.scores, examples.scores[kept], rtol=0, atol=1e-4)


def test_negatives_are_written_by_document_id(tmp_path):
    corpus = Corpus(0, ["a", "b", "c"], [""] * 3, ["x"] * 3, [(1, "asked")], ["q7"])
    examples = dense.Examples(["asked"], torch.tensor([[1, 2, 0]]), torch.tensor([[2.5, 1.0, -3]]))
    dense.write_teacher(tmp_path / "t", corpus, examples)
    assert json.loads((tmp_path / "t").read_text()) == line("q7", ["b", "c", "a"], [2.5, 1.0, -3.0])


@pytest.mark.parametrize(
    "bad, message",
    [
        (line("q2", ["a", "b"], [1, 0]), "query or its positive is not in D_0's training set .q2, a"),
        (line(5, ["a", "b"], [1, 0]), "not in D_0's training set .5, a"),
        (line("q1", ["later", "b"], [1, 0]), "not in D_0's training set .q1, later"),
        (line("q1", ["a", "b"], [1]), "as many scores"),
        (line("q1", ["a", "b"], [1, 0, 0]), "as many scores"),
        (line("q1", [], []), "as many scores"),
        (line("q1", ["a", "b"], [1, "x"]), "as many scores"),
        (line("q1", None, [1]), "as many scores"),
        ({"qid": "q1", "docids": ["a", "b"]}, "scores"),
        (line(["q1"], ["a", "b"], [1, 0]), "unhashable"),
        ([], "wanted qid"),
        ("{", "wanted qid"),
    ],
)
def test_bad_teacher_line_is_refused_with_file_and_line(tmp_path, bad, message):
    path = teacher(tmp_path / "t", line("q1", ["a", "b"], [1, 0]), bad)
    with pytest.raises(ValueError, match=message) as error:
        dense.read_teacher(path, D0)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    "bad",
    [
        line("q1", [["a"], "b"], [1, 0]),
        line("q1", ["a", ["b"]], [1, 0]),
        "[" * 100_000,
        line("q1", ["a", "b"], [float("nan"), 0]),
    ],
)
def test_unhashable_ids_deep_json_and_nan_are_refused_with_file_and_line(tmp_path, bad):
    with pytest.raises(ValueError, match=":1: "):
        dense.read_teacher(teacher(tmp_path / "t", bad), D0)


def test_teacher_without_one_negative_in_d0_or_without_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="t: found no query with a negative in D_0"):
        dense.read_teacher(teacher(tmp_path / "t", line("q1", ["a", "later"], [1, 0])), D0)
    with pytest.raises(ValueError, match=r"found no file .*nothing"):
        dense.read_teacher(tmp_path / "nothing", D0)


# ----------------------------------------------------------------------------------------------------- losses


def test_margin_mse_by_hand():
    q = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    positive = torch.tensor([[1.0, 1.0], [5.0, 2.0]])  # inner products 3 and 2
    negative = torch.tensor([[1.0, 0.0], [0.0, 4.0]])  # 1 and 4, so the margins are 2 and -2
    assert margin_mse(q, positive, negative, torch.tensor([2.0, -2.0])).item() == 0
    assert margin_mse(q, positive, negative, torch.tensor([1.0, 1.0])).item() == (1 + 9) / 2


def test_in_batch_contrastive_by_hand():
    q, documents = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [1.0]])
    logits = torch.tensor([[1.0, 2.0], [2.0, 4.0]])  # scale 2
    wanted = (
        torch.log1p(torch.exp(logits[0, 1] - logits[0, 0]))
        + torch.log1p(torch.exp(logits[1, 0] - logits[1, 1]))
    ) / 2
    assert in_batch_contrastive(q, documents, torch.tensor([7, 8]), 2.0).item() == pytest.approx(
        wanted.item()
    )


def test_contrastive_loss_equals_the_loss_without_the_columns_of_the_same_document():
    torch.manual_seed(0)
    q, documents = torch.randn(3, 4), torch.randn(6, 4)
    rows = torch.tensor([5, 5, 6, 5, 9, 6])  # positives 5, 5, 6, then negatives
    found = in_batch_contrastive(q, documents, rows, 0.7)
    others = [
        [0, 2, 4, 5],
        [1, 2, 4, 5],
        [0, 1, 2, 3, 4],
    ]  # each query's own column, and those of other documents
    wanted = torch.zeros(())
    for b, columns in enumerate(others):
        logits = 0.7 * documents[columns] @ q[b]
        wanted += (logits.exp().sum().log() - logits[columns.index(b)]) / 3
    torch.testing.assert_close(found, wanted)


def test_masked_document_gets_no_gradient_and_others_do():
    torch.manual_seed(0)
    q, documents = torch.randn(2, 4), torch.randn(4, 4, requires_grad=True)
    in_batch_contrastive(q, documents, torch.tensor([1, 2, 1, 3]), 1.0)[None][0].backward()
    assert (
        documents.grad.isfinite().all() and documents.grad[2].any()
    )  # row 1's copy is a negative of query 2 alone
    alone = torch.randn(3, 4, requires_grad=True)
    in_batch_contrastive(q[:1], alone, torch.tensor([1, 1, 3]), 1.0).backward()
    assert not alone.grad[1].any() and alone.grad[0].any() and alone.grad[2].any()


def test_batch_of_one_document_alone_costs_nothing():
    q = torch.randn(3, 4, requires_grad=True)
    loss = in_batch_contrastive(q, torch.randn(3, 4), torch.tensor([4, 4, 4]), 1.0)
    loss.backward()
    assert loss.item() == 0 and not q.grad.any()


# ---------------------------------------------------------------------------------------------------- windows


def numbered(lengths: list[int]) -> torch.Tensor:
    """Documents of tokens 10, 11, 12, .. that end in EOS, padded."""
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths):
        row[:length] = torch.tensor([*range(10, 9 + length), EOS])
    return ids


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 24), st.integers(0, 99))
def test_windows_are_contiguous_spans_closed_by_eos(lengths, length, seed):
    ids = numbered(lengths)
    documents = Tokens.of(ids)
    rows, flat = torch.arange(len(lengths)).repeat(3), documents.flat.copy()
    starts = draw_windows(documents, rows, length, torch.Generator().manual_seed(seed))
    drawn = cut_windows(documents, rows, starts, length)
    assert drawn.shape == (len(rows), length)
    for row, start, window in zip(rows.tolist(), starts.tolist(), drawn.tolist()):
        tokens = [token for token in window if token != PAD]
        body = tokens[:-1]
        assert len(tokens) == min(length, lengths[row]) and tokens[-1] == EOS
        assert window[len(tokens) :] == [PAD] * (length - len(tokens))  # padding comes last
        assert not body or body == list(range(10 + start, 10 + start + len(body)))
        if lengths[row] <= length:
            assert tokens == ids[row, : lengths[row]].tolist()  # short documents whole
    assert (documents.flat == flat).all()


def test_half_of_the_windows_start_at_the_beginning_and_half_anywhere():
    rows = torch.zeros(4000, dtype=torch.long)
    drawn = draw_windows(Tokens.of(numbered([9])), rows, 4, torch.Generator().manual_seed(0))
    starts = torch.bincount(drawn, minlength=6) / 4000  # six places: 0 to 5
    assert len(starts) == 6 and starts[0].item() == pytest.approx(0.5 + 0.5 / 6, abs=0.03)
    assert starts[1:].tolist() == pytest.approx([0.5 / 6] * 5, abs=0.02)


def test_windows_are_the_generator_s():
    documents, rows = Tokens.of(numbered([30] * 8)), torch.arange(8)
    one, same, other = (
        draw_windows(documents, rows, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_batches_give_every_index_once_an_epoch(n, batch, seed):
    stream = dense.Batches(n, batch, torch.Generator().manual_seed(seed))
    for _ in range(3):
        epoch = [next(stream).tolist() for _ in range(-(-n // batch))]
        assert sorted(i for part in epoch for i in part) == list(range(n))
        assert all(len(part) == batch for part in epoch[:-1])


def test_batches_shuffle_anew_each_epoch():
    stream = dense.Batches(20, 20, torch.Generator().manual_seed(0))
    assert next(stream).tolist() != next(stream).tolist()


# --------------------------------------------------------------------------------------------------- training


def tiny_t5(vocab: int) -> T5:
    torch.manual_seed(0)
    return T5(T5Config(vocab, 32, 16, 2, 64, 1, 1, dropout=0.0, codebooks=2, centroids=4))


def test_embeddings_do_not_depend_on_batch_size_or_on_padding():
    model, generator = tiny_t5(50), torch.Generator().manual_seed(0)
    lengths = [1, 7, 3, 12, 12, 5, 2, 9, 1, 4]
    ids = torch.full((10, 15), PAD)  # wider than the longest
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(3, 50, (length,), generator=generator)
    with torch.no_grad():
        alone = torch.cat([model.embed(row[None, :length]) for row, length in zip(ids, lengths)])
    for batch in (1, 3, 10, 64):
        found = dense.embed(model.train(), ids, batch)
        assert found.shape == (10, 32) and found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_embeddings_of_a_store_in_chunks_are_those_of_the_padded_ids(tmp_path, monkeypatch):
    """Also where they are written into a part of a larger tensor, which is left alone around it."""
    model, ids = tiny_t5(50), numbered([1, 7, 3, 12, 5, 2, 9])
    wanted = dense.embed(model, ids)
    store = Tokens.write(tmp_path / "d.bin", ([t for t in row if t != PAD] for row in ids.tolist()), 50)
    monkeypatch.setattr(dense, "CHUNK", 3)
    torch.testing.assert_close(dense.embed(model, store, 2), wanted, rtol=1e-4, atol=1e-5)
    whole = torch.full((11, 32), 5.0)
    found = dense.embed(model, store, 2, out=whole[2:9])
    torch.testing.assert_close(whole[2:9], wanted, rtol=1e-4, atol=1e-5)
    assert found.data_ptr() == whole[2:9].data_ptr() and (whole[[0, 1, 9, 10]] == 5).all()


class Lines:
    """Stands in for run.Log and keeps what it is told."""

    def __init__(self):
        self.measured = []

    def progress(self, text: str, last: bool = False) -> None:
        pass

    def metrics(self, **values) -> None:
        self.measured.append(values)

    def first_and_last(self, stage: str, name: str) -> tuple[float, float]:
        values = [float(found[name]) for found in self.measured if found["stage"] == stage]
        return values[0], values[-1]


def config(**changes) -> SimpleNamespace:
    fields = SimpleNamespace(
        seed=0, query_length=16, clip=1.0, negatives=5, teacher="", dense_length=24, dense_warmup_steps=0,
        dense_rounds=0, dense_steps=0, dense_batch=16, dense_lr=3e-3, dense_contrastive=0.0,
        dense_margin=1.0, dense_scale=0.1, dense_pseudo=0, micro_batch=0, precision="float32",
        save_negatives=False, skip_invalid=False,
    )  # fmt: skip
    return SimpleNamespace(**(vars(fields) | changes))


class WholeWords:
    """A tokenizer of whole words, `w0` to `w59` and the question words."""

    def __init__(self):
        self.pieces = dict(zip([*(f"w{i}" for i in range(60)), *queries.QUESTION_WORDS], range(3, 200)))
        self.vocab = 3 + len(self.pieces)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[self.pieces[word] for word in text.split()] for text in texts]


def made_up():
    """20 documents of 12 of 60 words; their tokenizer, ids, sampler and unseen four-word queries."""
    rng = random.Random(0)
    texts = [" ".join(rng.sample([f"w{i}" for i in range(60)], 12)) for _ in range(20)]
    train = [(row, " ".join(rng.sample(text.split(), 4))) for row, text in enumerate(texts)]
    corpus = Corpus(0, [f"d{i}" for i in range(20)], [""] * 20, texts, train, [f"q{i}" for i in range(20)])
    sampler = queries.PseudoQuerySampler(corpus.titles, texts, queries.Idf(texts), frozenset())
    unseen = [" ".join(rng.sample(text.split(), 4)) for text in texts for _ in range(3)]
    return corpus, WholeWords(), Tokens.of(data.tokenize(WholeWords(), texts, 64)), sampler, unseen


CORPUS, TOKENIZER, IDS, SAMPLER, UNSEEN = made_up()


def run_of(recipe: SimpleNamespace, corpus: Corpus = CORPUS, folder: Path | None = None, log=None):
    """What of prepare.Run the bi-encoder's training looks at."""
    resume = SimpleNamespace(stage="", restore=lambda *_: 0, due=lambda: False, save=lambda *_: None)
    return SimpleNamespace(
        config=recipe, corpora=[corpus], read_first=[corpus], draw=SAMPLER.draw, tokenizer=TOKENIZER, log=log or Lines(),
        folder=folder or Path(tempfile.mkdtemp()), resume=resume, device="cpu",
        tokens=lambda pairs: data.tokenize(TOKENIZER, [query for _, query in pairs], recipe.query_length),
    )  # fmt: skip


def recall_of(model: T5) -> float:
    embedded = dense.embed(model, data.tokenize(TOKENIZER, UNSEEN, 16))
    return recall(embedded, [{i // 3} for i in range(60)], dense.embed(model, IDS), k=1)


def test_training_lowers_each_phase_s_loss_finds_unseen_queries_and_leaves_the_docid_table_alone():
    model, lines = tiny_t5(TOKENIZER.vocab), Lines()
    before, rq = recall_of(model), model.rq.detach().clone()
    recipe = config(
        dense_warmup_steps=80,
        dense_rounds=2,
        dense_steps=20,
        dense_pseudo=4,
        dense_contrastive=1.0,
        dense_margin=0.01,
    )
    dense.train(run_of(recipe, log=lines), model, IDS)
    first, last = lines.first_and_last("dense warm-up", "loss")
    assert last < 0.6 * first
    assert {found["stage"] for found in lines.measured} == {"dense warm-up", "dense round 1", "dense round 2"}
    assert before < 0.35 and recall_of(model) > 0.5
    assert torch.equal(model.rq, rq) and not model.training


def test_same_seed_trains_the_same_bi_encoder_bit_by_bit():
    models = []
    for seed in (0, 0, 1):
        models.append(tiny_t5(TOKENIZER.vocab))
        recipe = config(seed=seed, dense_warmup_steps=2, dense_rounds=2, dense_steps=2, dense_pseudo=1)
        dense.train(run_of(recipe), models[-1], IDS)
    one, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_margin_rounds_learn_the_margins_of_bm25():
    model, lines = tiny_t5(TOKENIZER.vocab), Lines()
    dense.train(run_of(config(dense_rounds=1, dense_steps=60), log=lines), model, IDS)
    first, last = lines.first_and_last("dense round 1", "margin")
    assert last < 0.3 * first


def test_teacher_file_takes_the_place_of_bm25_in_every_round(tmp_path, monkeypatch):
    """Margins of 3 and -2 that no BM25 gives: after training the model has them."""
    monkeypatch.setattr(dense, "BM25", lambda *_: pytest.fail("BM25 taught"))
    margins = [3.0 if i % 2 else -2.0 for i in range(6)]
    lines = [line(f"q{i}", [f"d{i}", f"d{i + 7}"], [10 + margin, 10]) for i, margin in enumerate(margins)]
    model, recipe = (
        tiny_t5(TOKENIZER.vocab),
        config(dense_rounds=2, dense_steps=60, dense_scale=1.0),
    )
    recipe.teacher = str(teacher(tmp_path / "t", *lines))
    dense.train(run_of(recipe), model, IDS)
    q = dense.embed(model, data.tokenize(TOKENIZER, [query for _, query in CORPUS.train[:6]], 16))
    documents = dense.embed(model, IDS)
    found = (q * (documents[:6] - documents[7:13])).sum(1)
    assert F.mse_loss(found, torch.tensor(margins)) < 2.0
    assert found.sign().tolist() == torch.tensor(margins).sign().tolist()


def test_negatives_are_mined_with_the_first_round_s_model(monkeypatch):
    """The second round sees the trained model, not of the start, and at most N - 1 negatives."""
    seen, mine = {}, dense.hard_negatives

    def spy(bm25, pairs, k, index, device):
        seen.update(pairs=pairs, documents=index and index[1], k=k)
        return mine(bm25, pairs, k, index, device)

    monkeypatch.setattr(dense, "hard_negatives", spy)
    model = tiny_t5(TOKENIZER.vocab)
    start = dense.embed(model, IDS)
    recipe = config(dense_rounds=2, dense_steps=3, negatives=1000, dense_pseudo=2)
    dense.train(run_of(recipe), model, IDS)
    assert seen["k"] == 19 and len(seen["pairs"]) == 20 + 2 * 20
    assert (seen["documents"] - start).abs().max() > 1e-3


def parameters(recipe: SimpleNamespace, corpus: Corpus = CORPUS, folder: Path | None = None) -> torch.Tensor:
    """All parameters after this recipe."""
    model = tiny_t5(TOKENIZER.vocab)
    dense.train(run_of(recipe, corpus, folder), model, IDS)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_margin_rounds_in_micro_batches_train_as_whole_batches_do():
    """MarginMSE is a mean over queries; with weight decay off and no ties, only rounding may differ."""
    recipe = dict(dense_rounds=2, dense_steps=3, dense_pseudo=1, dense_lr=1e-3)
    whole, parts = (parameters(config(micro_batch=size, **recipe)) for size in (0, 5))  # 16 = 5 + 5 + 5 + 1
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
    assert not torch.equal(
        parts, torch.cat([p.detach().flatten() for p in tiny_t5(TOKENIZER.vocab).parameters()])
    )


@pytest.mark.parametrize("stage", [dict(dense_warmup_steps=3), dict(dense_rounds=2, dense_steps=3)])
def test_contrastive_training_in_micro_batches_is_that_of_whole_batches(stage):
    """With the weights of the default preset; each query's negatives are those of the whole batch."""
    recipe = dict(dense_contrastive=1.0, dense_margin=0.01, dense_pseudo=1, dense_lr=1e-3) | stage
    whole, parts = (parameters(config(micro_batch=size, **recipe)) for size in (0, 5))
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
    start = torch.cat([p.detach().flatten() for p in tiny_t5(TOKENIZER.vocab).parameters()])
    assert (whole - start).abs().max() > 1e-3


def test_each_round_s_negatives_are_saved_where_asked_and_train_the_same(tmp_path):
    recipe = dict(dense_rounds=2, dense_steps=2, dense_pseudo=1, negatives=3)
    plain = parameters(config(**recipe), folder=tmp_path)
    assert list(tmp_path.glob("negatives*")) == []
    saved = parameters(config(save_negatives=True, **recipe), folder=tmp_path)
    assert torch.equal(saved, plain)
    names = sorted(path.name for path in tmp_path.glob("negatives*"))
    assert names == ["negatives_1.jsonl", "negatives_2.jsonl"]
    for number in (1, 2):
        found = dense.read_teacher(tmp_path / f"negatives_{number}.jsonl", CORPUS)
        assert found.queries == [query for _, query in CORPUS.train] and found.documents.shape == (20, 4)
        assert found.documents[:, 0].tolist() == list(range(20))
        assert not (found.documents[:, 1:] == found.documents[:, :1]).any()


def test_teacher_may_be_one_file_for_each_round_and_the_last_serves_the_rest(tmp_path):
    training = dense.Training(run_of(config()), tiny_t5(200), IDS)
    files = [teacher(tmp_path / f"t{i}", line("q0", ["d0", f"d{i}"], [1, 0])) for i in (1, 2)]
    training.config.teacher = ",".join(map(str, files))
    found = [training.examples(number).documents.tolist() for number in (1, 2, 3)]
    assert found == [[[0, 1]], [[0, 2]], [[0, 2]]]


def test_round_without_a_teacher_s_file_mines_its_own_negatives(tmp_path):
    training = dense.Training(run_of(config()), tiny_t5(200), IDS)
    training.config.teacher = f"{teacher(tmp_path / 't', line('q0', ['d0', 'd3'], [1, 0]))},"
    assert training.examples(1).documents.tolist() == [[0, 3]]
    assert len(training.examples(2).queries) == len(CORPUS.train)


def test_lists_and_stores_of_documents_train_the_same():
    """Whether the corpus is held in memory or on disk."""
    documents = Documents()
    for row in zip(CORPUS.ids, CORPUS.titles, CORPUS.texts):
        documents.add(*row)
    documents.close()
    mapped = Corpus(0, documents.ids, documents.titles, documents.texts, CORPUS.train, CORPUS.train_ids)
    recipe = config(dense_rounds=1, dense_steps=2, dense_pseudo=1)
    assert torch.equal(parameters(recipe), parameters(recipe, mapped))


def test_bfloat16_products_train_both_rounds():
    recipe = dict(dense_warmup_steps=1, dense_rounds=2, dense_steps=1, dense_pseudo=1)
    full, half = (parameters(config(precision=name, **recipe)) for name in ("float32", "bf16"))
    assert half.isfinite().all() and not torch.equal(full, half)


def test_training_with_nothing_to_learn_from_is_refused():
    bare = Corpus(0, CORPUS.ids, CORPUS.titles, CORPUS.texts)
    with pytest.raises(ValueError, match="no annotated query and --dense_pseudo is 0"):
        dense.train(run_of(config(dense_rounds=1, dense_steps=1), bare), tiny_t5(200), IDS)


@pytest.mark.parametrize("mined", [False, True])
def test_other_relevant_document_of_the_same_query_is_no_negative(mined):
    """However many negatives are wanted; and a query of all documents has none."""
    pairs = [(0, "red cat"), (2, "red cat"), *((row, "all") for row in range(len(TEXTS)))]
    index = (torch.ones(len(pairs), 3), torch.ones(len(TEXTS), 3)) if mined else None
    for k in (2, len(TEXTS) - 1):
        found = dense.hard_negatives(BM25(TEXTS), pairs, k, index)
        assert found.queries == ["red cat"] * 2 and found.documents.shape == (2, k + 1)
        assert 2 not in found.documents[0, 1:] and 0 not in found.documents[:, 1:]
    with pytest.raises(ValueError, match="every query of D_0 belongs to all of its documents"):
        dense.hard_negatives(BM25(TEXTS), pairs[2:], 2, index)
