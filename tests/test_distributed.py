"""Two gloo processes train and evaluate as one does, and only the first writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, toy_folder

import distributed
import store

ROOT = Path(__file__).parents[1]
FLAGS = [
    *TOY, "--lora_dropout", "0", "--dense_warmup_steps", "0", "--dense_contrastive", "0", "--dense_margin", "1",
    "--dense_steps", "20", "--d0_steps", "50", "--steps", "50", "--splits", "80,20", "--expand", "always",
]  # fmt: skip
# In every process but the first, opening a file of the run folder for writing is an error; nameless caches are not.
GUARD = """
import os, runpy, sys
root, folder = {root!r}, {folder!r}
def guard(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(folder) and "/cache" not in args[0]:
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise RuntimeError(f"process {{os.environ['RANK']}} writes {{args[0]}}")
if os.environ["RANK"] != "0":
    sys.addaudithook(guard)
sys.path.insert(0, root)
runpy.run_path(root + "/train.py", run_name="__main__")
"""


def start(command: list[str], flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """One run by one process, and the same by two; paper_code gathers its statistics in training, over all."""
    folder = tmp_path_factory.mktemp("two")
    flags = ["--data", str(toy_folder(folder / "beir")), *FLAGS, "--ood_mode", "paper_code"]
    start([str(ROOT / "train.py")], [*flags, "--run", str(folder / "one")])
    (folder / "worker.py").write_text(GUARD.format(root=str(ROOT), folder=str(folder / "two")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "--"]
    start([*torchrun, str(folder / "worker.py")], [*flags, "--run", str(folder / "two")])
    return folder / "one", folder / "two"


def test_two_processes_have_the_loss_curve_of_one(runs):
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs
    )
    assert [(m["stage"], m["step"]) for m in one] == [(m["stage"], m["step"]) for m in two]
    for stage in ("dense round 1", "dense round 2", "D0", "D1"):
        curves = [[m["loss"] for m in metrics if m["stage"] == stage] for metrics in (one, two)]
        assert len(curves[0]) >= 3 and curves[0][0] != curves[0][-1]
        assert curves[1] == pytest.approx(curves[0], rel=1e-6, abs=1e-5)


def test_two_processes_end_with_the_weights_and_statistics_of_one(runs):
    for t in (0, 1):
        (one, stats), (two, others) = (store.load_model(run / f"D{t}.pt") for run in runs)
        for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters()):
            assert (a - b).abs().max() < 1e-3 if a.numel() else a.shape == b.shape, name
        for a, b in zip(stats, others):
            assert a.mean.flatten().tolist() == pytest.approx(b.mean.flatten().tolist(), abs=1e-4)


def test_two_processes_evaluate_as_one(runs):
    one, two = (json.loads((run / "results.json").read_text()) for run in runs)
    assert one["metrics"]["recall@10"] == two["metrics"]["recall@10"]
    assert one["experts"] == two["experts"] == {"D0": [2, 2], "D1": [3, 3]}
    assert two["versions"]["processes"] == 2 and one["versions"]["processes"] == 1


def test_only_the_first_process_writes(runs):
    """The guard of the second process would have ended the run; and no line is there twice."""
    lines = (runs[1] / "log.txt").read_text().splitlines()
    assert sum(line.startswith("D0 step 50/50") for line in lines) == 1
    assert not list(runs[1].rglob("*.part"))


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_shares_are_the_batch_cut_in_order(batch, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "size", lambda: size)
        shares = []
        for rank in range(size):
            patch.setattr(distributed, "rank", lambda r=rank: r)
            shares.append(distributed.share(batch))
    assert all(total == sum(len(part) for part, _ in shares) for _, total in shares)
    if len(batch) >= size:
        assert sum((part for part, _ in shares), []) == batch
        assert max(len(part) for part, _ in shares) - min(len(part) for part, _ in shares) <= 1
    else:
        assert all(part == batch for part, _ in shares)
