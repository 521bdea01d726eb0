"""The optimisation loop that every stage shares: schedule, gradient clipping, AdamW, progress.

Paper    appendix E: AdamW, linear warm-up and decay to zero, gradient norm clipped at 1, no decay of RMSNorm
         weights
In       named parameters that train, a function that draws a batch, one that gives the loss of a part of it
Out      the parameters, changed in place
Next     dense.py and train.py call it
Differs  plain AdamW where the released code has an 8-bit one; frozen tensors are never handed to it
"""

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

import distributed
from baselines import climb, climb_back

MOST_SKIPPED = 10  # steps in a row without a finite gradient, after which training stops


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> list[dict]:
    """AdamW groups of the parameters that train (requires_grad, not empty); RMSNorm weights are not decayed."""
    named = [(name, p) for name, p in named if p.requires_grad and p.numel()]
    norms = [p for name, p in named if name.endswith("norm.weight")]
    others = [p for name, p in named if not name.endswith("norm.weight")]
    groups = [
        dict(params=others, lr=lr, weight_decay=weight_decay),
        dict(params=norms, lr=lr, weight_decay=0.0),
    ]
    return [group for group in groups if group["params"]]


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate at a step: up from 1/warmup to 1, then down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def some(batch: Sequence | Tensor, most: int = 20) -> str:
    """The first examples of a batch, for the log."""
    shown = batch[:most].tolist() if isinstance(batch, Tensor) else [str(item)[:80] for item in batch[:most]]
    return f"{shown}" + (" .." if len(batch) > most else "")


def fit(
    what: str,
    groups: list[dict],
    steps: int,
    warmup: float,
    clip: float,
    next_batch: Callable[[], Sequence | Tensor],
    loss_of: Callable[[Sequence | Tensor], tuple[Tensor, dict[str, Tensor]]],
    log,
    micro_batch: int = 0,
    bf16: bool = False,
    before_clip: Callable[[], None] = lambda: None,
    after_step: Callable[[], None] = lambda: None,
    sam_rho: float = 0.0,
    resume=None,
    chance: dict | None = None,
) -> float:
    """Runs `steps` optimiser steps and reports them.

    A batch is cut into the shares of the processes and those into micro-batches, whose losses, means over their
    examples, add up to the mean over the batch.

    Args:
        what: the stage's name in the log, as "D2".
        warmup: share of the steps.
        next_batch: draws a batch, a list or tensor of examples, alike in every process.
        loss_of: of a part of it, the loss and its terms by name (as weighted in it).
        micro_batch: the most examples computed together; 0: all.
        bf16: matrix products in bfloat16; norms, softmax, router and losses see to their float32 themselves.
        before_clip, after_step: what else touches gradients (slow learner) or parameters (unit router rows).
        sam_rho: radius of adaptive SAM (DSI++): the gradient is taken where the loss is worst nearby; 0: where it is.
        resume: saves where the stage stands, and restores it before the first step (resume.Resume).
        chance: by name, whatever `next_batch` and `loss_of` draw from or add up, for `resume`.

    Returns:
        the last step's loss.
    Raises ValueError after 10 steps in a row whose loss or gradient is not finite; each such step is skipped.
    """
    optimizer = torch.optim.AdamW(groups, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    begin, examples, value, skipped = time.monotonic(), 0, float("nan"), 0

    def gradients(batch: Sequence | Tensor) -> dict[str, Tensor]:
        """Puts the gradient of the batch's mean loss into the parameters; the loss and its terms, of this share."""
        optimizer.zero_grad(set_to_none=True)
        mine, total = distributed.share(batch)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(mine), micro_batch or len(mine)):
            part = mine[start : start + (micro_batch or len(mine))]
            with torch.autocast(trained[0].device.type, torch.bfloat16, enabled=bf16):
                loss, terms = loss_of(part)
            weight = len(part) / total
            (weight * loss).backward()
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + weight * term.detach()
        distributed.add_up_gradients(trained)
        return sums

    first = resume.restore(what, trained, optimizer, chance or {}) if resume else 0
    for step in range(first, steps):
        factor = linear_schedule(step, steps, max(1, round(warmup * steps)))
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = next_batch()
        sums = gradients(batch)
        if sam_rho:
            before = climb(trained, sam_rho)
            gradients(batch)
            climb_back(trained, before)
        before_clip()
        norm = nn.utils.clip_grad_norm_(trained, clip)
        if norm.isfinite():
            optimizer.step()
            skipped = 0
        else:  # as it is where the loss is not
            skipped += 1
            log.line(
                f"{what} step {step + 1}: gradient norm {norm:.3g}, step {skipped} skipped; batch {some(batch)}"
            )
            if skipped == MOST_SKIPPED:
                raise ValueError(
                    f"{what}: {skipped} steps in a row had no finite loss or gradient. The last good checkpoint is "
                    "whole; lower the learning rate (--lr, --d0_lr or --dense_lr), or pass --precision float32"
                )
        after_step()

        examples += len(batch)
        last = step + 1 == steps
        if step % 10 == 0 or last:
            distributed.add_up(sums.values())
            numbers = {name: float(term) for name, term in sums.items()}
            value, seconds = numbers.pop("loss"), time.monotonic() - begin
            parts = " ".join(f"{name} {number:.3f}" for name, number in numbers.items())
            rate, left = examples / seconds, seconds / (step + 1 - first) * (steps - step - 1)
            log.progress(
                f"{what} step {step + 1}/{steps} | loss {value:.3f} ({parts}) | lr {max(peaks) * factor:.1e} | "
                f"{rate:.0f} q/s | ETA {left:.0f} s",
                last,
            )
            log.metrics(
                stage=what, step=step + 1, loss=value, **numbers, lr=max(peaks) * factor, gradient_norm=norm,
                queries_per_second=rate,
            )  # fmt: skip
        if resume and skipped == 0 and (last or resume.due()):
            resume.save(what, step + 1, trained, optimizer, chance or {})
    return value
