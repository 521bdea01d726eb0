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
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import store
from index import Index

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
FLOOR = "import sys, torch, faiss, sentencepiece; torch.load(sys.argv[1], weights_only=True)"


class Recorded(TorchDispatchMode):
    """Calls of matrix products that happen inside: name, and shape, strides and type of every tensor."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if (name := op.__name__.split(".")[0]) in PRODUCTS:
            self.calls.append((name, tuple((tuple(a.shape), a.stride(), a.dtype) for a in args)))
        return op(*args, **(kwargs or {}))


def replay(calls: list) -> float:
    """Seconds of these products back to back, on other numbers."""
    held, prepared = {}, []
    for name, described in calls:
        tensors = []
        for place, (shape, stride, dtype) in enumerate(described):
            key = (place, shape, stride, dtype)
            if key not in held:
                held[key] = (
                    torch.randn(shape).to(dtype).as_strided(shape, stride)
                    if 0 in stride
                    else laid_out(shape, stride, dtype)
                )
            tensors.append(held[key])
        prepared.append((getattr(torch, name), tensors))
    begin = time.monotonic()
    for product, tensors in prepared:
        product(*tensors)
    return time.monotonic() - begin


def laid_out(shape: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers with this shape and these strides."""
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride))
    return torch.randn(size).to(dtype).as_strided(shape, stride)


def timed(owner, name: str, seconds: Counter, label: str) -> None:
    """Adds what calls of a method take to seconds[label]."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        begin = time.monotonic()
        result = method(*args, **kwargs)
        seconds[label] += time.monotonic() - begin
        return result

    setattr(owner, name, call)


def of_processes(command: list[str], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = time.monotonic()
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
        seconds.append(time.monotonic() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    index = Index.open(args.run)
    texts = [text for corpus in index.run.corpora for text in corpus.test.values()][
        :: 1 + len(index) // args.queries
    ]
    index.search(texts[:5])  # warm
    ours, products = [], []
    for text in texts:  # in turns, so that a noisy machine disturbs both
        begin = time.monotonic()
        index.search(text)
        ours.append(time.monotonic() - begin)
        with Recorded() as recorded:
            index.search(text)
        replay(recorded.calls)
        products.append(replay(recorded.calls))
    shares = Counter()
    for owner, name, label in (
        (index.model, "encode", "encoder"), (index.model, "decode", "decoder"), (index.trie, "allowed", "trie"),
        (index.trie, "child", "trie"),
    ):  # fmt: skip
        timed(owner, name, shares, label)
    begin = time.monotonic()
    for text in texts:
        index.search(text)
    whole = time.monotonic() - begin
    cold, floors = [], []
    newest = store.LoadedRun(args.run).finished[-1]
    for _ in range(args.starts):
        cold += of_processes([sys.executable, "search.py", str(args.run.resolve()), texts[0]], 1)
        floors += of_processes([sys.executable, "-c", FLOOR, str((args.run / f"D{newest}.pt").resolve())], 1)
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
