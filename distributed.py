"""Data-parallel training under torchrun: each process takes its share of a batch, gradients are added up.

Paper    none: the paper trains on one GPU
In       batches that every process draws alike, gradients of its own share; without torchrun, of the one process
Out      the gradients of the whole batch, in every process; only the main process writes files
Next     optim.py adds gradients up, train.py lets the main process write and the others wait
Differs  no wrapper around the model: the sums are written out, so that one process and several train the
         same, but for dropout, whose masks are drawn for each share
"""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> str:
    """Joins the group that torchrun has made, if any; returns the device of this process."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:  # the one that writes
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Until every process is here, for a week at most: what the main process wrote can be read."""
    if world_size() > 1:
        dist.barrier()


def share(batch: Sequence | Tensor) -> tuple[Sequence | Tensor, int]:
    """This process's contiguous part of a batch that all hold, and how many examples all parts have together."""
    n, size = len(batch), world_size()
    if size == 1 or n < size:  # too few to share go to each process whole
        return batch, n * size
    start, end = (n * (dist.get_rank() + i) // size for i in (0, 1))
    return batch[start:end], n


def gather(part: Tensor, n: int) -> Tensor:
    """What each process computed of its share of a batch of n examples -> that of the batch (n, ..)."""
    if len(part) == n:  # each has computed all
        return part
    whole = part.new_zeros(n, *part.shape[1:])
    share(whole)[0].copy_(part)
    add_up([whole])
    return whole


def add_up(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over processes, in place."""
    if world_size() > 1:
        for work in [dist.all_reduce(as_it_lies(tensor), async_op=True) for tensor in tensors]:
            work.wait()


def as_it_lies(tensor: Tensor) -> Tensor:
    """The tensor, or its transpose, contiguous in memory, as nccl wants it: an expert's B lies transposed."""
    return tensor if tensor.is_contiguous() else tensor.mT


def add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients of all processes' shares; a share that does not reach a parameter counts as zero."""
    if world_size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        add_up(p.grad for p in parameters)


def copy_from_main(model: nn.Module) -> None:
    """Every process continues with the main process's parameters."""
    if world_size() > 1:
        for p in model.parameters():
            dist.broadcast(as_it_lies(p.data), 0)


def agree(value):
    """What the main process holds, in every process: a decision that all must share. Any small Python value."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]
