"""Sampling against transformers' warpers, forward and generate; determinism; stopping and going on."""

import json
import runpy
import sys
import types
from itertools import product

import pytest
import torch

import data
from data import load_tokenizer, train_tokenizer
from queries import store_pseudo_queries
from reading import Problems, read_pseudo_queries
from store import hold
from t5 import T5, T5Config
from tools import doc2query
from tools.doc2query import document_uniforms, draw, main, next_word_probabilities, sample
from weights import load_published, to_published

TEMPERATURE, TOP_K = 0.2, 5


def tiny_t5(vocab: int = 30) -> T5:
    """A small random T5 of ours, in evaluation mode. Its blocks outweigh the word they read and tell the
    positions apart, so that it does not repeat one word for ever; it seldom writes the padding word.
    """
    torch.manual_seed(0)
    shape = dict(width=12, head_width=5, heads=3, feed_forward=20, encoder_blocks=2, decoder_blocks=2)
    model = T5(T5Config(vocab=vocab, codebooks=1, centroids=1, **shape)).eval()
    with torch.no_grad():
        model.word *= 0.3
        model.word[0] *= 0.1
        model.decoder_bias.weight *= 6
        for block in model.decoder:
            block.self_attention.o *= 3
            block.ff.w_out *= 3
    return model


def published_config(model: T5) -> dict:
    """What a config.json says of it."""
    c = model.config
    sizes = dict(
        vocab_size=c.vocab, d_model=c.width, d_kv=c.head_width, num_heads=c.heads, d_ff=c.feed_forward
    )
    sizes |= dict(num_layers=c.encoder_blocks, num_decoder_layers=c.decoder_blocks, dropout_rate=0.1)
    return sizes | dict(relative_attention_num_buckets=c.buckets)


def batch(lengths: list[int]) -> torch.Tensor:
    """Random token ids (B, S) of these lengths, from 1 to 29, padded with 0."""
    ids = torch.randint(1, 30, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    return ids * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@pytest.fixture(scope="module")
def pair():
    """A transformers T5 of 30 words and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    ours = tiny_t5()
    config = transformers.T5Config(**published_config(ours), decoder_start_token_id=0)
    hf = transformers.T5ForConditionalGeneration(config).eval()
    hf.load_state_dict(to_published(ours), strict=False)  # its copies of the word table are tied
    load_published(ours, hf.state_dict())  # every tensor is accounted for
    return hf, ours


def uniforms(documents: int, per_document: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(documents, per_document, length, generator=torch.Generator().manual_seed(seed))


def warped(logits: torch.Tensor, top_k: int, temperature: float) -> torch.Tensor:
    """transformers' distribution over all words: (R, V) logits -> (R, V) probabilities."""
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = process.TemperatureLogitsWarper(temperature)(None, logits)
    return process.TopKLogitsWarper(top_k)(None, scores).softmax(-1)


def spread(probabilities: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """Our (R, k) probabilities put back in their places, (R, V)."""
    return torch.zeros(len(ids), vocab).scatter(1, ids, probabilities)


@torch.no_grad()
def next_by_forward(hf, ids: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """The warped distribution after each prefix (R, t) by a whole forward of transformers, (R, V)."""
    ids = ids.expand(len(prefixes), -1)
    started = torch.nn.functional.pad(prefixes, (1, 0))
    logits = hf(ids, attention_mask=(ids != 0).long(), decoder_input_ids=started).logits[:, -1]
    return warped(logits, TOP_K, TEMPERATURE)


def two_words(hf, ids: torch.Tensor) -> dict[tuple[int, int], float]:
    """The exact probability of every pair of first words; </s> ends, and what follows it counts as 0."""
    first = next_by_forward(hf, ids, torch.empty(1, 0, dtype=torch.long))[0]
    live = first.nonzero()[:, 0]
    second = next_by_forward(hf, ids, live[:, None])
    exact = {}
    for i, j in product(range(len(live)), range(len(first))):
        outcome = (0, 0) if live[i] == 1 else (int(live[i]), 0 if j == 1 else j)
        exact[outcome] = exact.get(outcome, 0.0) + float(first[live[i]] * second[i, j])
    return {outcome: p for outcome, p in exact.items() if p > 0}


def counts(tokens: torch.Tensor) -> dict[tuple[int, int], int]:
    pairs, n = tokens.unique(dim=0, return_counts=True)
    return {tuple(outcome): k for outcome, k in zip(pairs.tolist(), n.tolist())}


# ------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize(
    "top_k, temperature", [(1, 1.0), (5, 1.0), (10, 0.3), (10, 2.5), (29, 1.0), (30, 0.7)]
)
def test_probabilities_equal_transformers_warpers(top_k, temperature):
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(1)) * 3
    probabilities, ids = next_word_probabilities(logits, top_k, temperature)
    ours = spread(probabilities, ids, 30)
    theirs = warped(logits, top_k, temperature)
    assert torch.equal(ours > 0, theirs > 0) and probabilities.shape == (200, top_k)
    assert (ours - theirs).abs().max() < 1e-6
    assert (probabilities.diff(dim=1) <= 0).all()  # likeliest first


def test_probabilities_are_float32_and_top_k_may_exceed_the_vocabulary():
    logits = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float64):
        probabilities, ids = next_word_probabilities(logits.to(dtype), 100, 0.5)
        assert probabilities.dtype == torch.float32 and ids.shape == (3, 8)
        want = (logits.to(dtype).float() / 0.5).softmax(-1)
        torch.testing.assert_close(spread(probabilities, ids, 8), want)


