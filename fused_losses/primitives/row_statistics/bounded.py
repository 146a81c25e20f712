"""The memory-bounded path in pure PyTorch: what runs where no compiled backend can.

The classes go by in tiles; forward keeps row statistics, backward recomputes each tile.
Extra memory O(N D + tile), whatever the number of classes; any device; float64 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype, row_dtype, unit_rows
from fused_losses.base.unit_norm import UnitRows, unit_parts
from fused_losses.primitives.row_statistics.bend import bent, bent_slope
from fused_losses.primitives.row_statistics.inputs import (
    Inputs,
    Needs,
    RowGradients,
    check,
    gradient_shape,
)

TILE_BYTES = 3 << 20  # of scores and of weights in a tile, together
ROW_BYTES = 200  # of vectors
LIVE_TILES = 4.2  # how many such are alive at the peak, in backward (test_memory.py)


def tile_classes(n: int, d: int, element_size: int) -> int:
    return max(16, TILE_BYTES // (max(n + d, 1) * element_size))


def workspace_bytes(n: int, d: int, dtype: torch.dtype, precision: str = "fp32") -> int:
    """Peak memory of forward and backward beyond inputs and gradients."""
    size = accumulate_dtype(dtype).itemsize
    return int(LIVE_TILES * tile_classes(n, d, size) * (n + d) * size) + 3 * n * d * size


def workspace(p: Inputs, needs: Needs | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), dtype = p.x.shape, accumulate_dtype(p.x.dtype)
    total = p.weight.shape[0] if p.classes is None else p.classes.shape[0]
    tile = min(tile_classes(n, d, dtype.itemsize), total) * (n + d) * dtype.itemsize
    gathered = min(TILE_BYTES, 32 * n * d)  # of targets
    return int(LIVE_TILES * max(tile, gathered)) + n * (3 * d * dtype.itemsize + ROW_BYTES)


@dataclass
class ClassTile:
    """A run of classes with their scores against every row."""

    ids: Tensor  # [T] class ids
    weight: Tensor  # [T, D] as multiplied (normalised if asked)
    unit: UnitRows | None  # of those rows, where they are normalised
    raw: Tensor  # [N, T] products
    scores: Tensor  # [N, T] products, bent if asked, plus bias
    is_target: Tensor  # [N, T]


def tiles(p: Inputs, x: Tensor) -> Iterator[ClassTile]:
    """The classes that take part, a tile at a time, against the rows x (p.x as accumulated)."""
    weight, classes, bias = p.weight, p.classes, p.bias
    total = weight.shape[0] if classes is None else classes.shape[0]
    step = tile_classes(x.shape[0], x.shape[1], x.element_size())
    if p.bend is not None:  # bending a tile takes as much memory again
        step = max(16, step // 2)
    for start in range(0, total, step):
        stop = min(start + step, total)
        if classes is None:
            ids = torch.arange(start, stop, device=x.device)
            part = weight[start:stop].to(x.dtype)
        else:
            ids = classes[start:stop]
            part = weight[ids].to(x.dtype)
        unit = unit_parts(part) if p.normalize else None
        part = part if unit is None else unit.rows
        raw = x @ part.T
        scores = raw if p.bend is None else bent(raw, p.bend.to(raw.dtype)[:, :, None])
        scores = scores if bias is None else scores + bias[ids].to(x.dtype)
        yield ClassTile(ids, part, unit, raw, scores, p.labels[:, None] == ids[None, :])


def targets(
    x: Tensor, weight: Tensor, labels: Tensor, normalize: bool, shortest: float = 0.0
) -> Tensor:
    """<x_i, w_y> a row, 0 without a target. [N]

    shortest: with normalize, classes of a smaller norm are zeros (`counts_as_zero`).

    Summed in float64: lse - target is what the gradient is the exponential of, and a long float32
    sum puts 6e-6 into a score of 48 (D = 512), six times what rounding the result does.
    """
    if torch.compiler.is_compiling():  # a loop would be traced for this N alone
        return _targets(x, weight, labels, normalize, shortest)
    out = torch.zeros_like(labels, dtype=row_dtype(x.device))
    step = max(1, TILE_BYTES // (32 * max(x.shape[1], 1)))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        out[rows] = _targets(x[rows], weight, labels[rows], normalize, shortest)
    return out


def _targets(x: Tensor, weight: Tensor, labels: Tensor, normalize: bool, shortest: float) -> Tensor:
    wide = row_dtype(x.device)
    w = weight[labels.clamp_min(0)].to(wide)
    nothing = labels < 0
    if normalize and shortest:
        nothing = nothing | (torch.linalg.vector_norm(w, dim=1) < shortest)
    w = unit_rows(w) if normalize else w
    return torch.where(nothing, 0, (x.to(wide) * w).sum(dim=1))


def forward(p: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, target, weighted_sum, hardest, hardest_score (`row_statistics`)."""
    check(p.labels, p.weight, p.classes)
    x = p.x.to(accumulate_dtype(p.x.dtype))
    n = x.shape[0]
    lse = x.new_full((n,), -torch.inf)
    target = targets(x, p.weight, p.labels, p.normalize)
    weighted_sum = x.new_zeros(n if p.weighted else 0)
    hardest = torch.full((n,), -1, device=x.device)
    hardest_score = x.new_full((n,), -torch.inf)
    for tile in tiles(p, x) if n else ():
        if p.weighted:
            v = 1 if p.column_weight is None else p.column_weight[tile.ids].to(x.dtype)
            weighted_sum += (v * tile.scores).masked_fill_(tile.is_target, 0).sum(dim=1)
        others = tile.scores.masked_fill(tile.is_target, -torch.inf)
        best = others.max(dim=1)
        better = best.values > hardest_score
        hardest = torch.where(better, tile.ids[best.indices], hardest)
        hardest_score = torch.where(better, best.values, hardest_score)
        lse = torch.logaddexp(lse, torch.logsumexp(others, dim=1))
    # an infinite score is a fault that must show, as in F.cross_entropy
    lse = torch.where(lse == torch.inf, torch.nan, lse)
    return lse, target, weighted_sum, hardest, hardest_score


