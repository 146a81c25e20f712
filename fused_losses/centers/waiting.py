"""Gradients that wait for a step, with a factor that torch's own tools see and change."""

from __future__ import annotations

import math
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

UNIT = 2.0**-40  # what stands for a waiting gradient: its norm must not count in a clipping

Gradient = TypeVar("Gradient")


class WaitingGradient(NamedTuple, Generic[Gradient]):
    """One backward's."""

    gradient: Gradient
    factor: float  # of it


class WaitingGradients(Generic[Gradient]):
    """Those of some backwards.

    `probe` is a leaf among an optimiser's parameters whose gradient is their common factor: a
    GradScaler multiplies it, or finds that it is not finite; `zero_grad` forgets it with them.
    """

    def __init__(self) -> None:
        self._waiting: list[WaitingGradient[Gradient]] = []
        self.probe = new_probe()

    def __len__(self) -> int:
        return len(self._waiting)

    def __getstate__(self) -> dict[str, Any]:
        # as a parameter's copy has no gradient. A tensor made here would be gone before another
        # process maps it
        return {"_waiting": []}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()

    def pending(self) -> list[WaitingGradient[Gradient]]:
        """What waits, each with its factor as it stands now."""
        if self.probe.grad is None:
            self._waiting.clear()  # whoever dropped the optimiser's gradients meant these
        elif self._waiting:
            factor = float(self.probe.grad) / UNIT
            self._waiting = [each._replace(factor=each.factor * factor) for each in self._waiting]
            self.tell(self.finite)
        return self._waiting

    @property
    def finite(self) -> bool:
        return all(math.isfinite(each.factor) for each in self._waiting)

    def add(self, gradient: Gradient, *, finite: bool) -> None:
        """One more, after the factor of those before has been taken up."""
        former = self.pending()
        self._waiting = [*former, WaitingGradient(gradient, 1.0 if finite else math.nan)]
        self.tell(self.finite)

    def tell(self, finite: bool) -> None:
        """What a GradScaler finds, and lowers its scale for."""
        self.probe.grad = torch.full_like(self.probe, UNIT if finite else math.nan)

    def scale(self, factor: float) -> None:
        """Multiplies them all."""
        if self.probe.grad is not None:
            self.probe.grad *= factor

    def forget(self) -> None:
        """Nothing waits; what `pending` gave stays as it is."""
        self._waiting = []
        self.probe.grad = None


def new_probe() -> Tensor:
    """On the host: it is read there."""
    return torch.zeros((), dtype=torch.float64, device="cpu", requires_grad=True)
