"""Folds over rows on blocks of scores, in PyTorch, on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.distances.op import DISTANCE_MATRIX
from fused_losses.primitives.row_rules.inputs import ROW_SCORES, RowInputs, RowNeeds, block
from fused_losses.primitives.row_rules.rules import ROW_FOLDS

BLOCK_BYTES = 2 << 20  # of scores in a block

GPU_BLOCK_BYTES = 16 << 20  # enough rows for every processor; a block stays in L2


def block_bytes(device: torch.device) -> int:
    return GPU_BLOCK_BYTES if device.type == "cuda" else BLOCK_BYTES


def _tall(p: RowInputs) -> int:
    """Rows of a block."""
    size = accumulate_dtype(p.x.dtype).itemsize
    return max(1, block_bytes(p.x.device) // (max(p.y.shape[0], 1) * size))


def workspace(backend: str, p: RowInputs, needs: RowNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), m, dtype = p.x.shape, p.y.shape[0], accumulate_dtype(p.x.dtype)
    tall = min(n, _tall(p))
    blocks = ROW_FOLDS[p.rule].on(backend).blocks(list(p.params)) * tall * m
    around = (blocks + 2 * (n + m) * d) * dtype.itemsize
    return around + _score_bytes(backend, p, tall, needs)


def _score_bytes(backend: str, p: RowInputs, tall: int, needs: RowNeeds | None) -> int:
    """Of a block's scores, and of their gradient."""
    x, y = (
        torch.empty((count, p.x.shape[1]), dtype=accumulate_dtype(p.x.dtype), device="meta")
        for count in (tall, p.y.shape[0])
    )
    inputs = DistanceInputs(x, y, None, ROW_SCORES[p.score][0], 2.0, p.precision)
    form = DISTANCE_MATRIX.form(backend)
    return form.workspace(inputs, needs and DistanceNeeds(needs.x, needs.y, False))


def _scores(backend: str, p: RowInputs, x: Tensor, y: Tensor) -> Tensor:
    """Scores [B, M] of rows x, before their sign; NaN where infinite, as in the reference."""
    score = DISTANCE_MATRIX(backend, x, y, None, ROW_SCORES[p.score][0], 2.0, p.precision)
    return score.masked_fill_(score.isinf(), torch.nan)


def forward(backend: str, p: RowInputs) -> Tensor:
    rule, dtype = ROW_FOLDS[p.rule], accumulate_dtype(p.x.dtype)
    x, y, sign = p.x.to(dtype), p.y.to(dtype), ROW_SCORES[p.score][1]
    size = (p.x.shape[0], rule.size(list(p.params)))
    out = p.x.new_empty(size, dtype=row_dtype(p.x.device))
    for rows in runs(p.x.shape[0], _tall(p)):
        score = _scores(backend, p, x[rows], y)
        out[rows] = rule.on(backend).forward(block(p, -score if sign < 0 else score, rows))
    return out


def backward(
    backend: str, grad: Tensor, p: RowInputs, need_x: bool, need_y: bool, need_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rule, dtype = ROW_FOLDS[p.rule], accumulate_dtype(p.x.dtype)
    x, y = p.x.to(dtype), p.y.to(dtype)
    kind, sign = ROW_SCORES[p.score]
    dx = torch.empty_like(x) if need_x else p.x.new_empty(0)
    dy = torch.zeros_like(y) if need_y else p.y.new_empty(0)
    dvalues = (
        torch.zeros_like(p.values) if need_values and p.values is not None else p.x.new_empty(0)
    )
    gradient = rule.on(backend).gradient
    assert gradient is not None
    for rows in runs(p.x.shape[0], _tall(p)):
        score = _scores(backend, p, x[rows], y)
        slope, of_values = gradient(
            block(p, -score if sign < 0 else score, rows), grad[rows].to(dtype)
        )
        slope = -slope if sign < 0 else slope
        given = (slope.to(dtype), score, x[rows], y, None, kind, 2.0, p.precision)
        of_x, of_y, _ = DISTANCE_MATRIX.run_backward(backend, *given, need_x, need_y, False)
        if need_x:
            dx[rows] = of_x
        if need_y:
            dy += of_y
        if need_values and of_values is not None:
            dvalues[rows] = of_values.to(dvalues.dtype)
    return (
        dx.to(p.x.dtype) if need_x else dx,
        dy.to(p.y.dtype) if need_y else dy,
        dvalues,
    )
