"""Where a stage of training stands, so that a run stopped at any moment goes on as if it had not been.

Paper    none
In       the trained tensors, the optimiser, and every source of chance of a stage
Out      latest.pt in the run folder, and latest.previous.pt, the one before it
Next     optim.py saves while it trains and restores before its first step
Differs  the released code starts a stopped stage from its beginning

What leads up to a stage's first step (scan, growth, mined negatives) is not saved: it follows from the checkpoint
before it and from the seed, and is simply done again.
"""

import os
import random
import time
from pathlib import Path

import torch
from torch import Tensor

import distributed
import run as store
from mapped import sync_folder


class Resume:
    """Saves and restores the stage that is being trained. Without a folder it does neither."""

    def __init__(self, folder: Path | None, seconds: float, log):
        self.folder, self.seconds, self.log = folder, seconds, log
        self.found = self._read() if folder else {}
        self.last = time.monotonic()

    @property
    def stage(self) -> str:
        """The stage that the folder's latest.pt is of, "" without one."""
        return self.found.get("stage", "")

    def _read(self) -> dict:
        """latest.pt or, where it cannot be trusted, the one before it."""
        for name in ("latest.pt", "latest.previous.pt"):
            path = self.folder / name
            if path.exists():
                try:
                    found = store.read_tensors(path)
                    store.check_stamp(path, found)
                    return found
                except ValueError as error:
                    self.log.line(f"{error}; going on without it")
        return {}

    def restore(self, stage: str, trained: list[Tensor], optimizer, chance: dict) -> int:
        """Puts everything back to where latest.pt found this stage; returns the number of steps done then."""
        found, self.found = self.found, {}
        self.log.forget(stage, found["step"] if found.get("stage") == stage else 0)
        if found.get("stage") != stage:
            return 0
        with torch.no_grad():
            for p, value in zip(trained, found["trained"], strict=True):
                p.copy_(value)
        optimizer.load_state_dict(found["optimizer"])
        for name, source in chance.items():
            put_state(source, found["chance"][name])
        torch.set_rng_state(found["torch"])
        if torch.cuda.is_available() and found["cuda"]:
            torch.cuda.set_rng_state_all(found["cuda"])
        self.log.line(f"{stage}: going on after step {found['step']}")
        return found["step"]

    def due(self) -> bool:
        """Has it been long enough since the last save?"""
        return self.folder is not None and time.monotonic() - self.last >= self.seconds

    def save(self, stage: str, step: int, trained: list[Tensor], optimizer, chance: dict) -> None:
        """Writes latest.pt after `step` steps of a stage; the one before it stays as latest.previous.pt."""
        if self.folder is None or not distributed.first():
            return
        value = store.stamp(self.folder) | {
            "stage": stage,
            "step": step,
            "trained": [p.detach() for p in trained],
            "optimizer": optimizer.state_dict(),
            "chance": {name: get_state(source) for name, source in chance.items()},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path = self.folder / "latest.pt"
        store.write_tensors(path.with_name("latest.new.pt"), value)
        if path.exists():
            os.replace(path, path.with_name("latest.previous.pt"))
        os.replace(path.with_name("latest.new.pt"), path)
        sync_folder(self.folder)
        self.last = time.monotonic()


def get_state(source):
    """The state of a source of chance: random.Random, torch.Generator, or an object with state()."""
    if isinstance(source, random.Random):
        return source.getstate()
    return source.get_state() if isinstance(source, torch.Generator) else source.state()


def put_state(source, state) -> None:
    if isinstance(source, random.Random):
        source.setstate(state)
    elif isinstance(source, torch.Generator):
        source.set_state(state)
    else:
        source.restore(state)
