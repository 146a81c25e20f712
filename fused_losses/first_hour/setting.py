"""What a first hour is asked for, and the kinds of units that it has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fused_losses.base.examples import TABLE, Example
from fused_losses.first_hour.record import Outcome
from fused_losses.verify.table import SMALL, Chosen, VerifiedShape, judged

TINY: VerifiedShape = (7, 18, 12)
MIDDLE: VerifiedShape = (256, 1024, 512)


@dataclass(frozen=True)
class Setting:
    """Of one call of `fused-losses first-hour`."""

    device: str
    out: Path
    ops: tuple[str, ...] | None = None  # rows of the table, or functions; None: all
    cases: tuple[str, ...] | None = None  # of the bench and the roofline; None: all
    stages: tuple[str, ...] | None = None  # None: all
    environment: dict[str, str] = field(default_factory=dict)  # of the process that runs units

    @property
    def rehearsed(self) -> bool:
        """Without a GPU, everything at small shapes: times say nothing of a GPU."""
        return self.device == "cpu"

    @property
    def small(self) -> VerifiedShape:
        """Of checks."""
        return TINY if self.rehearsed else SMALL

    @property
    def middle(self) -> VerifiedShape:
        """Of launches and memory."""
        return TINY if self.rehearsed else MIDDLE

    def examples(self) -> list[Example]:
        """Those that can be judged and are asked for; each function's first one before the rest."""
        chosen = Chosen(self.ops)
        found = [e for e in TABLE.values() if judged(e) and chosen.takes(e.name)]
        firsts = {e.function: e for e in reversed(found)}
        return [*reversed(firsts.values()), *(e for e in found if firsts[e.function] is not e)]

    def functions(self) -> list[Example]:
        """One example of each function."""
        firsts: dict[object, Example] = {}
        for example in self.examples():
            firsts.setdefault(example.function, example)
        return [*firsts.values()]

    def wants(self, case: str) -> bool:
        return self.cases is None or case in self.cases


class HourUnit(NamedTuple):
    """One thing to learn; its name begins with its stage."""

    name: str
    run: Callable[[], Outcome]

    @property
    def stage(self) -> str:
        return self.name.partition("/")[0]


def rehearsal_environment(device: str) -> dict[str, str]:
    """What makes the kernels of a GPU run on CPU tensors."""
    if device != "cpu":
        return {}
    asked = {"TRITON_INTERPRET": "1", "FUSED_LOSSES_CUDA_ON_HOST": "1"}
    return {name: os.environ.get(name, value) for name, value in asked.items()}


def sizes(example: Example, shape: VerifiedShape) -> VerifiedShape:
    """One batch is larger than one side of two."""
    n, m, d = shape
    return (n + m // 4 if example.alone else n, m, d)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
