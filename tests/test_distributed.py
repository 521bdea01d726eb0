"""Two gloo processes train and evaluate as one does, and only the main process writes."""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY

import distributed
import store
import train

FLAGS = [
    *TOY, "--lora_dropout", "0", "--dense_warmup_steps", "0", "--dense_contrastive", "0", "--dense_margin", "1",
    "--dense_steps", "12", "--d0_steps", "22", "--steps", "12", "--splits", "80,20", "--expand", "always",
    "--no-baselines",
]  # fmt: skip


def work(rank: int, port: int, folder: Path, flags: list[str]) -> None:
    """One of two processes, as torchrun starts them. In the second one, opening a file of the run folder for writing is
    an error; nameless caches are not.
    """
    torch.set_num_threads(1)  # a forked process must not wait for the threads of its parent

    def guard(event: str, args: tuple) -> None:
        held = event == "open" and str(args[0]).startswith(str(folder)) and "/cache" not in str(args[0])
        if held and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise RuntimeError(f"process {rank} writes {args[0]}")

    if rank:
        sys.addaudithook(guard)
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    train.main([*flags, "--run", str(folder)])


@pytest.fixture(scope="module")
def runs(once, toy) -> tuple[Path, Path]:
    """One run by one process, and the same by two; paper_code gathers its statistics in training, over all."""
    flags = ["--data", str(toy), *FLAGS, "--ood_mode", "paper_code"]
    one = once("one_process", lambda folder: train.main([*flags, "--run", str(folder)]))

    def by_two(folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")  # which need not import everything again
        processes = [fork.Process(target=work, args=(rank, port, folder, flags)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in processes] == [0, 0]

    return one, once("two_processes", by_two)


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


def test_only_the_main_process_writes(runs):
    """The guard of the second process would have ended the run; and no line is there twice."""
    lines = (runs[1] / "log.txt").read_text().splitlines()
    assert sum(line.startswith("D0 step 22/22") for line in lines) == 1
    assert not list(runs[1].rglob("*.part"))


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_shares_are_the_batch_cut_in_order(batch, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: size)
        shares = []
        for rank in range(size):
            patch.setattr(distributed.dist, "get_rank", lambda r=rank: r)
            shares.append(distributed.share(batch))
    assert all(total == sum(len(part) for part, _ in shares) for _, total in shares)
    if len(batch) >= size:
        assert sum((part for part, _ in shares), []) == batch
        assert max(len(part) for part, _ in shares) - min(len(part) for part, _ in shares) <= 1
    else:
        assert all(part == batch for part, _ in shares)
