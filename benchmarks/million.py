"""A synthetic corpus of a million documents through quantiser, docid table, dreams, trie and search: time and memory.

    python benchmarks/million.py [--documents 1000000] [--beam 5] [--width 768] [--folder FOLDER]

Embeddings, codebooks and words are random, so nothing here says how well documents are found; what it shows is that
each step runs in chunks, and that dreams of all documents take what dreams of a tenth of them do. The embeddings lie
on disk (3 GB at the default width).
"""

import argparse
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dream
import rq
from arrays import ArrayWriter, ItemsWriter, Strings, open_array
from benchmarks.measure import new_folder, resident
from search import beam_search, documents
from t5 import T5, T5Config

WORDS = 21_071  # of which T5's tokenizer makes dreams (dream.word_pieces)


@contextmanager
def step(name: str):
    """Prints what a step took, the largest resident size of the process in it, and how much of this the step added."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    begin, before = time.monotonic(), resident("VmRSS")
    yield
    seconds, peak = time.monotonic() - begin, resident("VmHWM")
    sizes = f"peak {peak / 2**20:6.2f} GiB, of it new {(peak - before) / 2**20:6.2f}"
    print(f"{name:44}{seconds:9.1f} s   {sizes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--M", type=int, default=8)
    parser.add_argument("--K", type=int, default=2048)
    parser.add_argument("--beam", type=int, default=5, help="of the quantiser")
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--dreams", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/million"))
    args = parser.parse_args()
    n, generator = args.documents, torch.Generator().manual_seed(0)
    new_folder(args.folder)
    print(f"{n:,} documents, D={args.width}, M={args.M}, K={args.K}, {torch.get_num_threads()} threads")

    with step("embeddings, written to disk"):
        writer = ArrayWriter(args.folder / "embeddings.npy", (n, args.width))
        for part in writer.values.split(rq.CHUNK):
            part.normal_(generator=generator)
        writer.close()
    books = torch.stack([
        torch.randn(args.K, args.width, generator=generator) * 0.9**m / 3 for m in range(args.M)
    ])  # fmt: skip
    embeddings = open_array(args.folder / "embeddings.npy")
    with step(f"RQ encoding, beam {args.beam}"):
        codes = rq.encode(embeddings, books, args.beam)
    print(rq.report(embeddings, books, codes))
    with step("docid table and document ids, written"):
        np.save(args.folder / "docids.npy", codes.numpy().astype(np.int16))
        writer = ItemsWriter(args.folder / "ids.bin")
        for i in range(n):
            writer.add(f"doc-{i}".encode())
        writer.close()
        ids = Strings.open(args.folder / "ids.bin")
    with step("docid table, read; document ids, as a dict"):
        codes = torch.from_numpy(np.load(args.folder / "docids.npy").astype(np.int64))
        row_of = {doc_id: row for row, doc_id in enumerate(ids)}
        assert row_of[f"doc-{n - 1}"] == n - 1
    prior = torch.rand(WORDS, generator=generator).log()
    words = torch.randn(WORDS, args.width, generator=generator)
    drawer = dream.Dreams(3 + torch.arange(WORDS), words, prior, books)
    for known in n // 10, n:
        with step(f"{args.dreams:,} dreams of {known:,} documents"):
            ends = [known * tenths // 10 for tenths in (6, 7, 8, 9, 10)]  # as --splits 60,10,10,10,10
            drawn = drawer.draw(codes[dream.choose(ends, args.dreams, generator)], generator)
        assert len(drawn) == args.dreams and (drawn > 0).any(1).all()
    with step("trie"):
        trie = rq.Trie(codes)
    print(f"trie: {trie.nbytes() / n:.1f} bytes a document")

    torch.manual_seed(0)
    model = T5(T5Config(
        vocab=1000, width=args.width, encoder_blocks=2, decoder_blocks=2, codebooks=args.M, centroids=args.K,
        dropout=0.0,
    )).eval()  # fmt: skip
    queries = torch.randint(3, 1000, (args.queries, 12), generator=generator)
    with step(f"search, {args.queries} queries, 10 beams"):
        leaves, scores = beam_search(model, trie, queries, 10)
        rankings = documents(trie, leaves, scores, ids, 10)
    for ranking, row in zip(rankings, leaves.tolist()):
        assert len(ranking) == 10 and {doc for doc, _ in ranking} <= {
            d for leaf in row for d in trie.documents_at(leaf)
        }
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
