"""The sweep over widths in pure PyTorch: a block's product grows by each width's own columns.

Memory O((N + M) D) plus blocks, a few and one a width. All arithmetic is out of place, so that
`statistics_backward` is the same code under autograd, a checkpoint a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.nested.inputs import NestedInputs, NestedNeeds
from fused_losses.primitives.pairs import bounded as pairs
from fused_losses.primitives.pairs import tangents as moves
from fused_losses.primitives.pairs.blocks import (
    BLOCK_ROWS,
    ScoreBlock,
    block_columns,
    cuts,
    run,
)

LIVE_BLOCKS = 13  # how many blocks are alive at the peak, beside one a width
VECTOR_BYTES = 200  # of a row or column, a width


def workspace(p: NestedInputs, needs: NestedNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), m, size = p.x.shape, p.y.shape[0], accumulate_dtype(p.x.dtype).itemsize
    wide = min(m, block_columns(n, d, size))
    block = min(n, BLOCK_ROWS) * wide * size
    count = len(p.widths)
    # columns are widened a block at a time; their gradient has sums of their own
    columns = m if needs is not None and needs.y else wide
    sides = (n + columns) * (1 if needs is None else 3)
    return (LIVE_BLOCKS + count) * block + sides * d * size + (n + m) * count * VECTOR_BYTES


class NestedBlock:
    """A run of rows against a run of columns: their product, width by width."""

    def __init__(self, p: NestedInputs, rows: slice, cols: slice) -> None:
        dtype = accumulate_dtype(p.x.dtype)
        self.p, self.rows, self.cols = p, rows, cols
        self.x, self.y = p.x[rows].to(dtype), p.y[cols].to(dtype)
        self.scale = p.scale.to(dtype)
        # what pairs are is asked once, of rows without coordinates
        bare = p.pairs()._replace(x=p.x[:, :0], y=p.y[:, :0])
        self.pairs = ScoreBlock(bare, rows, cols)

    def sums(self) -> Iterator[Tensor]:
        """sum_d x y up to each width, in the units of its shrinks."""
        total = None
        for w, part in enumerate(self.p.parts()):
            here = self.x[:, part] @ self.y[:, part].T
            total = here if total is None else self.shrunk(total, w) + here
            yield total

    def scored(self, total: Tensor, w: int) -> ScoreBlock:
        """The scores of a width."""
        return self.pairs.of_product(self.factored(total, w))

    def shrunk(self, t: Tensor, w: int) -> Tensor:
        return self._times(t, self.p.x_shrink, self.p.y_shrink, w)

    def factored(self, t: Tensor, w: int) -> Tensor:
        return self._times(t, self.p.x_factor, self.p.y_factor, w)

    def _times(
        self, t: Tensor, of_rows: Tensor | None, of_columns: Tensor | None, w: int
    ) -> Tensor:
        if of_rows is None or of_columns is None:
            return t
        return t * of_rows[w, self.rows, None] * of_columns[w, self.cols]


# ---- statistics ---------------------------------------------------------------------------------


def statistics(p: NestedInputs, cols: bool) -> tuple[Tensor, Tensor]:
    """rows and columns of `nested.op`, [W, 4, 2, N] and [W, 4, 2, M or 0]."""
    sizes = p.x.shape[0], p.y.shape[0] if cols else 0
    sides = [[pairs.nothing(p.x, size, "lse") for size in sizes] for _ in p.widths]
    for rows, columns in cuts(p.pairs()):
        block = NestedBlock(p, rows, columns)
        for w, total in enumerate(block.sums()):
            pairs.add_block(block.scored(total, w), sides[w], "lse", cols)
    return torch.stack([s[0] for s in sides]), torch.stack([s[1] for s in sides])


# ---- gradients ----------------------------------------------------------------------------------


def _block_gradient(
    p: NestedInputs, rows: slice, cols: slice, grads: tuple, stats: tuple, both: bool
) -> tuple[Tensor, ...]:
    """The block's part of dx, dy, dscale, dx_factor [W, rows] and dy_factor [W, cols]."""
    block = NestedBlock(p, rows, cols)
    sums = list(block.sums())
    dscale = torch.zeros_like(p.scale)
    later = None  # dL/dsum of the width before it
    gx, gy, of_rows, of_columns = [], [], [], []
    parts = p.parts()
    for w in reversed(range(len(parts))):
        scored = block.scored(sums[w], w)
        g = pairs.to_scores(scored, [t[w] for t in grads], [t[w] for t in stats], "lse", both)
        dscale = dscale + (g * scored.product).sum(dtype=dscale.dtype)
        g = g * block.scale
        if p.x_factor is not None and p.y_factor is not None:
            through = g * sums[w]
            of_rows.append((through * p.y_factor[w, cols]).sum(1))
            of_columns.append((through * p.x_factor[w, rows, None]).sum(0))
            del through
        g = block.factored(g, w)
        g = g if later is None else g + later
        gx.append(g @ block.y[:, parts[w]])
        gy.append(g.T @ block.x[:, parts[w]])
        later = block.shrunk(g, w) if w else None
    found = torch.cat(gx[::-1], 1), torch.cat(gy[::-1], 1), dscale
    if not of_rows:
        return found
    return *found, torch.stack(of_rows[::-1]), torch.stack(of_columns[::-1])


def statistics_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    p: NestedInputs,
    cols: bool,
    needs: NestedNeeds,
    differentiable: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, scale and the factors, each None where it is not needed."""
    dtype = accumulate_dtype(p.x.dtype)
    dx = torch.zeros_like(p.x, dtype=dtype)
    # a bank without a gradient has no sums of one
    dy = torch.zeros_like(p.y, dtype=dtype) if needs.y else None
    dscale = torch.zeros_like(p.scale)
    dx_factor = None if p.x_factor is None else torch.zeros_like(p.x_factor)
    dy_factor = None if p.y_factor is None else torch.zeros_like(p.y_factor)
    grads, stats = (grad_rows, grad_columns), (rows, columns)
    for i, j in cuts(p.pairs()):
        found = run(differentiable, _block_gradient, p, i, j, grads, stats, cols)
        dx[i] += found[0]
        if dy is not None:
            dy[j] += found[1]
        dscale = dscale + found[2]
        if dx_factor is not None and dy_factor is not None:
            dx_factor[:, i] += found[3]
            dy_factor[:, j] += found[4]
    of_y = None if dy is None else dy.to(p.y.dtype)
    out = dx.to(p.x.dtype), of_y, dscale, dx_factor, dy_factor
    return tuple(t if need else None for t, need in zip(out, needs, strict=True))


def tangents(p: NestedInputs, cols: bool, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Tangents of rows and columns, the statistics of the dual p."""
    found = torch.zeros_like(rows), torch.zeros_like(columns)
    for i, j in cuts(p.pairs()):
        block = NestedBlock(p, i, j)
        for w, total in enumerate(block.sums()):
            into, stats = [t[w] for t in found], [rows[w], columns[w]]
            moves.add_moves(block.scored(total, w), into, stats, "lse", cols)
    return found
