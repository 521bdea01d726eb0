"""Two gloo processes train and evaluate as one does, by the default preset, and only the main process writes."""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import link_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY

import distributed
import optim
import store
import train
from mixlora import Experts, attention_lora

FLAGS = [
    *TOY, "--lora_dropout", "0", "--dense_warmup_steps", "22", "--dense_steps", "12", "--d0_steps", "22",
    "--steps", "12", "--splits", "80,20", "--expand", "always", "--no-baselines",
]  # fmt: skip


def test_what_is_sent_lies_contiguous_in_memory_and_is_the_tensor_itself():
    """An expert's B does not, and nccl refuses what does not."""
    experts = Experts(2, 6, 8, 3)
    experts.in_b.sum().backward()
    assert not experts.in_b.is_contiguous()
    for tensor in (experts.in_a.data, experts.in_b.data, experts.in_b.grad):
        sent = distributed.as_it_lies(tensor)
        assert sent.is_contiguous() and sent.data_ptr() == tensor.data_ptr()


def join(rank: int, port: int, work: Callable, *args) -> None:
    """`work` in one of two processes, as torchrun starts them."""
    torch.set_num_threads(1)  # a forked process must not wait for the threads of its parent
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    work(rank, *args)


def by_two(work: Callable, *args) -> None:
    """work(rank, *args) in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # which need not import everything again
    processes = [fork.Process(target=join, args=(rank, port, work, *args)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def train_guarded(rank: int, folder: Path, flags: list[str]) -> None:
    """A run in whose second process opening a file of the run folder for writing is an error; nameless caches are not."""

    def guard(event: str, args: tuple) -> None:
        held = event == "open" and str(args[0]).startswith(str(folder)) and "/cache" not in str(args[0])
        if held and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise RuntimeError(f"process {rank} writes {args[0]}")

    if rank:
        sys.addaudithook(guard)
    train.main([*flags, "--run", str(folder)])


def resume(rank: int, folder: Path) -> None:
    train.main(["--resume", str(folder)])


@pytest.fixture(scope="module")
def runs(once, toy, general) -> tuple[Path, Path]:
    """One run by one process, and the same by two, with general text; paper_code gathers its statistics in training, over all."""
    flags = ["--data", str(toy), "--general", str(general), *FLAGS, "--ood_mode", "paper_code"]
    one = once("one_process", lambda folder: train.main([*flags, "--run", str(folder)]))
    return one, once("two_processes", lambda folder: by_two(train_guarded, folder, flags))


def test_two_processes_have_the_loss_curve_of_one(runs):
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs
    )
    assert [(m["stage"], m["step"]) for m in one] == [(m["stage"], m["step"]) for m in two]
    for stage in ("dense warm-up", "dense round 1", "dense round 2", "D0", "D1"):
        curves = [[m["loss"] for m in metrics if m["stage"] == stage] for metrics in (one, two)]
        assert len(curves[0]) >= 3 and curves[0][0] != curves[0][-1]
        assert curves[1] == pytest.approx(curves[0], rel=5e-5)
    dreams = [[m["dream"] for m in metrics if m["stage"] == "D1"] for metrics in (one, two)]
    assert dreams[0][-1] > 0.01 and dreams[1] == pytest.approx(dreams[0], rel=1e-4, abs=1e-6)


def test_two_processes_end_with_the_weights_and_statistics_of_one(runs):
    for t in (0, 1):
        (one, stats), (two, others) = (store.load_model(run / f"D{t}.pt") for run in runs)
        for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters()):
            # As a whole: AdamW moves an entry whose gradient is no more than rounding by a whole step, up or down
            assert a.shape == b.shape and (a - b).norm() <= 0.05 * a.norm(), name
        assert len(attention_lora(one)) == 4 * t and all(lora.o_b.any() for lora in attention_lora(two))
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


def test_two_processes_make_a_lost_evaluation_again(runs, tmp_path):
    run = link_tree(runs[1], tmp_path / "run")
    for name in ("evaluation_D0.json", "results.json"):
        (run / name).unlink()
    by_two(resume, run)
    found, wanted = (json.loads((folder / "evaluation_D0.json").read_text()) for folder in (run, runs[1]))
    assert found["values"] == wanted["values"] and (run / "results.json").exists()


def contrastive(net: torch.nn.Module) -> optim.Stage:
    texts, documents = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))

    def loss(batch: list[int], embedded: torch.Tensor) -> tuple[torch.Tensor, dict]:
        q, d = embedded.unbind(1)
        loss = (q @ d.T).log_softmax(1).diagonal().neg().mean()
        return loss, {"in_batch": loss}

    embed = lambda part: torch.stack([net(texts[part]), net(documents[part])], dim=1)  # noqa: E731
    return optim.Stage("x", [], 1, 0.0, list, loss, embed=embed)


def small_net() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))


def save_gradients(rank: int, path: Path, batch: list[int], micro_batch: int) -> None:
    distributed.start("cpu")
    net = small_net()
    torch.manual_seed(3)
    recipe = SimpleNamespace(micro_batch=micro_batch, precision="float32")
    sums = optim.gradients(contrastive(net), batch, list(net.parameters()), recipe)
    distributed.add_up(sums.values())
    if rank:
        torch.save(([p.grad for p in net.parameters()], float(sums["loss"]), float(sums["in_batch"])), path)
    distributed.stop()


@pytest.mark.parametrize(
    "n, micro_batch, parts", [(7, 0, [[3], [4]]), (7, 2, [[2, 1], [2, 2]]), (1, 0, [[1]])]
)
def test_in_batch_loss_of_two_processes_is_that_of_one_with_the_same_dropout(tmp_path, n, micro_batch, parts):
    """Against one graph over all parts, each process's from the seed on; a batch of one goes to both processes."""
    batch, net, embedded, start = list(range(n)), small_net(), [], 0
    stage = contrastive(net)
    for sizes in parts:
        torch.manual_seed(3)
        for size in sizes:
            embedded.append(stage.embed(batch[start : start + size]))
            start += size
    loss, _ = stage.loss(batch, torch.cat(embedded))
    loss.backward()
    by_two(save_gradients, tmp_path / "gradients", batch, micro_batch)
    gradients, *sums = torch.load(tmp_path / "gradients")
    assert sums == pytest.approx([loss.item()] * 2)
    for gradient, p in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


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
