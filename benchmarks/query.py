"""What one query takes, on an open index and from a process's start, against what it must take.

    python benchmarks/query.py RUN [--queries 200] [--starts 10] [--json FILE]

Open: Index.search of one query after another, against its matrix products alone: the same shapes, back to back. Cold:
`python search.py RUN QUERY`, against a process that imports torch, faiss and sentencepiece and reads the checkpoint.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import store
from benchmarks.measure import products_of, seconds_of
from index import Index

FLOOR = "import sys, torch, faiss, sentencepiece; torch.load(sys.argv[1], weights_only=True)"


def timed(owner, name: str, seconds: Counter, label: str) -> None:
    """Adds what calls of a method take to seconds[label]."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        begin = time.monotonic()
        result = method(*args, **kwargs)
        seconds[label] += time.monotonic() - begin
        return result

    setattr(owner, name, call)


def of_process(*command: str) -> float:
    run = partial(subprocess.run, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
    return seconds_of(partial(run, [sys.executable, *command]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    index = Index.open(args.run)
    texts = [text for corpus in index.run.corpora for text in corpus.test.values()]
    texts = texts[:: max(1, len(texts) // args.queries)]
    index.search(texts[:5])  # warm
    ours, products = [], []
    for text in texts:  # in turns, so that a noisy machine disturbs both
        search = partial(index.search, text)
        ours.append(seconds_of(search))
        same = products_of(search)
        same()  # warm
        products.append(seconds_of(same))
    shares = Counter()
    for owner, name, label in (
        (index.model, "encode", "encoder"), (index.model, "decode", "decoder"), (index.trie, "children", "trie"),
    ):  # fmt: skip
        timed(owner, name, shares, label)
    begin = time.monotonic()
    for text in texts:
        index.search(text)
    whole = time.monotonic() - begin
    cold, floors = [], []
    newest = store.LoadedRun(args.run).finished[-1]
    for _ in range(args.starts):
        cold.append(of_process("search.py", str(args.run.resolve()), texts[0]))
        floors.append(of_process("-c", FLOOR, str((args.run / f"D{newest}.pt").resolve())))
    ratios = np.divide(ours, products)
    results = {
        "queries": len(texts), "threads": torch.get_num_threads(),
        "open_ms": {"min": 1e3 * min(ours), "median": 1e3 * float(np.median(ours))},
        "products_ms": {"min": 1e3 * min(products), "median": 1e3 * float(np.median(products))},
        "open_to_products": float(np.median(ratios)),
        "shares": {label: seconds / whole for label, seconds in shares.items()},
        "cold_s": {"min": min(cold), "median": float(np.median(cold))},
        "floor_s": {"min": min(floors), "median": float(np.median(floors))},
        "cold_to_floor": float(np.median(np.divide(cold, floors))),
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