def test_step_probabilities_equal_a_whole_forward_of_transformers(pair, monkeypatch):
    hf, ours = pair
    steps = []

    def recorded(*args):
        steps.append(next_word_probabilities(*args))
        return steps[-1]

    monkeypatch.setattr(doc2query, "next_word_probabilities", recorded)
    ids = batch([9, 1, 6])
    tokens = sample(ours, ids, 4, TOP_K, TEMPERATURE, uniforms(3, 4, 12))  # (3, 4, T)
    assert len(steps) == tokens.shape[2] == 12
    compared = 0
    for b, i, t in product(range(3), range(4), range(12)):
        prefix = tokens[b, i, :t]
        if (prefix == 0).any():
            continue  # ended before
        theirs = next_by_forward(hf, ids[b : b + 1], prefix[None])
        row = [part[b * 4 + i][None] for part in steps[t]]
        assert (spread(*row, 30) - theirs).abs().max() < 1e-5
        compared += 1
    assert compared > 100  # most of the 144 steps


def test_top_1_equals_greedy_generate(pair):
    hf, ours = pair
    ids = batch([9, 1, 6, 14])
    theirs = hf.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), do_sample=False, num_beams=1, max_new_tokens=12
    )[:, 1:]  # without the start token
    tokens = sample(ours, ids, 3, 1, 1.0, uniforms(4, 3, 12))
    want = theirs.masked_fill(theirs == 1, 0)
    for i in range(3):
        assert torch.equal(tokens[:, i], want[:, : tokens.shape[2]])
    assert all(row.unique().numel() >= 3 for row in want)


@pytest.mark.parametrize("document", [0, 1])
def test_first_two_words_follow_the_exact_distribution(pair, document):
    hf, ours = pair
    ids, n = batch([9, 4]), 20_000
    exact = two_words(hf, ids[document : document + 1])
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5) and len(exact) > 10
    tokens = sample(ours, ids, n, TOP_K, TEMPERATURE, uniforms(2, n, 2))[document]
    for words in (1, 2):
        want = {}
        for outcome, p in exact.items():
            want[outcome[:words]] = want.get(outcome[:words], 0) + p
        sampled = counts(tokens[:, :words])
        assert set(sampled) <= set(want)
        # cells that expect 5 or more; the statistic has mean f and variance 2 f for f degrees of freedom
        cells = [(sampled.get(outcome, 0), n * p) for outcome, p in want.items() if n * p >= 5]
        statistic, f = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
        assert f >= 3 and statistic < f + 4 * (2 * f) ** 0.5


def test_frequencies_agree_with_transformers_generate(pair):
    hf, ours = pair
    ids, n = batch([9]), 8000
    torch.manual_seed(0)
    theirs = hf.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=TOP_K, max_new_tokens=2,
        temperature=TEMPERATURE, num_return_sequences=n,
    )[:, 1:]  # fmt: skip
    theirs = counts(theirs.masked_fill(theirs == 1, 0))
    sampled = counts(sample(ours, ids, n, TOP_K, TEMPERATURE, uniforms(1, n, 2))[0])
    # total variation between two draws of n from one distribution over at most 25 pairs: about
    # sum_i sqrt(p_i / (pi n)) <= sqrt(25 / (pi n)) = 0.032
    distance = sum(abs(theirs.get(o, 0) - sampled.get(o, 0)) for o in theirs | sampled) / (2 * n)
    assert distance < 0.04
    flat = {o: 1 / len(sampled) for o in sampled}  # the bound tells the distribution from an even one
    assert sum(abs(theirs.get(o, 0) / n - p) for o, p in flat.items()) / 2 > 0.2


