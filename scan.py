"""One pass over a corpus with a frozen encoder: what the OOD decision, the KL teacher and the training reuse.

Paper    section 3.2: D_t is scanned with the model before it, teacher-forced along its own docids
In       the model, token ids of pseudo-queries, their docids
Out      encoder outputs, the model's last hidden states, router scores, mean direction of the OOD router inputs
Next     ood.py decides from the scores; train.py trains from the cache
Differs  the released code runs encoder, all 24 blocks and a second model again in every step of every epoch; what
         is cached here is kept in the precision of training's products
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from arrays import scratch
from data import PAD
from mixlora import mixed_layers, routes_of
from t5 import T5

BATCH = 512  # queries together


class SourceCache:
    """Encoder outputs of many queries without their padding."""

    @torch.no_grad()
    def __init__(self, model: T5, ids: Tensor, precision: str = "float32", folder: Path | None = None):
        """ids (Q, S); precision: float32 or bf16. With a folder the outputs lie in a nameless file there (see
        `arrays.scratch`).
        """
        model.eval()
        lengths = (ids != PAD).sum(1)
        self.start, self.lengths, self.folder = lengths.cumsum(0) - lengths, lengths, folder
        device, dtype = model.word.device, torch.bfloat16 if precision == "bf16" else torch.float32
        self.flat = scratch(folder, (int(lengths.sum()), model.config.width), dtype)  # (tokens, D)
        for rows in lengths.argsort().split(BATCH):
            width = int(lengths[rows].max())
            source, _ = model.encode(ids[rows, :width].to(device))
            at = torch.arange(width) < lengths[rows, None]
            places = (self.start[rows, None] + torch.arange(width))[at]
            self.flat[places] = source.to(self.flat.dtype).cpu()[at]

    def get(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states (B, S, D) and padding bias (B, 1, 1, S), as T5.encode gives them."""
        lengths = self.lengths[rows, None]
        position = torch.arange(int(lengths.max()))
        padded = position >= lengths  # (B, S)
        source = self.flat[(self.start[rows, None] + position).clamp(max=len(self.flat) - 1)]
        padding = torch.zeros(padded.shape).masked_fill(padded, -1e9)
        return source.to(device).float(), padding[:, None, None, :].to(device)


@dataclass
class Scan:
    """One pass of a model over a corpus's pseudo-queries along their own docids, in evaluation mode."""

    hidden: Tensor | None  # (Q, M, D) final decoder states: the KL teacher, with the model's docid table
    scores: list[Tensor]  # per mixed layer, router scores (Q, M, E)
    direction: list[Tensor]  # per mixed layer, (D,) summed unit router inputs of OOD queries, else of all


@torch.no_grad()
def scan(
    model: T5, cache: SourceCache, codes: Tensor, is_ood: Callable | None = None, n_plain=0, hidden=True
) -> Scan:
    """Runs the decoder over cached queries with docids (Q, M).

    Directions are of the first `n_plain` queries; `is_ood(layer, scores)` tells which of a batch are OOD for a layer,
    (B, M, E) -> (B,). Without `hidden` it ends at the last mixed layer's router.
    """
    model.eval()
    device, layers = model.word.device, len(mixed_layers(model))
    kept = scratch(cache.folder, (*codes.shape, model.config.width), cache.flat.dtype) if hidden else None
    scores = [[] for _ in range(layers)]
    every, flagged = torch.zeros(2, layers, model.config.width)
    by_length = cache.lengths.argsort()
    for rows in by_length.split(BATCH):
        source, padding = cache.get(rows, device)
        docids = codes[rows].to(device)
        if hidden:
            out, routes = model.docid_hidden(source, padding, docids, model.past(source, padding))
            kept[rows] = out.to(kept.dtype).cpu()
        else:
            routes = routes_of(model, source, padding, docids)
        for layer, route in enumerate(routes):
            scores[layer].append(route.scores.cpu())
            if (plain := rows < n_plain).any():
                unit = F.normalize(route.x.float().cpu()[plain], dim=-1)
                every[layer] += unit.sum((0, 1))
                flagged[layer] += unit[is_ood(layer, scores[layer][-1][plain])].sum((0, 1))
    direction = [one if one.any() else other for one, other in zip(flagged, every)]
    return Scan(kept, [torch.cat(parts)[by_length.argsort()] for parts in scores], direction)
