"""tools/dreams.py shows what dream.py draws for the documents that are asked for."""

import sys

import pytest
import torch

import command
import dream
import store
from data import EOS, PAD
from tools import dreams


def shown(folder, *flags, capsys) -> dict[str, tuple[str, list[str]]]:
    """Document id -> the line's rest and the dreams printed below it."""
    dreams.main([str(folder), *flags])
    found, doc_id = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("    "):
            found[doc_id][1].append(line.strip())
        else:
            doc_id, rest = line.split("  ", 1)
            found[doc_id] = rest, []
    return found


def test_named_documents_are_shown_with_title_docid_and_five_dreams_of_words_near_it(finished, capsys):
    run, found = store.LoadedRun(finished), shown(finished, "d7", "d3", capsys=capsys)
    assert list(found) == ["d7", "d3"]
    bi_encoder, books = store.load_model(finished / "dense.pt")[0], store.read_tensors(finished / "rq.pt")
    drawer = dream.dreams(bi_encoder, run.tokenizer, books)
    for doc_id, (rest, texts) in found.items():
        row = list(run.ids).index(doc_id)
        assert rest == f"{run.headline(row)}  {'-'.join(map(str, run.docids[row].tolist()))}"
        near = {run.tokenizer.decode([int(p)]) for p in drawer.pieces[drawer.words(run.docids[[row]])[0][0]]}
        assert len(texts) == 5 and len(set(texts)) > 1
        assert all(len(near & set(text.split())) >= dream.FEWEST for text in texts)


def test_dreams_are_the_drawers_and_their_text_has_no_padding(finished):
    run = store.LoadedRun(finished)
    ((row, texts),) = dreams.dreams_of(run, [4], seed=1)
    bi_encoder, books = store.load_model(finished / "dense.pt")[0], store.read_tensors(finished / "rq.pt")
    drawn = dream.dreams(bi_encoder, run.tokenizer, books).draw(
        run.docids[[4] * 5], torch.Generator().manual_seed(1)
    )
    assert row == 4
    for text, ids in zip(texts, drawn.tolist(), strict=True):
        assert run.tokenizer.encode(text) == [i for i in ids if i not in (PAD, EOS)]


def test_without_ids_a_seed_draws_ten_documents(finished, capsys):
    first, again, other = (shown(finished, "--seed", seed, capsys=capsys) for seed in "112")
    assert len(first) == 10 and first == again and list(first) != list(other)


def test_lost_queries_are_counted_by_the_words_of_their_documents_that_they_hold(copied, capsys):
    run = store.LoadedRun(copied)
    drawer, wanted = dreams.drawer_of(run), {}
    paths = [copied / f"evaluation_D{t}.json" for t in range(5)]
    hits = [[[float(v) for v in of["recall@10"]] for of in store.read_json(path)["values"]] for path in paths]
    hits[2][0] = [0.0] * len(hits[2][0])  # D_2 costs all of D_0, and D_3 brings it back
    del hits[4][1][0]  # a query of D_1 that was deleted since
    for path, values in zip(paths, hits):
        store.write_json(path, {"values": [{"recall@10": of} for of in values]})
    for i, corpus in enumerate(run.corpora):
        for q, (query_id, text) in enumerate(corpus.test.items()):
            (doc_id,) = corpus.qrels[query_id]
            numbers = drawer.words(run.docids[[list(run.ids).index(doc_id)]])[0][0]
            near = [run.tokenizer.id_to_piece(int(piece)) for piece in drawer.pieces[numbers]]
            pieces = set(run.tokenizer.encode(text, out_type=str))
            n = min(2, sum(piece in near for piece in pieces))
            for t in range(i + 1, 5):
                if hits[t - 1][i][q] and (t, i) != (4, 1):
                    seen = wanted.setdefault((i > 0, n), [0, 0])
                    seen[0] += not hits[t][i][q]
                    seen[1] += 1
    counts = dreams.lost_queries(run)
    assert {(a, b): counts[a, b].tolist() for a in (0, 1) for b in range(3) if counts[a, b, 1]} == wanted
    assert counts[0, :, 0].sum() >= sum(map(bool, hits[1][0])) > 0
    dreams.main([str(copied), "--lost"])
    lost, found = counts[0, 2]
    assert f"two or more {lost} of {found}\n" in capsys.readouterr().out
    for path in paths[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="nothing to count"):
        dreams.lost_queries(run)


@pytest.mark.parametrize(
    "flags, missing, said",
    [
        (["d3", "nowhere", "nor"], "", "holds no document nowhere, nor; doc_ids.txt lists its own"),
        ([], "dense.pt", "dense.pt"),
        ([], "rq.pt", "rq.pt"),
        ([], "config.json", "config.json"),
        (["--sed", "1"], "", "unrecognized arguments: --sed"),
        (["d3", "--lost"], "", "--lost counts the queries of all documents; leave the ids out"),
    ],
)
def test_what_is_wrong_is_one_line(copied, monkeypatch, flags, missing, said):
    if missing:
        (copied / missing).unlink()
    monkeypatch.setattr(sys, "argv", ["dreams.py", str(copied), *flags])
    with pytest.raises(SystemExit, match="^tools.dreams: ") as error:
        command.run(dreams.main, "tools.dreams")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_of_few_words_is_named(finished, monkeypatch):
    monkeypatch.setattr(dream, "word_pieces", lambda _: torch.arange(dream.LEAST - 1))
    with pytest.raises(ValueError, match="too few words for dreams"):
        dreams.main([str(finished)])