# ---------------------------------------------------------------------------------------------------- by hand


def test_draw_is_the_inverse_cdf():
    p, ids = torch.tensor([[0.5, 0.25, 0.25]]).expand(6, 3), torch.tensor([[7, 3, 9]]).expand(6, 3)
    u = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24])  # 0.5 itself belongs to the second word
    assert draw(p, ids, u).tolist() == [7, 7, 3, 3, 9, 9]


def test_draw_never_falls_past_the_end_nor_on_a_word_of_probability_zero():
    largest = torch.tensor([1 - 2**-24])  # the largest float32 below 1
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    p, ids = next_word_probabilities(logits, 40, 0.02)  # many probabilities underflow to 0
    assert (p == 0).any()
    for u in (largest.expand(500), torch.zeros(500)):
        words = draw(p, ids, u)
        assert (spread(p, ids, 40).gather(1, words[:, None]) > 0).all()


def test_a_query_stops_at_the_end_word_and_stays_padded(pair):
    _, ours = pair
    ids = batch([9, 4])
    u = uniforms(2, 50, 40)
    tokens = sample(ours, ids, 50, 30, 3.0, u)  # every word is possible, </s> too
    assert not (tokens == 1).any()
    rows = tokens.flatten(0, 1)
    lengths = (rows != 0).int().argmin(1)
    assert lengths.min() < 5 and (rows != 0).all(1).any()  # some stop soon, some never
    shorter = sample(ours, ids, 50, 30, 3.0, u[..., :8])
    assert torch.equal(shorter, tokens[..., :8])  # what comes later changes nothing before


@torch.no_grad()
def test_sampling_stops_when_every_query_has_ended(pair, monkeypatch):
    _, ours = pair
    calls = []

    def ends_after(lengths):
        def scripted(probabilities, ids, numbers):
            calls.append(len(numbers))
            return torch.tensor([1 if len(calls) > length else 5 for length in lengths])

        calls.clear()
        return scripted

    ids = batch([9, 4])
    monkeypatch.setattr(doc2query, "draw", ends_after([2, 0, 3, 1]))
    tokens = sample(ours, ids, 2, 3, 1.0, uniforms(2, 2, 40))
    assert tokens.tolist() == [[[5, 5, 0], [0, 0, 0]], [[5, 5, 5], [5, 0, 0]]] and calls == [4] * 4
    monkeypatch.setattr(doc2query, "draw", ends_after([0, 0, 0, 0]))
    assert sample(ours, ids, 2, 3, 1.0, uniforms(2, 2, 40)).shape == (2, 2, 0)


def test_the_encoder_and_cross_keys_see_each_passage_once(pair, monkeypatch):
    _, ours = pair
    seen = []
    encode, cross = ours.encode, ours.cross_keys_values
    monkeypatch.setattr(ours, "encode", lambda ids: (seen.append(len(ids)), encode(ids))[1])
    monkeypatch.setattr(ours, "cross_keys_values", lambda x: (seen.append(len(x)), cross(x))[1])
    sample(ours, batch([9, 4]), 7, 3, 1.0, uniforms(2, 7, 3))
    assert seen == [2, 2]


# ------------------------------------------------------------------------------------------------- determinism


def test_a_document_has_its_own_numbers():
    a = document_uniforms(42, "d1", 3, 5)
    assert torch.equal(a, document_uniforms(42, "d1", 3, 5)) and a.shape == (3, 5)
    others = [document_uniforms(42, "d2", 3, 5), document_uniforms(43, "d1", 3, 5)]
    assert all((a != other).all() for other in others)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    document_uniforms(1, "x", 2, 2)
    assert torch.equal(before, torch.get_rng_state())  # no chance of others is used up
    many = torch.cat([document_uniforms(0, str(i), 1, 50) for i in range(400)])
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