def backward(
    p: Inputs,
    lse: Tensor,  # [N]
    grads: RowGradients,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each None where it is not needed."""
    rows = p.x.to(accumulate_dtype(p.x.dtype))
    dx = torch.zeros_like(rows) if needs.x else None
    compact = needs.compact and p.classes is not None
    dweight = p.weight.new_zeros(gradient_shape(p, needs)) if needs.weight else None
    at = 0
    dbias = torch.zeros_like(p.bias) if needs.bias and p.bias is not None else None
    # a row without other classes has lse = -inf and no gradient to share out
    safe_lse = torch.where(lse == -torch.inf, 0, lse)[:, None]
    for tile in tiles(p, rows) if len(rows) else ():
        g = (tile.scores - safe_lse).exp_().mul_(grads.lse[:, None])
        if p.weighted and grads.weighted is not None:
            v = 1 if p.column_weight is None else p.column_weight[tile.ids].to(g.dtype)
            g += grads.weighted[:, None] * v
        if dbias is not None:
            dbias[tile.ids] = g.masked_fill(tile.is_target, 0).sum(dim=0).to(dbias.dtype)
        if p.bend is not None:
            g *= bent_slope(tile.raw, p.bend.to(g.dtype)[:, :, None])
        g = torch.where(tile.is_target, grads.target[:, None], g)
        if dx is not None:
            dx.addmm_(g, tile.weight)
        if dweight is not None:
            dw = g.T @ rows
            if tile.unit is not None:
                dw = tile.unit.backward(dw)
            dweight[slice(at, at + len(dw)) if compact else tile.ids] = dw.to(dweight.dtype)
            at += len(dw)
    return None if dx is None else dx.to(p.x.dtype), dweight, dbias
