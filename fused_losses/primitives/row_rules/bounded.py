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
    second = 0 if p.x_second is None else p.x_second.shape[1]
    tall = min(n, _tall(p))
    blocks = ROW_FOLDS[p.rule].on(backend).blocks(list(p.params)) * tall * m
    # 16-bit columns without a gradient stay where they lie
    columns = 0 if backend == "cpu" and not (needs and needs.y) else m
    wide = (n + columns) * d + (n + m) * second
    around = (blocks + 2 * wide) * dtype.itemsize
    of_rows = p.x.dtype if backend == "cpu" and not (needs and needs.y) else dtype
    kind = ROW_SCORES[p.score][0]
    scores = _score_bytes(backend, p, p.x.shape[1], of_rows, kind, tall, needs)
    if p.x_second is None:
        return around + scores
    needs = needs and RowNeeds(needs.x_second, needs.y_second, False)
    more = _score_bytes(backend, p, p.x_second.shape[1], dtype, "dot", tall, needs)
    return around + scores + more


def _score_bytes(
    backend: str,
    p: RowInputs,
    width: int,
    dtype: torch.dtype,
    kind: str,
    tall: int,
    needs: RowNeeds | None,
) -> int:
    """Of a block's scores or second products, and of their gradient."""
    x, y = (
        torch.empty((count, width), dtype=dtype, device="meta") for count in (tall, p.y.shape[0])
    )
    inputs = DistanceInputs(x, y, None, kind, 2.0, p.precision)
    form = DISTANCE_MATRIX.form(backend)
    return form.workspace(inputs, needs and DistanceNeeds(needs.x, needs.y, False))


def _scores(backend: str, p: RowInputs, x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Scores [B, M] of rows x, before their sign; NaN where infinite, as in the reference."""
    score = DISTANCE_MATRIX(backend, x, y, None, kind, 2.0, p.precision)
    return score.masked_fill_(score.isinf(), torch.nan)


def _seconds(p: RowInputs) -> tuple[Tensor, Tensor] | None:
    """Both second factors in the accumulation dtype."""
    if p.x_second is None or p.y_second is None:
        return None
    dtype = accumulate_dtype(p.x.dtype)
    return p.x_second.to(dtype), p.y_second.to(dtype)


def _rows(backend: str, p: RowInputs, moving: bool) -> tuple[Tensor, Tensor]:
    """Both sides as scores are made of them: in the accumulation dtype, or as they lie.

    moving: the columns need a gradient, whose parts are not to be rounded.
    """
    if backend == "cpu" and not moving:
        return p.x, p.y
    dtype = accumulate_dtype(p.x.dtype)
    return p.x.to(dtype), p.y.to(dtype)


def forward(backend: str, p: RowInputs) -> Tensor:
    rule, (kind, sign) = ROW_FOLDS[p.rule], ROW_SCORES[p.score]
    x, y = _rows(backend, p, False)
    seconds, second = _seconds(p), None
    size = (p.x.shape[0], rule.size(list(p.params)))
    out = p.x.new_empty(size, dtype=row_dtype(p.x.device))
    for rows in runs(p.x.shape[0], _tall(p)):
        score = _scores(backend, p, x[rows], y, kind)
        if seconds is not None:
            second = _scores(backend, p, seconds[0][rows], seconds[1], "dot")
        given = block(p, -score if sign < 0 else score, rows, second)
        out[rows] = rule.on(backend).forward(given)
    return out


def backward(backend: str, grad: Tensor, p: RowInputs, needs: RowNeeds) -> tuple[Tensor, ...]:
    """dx, dy, dvalues, dx_second, dy_second; empty where not asked for."""
    rule, dtype = ROW_FOLDS[p.rule], accumulate_dtype(p.x.dtype)
    x, y = _rows(backend, p, needs.y)
    seconds, second = _seconds(p), None
    kind, sign = ROW_SCORES[p.score]
    # no output of an op is another one
    dx, dy, dvalues, dx_second, dy_second = (p.x.new_empty(0) for _ in RowNeeds._fields)
    dx = torch.empty_like(x, dtype=dtype) if needs.x else dx
    dy = torch.zeros_like(y, dtype=dtype) if needs.y else dy
    dvalues = torch.zeros_like(p.values) if needs.values and p.values is not None else dvalues
    dx_second = torch.empty_like(seconds[0]) if seconds and needs.x_second else dx_second
    dy_second = torch.zeros_like(seconds[1]) if seconds and needs.y_second else dy_second
    gradient = rule.on(backend).gradient
    assert gradient is not None
    for rows in runs(p.x.shape[0], _tall(p)):
        score = _scores(backend, p, x[rows], y, kind)
        if seconds is not None:
            second = _scores(backend, p, seconds[0][rows], seconds[1], "dot")
        given = block(p, -score if sign < 0 else score, rows, second)
        slope, of_values, *of_second = gradient(given, grad[rows].to(dtype))
        assert slope is not None
        slope = -slope if sign < 0 else slope
        arguments = slope.to(dtype), score, x[rows], y, None, kind, 2.0, p.precision
        of_x, of_y, _ = DISTANCE_MATRIX.run_backward(backend, *arguments, *needs[:2], False)
        if needs.x:
            dx[rows] = of_x
        if needs.y:
            dy += of_y
        if needs.values and of_values is not None:
            dvalues[rows] = of_values.to(dvalues.dtype)
        if seconds is None or not (needs.x_second or needs.y_second):
            continue
        of_pairs = of_second[0]
        assert of_pairs is not None
        arguments = of_pairs.to(dtype), second, seconds[0][rows], seconds[1], None, "dot"
        of_x, of_y, _ = DISTANCE_MATRIX.run_backward(
            backend, *arguments, 2.0, p.precision, needs.x_second, needs.y_second, False
        )
        if needs.x_second:
            dx_second[rows] = of_x
        if needs.y_second:
            dy_second += of_y
    found = dx, dy, dvalues, dx_second, dy_second
    like = p.x, p.y, dvalues, p.x_second, p.y_second
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(found, like, strict=True))
