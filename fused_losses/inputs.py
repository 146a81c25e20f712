"""What the streamed primitive is given, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """One call of the primitive (`fused_losses.sweep`)."""

    x: Tensor  # [N, D]
    weight: Tensor  # [C, D]
    labels: Tensor  # [N], -1: no target
    classes: Tensor | None = None  # [K], increasing
    bias: Tensor | None = None  # [C]
    column_weight: Tensor | None = None  # [C]
    normalize: bool = False
    weighted: bool = False
    precision: str = "fp32"
    bend: Tensor | None = None  # [4, N]: threshold, then the polynomial above it


class RowGradients(NamedTuple):
    """The gradients that come in, [N] each."""

    lse: Tensor
    target: Tensor
    weighted: Tensor | None


class Needs(NamedTuple):
    """The gradients that are asked for."""

    x: bool
    weight: bool
    bias: bool
    compact: bool = False  # the weight's gradient has the rows of `classes` only, [K, D]
