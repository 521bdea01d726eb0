"""The search against exhaustive scoring and a plain beam search that caches nothing; the command line."""

import builtins
import itertools
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arrays
import search
import store
from data import Corpus, load_tokenizer, tokenize, train_tokenizer
from mixlora import MixConfig, add_mixture, mixed_layers
from rq import Trie
from search import beam_search, documents, exact_scores, retrieve
from t5 import T5, T5Config

M, K, VOCAB = 3, 5, 60


def small_model(mixed: bool, codebooks: int = M, centroids: int = K) -> T5:
    """A random T5; `mixed` puts three experts with random weights in each of its first two decoder blocks."""
    torch.manual_seed(0)
    model = T5(
        T5Config(
            VOCAB, 16, 4, 4, 24, encoder_blocks=2, decoder_blocks=3, codebooks=codebooks, centroids=centroids
        )
    )
    with torch.no_grad():
        model.rq *= 0.5  # logits a few units apart
        if mixed:
            add_mixture(model, MixConfig(layers=2, experts=3, rank=2))
            for layer in mixed_layers(model):
                layer.new.in_b.normal_(0, 0.3)
                layer.new.out_b.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "mixed"])
def model(request) -> T5:
    return small_model(request.param)


@pytest.fixture(scope="module")
def codes() -> Tensor:
    """60 documents on at most 125 docids, some of them shared."""
    return torch.randint(K, (60, M), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Six queries of 1 to 9 tokens, padded with 0."""
    generator = torch.Generator().manual_seed(4)
    ids, lengths = torch.randint(1, VOCAB, (6, 9), generator=generator), torch.tensor([9, 4, 1, 6, 9, 2])
    return ids * (torch.arange(9) < lengths[:, None])


def docids_of(trie: Trie, leaves: Tensor) -> list[tuple]:
    return [tuple(trie.rows[first].tolist()) for first, end in leaves.tolist() if first < end]


@torch.no_grad()
def log_p_next(model: T5, query: Tensor, prefix: tuple) -> Tensor:
    """Log-probabilities (K,) of the code after `prefix`: the whole network on one query, nothing kept."""
    source, padding = model.encode(query[query != 0][None])
    hidden, _ = model.docid_hidden(source, padding, torch.tensor([[*prefix, 0]]))  # the last code is no input
    return F.log_softmax(hidden[0, -1] @ model.rq[len(prefix)].T, dim=-1)


def teacher_forced(model: T5, query: Tensor, docid: tuple) -> float:
    """sum_m log p(code m | codes before m, query)."""
    return sum(log_p_next(model, query, docid[:m])[code].item() for m, code in enumerate(docid))


def plain_beam_search(model: T5, docids: set[tuple], query: Tensor, beam: int) -> list[tuple[tuple, float]]:
    """Beam search over a trie of dicts that runs the whole network again at every step."""
    trie: dict = {}
    for docid in docids:
        node = trie
        for code in docid:
            node = node.setdefault(code, {})
    beams = [((), 0.0, trie)]
    for _ in range(M):
        grown = []
        for prefix, score, node in beams:
            log_p = log_p_next(model, query, prefix).tolist()
            grown += [((*prefix, code), score + log_p[code], below) for code, below in node.items()]
        beams = sorted(grown, key=lambda item: -item[1])[:beam]
    return [(docid, score) for docid, score, _ in beams]


# ------------------------------------------------------------------------------------------------ beam search


def test_a_beams_score_is_its_docids_teacher_forced_log_probability(model, codes, ids):
    trie = Trie(codes)
    leaves, scores = beam_search(model, trie, ids, beam=4)
    for query, row, row_scores in zip(ids, leaves, scores.tolist()):
        want = [teacher_forced(model, query, docid) for docid in docids_of(trie, row)]
        assert row_scores == pytest.approx(want, abs=1e-5) and len(want) == 4


def test_exact_scores_are_teacher_forced_log_probabilities(model, codes, ids):
    want = [
        [teacher_forced(model, query, docid) for docid in map(tuple, codes[:12].tolist())]
        for query in ids[:3]
    ]
    found = exact_scores(model, ids[:3], codes[:12])
    torch.testing.assert_close(found, torch.tensor(want), atol=1e-5, rtol=0)
    torch.testing.assert_close(exact_scores(model, ids[:3], codes[:12], chunk=5), found, atol=1e-5, rtol=0)


def test_scores_are_not_renormalised_over_the_trie(model, ids):
    every = torch.cartesian_prod(*[torch.arange(K)] * M)
    total = exact_scores(model, ids, every).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(len(ids)))  # all K^M docids share one unit of probability
    leaves, scores = beam_search(model, Trie(every[:1]), ids, beam=1)
    assert (
        leaves.tolist() == [[[0, 1]]] * 6 and (scores < -0.5).all()
    )  # a lone docid keeps its own share of it


@pytest.mark.parametrize("extra", [0, 7])
def test_a_beam_as_wide_as_the_corpus_equals_exhaustive_scoring(model, codes, ids, extra):
    distinct = torch.unique(codes, dim=0)
    trie = Trie(codes)
    leaves, scores = beam_search(model, trie, ids, beam=len(distinct) + extra)
    want = exact_scores(model, ids, distinct).sort(dim=1, descending=True)
    assert want.values.diff(dim=1).abs().min() > 2e-5  # no tie within rounding, so one order is right
    for row, order in zip(leaves[:, : len(distinct)], want.indices):
        assert docids_of(trie, row) == list(map(tuple, distinct[order].tolist()))
    torch.testing.assert_close(scores[:, : len(distinct)], want.values, atol=1e-5, rtol=0)
    beyond = leaves[:, len(distinct) :]
    assert torch.equal(beyond[..., 0], beyond[..., 1]) and (scores[:, len(distinct) :] == -torch.inf).all()


@pytest.mark.parametrize("beam", [1, 2, 5, 11])
def test_cached_beams_equal_a_plain_search_that_recomputes_every_prefix(model, codes, ids, beam):
    trie = Trie(codes)
    leaves, scores = beam_search(model, trie, ids, beam)
    for query, row, row_scores in zip(ids, leaves, scores):
        want = plain_beam_search(model, set(map(tuple, codes.tolist())), query, beam)
        assert docids_of(trie, row) == [docid for docid, _ in want]
        assert row_scores.tolist() == pytest.approx([score for _, score in want], abs=1e-5)


def test_a_narrow_beam_can_miss_what_a_wide_one_finds(model, codes, ids):
    # otherwise the comparison above would pass with any beam
    trie = Trie(codes)
    narrow, wide = beam_search(model, trie, ids, 1)[1], beam_search(model, trie, ids, 40)[1]
    assert (narrow[:, 0] <= wide[:, 0] + 1e-6).all() and (narrow[:, 0] < wide[:, 0] - 1e-3).any()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_every_docid_found_is_in_the_trie_and_none_twice(model, codes, ids, n):
    for seed in range(5):
        some = codes[torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:n]]
        trie, indexed = Trie(some), set(map(tuple, some.tolist()))
        leaves, scores = beam_search(model, trie, ids, beam=10)
        assert leaves.shape == (6, min(10, n), 2) and scores.shape == leaves.shape[:2]
        for row, row_scores in zip(leaves, scores):
            found = docids_of(trie, row)
            exists = row[:, 0] < row[:, 1]
            assert set(found) <= indexed and len(set(found)) == len(found) == exists.sum()
            assert len(indexed) > 10 or set(found) == indexed  # a corpus within the beam is found whole
            assert row_scores.tolist() == sorted(row_scores.tolist(), reverse=True)
            assert torch.equal(exists, row_scores > -torch.inf)


def test_fewer_docids_than_beams_end_in_no_leaf_and_minus_infinity(model, ids):
    # two docids part at the first code, two at the last: the live beams grow from 2 to 3
    trie = Trie(torch.tensor([[0, 1, 2], [4, 1, 2], [4, 1, 3], [4, 1, 3]]))
    leaves, scores = beam_search(model, trie, ids, beam=5)
    assert [sorted(row) for row in leaves[:, :3].tolist()] == [[[0, 1], [1, 2], [2, 4]]] * 6
    assert scores[:, :3].isfinite().all() and (scores[:, 3:] == -torch.inf).all()
    assert torch.equal(leaves[:, 3:, 0], leaves[:, 3:, 1])


def test_no_more_beams_are_decoded_than_there_are_documents(model, ids, monkeypatch):
    rows, decode = [], type(model).decode
    monkeypatch.setattr(T5, "decode", lambda self, x, *rest: rows.append(len(x)) or decode(self, x, *rest))
    leaves, _ = beam_search(model, Trie(torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]])), ids, 1000)
    assert max(rows) == 3 * len(ids) and leaves.shape[:2] == (len(ids), 3)


def test_a_beam_whose_branch_is_narrow_does_not_fill_up_with_invalid_children(model, ids):
    # under code 0 one docid, under code 1 five: the children of beam 0 are padded with four that do not exist
    trie = Trie(torch.tensor([[0, 3, 3], *([1, 2, k] for k in range(5))]))
    leaves, scores = beam_search(model, trie, ids, beam=6)
    assert [sorted(row) for row in leaves[..., 0].tolist()] == [
        list(range(6))
    ] * 6 and scores.isfinite().all()


def test_a_query_scores_the_same_alone_and_in_a_padded_batch(model, codes, ids):
    trie = Trie(codes)
    leaves, scores = beam_search(model, trie, ids, beam=8)
    for query, row, row_scores in zip(ids, leaves, scores):
        alone, alone_scores = beam_search(model, trie, query[query != 0][None], beam=8)
        assert torch.equal(alone[0], row)
        torch.testing.assert_close(alone_scores[0], row_scores, atol=1e-5, rtol=0)


def test_the_papers_shape_of_docid_is_searched():
    model = small_model(True, codebooks=8, centroids=2048)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2048, (300, 8), generator=generator)
    codes[150:, :3] = codes[:150, :3]  # shared prefixes, as residual quantisation gives
    ids = torch.randint(1, VOCAB, (2, 5), generator=generator)
    leaves, scores = beam_search(model, Trie(codes), ids, beam=300)
    assert leaves[..., 0].sort(dim=1).values.tolist() == [list(range(300))] * 2
    want = exact_scores(model, ids, Trie(codes).rows.long()).gather(1, leaves[..., 0])
    torch.testing.assert_close(scores, want, atol=1e-4, rtol=0)
    assert (scores.diff(dim=1) <= 0).all()


# ---------------------------------------------------------------------------------------- documents, retrieve


def test_documents_that_tie_stand_in_order_of_document_id():
    # [0, 0] has rows 1 and 3, [1, 0] row 0, [1, 1] row 2; the last two have the same score, above the first's
    trie = Trie(torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]))
    names = ["p9", "p7", "p10", "p1"]
    leaves, scores = (
        torch.tensor([[[3, 4], [2, 3], [0, 2]], [[0, 2], [0, 0], [4, 4]]]),
        torch.tensor([[-1.0, -1, -2], [-3, -torch.inf, -torch.inf]]),
    )
    first, second = documents(trie, leaves, scores, names, k=10)
    assert first == [(2, -1.0), (0, -1.0), (3, -2.0), (1, -2.0)]  # "p10" < "p9" as text, then "p1" < "p7"
    assert second == [(3, -3.0), (1, -3.0)]
    assert documents(trie, leaves, scores, names, k=3) == [first[:3], second]
    assert documents(trie, leaves, scores, names, k=1) == [first[:1], second[:1]]


TEXTS = [
    f"{a} {b} {c}"
    for a, b, c in itertools.product(
        ["red", "green", "blue", "black"],
        ["river", "mountain", "city", "forest"],
        ["song", "battle", "ship", "king"],
    )
]


@pytest.fixture(scope="module")
def tokenizer_model() -> bytes:
    return train_tokenizer(TEXTS, VOCAB)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model):
    return load_tokenizer(tokenizer_model)


def test_retrieve_keeps_the_order_of_the_queries(model, codes, tokenizer):
    trie, names = Trie(codes), [f"d{row:02}" for row in range(60)]
    queries = ["king", " ".join(TEXTS[:4]), "red ship", *TEXTS[20:24], "blue", "green forest battle " * 3]
    together = retrieve(model, trie, tokenizer, queries, names, k=7, beam=7)
    assert len({tuple(row for row, _ in ranking) for ranking in together}) > 5  # so that a swap would show
    for query, ranking in zip(queries, together, strict=True):
        (alone,) = retrieve(model, trie, tokenizer, [query], names, k=7, beam=7)
        assert [row for row, _ in ranking] == [row for row, _ in alone]
        assert [score for _, score in ranking] == pytest.approx([score for _, score in alone], abs=1e-5)


def test_retrieve_ranks_documents_as_exhaustive_scoring_does(model, codes, tokenizer):
    names = [f"d{row:02}" for row in range(60)]
    (ranking,) = retrieve(model, Trie(codes), tokenizer, ["red river king"], names, k=60, beam=60)
    docids = list(map(tuple, codes.tolist()))
    exact = exact_scores(model, tokenize(tokenizer, ["red river king"], 64), codes)[0].tolist()
    score_of = dict(zip(docids, exact))  # one score for all that share a docid
    want = sorted((-score_of[docid], name) for docid, name in zip(docids, names))
    assert [names[row] for row, _ in ranking] == [name for _, name in want]
    assert [score for _, score in ranking] == pytest.approx([-score for score, _ in want], abs=1e-5)


def test_retrieve_cuts_queries_to_max_length(model, codes, tokenizer):
    names = list(map(str, range(60)))
    long, cut, other = (
        retrieve(model, Trie(codes), tokenizer, [TEXTS[5] + tail], names, max_length=4)
        for tail in ("", " king", " a")
    )
    assert len(tokenizer.encode(TEXTS[5])) > 3 and long == cut == other
    assert retrieve(model, Trie(codes), tokenizer, [TEXTS[5]], names) != long


def test_retrieve_switches_dropout_off(codes, tokenizer):
    model, trie, names = small_model(True), Trie(codes), list(map(str, range(60)))
    want = retrieve(model, trie, tokenizer, TEXTS[:3], names)
    model.train()
    assert retrieve(model, trie, tokenizer, TEXTS[:3], names) == want and not model.training


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "mixed"])
def run_folder(request, tmp_path_factory, tokenizer_model):
    """A finished run of two corpora with 9 and 3 documents, of which rows 2 and 10 share a docid."""
    folder = tmp_path_factory.mktemp("run")
    corpora = [
        Corpus(
            first,
            [f"doc{row}" for row in rows],
            [f"Title {row}" for row in rows],
            [TEXTS[row] for row in rows],
        )
        for first, rows in ((0, range(9)), (9, range(9, 12)))
    ]
    store.write_json(folder / "config.json", {"method": "base", "beam": 10, "query_length": 64})
    store.write(folder / "tokenizer.model", tokenizer_model)
    store.save_corpora(folder, "made up", corpora, {}, {})
    docids = torch.randint(K, (12, M), generator=torch.Generator().manual_seed(5))
    docids[10] = docids[2]
    arrays.write_array(folder / "docids.npy", docids.numpy())
    for t in (0, 1):
        model = small_model(request.param)
        with torch.no_grad():
            model.rq.copy_(model.rq.roll(t, dims=1))  # the model after D_1 is another than that after D_0
        store.save_model(folder / f"D{t}.pt", model, [])
    return folder


LINE = re.compile(r" *(\d+) +(-\d+\.\d{3})  (\S+) +(doc\d+)  (Title \d+)")


def test_command_prints_rank_score_docid_and_title_as_the_last_model_ranks_them(run_folder, capsys):
    search.main([str(run_folder), "red river king", "-k", "12"])
    lines = [LINE.fullmatch(line).groups() for line in capsys.readouterr().out.splitlines()]
    run = store.LoadedRun(run_folder)
    scores = exact_scores(run.at(1)[0], tokenize(run.tokenizer, ["red river king"], 64), run.docids)[0]
    assert sorted(doc for _, _, _, doc, _ in lines) == sorted(run.ids)
    for place, (number, score, docid, doc, title) in enumerate(lines, 1):
        row = run.ids.index(doc)
        assert int(number) == place and title == run.headline(row) == f"Title {row}"
        assert docid == "-".join(map(str, run.docids[row].tolist()))
        assert float(score) == pytest.approx(scores[row].item(), abs=6e-4)
    printed = [float(score) for _, score, _, _, _ in lines]
    assert printed == sorted(printed, reverse=True)
    place = [doc for _, _, _, doc, _ in lines].index("doc10")
    assert lines[place + 1][3] == "doc2"  # the same docid, so the same score; "doc10" < "doc2" as text


def test_k_cuts_what_is_printed_and_widens_a_narrower_beam(run_folder, capsys):
    for k in (1, 3, 12):
        search.main([str(run_folder), "blue ship", "-k", str(k), "--beam", "1"])
        assert len(capsys.readouterr().out.splitlines()) == k


def test_a_run_that_stopped_after_d0_searches_d0_alone(run_folder, capsys):
    last = (run_folder / "D1.pt").rename(run_folder / "D1.away")
    try:
        search.main([str(run_folder), "blue ship", "-k", "20"])
    finally:
        last.rename(run_folder / "D1.pt")
    found = {LINE.fullmatch(line).group(4) for line in capsys.readouterr().out.splitlines()}
    assert found == {f"doc{row}" for row in range(9)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["RUN", ""], "query is empty"),
        (["RUN", "  \t "], "query is empty"),
        (["RUN", "king", "-k", "0"], "-k 0 .* positive"),
        (["RUN", "king", "--beam", "-3"], "--beam -3: wanted positive"),
        (["RUN/absent", "king"], r"absent.config.json; is .*absent the folder of a finished run\?"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_found(run_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        search.main([argument.replace("RUN", str(run_folder)) for argument in arguments])


def copy_without_models(run_folder: Path, folder: Path) -> None:
    for name in ("config.json", "tokenizer.model", "corpus.json", "docids.npy"):
        shutil.copy(run_folder / name, folder / name)
    shutil.copytree(run_folder / "documents", folder / "documents")


def test_a_document_without_a_title_is_shown_by_its_first_words(run_folder, tmp_path, capsys):
    copy_without_models(run_folder, tmp_path)
    texts = [f"The {TEXTS[row]} and so on" for row in range(12)]
    corpus = Corpus(0, [f"doc{row}" for row in range(12)], [""] * 12, texts)
    store.save_corpora(tmp_path, "made up", [corpus], {}, {})
    store.save_model(tmp_path / "D0.pt", store.load_model(run_folder / "D1.pt")[0], [])
    search.main([str(tmp_path), "red river king", "-k", "3"])
    for line in capsys.readouterr().out.splitlines():
        found = re.search(r"doc(\d+)  (.*)$", line)
        assert found.group(2) == texts[int(found.group(1))]


def test_a_run_without_a_finished_corpus_says_how_to_go_on(run_folder, tmp_path):
    copy_without_models(run_folder, tmp_path)
    with pytest.raises(ValueError, match=r"no finished corpus .* train.py --resume"):
        search.main([str(tmp_path), "king"])


def test_a_damaged_checkpoint_is_named(run_folder, tmp_path):
    copy_without_models(run_folder, tmp_path)
    (tmp_path / "D0.pt").write_bytes((run_folder / "D0.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"D0.pt: cannot be read"):
        search.main([str(tmp_path), "king"])


def test_prompt_answers_until_an_empty_line(run_folder, monkeypatch, capsys):
    typed = iter(["red river", "  blue ship ", "   ", "never asked"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed))
    search.main([str(run_folder), "-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert "12 documents" in lines[0] and list(typed) == ["never asked"]
    for query, answer in (("red river", lines[1:3]), ("blue ship", lines[3:5])):
        search.main([str(run_folder), query, "-k", "2"])
        assert capsys.readouterr().out.splitlines() == answer
    assert len(lines) == 5


def test_the_program_ends_without_a_traceback(run_folder, monkeypatch):
    def end_of_input(prompt):
        raise EOFError

    monkeypatch.setattr(builtins, "input", end_of_input)
    monkeypatch.setattr(sys, "argv", ["search.py", str(run_folder), ""])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(search.__file__, run_name="__main__")
    assert ended.value.code == "search.py: the query is empty; type some words"
    monkeypatch.setattr(sys, "argv", ["search.py", str(run_folder)])
    runpy.run_path(search.__file__, run_name="__main__")  # end of input at the prompt