def test_samples_do_not_depend_on_the_batch():
    model = tiny_t5().double()  # sums in float64: padding moves no float32 probability
    ids, u = batch([9, 1, 14, 6, 3]), uniforms(5, 6, 10)
    at_once = sample(model, ids, 6, 10, 1.0, u)
    for row, length in enumerate([9, 1, 14, 6, 3]):
        alone = sample(model, ids[row : row + 1, :length], 6, 10, 1.0, u[row : row + 1])
        width = alone.shape[2]
        assert torch.equal(alone[0], at_once[row, :, :width]) and not at_once[row, :, width:].any()
    order = torch.tensor([4, 2, 0, 3, 1])
    assert torch.equal(sample(model, ids[order], 6, 10, 1.0, u[order]), at_once[order])


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder with spiece.model, and 23 documents."""
    folder = tmp_path_factory.mktemp("doc2query")
    text = "The heron waits by the river, and the small fish swim past its feet all morning long.".split()
    lines = [
        {"_id": f"d{i}", "title": "Birds" if i % 3 else "", "text": " ".join(text[i % 7 : 8 + i % 9])}
        for i in range(23)
    ]
    write_documents(folder / "corpus.jsonl", lines)
    (folder / "spiece.model").write_bytes(train_tokenizer([line["text"] for line in lines], 40))
    pieces = load_tokenizer(folder / "spiece.model").vocab_size()
    model = tiny_t5(pieces + 5)  # five rows beyond the pieces, as T5 has a hundred
    torch.save(to_published(model), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(published_config(model)))
    return folder


def write_documents(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_documents(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]


def command(folder, out, **changes) -> list[str]:
    """The arguments of a small run; at this temperature all words are about as likely, so some queries are empty."""
    flags = dict(t5=folder, documents=folder / "corpus.jsonl", out=out, per_document=4, top_k=50)
    flags |= dict(temperature=30.0, batch=4, query_length=3, device="cpu") | changes
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def by_document(out) -> dict[str, list[str]]:
    queries: dict[str, list[str]] = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        assert list(row) == ["doc_id", "query"]
        queries.setdefault(row["doc_id"], []).append(row["query"])
    return queries


@pytest.fixture(scope="module")
def whole(folder):
    """The output of a run that nobody stopped."""
    main(command(folder, folder / "whole.jsonl"))
    return folder / "whole.jsonl"


def test_lines_come_in_document_order_and_the_counts_add_up(folder, whole, tmp_path, capsys):
    queries = by_document(whole)
    ids = [line["_id"] for line in read_documents(folder)]
    assert list(queries) == [doc_id for doc_id in ids if doc_id in queries] and len(queries) == 23
    written = sum(map(len, queries.values()))
    assert 0 < written < 23 * 4  # some samples have no word
    main(command(folder, tmp_path / "out.jsonl"))
    said = f"{written} queries of 23 documents; left out {23 * 4 - written} samples without a word"
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_data_reads_the_output(folder, whole, tmp_path):
    ids = [line["_id"] for line in read_documents(folder)]
    read = [(doc_id, query) for _, doc_id, query in read_pseudo_queries(whole)]
    assert read == [(doc_id, query) for doc_id, queries in by_document(whole).items() for query in queries]
    documents = [(ids, [""] * 23, [""] * 23)]
    counts = store_pseudo_queries(read_pseudo_queries(whole), tmp_path, documents, frozenset(), Problems())
    assert counts == {"kept": len(read)}


def test_a_document_has_the_same_queries_in_any_batch_and_order(folder, whole, tmp_path):
    want = by_document(whole)
    for size in (1, 7, 100):
        main(command(folder, tmp_path / f"{size}.jsonl", batch=size))
        assert (tmp_path / f"{size}.jsonl").read_bytes() == whole.read_bytes()
    write_documents(tmp_path / "some.jsonl", read_documents(folder)[::-2])
    main(command(folder, tmp_path / "out.jsonl", documents=tmp_path / "some.jsonl"))
    queries = by_document(tmp_path / "out.jsonl")
    assert list(queries) == [f"d{i}" for i in range(22, -1, -2)]
    assert all(queries[doc_id] == want[doc_id] for doc_id in queries)


def test_another_seed_gives_other_queries(folder, whole, tmp_path):
    main(command(folder, tmp_path / "out.jsonl", seed=43))
    assert by_document(tmp_path / "out.jsonl") != by_document(whole)


class Stopped(Exception):
    pass


def stop_at(monkeypatch, name: str, call: int) -> None:
    """Raises Stopped at this call of a function of doc2query, from 1 on."""
    inner, calls = getattr(doc2query, name), []

    def counted(*args):
        calls.append(1)
        if len(calls) == call:
            raise Stopped
        return inner(*args)

    monkeypatch.setattr(doc2query, name, counted)


@pytest.mark.parametrize(
    "garbage", [b"", b'{"doc_id": "d8", "qu\xff', b'{"doc_id": "d8", "query": "half a document"}\n']
)
@pytest.mark.parametrize("call, done", [(1, 0), (3, 8), (6, 20)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    folder, whole, tmp_path, monkeypatch, capsys, call, done, garbage
):
    """What was written after the last whole batch, settings say of which bytes, is dropped."""
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, "sample", call)
        with pytest.raises(Stopped):
            main(command(folder, out))
    before = out.read_bytes()
    assert whole.read_bytes().startswith(before) and (len(before) > 0) == (call > 1)
    with out.open("ab") as file:
        file.write(garbage)
    main(command(folder, out))
    assert out.read_bytes() == whole.read_bytes()
    assert (f"goes on after {done} documents" in capsys.readouterr().out) == (done > 0)


def test_an_output_that_was_cut_is_refused_and_an_empty_one_begun_anew(folder, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    main(command(folder, out))
    out.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=f"{len(whole.read_bytes()) - 1} of .* bytes are left; remove out.jsonl"
    ):
        main(command(folder, out))
    out.write_bytes(b"")
    main(command(folder, out))
    assert out.read_bytes() == whole.read_bytes()


def test_two_commands_do_not_write_into_one_output(folder, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    with out.open("ab") as other:
        hold(other, "")
        with pytest.raises(ValueError, match="out.jsonl: another process writes into it; wait"):
            main(command(folder, out))
    assert not out.read_bytes()
    main(command(folder, out))
    assert out.read_bytes() == whole.read_bytes()


def test_a_run_goes_on_past_documents_without_a_query(folder, tmp_path, monkeypatch):
    """d1 and d4..d7 are sampled without a word, so that no line tells that they are done."""
    whole, out, sample = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", doc2query.queries

    def some_silent(model, tokenizer, batch, args):
        texts = sample(model, tokenizer, batch, args)
        return [
            ["?!"] * 4 if doc_id in ("d1", "d4", "d5", "d6", "d7") else t
            for (doc_id, _), t in zip(batch, texts)
        ]

    monkeypatch.setattr(doc2query, "queries", some_silent)
    main(command(folder, whole))
    assert not {"d1", "d4", "d7"} & set(by_document(whole)) and "d8" in by_document(whole)
    for call in (2, 3, 4):
        out.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            stop_at(patch, "queries", call)
            with pytest.raises(Stopped):
                main(command(folder, out))
        main(command(folder, out))
        assert out.read_bytes() == whole.read_bytes()


def test_a_run_goes_on_with_another_batch_size(folder, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, "sample", 3)
        with pytest.raises(Stopped):
            main(command(folder, out))
    main(command(folder, out, batch=5))
    assert out.read_bytes() == whole.read_bytes()


def test_a_finished_run_samples_nothing_and_stays_as_it_is(folder, whole, monkeypatch):
    before = whole.read_bytes()
    monkeypatch.setattr(doc2query, "sample", None)
    main(command(folder, whole))
    assert whole.read_bytes() == before


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change", [{"top_k": 9}, {"temperature": 1.5}, {"seed": 1}, {"per_document": 5}, {"query_length": 7}]
)
def test_other_settings_are_refused_and_nothing_is_touched(folder, whole, change):
    before, settings = whole.read_bytes(), doc2query.settings_path(whole).read_bytes()
    ((name, value),) = change.items()
    message = (
        f"sampled with {name}={json.loads(settings)['settings'][name]}; this command says {name}={value}"
    )
    with pytest.raises(ValueError, match=message):
        main(command(folder, whole, **change))
    assert whole.read_bytes() == before and doc2query.settings_path(whole).read_bytes() == settings


def test_settings_may_change_as_long_as_nothing_is_written(folder, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, "sample", 1)
        with pytest.raises(Stopped):
            main(command(folder, out, seed=7))
    main(command(folder, out))
    assert out.read_bytes() == whole.read_bytes()


def test_an_output_without_settings_is_refused(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    message = r"found .*out.jsonl without out.jsonl.settings.json.*pass another --out"
    with pytest.raises(ValueError, match=message):
        main(command(folder, out))
    assert out.read_text() == "precious\n"


def test_other_documents_than_those_of_the_output_are_refused(folder, tmp_path):
    out, source, lines = tmp_path / "out.jsonl", tmp_path / "corpus.jsonl", read_documents(folder)
    write_documents(source, lines)
    main(command(folder, out, documents=source))
    before = out.read_bytes()
    write_documents(source, lines[1:])
    with pytest.raises(ValueError, match="sampled with documents_sha256="):
        main(command(folder, out, documents=source))
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_document": 0}, "--per_document 0"),
        ({"top_k": -1}, "--top_k -1"),
        ({"batch": 0}, "--batch 0"),
        ({"query_length": 0}, "--query_length 0"),
        ({"temperature": 0.0}, "--temperature 0.0.*--top_k 1"),
        ({"temperature": "nan"}, "--temperature nan"),
        ({"documents": "missing.jsonl"}, "found no file missing.jsonl"),
        ({"tokenizer": "missing.model"}, "found no tokenizer at missing.model"),
        ({"t5": "missing"}, "found no"),
    ],
)
def test_bad_flags_are_named_and_leave_no_output(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        main(command(folder, tmp_path / "out.jsonl", **change))
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(folder, tmp_path):
    text = "Quick brown foxes jump over lazy dogs while vexed wizards mix potions in 1234567890 jars."
    (tmp_path / "other.model").write_bytes(train_tokenizer([text] * 20, 80))
    with pytest.raises(ValueError, match="the tokenizer has .* pieces, .* has .* word rows; pass"):
        main(command(folder, tmp_path / "out.jsonl", tokenizer=tmp_path / "other.model"))


def test_documents_are_read_one_at_a_time_and_without_empty_ones(tmp_path):
    lines = [
        {"_id": "a", "title": " Two  words ", "text": " text "},
        {"_id": "b", "title": None, "text": "only text"},
        {"_id": "c", "title": "", "text": " "},  # data.read_beir leaves it out, too
        {"_id": "d", "text": ""},
        {"_id": "e", "title": "only title", "text": ""},
    ]
    write_documents(tmp_path / "corpus.jsonl", lines)
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"_id": 3}\n')
    stream = doc2query.documents(doc2query.argparse.Namespace(documents=tmp_path / "corpus.jsonl"))
    assert next(stream) == ("a", "Two words. text")  # the broken last line has not been read
    assert [next(stream), next(stream)] == [("b", "only text"), ("e", "only title. ")]
    with pytest.raises(ValueError, match="corpus.jsonl:6: wanted "):
        next(stream)


def test_no_document_at_all_is_an_error(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="found no document with"):
        main(command(folder, tmp_path / "out.jsonl", documents=tmp_path / "empty.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


def test_text_drops_unknown_pieces_padding_and_rows_beyond_the_pieces(folder):
    tokenizer = load_tokenizer(folder / "spiece.model")
    n, river = tokenizer.vocab_size(), tokenizer.encode("the river")
    assert doc2query.to_text(tokenizer, [2, n, *river, n + 4, 0, 0]) == tokenizer.decode(river) == "the river"
    assert doc2query.to_text(tokenizer, [0, 0, 2]) == doc2query.to_text(tokenizer, []) == ""


def test_progress_lines_say_how_fast(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doc2query, "SECONDS_BETWEEN_LINES", 0)
    main(command(folder, tmp_path / "out.jsonl"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[0].startswith("4 documents | ") and lines[0].endswith(" q/s")
    assert "of 23 documents; left out" in lines[-1]


def test_the_command_says_what_is_wrong_and_how_to_go_on(folder, tmp_path, monkeypatch):
    def exits(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["doc2query.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("tools.doc2query", run_name="__main__")
        return str(stop.value)

    out = tmp_path / "out.jsonl"
    assert exits(command(folder, out, top_k=0)) == "tools.doc2query: --top_k 0: wanted a positive number"
    assert exits(command(folder, folder / "corpus.jsonl" / "out.jsonl")).startswith(
        "tools.doc2query: [Errno "
    )

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "tokenize", interrupt)
    assert "the same command goes on" in exits(command(folder, out))


@pytest.mark.parametrize(
    "name, content",
    [
        ("corpus.jsonl", '{"_id": "0", "text": "red cat"}\n{"_id": "1", "text": " "}\n{"_id": "2", "text": "blue"}\n'),
        ("collection.tsv", "0\tred cat\n1\t \n2\tblue\n"),
        ("corpus_lite.json", '["red cat", " ", "blue"]'),
    ],
)  # fmt: skip
def test_documents_come_from_each_published_layout(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    args = types.SimpleNamespace(documents=tmp_path / name)
    assert list(doc2query.documents(args)) == [("0", "red cat"), ("2", "blue")]
