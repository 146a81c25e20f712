"""The rule "triplets" of `row_rules` compiled: a block's triplets counted in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.primitives.library import LIBRARY

_BLOCK = "Tensor score, Tensor positive, Tensor negative, float margin, str kind"
LIBRARY.define(f"row_triplets_cpu({_BLOCK}) -> Tensor")
LIBRARY.define(f"row_triplets_cpu_slope(Tensor grad, {_BLOCK}) -> Tensor")


def forward(score: Tensor, positive: Tensor, negative: Tensor, margin: float, kind: str) -> Tensor:
    """The sum of a row's triplets and their number, [B, 2] float64."""
    block = (score.contiguous(), positive.contiguous(), negative.contiguous())
    return torch.ops.fused_losses.row_triplets_cpu(*block, margin, kind)


def slope(
    grad: Tensor, score: Tensor, positive: Tensor, negative: Tensor, margin: float, kind: str
) -> Tensor:
    """grad [B] times the slope of the sum in each score, [B, M] in the score's type."""
    block = (score.contiguous(), positive.contiguous(), negative.contiguous())
    return torch.ops.fused_losses.row_triplets_cpu_slope(grad, *block, margin, kind)
