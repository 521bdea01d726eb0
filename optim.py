"""The optimisation loop that every stage shares: schedule, gradient clipping, AdamW, progress.

Paper    appendix E: AdamW, linear warm-up and decay to zero, gradient norm clipped at 1, RMSNorm weights undecayed
In       a Stage: parameters that train, a function that draws a batch, one that gives its loss
Out      the parameters, changed in place
Next     dense.py and train.py call it
Differs  plain AdamW where the released code has an 8-bit one; frozen tensors are never handed to it; a loss that
         compares the examples of a batch sees them all, also where the batch is cut (GradCache, Gao et al., 2021)
"""

import ctypes
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import distributed

WEIGHT_DECAY, CLIP = 0.01, 1.0  # of docid training; largest gradient norm (paper)
MOST_SKIPPED = 10  # steps in a row without a finite gradient, after which training stops

Batch = Sequence | Tensor  # examples that every process draws alike


@dataclass
class Stage:
    """What one call of `fit` trains, and on what."""

    name: str  # in the log, as "D2"
    groups: list[dict]  # parameter_groups
    steps: int
    warmup: float  # share of the steps in which the learning rate rises
    next_batch: Callable[[], Batch]
    loss: Callable[..., tuple[Tensor, dict]]  # of a part of a batch, and its terms by name, as weighted
    chance: dict = field(default_factory=dict)  # by name, what `next_batch` and `loss` draw from or add up
    before_clip: Callable[[], None] = lambda: None  # what else touches gradients (slow learner)
    after_step: Callable[[], None] = lambda: None  # or parameters (unit router rows)
    climb: Callable[[list[Tensor]], list[Tensor]] | None = None  # adaptive SAM; see `fit`
    embed: Callable[[Batch], Tensor] | None = None  # (B, ..) of a part; `loss` is of a whole batch and these
    parts: int = 1  # of a batch, one after another, where `micro_batch` sets none


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float = WEIGHT_DECAY
) -> list[dict]:
    """AdamW groups of the parameters that train (requires_grad, not empty); RMSNorm weights are not decayed."""
    named = [(name, p) for name, p in named if p.requires_grad and p.numel()]
    norms = [p for name, p in named if name.endswith("norm.weight")]
    others = [p for name, p in named if not name.endswith("norm.weight")]
    decays = (others, weight_decay), (norms, 0.0)
    return [dict(params=params, lr=lr, weight_decay=decay) for params, decay in decays if params]


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate at a step: up from 1/warmup to 1, then down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def gradients(stage: Stage, batch: Batch, trained: list[Tensor], config) -> dict[str, Tensor]:
    """Puts the gradient of the batch's mean loss into the parameters; returns the loss and its terms, of this share.

    The batch is cut into the shares of the processes and those into micro-batches, whose losses, means over their
    examples, add up to the mean over the batch. With `stage.embed` there is one loss, of the embeddings of all parts,
    which are made without gradients first. Its gradient with respect to them goes on into each part, embedded again.
    """
    for p in trained:
        p.grad = None
    share, total = distributed.share(batch)
    size, device, sums = config.micro_batch or -(-len(share) // stage.parts), trained[0].device, {}
    parts = [share[start : start + size] for start in range(0, len(share), size)]
    products = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16")
    if stage.embed and len(parts[0]) < len(batch):
        # fork_rng: the second pass draws the dropout of the first
        with torch.no_grad(), products(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            own = torch.cat([stage.embed(part) for part in parts])
        embedded = distributed.gather(own, len(batch)).requires_grad_()
        with products():
            loss, terms = stage.loss(batch, embedded)
        (len(batch) / total * loss).backward()
        for part, gradient in zip(parts, distributed.share(embedded.grad)[0].split(size)):
            with products():
                again = stage.embed(part)
            again.backward(gradient)
        terms = {"loss": loss, **terms}  # the same in every process
        sums = {name: term.detach() / distributed.world_size() for name, term in terms.items()}
    else:
        for part in parts:
            with products():
                loss, terms = stage.loss(part, stage.embed(part)) if stage.embed else stage.loss(part)
            weight = len(part) / total
            (weight * loss).backward()
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + weight * term.detach()
    distributed.add_up_gradients(trained)
    return sums


def fit(stage: Stage, config, log, resume=None) -> None:
    """Runs a stage's optimiser steps and reports them.

    With `stage.climb` (DSI++) the gradient is taken where the loss is worst nearby: it moves the parameters there and
    returns their values before, the batch's gradient is computed again, and the values are put back.

    Args:
        config: `micro_batch`, the most examples computed together (0: all), and `precision`: with bf16, matrix
            products are in bfloat16; norms, softmax, router scores, cross-entropies and KL see to their float32 themselves.
        resume: saves where the stage stands, and restores it before the first step (store.Resume).

    Raises ValueError after 10 steps in a row whose loss or gradient is not finite; each such step is skipped.
    """
    optimizer = torch.optim.AdamW(stage.groups, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    start = resume.restore(stage.name, trained, optimizer, stage.chance) if resume else 0
    begin, examples, skipped = time.monotonic(), 0, 0
    for step in range(start, stage.steps):
        factor = linear_schedule(step, stage.steps, max(1, round(stage.warmup * stage.steps)))
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = stage.next_batch()
        sums = gradients(stage, batch, trained, config)
        if stage.climb:
            before = stage.climb(trained)
            gradients(stage, batch, trained, config)
            with torch.no_grad():
                for p, values in zip(trained, before):
                    p.copy_(values)
        stage.before_clip()
        norm = nn.utils.clip_grad_norm_(trained, CLIP)
        if norm.isfinite():  # as it is not where the loss is not
            optimizer.step()
            skipped = 0
        else:
            skipped += 1
            skip(stage.name, step + 1, norm, batch, skipped, log)
        stage.after_step()

        examples += len(batch)
        last = step + 1 == stage.steps
        if step % 10 == 0 or last:
            distributed.add_up(sums.values())
            numbers = {name: float(term) for name, term in sums.items()}
            loss, seconds = numbers.pop("loss"), time.monotonic() - begin
            terms = " ".join(f"{name} {number:.3f}" for name, number in numbers.items())
            rate, left = examples / seconds, seconds / (step + 1 - start) * (stage.steps - step - 1)
            log.progress(
                f"{stage.name} step {step + 1}/{stage.steps} | loss {loss:.3f} ({terms}) | "
                f"lr {max(peaks) * factor:.1e} | {rate:.0f} q/s | ETA {left:.0f} s",
                last,
            )
            log.metrics(
                stage=stage.name, step=step + 1, loss=loss, **numbers, lr=max(peaks) * factor, gradient_norm=norm,
                queries_per_second=rate,
            )  # fmt: skip
        if resume and skipped == 0 and (last or resume.due()):
            resume.save(stage.name, step + 1, trained, optimizer, stage.chance)


def skip(name: str, step: int, norm: Tensor, batch: Batch, skipped: int, log) -> None:
    """Logs a step that is not taken; raises ValueError where too many were skipped in a row."""
    examples = [str(item)[:80] for item in (batch.tolist() if isinstance(batch, Tensor) else batch)[:20]]
    log.line(
        f"{name} step {step}: gradient norm {norm:.3g}, skipped ({skipped} in a row); batch: {examples} .."
    )
    if skipped == MOST_SKIPPED:
        raise ValueError(
            f"{name}: {skipped} steps in a row had no finite loss or gradient (the last checkpoint is whole); "
            "lower the learning rate (--lr, --d0_lr, --dense_lr) or pass --precision float32"
        )


def keep_freed_memory() -> None:
    """Keeps what tensors free for the next ones, where the C library is glibc.

    It gives blocks of 128 KB and more back to the system, which hands them out again a zeroed page at a time: a fifth
    of a small model's training on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, most_mapped = -1, -4  # numbers of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(most_mapped, 0)
