"""Data-parallel training under torchrun: each process takes its share of a batch, gradients are added up.

Paper    none: the paper trains on one GPU
In       batches that every process draws alike, gradients of its own share
Out      the gradients of the whole batch, in every process; only the first process writes files
Next     optim.py adds gradients up, train.py lets the first process write and the others wait
Differs  no wrapper around the model: the sums are written out, so that one process and several train the same

Without torchrun all of this does nothing: there is one process, and it is the first.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(days=7)  # while the first process embeds a corpus, the others wait


def start(device: str) -> str:
    """Joins the group that torchrun has made, if any; returns the device of this process."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Is this the process that writes?"""
    return process_rank() == 0


def wait() -> None:
    """Until every process is here: what the first one wrote can be read."""
    if world_size() > 1:
        dist.barrier()


def share(batch) -> tuple[list | Tensor, int]:
    """This process's contiguous part of a batch that all hold, and how many examples all parts have together.

    A batch of fewer examples than processes goes to each of them whole.
    """
    n = len(batch)
    if n < world_size():
        return batch, n * world_size()
    return batch[n * process_rank() // world_size() : n * (process_rank() + 1) // world_size()], n


def add_up(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over processes, in place."""
    if world_size() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients of all processes' shares; a share that does not reach a parameter counts as zero."""
    if world_size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_up(p.grad for p in parameters)


@torch.no_grad()
def copy_from_main(model: nn.Module) -> None:
    """Every process continues with the first one's parameters."""
    if world_size() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


def agree(value):
    """What the first process holds, in every process: a decision that all must share. Any small Python value."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]
