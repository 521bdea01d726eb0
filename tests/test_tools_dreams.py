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


@pytest.mark.parametrize(
    "flags, missing, said",
    [
        (["d3", "nowhere", "nor"], "", "holds no document nowhere, nor; doc_ids.txt lists its own"),
        ([], "dense.pt", "dense.pt"),
        ([], "rq.pt", "rq.pt"),
        ([], "config.json", "config.json"),
        (["--sed", "1"], "", "unrecognized arguments: --sed"),
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
