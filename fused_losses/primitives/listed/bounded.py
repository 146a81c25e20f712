"""Listed pairs in blocks: any device, float64 too, and the backward's own derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype, recomputed
from fused_losses.primitives.listed import reference
from fused_losses.primitives.listed.inputs import ListedInputs

BLOCK_BYTES = 1 << 20  # of gathered rows
LIVE_BLOCKS = 6  # how many are alive at the peak (test_workspace.py)


def block_pairs(p: ListedInputs) -> int:
    """How many pairs a block has."""
    return max(1, BLOCK_BYTES // (max(1, p.x.shape[1]) * accumulate_dtype(p.x.dtype).itemsize))


def workspace(p: ListedInputs, backward: bool) -> int:
    """Bytes beyond inputs and outputs, at most."""
    size = accumulate_dtype(p.x.dtype).itemsize
    block = LIVE_BLOCKS * min(p.rows.shape[0], block_pairs(p)) * (p.x.shape[1] + 4) * size
    if not backward:
        return block + 2 * p.rows.shape[0] * size
    return block + (p.x.numel() + (0 if p.y is None else p.y.numel())) * size


def forward(p: ListedInputs) -> Tensor:
    out = [p.x.new_zeros(0, dtype=accumulate_dtype(p.x.dtype))]
    for run in runs(p.rows.shape[0], block_pairs(p)):
        block = p._replace(rows=p.rows[run], columns=p.columns[run])
        out.append(reference.scores(block))
    return torch.cat(out)


def _block_gradient(p: ListedInputs, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What the block's pairs give their rows and their columns, [B, D] each."""
    wide, g = grad.dtype, grad[:, None]
    x, y = p.x.index_select(0, p.rows).to(wide), p.others.index_select(0, p.columns).to(wide)
    if p.apart:
        moved = (2 * g) * (x - y)
        return moved, -moved
    return g * y, g * x


def backward(
    grad: Tensor, p: ListedInputs, need_x: bool, need_y: bool, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y, empty where they are not needed."""
    dx = torch.zeros_like(p.x, dtype=grad.dtype) if need_x else grad.new_empty(0)
    dy = grad.new_empty(0)
    if need_y and p.y is not None:
        dy = torch.zeros_like(p.y, dtype=grad.dtype)
    for run in runs(p.rows.shape[0], block_pairs(p)):
        block = p._replace(rows=p.rows[run], columns=p.columns[run])
        of = recomputed if differentiable else lambda f, *given: f(*given)
        of_x, of_y = of(_block_gradient, block, grad[run])
        if need_x:
            dx.index_add_(0, block.rows, of_x)
        if need_x if p.y is None else need_y:
            (dx if p.y is None else dy).index_add_(0, block.columns, of_y)
    return dx.to(p.x.dtype), dy.to(p.x.dtype)
