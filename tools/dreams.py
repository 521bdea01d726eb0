"""What a run dreams: documents' titles, and beside them pseudo-queries that are made from their docids alone.

    python -m tools.dreams RUN [ID ...] [--seed 0]
    python -m tools.dreams RUN --lost

Paper    none, dreams are ours (dream.py)
In       a run folder: bi-encoder, codebooks, docids and tokenizer; titles are shown, not read by the dreams
Out      for each document its id, docid and title, and COUNT dreams as text; with --lost, how many test queries later
         corpora cost, by how many words that its document's dreams may hold a query holds
Next     nobody; where the dreams have nothing to do with the titles, the run will forget (tools.doctor says how much)
Differs  nothing: it is not in the released code
"""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import command
import dream
import extend
import store
from config import saved_config
from data import EOS, PAD

HELD = ("none", "one", "two or more")  # of a document's words, in a query
DOCUMENTS, COUNT = 10, 5  # documents that are drawn where none is named, dreams of each


def drawer_of(run: store.LoadedRun) -> dream.Dreams:
    """What draws the run's dreams. Raises ValueError where its tokenizer has too few words."""
    books, config = store.read_tensors(run.folder / "rq.pt"), saved_config(run.folder)
    bi_encoder = store.load_model(run.folder / "dense.pt")[0]
    drawer = dream.dreams(bi_encoder, run.tokenizer, books, config.dream_words, config.dream_noise)
    if drawer is None:
        raise ValueError(f"{run.folder}: its tokenizer has too few words for dreams")
    return drawer


def dreams_of(run: store.LoadedRun, rows: list[int], seed: int) -> Iterator[tuple[int, list[str]]]:
    """The documents in these rows of the stream, each with its dreams."""
    drawer, generator = drawer_of(run), torch.Generator().manual_seed(seed)
    for row in rows:
        drawn = drawer.draw(run.docids[[row] * COUNT], generator).tolist()
        yield row, [run.tokenizer.decode([i for i in ids if i not in (PAD, EOS)]) for ids in drawn]


def lost_queries(run: store.LoadedRun) -> np.ndarray:
    """Numbers (2, 3, 2) of test queries: of D_0 or of later corpora; by how many words that a dream of their documents may
    hold they hold (`HELD`); lost, and found.

    Found: a right document is among the first ten before a corpus. Lost: of these, none is after it. Summed over
    D_1..D_T; a corpus of which test queries were deleted meanwhile is left out. Raises ValueError where none was found.
    """
    drawer, counts, held = drawer_of(run), np.zeros((2, len(HELD), 2), int), []
    row_of = {doc_id: row for row, doc_id in enumerate(run.ids)}
    for corpus in run.corpora:
        held.append(np.zeros(len(corpus.test), int))
        for place, (query_id, text) in enumerate(corpus.test.items()):
            rows = [row_of[doc_id] for doc_id in corpus.qrels[query_id]]
            words = drawer.pieces[drawer.words(run.docids[rows])[0]].flatten().tolist()
            held[-1][place] = min(len({*words} & {*run.tokenizer.encode(text)}), len(HELD) - 1)
    paths = [run.folder / f"evaluation_{corpus.name}.json" for corpus in run.corpora]
    evaluations = [store.read_json(path)["values"] for path in paths if path.exists()]
    for before, after in zip(evaluations, evaluations[1:]):
        for i, of_corpus in enumerate(zip(before, after)):
            was, still = (np.array(values["recall@10"]) > 0 for values in of_corpus)
            if len(was) == len(still) == len(held[i]):
                np.add.at(counts[min(i, 1)], held[i], np.stack([was & ~still, was], axis=1))
    if not counts.any():
        raise ValueError(
            f"{run.folder}: no test query was found before a later corpus came; nothing to count"
        )
    return counts


def main(argv: list[str]) -> None:
    parser = command.Parser(description="Show what a run dreams of its documents.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"documents (default: {DOCUMENTS} drawn ones)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--lost", action="store_true", help="count the test queries that later corpora cost")
    args = parser.parse_args(argv)
    run = store.LoadedRun(args.run)
    if args.lost and args.ids:
        raise ValueError("--lost counts the queries of all documents; leave the ids out")
    if args.lost:
        print("test queries that the next corpus cost, by how many of their document's words they hold")
        for name, of_words in zip(("of D_0", "of later corpora"), lost_queries(run)):
            shares = [f"{words} {lost} of {found}" for words, (lost, found) in zip(HELD, of_words)]
            print(f"{name}: {', '.join(shares)}")
        return
    rows = random.Random(args.seed).sample(run.live.tolist(), min(DOCUMENTS, len(run.live)))
    if args.ids:
        rows = extend.rows_of(run.folder, list(dict.fromkeys(args.ids)))
    for row, texts in dreams_of(run, rows, args.seed):
        print(f"{run.ids[row]}  {run.headline(row)}  {'-'.join(map(str, run.docids[row].tolist()))}")
        print("".join(f"    {text}\n" for text in texts), end="", flush=True)


if __name__ == "__main__":
    command.run(main, "tools.dreams")
