"""Where the time of a run goes: its stages, each against its matrix products.

    python benchmarks/stages.py [--json FILE] [flags of train.py]
    python benchmarks/stages.py --show    print what --json holds as the table of docs/speed.md

Trains as train.py does, in a temporary folder without --run. The figures that are kept are those without flags; with
some pass --json to keep them. A stage's time is that of its functions in PARTS without those of other stages that
they call. Of the units of work in UNITS every n-th call is recorded, and its products are done again right after it,
at their own shapes, back to back: their time and their FLOP, times n, are the stage's. What this takes is no part of
the run's time. The recorded call itself is slower by some percent.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dense
import eval as scoring
import optim
import prepare
import rq
import scan
import search
import train
from benchmarks.measure import Recorded, again, flop, machine, seconds_of
from dream import Dreams
from t5 import T5

RESULTS = "stages.json"
PARTS = {
    "reading": [(prepare, "read"), (prepare.Run, "load_corpora")],
    "tokenising": [
        (prepare.Run, "_tokenizer"), (prepare, "document_tokens"), (prepare.Run, "tokens"), (dense, "tokenize"),
    ],
    "pseudo-queries": [
        (prepare.Run, "training_queries"), (prepare.Run, "pseudo_queries"), (prepare.Run, "sample"),
        (train.FirstCorpus, "next_batch"), (dense.Training, "warmup_batch"), (dense.Training, "pseudo"),
    ],
    "bi-encoder": [(prepare, "dense_stage")],
    "embeddings": [(dense, "embed")],
    "codebooks": [(prepare, "docid_stage"), (prepare, "docid_report")],
    "D_0": [(train.FirstCorpus, "__init__"), (train.FirstCorpus, "train")],
    "dreams": [(prepare, "find_dreams"), (train.LaterCorpus, "queries")],
    "scan": [(train.LaterCorpus, "scan"), (train, "fresh_scores"), (train, "measure_dreams")],
    "D_t": [(train.LaterCorpus, name) for name in ("__init__", "grow", "train", "settle")],
    "evaluation": [(scoring, "evaluate_after"), (prepare, "references"), (scoring, "results")],
}  # fmt: skip
REST, MEASURING = "the rest", "measuring"
UNITS = [  # and of how many calls one is recorded; a unit within another is a part of that one
    (optim, "gradients", 20), (search, "beam_search", 5), (T5, "embed", 10), (T5, "encode", 5),
    (T5, "docid_hidden", 5), (scan, "routes_of", 5), (Dreams, "words", 5), (dense, "nearest", 1), (rq, "encode", 1),
]  # fmt: skip
SIDE, EACH_RATE = 2048, 10  # of the large product, which is timed beside every tenth record


class Clock:
    """Seconds of each part, by the parts around it: time counts for the innermost."""

    def __init__(self):
        self.around, self.since, self.seconds = (REST,), time.monotonic(), Counter()

    def lap(self) -> None:
        now = time.monotonic()
        self.seconds[self.around] += now - self.since
        self.since = now

    @contextmanager
    def within(self, part: str):
        self.lap()
        outer, self.around = self.around, self.around + (part,) * (part != self.around[-1])
        try:
            yield
        finally:
            self.lap()
            self.around = outer

    def of(self, part: str) -> float:
        return sum(seconds for around, seconds in self.seconds.items() if around[-1] == part)

    def of_steps(self) -> float:
        """Seconds on D_0 and D_t, those in which their batches are drawn and tokenised included."""
        steps, batches = ("D_0", "D_t"), ("pseudo-queries", "tokenising")
        inner = {around: [part for part in around if part not in batches][-1] for around in self.seconds}
        return sum(self.seconds[around] for around, part in inner.items() if part in steps)


@dataclass
class Unit:
    """What is known of one kind of work in one part."""

    calls: int = 0
    recorded: int = 0
    flop: int = 0
    seconds: float = 0.0  # of the products alone

    def whole(self, measured: float) -> float:
        """Of all calls, where so much was measured of those recorded."""
        return measured * self.calls / self.recorded


class Watch:
    """Clock and records of a run, whose functions it wraps."""

    def __init__(self):
        self.clock, self.units, self.inside, self.rates = Clock(), {}, False, []
        self.square = torch.randn(SIDE, SIDE)

    def timed(self, part: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            with self.clock.within(part):
                return method(*args, **kwargs)

        return call

    def sampled(self, method: Callable, every: int) -> Callable:
        def call(*args, **kwargs):
            if self.inside:
                return method(*args, **kwargs)
            unit = self.units.setdefault((self.clock.around[-1], method.__qualname__), Unit())
            unit.calls += 1
            self.inside = True
            try:
                if (unit.calls - 1) % every:
                    return method(*args, **kwargs)
                with Recorded() as recorded:
                    result = method(*args, **kwargs)
            finally:
                self.inside = False
            with self.clock.within(MEASURING):
                self.measure(unit, recorded.calls)
            return result

        return call

    def measure(self, unit: Unit, calls: list) -> None:
        products = again(calls)
        products()  # warm
        unit.recorded, unit.flop = unit.recorded + 1, unit.flop + flop(calls)
        unit.seconds += seconds_of(products)
        if sum(one.recorded for one in self.units.values()) % EACH_RATE == 1:
            self.rates.append(2 * SIDE**3 / seconds_of(lambda: self.square @ self.square))

    def results(self) -> dict:
        """Rows by stage, and what the goals are about."""
        self.clock.lap()
        wall = sum(self.clock.seconds.values()) - self.clock.of(MEASURING)
        rate, rows = statistics.median(self.rates), []
        for part in (*PARTS, REST):
            units = [unit for (place, _), unit in self.units.items() if place == part]
            rows.append({
                "stage": part, "seconds": self.clock.of(part), "flop": sum(u.whole(u.flop) for u in units),
                "products": sum(u.whole(u.seconds) for u in units),
            })  # fmt: skip
        steps = sum(row["products"] for row in rows if row["stage"] in ("D_0", "D_t")) / self.clock.of_steps()
        return {"seconds": wall, "rate": rate, "share_of_steps": steps, "rows": rows}


def markdown(results: dict) -> str:
    """A results file as the table of docs/speed.md."""
    wall, rate = results["seconds"], results["rate"]
    large = f"{SIDE:,} x {SIDE:,}"
    lines = [
        f"| stage | seconds | of the run | GFLOP | its products | of the stage | at the rate of {large} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        seconds, products = row["seconds"], row["products"]
        cells = [f"{seconds:.1f}", f"{seconds / wall:.1%}", *["–"] * 4]
        if row["flop"]:
            cells[2:] = f"{row['flop'] / 1e9:,.0f}", f"{products:.1f} s", f"{products / seconds:.0%}"
            cells.append(f"{row['flop'] / rate:.1f} s")
        lines.append(" | ".join([f"| {row['stage']}", *cells]) + " |")
    steps, verdict = results["share_of_steps"], {True: "reached", False: "**missed**"}
    others = [row for row in results["rows"] if row["stage"] not in ("D_0", "D_t", "reading")]
    others = [row for row in others if row["products"] < row["seconds"] / 2]
    most = max(others, key=lambda row: row["seconds"])
    other = most["seconds"] / wall
    at = f"{results['date'][:10]}, {results['cpu']}, threads {results['threads']}, torch {results['torch']}"
    return "\n".join([
        *lines, "", f"{wall:.1f} s in all; a product of {large} at {rate / 1e9:.0f} GFLOP/s. {at}.", "",
        f"Products take {steps:.0%} of the time on D_0 and D_t with their batches (goal: 60 % or more): {verdict[steps >= 0.6]}.",
        f"The longest other stage that is neither reading nor mostly products, {most['stage']}, takes {other:.1%} of the "
        f"run (goal: 5 % at most): {verdict[other <= 0.05]}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    text = f"where the figures go (default: {RESULTS} beside this file, of a run without flags)"
    parser.add_argument("--json", type=Path, help=text)
    parser.add_argument("--show", action="store_true", help="print what --json holds and end")
    args, flags = parser.parse_known_args()
    place = args.json or (None if flags else Path(__file__).with_name(RESULTS))
    if args.show:
        print(markdown(json.loads(place.read_text())))
        return
    watch = Watch()
    for owner, name, every in UNITS:
        setattr(owner, name, watch.sampled(getattr(owner, name), every))
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, watch.timed(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        watch.clock.since = time.monotonic()
        of_its_own = any(flag.partition("=")[0] == "--run" for flag in flags)
        train.main(flags if of_its_own else [*flags, "--run", f"{folder}/run"])
        results = machine() | {"flags": flags} | watch.results()
    if place:
        place.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
