"""The rule "triplets" of `row_rules` on the CUDA kernels: a block's triplets counted a row a block.

Nothing waits for the device, so both can be captured in a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch

TRIPLET_KINDS = ("all", "hard", "semihard")  # as csrc/triplets.h numbers them
MOST_COLUMNS = 2**30  # the kernel counts in 32 bits


def forward(score: Tensor, positive: Tensor, negative: Tensor, margin: float, kind: str) -> Tensor:
    """The sum of a row's triplets and their number, [B, 2] float64."""
    out = score.new_empty((score.shape[0], 2), dtype=torch.float64)
    _launch(score, positive, negative, margin, kind, statistics=out)
    return out


def slope(
    grad: Tensor, score: Tensor, positive: Tensor, negative: Tensor, margin: float, kind: str
) -> Tensor:
    """grad [B] times the slope of the sum in each score, [B, M]."""
    out = torch.empty_like(score, memory_format=torch.contiguous_format)
    _launch(score, positive, negative, margin, kind, grad=grad, slope=out)
    return out


def _launch(
    score: Tensor,  # [B, M]
    positive: Tensor,
    negative: Tensor,
    margin: float,
    kind: str,
    grad: Tensor | None = None,
    statistics: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    if score.dtype != torch.float32:
        raise TypeError(f"score: expected float32, got {score.dtype}")
    rows, columns = score.shape
    if columns > MOST_COLUMNS:
        raise ValueError(f"score: expected at most {MOST_COLUMNS} columns, got {columns}")
    cuda_launch.launch(
        "triplets",
        score=score.contiguous(),
        positive=positive.contiguous(),
        negative=negative.contiguous(),
        grad=grad,
        statistics=statistics,
        slope=slope,
        rows=rows,
        columns=columns,
        grad_stride=0 if grad is None else grad.stride(0),
        margin=margin,
        kind=TRIPLET_KINDS.index(kind),
    )
