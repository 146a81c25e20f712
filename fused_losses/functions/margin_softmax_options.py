"""The options of a margin softmax by their types, for checkers: of both its results."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor

from fused_losses.base.memory_budget import MemoryBudget


class MarginSoftmaxOptions(TypedDict, total=False):
    """Keywords of `margin_softmax`, whose own signature has their defaults."""

    margin: Any
    scale: float | Tensor
    normalize: bool
    bias: Tensor | None
    label_smoothing: float
    ignore_index: int
    class_weight: Tensor | None
    row_weight: Tensor | None
    classes: Tensor | None
    z_loss: float
    softcap: float | None
    precision: str
    memory_budget: MemoryBudget
    gradient: str
    reduction: str
    backend: str | None
