"""Rows of norm 1 by one launch a direction, where `base.unit_norm` takes some thirty operators."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.gpu import rehearsal
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.tiles import Tile, width
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.capability import DTYPES
from fused_losses.base import unit_norm
from fused_losses.base.compiled import transformed

# elements that a program holds at once, and of a row
HELD, DEPTH = 1024, 512


def takes(x: Tensor) -> bool:
    """Whether the kernels have these rows, and nothing asks for PyTorch's operators."""
    if x.dim() != 2 or x.dtype not in DTYPES or x.stride(1) != 1 or x.numel() == 0:
        return False
    if transformed() or not rehearsal.launchable():
        return False
    asked = backends.requested(None) in ("auto", "triton")
    return asked and not backends.reasons_against("triton", x.device, x.dtype, "fp32")


def forward(x: Tensor) -> Tensor:
    """x / |x|, rounded once; zeros stay zeros. [N, D]"""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("unit_forward", x, (x, out, x.stride(0)))
    return out


def backward(x: Tensor, grad: Tensor) -> Tensor:
    """dL/dx of dL/du; 0 of a row of zeros. [N, D]"""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("unit_backward", x, (x, grad, out, x.stride(0), grad.stride(0)))
    return out


def _launch(name: str, x: Tensor, given: tuple) -> None:
    (n, d), depth = x.shape, min(DEPTH, width(x.shape[1]))
    even = d % depth == 0
    # rows of no whole slices take more registers: 8 of them spill on sm_100
    tile = Tile((HELD if even else HELD // 2) // depth, 0, depth, 4, 1)
    triton_launch.launch(
        triton_launch.shared_kernel(f"triton_unit.{name}"),
        ceil_div(n, tile.rows),
        (*given, n, d),
        dict(BM=tile.rows, BK=tile.depth, EVEN=even),
        tile,
    )


unit_norm.FORMS.append(unit_norm.UnitForm(takes, forward, backward))
