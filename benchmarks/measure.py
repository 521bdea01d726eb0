"""What the benchmarks share: the matrix products of a piece of work, the same again back to back, and the machine.

Attention in one call (torch's fused kernel) holds two products that cannot be told from the rest of it. They are not
counted, nor are those of faiss and numpy, which torch does not see.
"""

import math
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul")  # the last in inference mode alone


def new_folder(folder: Path) -> None:
    """Makes the folder of a benchmark. Ends the program where it exists: what it holds may be somebody's runs."""
    if folder.exists():
        sys.exit(f"{folder} exists already; remove it, or pass another --folder")
    folder.mkdir(parents=True)


class Recorded(TorchDispatchMode):
    """Calls of matrix products that happen inside, forward and backward: name, and shape, strides and type of every tensor."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if (name := op.__name__.split(".")[0]) in PRODUCTS:
            self.calls.append((name, tuple((tuple(a.shape), a.stride(), a.dtype) for a in args)))
        return op(*args, **(kwargs or {}))


def flop(calls: list) -> int:
    """Operations of recorded calls: 2 for each multiplication of two entries."""
    return sum(2 * math.prod(left[0]) * right[0][-1] for _, (*_, left, right) in calls)


def again(calls: list) -> Callable[[], None]:
    """A function that computes these products back to back, on other numbers. Leaves torch's random state alone."""
    held, prepared = {}, []
    with torch.random.fork_rng():
        for name, described in calls:
            keys = [(place, *tensor) for place, tensor in enumerate(described)]
            held |= {key: laid_out(*key[1:]) for key in keys if key not in held}
            prepared.append((getattr(torch, name), [held[key] for key in keys]))

    @torch.no_grad()
    def products() -> None:
        for product, tensors in prepared:
            product(*tensors)

    return products


def laid_out(shape: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers with this shape and these strides."""
    size = 1 + sum(max(0, n - 1) * step for n, step in zip(shape, stride))
    return torch.randn(size).to(dtype).as_strided(shape, stride)


def products_of(work: Callable) -> Callable[[], None]:
    """The products of a piece of work, which is done once to see them."""
    with Recorded() as recorded:
        work()
    return again(recorded.calls)


def resident(field: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at most, without what a parent held that started it. Linux only."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def seconds_of(work: Callable) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def machine() -> dict:
    """Where and when the figures came about."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "threads": torch.get_num_threads(),
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
