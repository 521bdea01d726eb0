"""What a run dreams: documents' titles, and beside them pseudo-queries that are made from their docids alone.

    python -m tools.dreams RUN [ID ...] [--seed 0]

Paper    none, dreams are ours (dream.py)
In       a run folder: bi-encoder, codebooks, docids and tokenizer; titles are shown, not read by the dreams
Out      for each document its id, docid and title, and COUNT dreams as text
Next     nobody; where the dreams have nothing to do with the titles, the run will forget (tools.doctor says how much)
Differs  nothing: it is not in the released code
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

import command
import dream
import extend
import store
from config import saved_config
from data import EOS, PAD

DOCUMENTS, COUNT = 10, 5  # documents that are drawn where none is named, dreams of each


def dreams_of(run: store.LoadedRun, rows: list[int], seed: int) -> Iterator[tuple[int, list[str]]]:
    """The documents in these rows of the stream, each with its dreams."""
    books, config = store.read_tensors(run.folder / "rq.pt"), saved_config(run.folder)
    bi_encoder, generator = store.load_model(run.folder / "dense.pt")[0], torch.Generator().manual_seed(seed)
    drawer = dream.dreams(bi_encoder, run.tokenizer, books, config.dream_words, config.dream_noise)
    if drawer is None:
        raise ValueError(f"{run.folder}: its tokenizer has too few words for dreams")
    for row in rows:
        drawn = drawer.draw(run.docids[[row] * COUNT], generator).tolist()
        yield row, [run.tokenizer.decode([i for i in ids if i not in (PAD, EOS)]) for ids in drawn]


def main(argv: list[str]) -> None:
    parser = command.Parser(description="Show what a run dreams of its documents.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"documents (default: {DOCUMENTS} drawn ones)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    args = parser.parse_args(argv)
    run = store.LoadedRun(args.run)
    rows = random.Random(args.seed).sample(run.live.tolist(), min(DOCUMENTS, len(run.live)))
    if args.ids:
        rows = extend.rows_of(run.folder, list(dict.fromkeys(args.ids)))
    for row, texts in dreams_of(run, rows, args.seed):
        print(f"{run.ids[row]}  {run.headline(row)}  {'-'.join(map(str, run.docids[row].tolist()))}")
        print("".join(f"    {text}\n" for text in texts), end="", flush=True)


if __name__ == "__main__":
    command.run(main, "tools.dreams")
