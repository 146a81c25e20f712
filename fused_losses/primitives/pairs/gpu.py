"""What both GPU forms of the sweep over pairs do around their kernels, `triton` and
`cuda`: the vectors that kernels read, blocks of the matrix, and library products of G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.backends.gpu.products import accumulate, float16_scale
from fused_losses.base.numerics import row_dtype
from fused_losses.primitives.pairs.blocks import both_sides
from fused_losses.primitives.pairs.inputs import (
    BEST,
    COUNT,
    NEGATIVE,
    POSITIVE,
    TOTAL,
    VALUE,
    PairInputs,
    PairNeeds,
)

ROW_BLOCK = 16384  # rows of a stored block, at most
MAX_CHUNK = 16384  # columns; bounds the float32 sums of a chunk where N is small
WEIGHT_UNIT = 4096.0  # float16 attention weights are stored times this: float16 starts at 6e-8

# the vectors of PairInputs, by what the kernels read
FLOATS = ("x_bias", "y_bias", "x_window", "y_window")
INTEGERS = ("x_labels", "y_labels", "x_ids", "y_ids", "x_groups", "y_groups", "exclude")


class Block(NamedTuple):
    """A rectangle of the matrix."""

    first_row: int
    row_end: int
    first_column: int
    column_end: int


@dataclass(frozen=True)
class PairProblem:
    """One call as the kernels want it."""

    p: PairInputs  # y is x with triangle, and so are its vectors
    scale: Tensor  # [1] float32

    @property
    def n(self) -> int:
        return self.p.x.shape[0]

    @property
    def m(self) -> int:
        return self.p.y.shape[0]


def kernel_form(p: PairInputs) -> tuple[PairInputs, Tensor]:
    """Both sides' vectors in the types that kernels read, and the scale, [1] float32."""
    p = both_sides(p)

    def rows(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if t is None else t.to(dtype).contiguous()

    vectors = {name: rows(getattr(p, name), torch.float32) for name in FLOATS}
    vectors |= {name: rows(getattr(p, name), torch.int32) for name in INTEGERS}
    return p._replace(**vectors), p.scale.to(p.x.device, torch.float32).reshape(1)


def blocks(p: PairInputs, height: int, width: int) -> Iterator[Block]:
    """The matrix in blocks, all rows of a run of columns in a row; none below the diagonal."""
    n, m = p.x.shape[0], p.y.shape[0]
    for first in range(0, m, max(width, 1)):
        for top in range(0, n, max(height, 1)):
            block = Block(top, min(top + height, n), first, min(first + width, m))
            if not p.triangle or block.column_end - 1 > top:
                yield block


# ---- statistics ---------------------------------------------------------------------------------


def nothing_yet(size: int, new: dict) -> Tensor:
    out = torch.zeros((4, 2, size), **new)
    out[BEST] = -torch.inf
    return out


def finish(out: Tensor, reduction: str) -> None:
    mass = out[VALUE]
    # the kernels' maximum passes over a NaN, the sum does not
    out[BEST] = torch.where(out[TOTAL].isnan(), torch.nan, out[BEST])
    if reduction == "lse":
        lse = out[BEST] + torch.where(mass == 0, 1, mass).log()
        out[VALUE] = torch.where(mass == 0, -torch.inf, lse)


# ---- gradients ----------------------------------------------------------------------------------


def statistics_gain(
    p: PairInputs, grads: tuple[Tensor, Tensor], stats: tuple[Tensor, Tensor]
) -> Tensor | float:
    """What G of float16 products is multiplied with, lest it be 0.

    A class without pairs has no part in G, however steep a loss is in its sum of nothing.
    """
    if p.x.dtype != torch.float16 or not (p.x.shape[0] and p.y.shape[0]):
        return 1.0
    factor = max(abs(p.positive.factor), abs(p.negative.factor))
    sides = [(v, side) for v, side in zip(grads, stats, strict=True) if v.numel()]
    steep = [torch.where(side[COUNT] > 0, v.abs() * factor, 0) for v, side in sides]
    return float16_scale([*steep], None)


def attention_gain(p: PairInputs, grad_out: Tensor, grad_lse: Tensor) -> Tensor | float:
    if p.x.dtype != torch.float16 or not (p.x.shape[0] and p.y.shape[0]):
        return 1.0
    norm = torch.linalg.vector_norm(grad_out, dim=1)
    return float16_scale([norm * max(1.0, abs(p.negative.factor)), grad_lse.float()], None)


def vectors(grad: Tensor, stats: Tensor, reduction: str) -> tuple[Tensor, ...]:
    """What the kernel wants of a row for each class, float64: base, mean, rest, share. [2, N] each

    With e = exp(z - best), m = sum e and h = -g_total count, the gradient through value and total
    g_value e/m + g_total = (g_value - h) e/m + h (e/m - 1/count): near zero loss g_value and h all
    but cancel, here in float64. base is best and not the lse, so that a lone pair has e = 1.
    """
    g_value, g_total = grad.to(stats.dtype)
    if reduction != "lse":
        nothing = torch.zeros_like(g_value)
        return nothing, nothing, g_value, g_total
    none = stats[COUNT] == 0
    best = stats[BEST].masked_fill(none, 0)
    log_mass = stats[VALUE].masked_fill(none, 0) - best
    count = stats[COUNT].clamp_min(1)
    inverse = (-log_mass).exp()
    share = -g_total * count
    return best, log_mass.exp() / count, (g_value - share) * inverse, share * inverse


def packed(side: tuple[Tensor, ...], gain: Tensor | float) -> Tensor:
    """[2, VECTORS, N] float32, gradients times gain."""
    base, mean, rest, share = side
    return torch.stack((base, mean, rest * gain, share * gain), 1).float().contiguous()


def cut(stored_tiles: Tensor, block: Block) -> Tensor:
    return stored_tiles[: block[1] - block[0], : block[3] - block[2]]


def add(total: Tensor, a: Tensor, b: Tensor, beta: float = 1.0) -> None:
    """total = beta total + a b, summed in float32."""
    accumulate(total[None], a[None], b[None], beta)


class ColumnSums:
    """A^T b over the rows, for a run of columns at a time: no float32 copy of the whole result."""

    def __init__(self, out: Tensor, height: int, factor: Tensor | float) -> None:
        self.out, self.height, self.factor = out, height, factor
        self.sums = out.new_empty((0, out.shape[1]), dtype=torch.float32)

    def add(
        self,
        block: Block,
        a: Tensor,
        b: Tensor,
        rest: Callable[[Tensor], None] | None = None,  # adds what else belongs to the sums
    ) -> None:
        top, stop, first, end = block
        if top == 0:
            self.sums = self.sums.new_empty((end - first, self.out.shape[1]))
        add(self.sums, a.T, b[top:stop], float(top > 0))
        if rest is not None:
            rest(self.sums)
        if stop == self.height:
            with torch.no_grad():  # rounded as it is written: one launch
                torch.mul(self.sums, self.factor, out=self.out[first:end])


class RowSums:
    """The sums of rows that G = dL/du makes of x and y, whatever the scores are made of."""

    def __init__(
        self,
        p: PairInputs,
        x: Tensor,  # as the products take it
        y: Tensor,  # a block of it is rounded as G is
        scale: Tensor,  # [1] float32, of the sums
        unscale: Tensor | float,
        need_x: bool,
        need_y: bool,
    ) -> None:
        n = p.x.shape[0]
        self.p, self.scale, self.unscale = p, scale * unscale, unscale
        self.x, self.y = x, x if p.triangle else y
        self.wide: dict[str, Any] = dict(dtype=row_dtype(x.device), device=x.device)
        sums: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
        self.dx = torch.zeros((n, x.shape[1]), **sums) if need_x else None
        self.dy = None
        if need_y:
            dy = torch.empty(p.y.shape, dtype=p.y.dtype, device=x.device)
            self.dy = ColumnSums(dy if n else dy.zero_(), n, self.scale)


class PairGradients(RowSums):
    """What G = dL/du makes of x, y, scale and the biases, block by block."""

    def __init__(
        self,
        p: PairInputs,
        x: Tensor,
        y: Tensor,
        scale: Tensor,  # [1] float32
        needs: PairNeeds,
        unscale: Tensor | float,
    ) -> None:
        super().__init__(p, x, y, scale, unscale, needs.x or needs.scale, needs.y)
        self.needs = needs
        self.dx_bias = torch.zeros(p.x.shape[0], **self.wide) if needs.x_bias else None
        self.dy_bias = torch.zeros(p.y.shape[0], **self.wide) if needs.y_bias else None

    def add(self, block: Block, g: Tensor) -> None:
        top, stop, first, end = block
        triangle = self.p.triangle
        if self.dx is not None:
            add(self.dx[top:stop], g, self.y[first:end].to(g.dtype))
            if triangle:
                add(self.dx[first:end], g.T, self.x[top:stop])
        if self.dy is not None:
            self.dy.add(block, g, self.x)
        # of the rounded G, as dx is: where a bias stands for -|x|^2 the two must cancel
        if self.dx_bias is not None:
            self.dx_bias[top:stop] += g.sum(1, dtype=torch.float32)
            if triangle:
                self.dx_bias[first:end] += g.sum(0, dtype=torch.float32)
        if self.dy_bias is not None:
            self.dy_bias[first:end] += g.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor | None, ...]:
        p, needs = self.p, self.needs
        dscale = None
        if needs.scale and self.dx is not None:
            # with triangle dx holds each pair twice
            factor = self.unscale * (0.5 if p.triangle else 1.0)
            dscale = (p.x.float() * self.dx).sum(dtype=row_dtype(p.x.device)) * factor
            dscale = dscale.reshape(()).to(p.scale)
        return (
            (self.dx * self.scale).to(p.x.dtype) if needs.x and self.dx is not None else None,
            None if self.dy is None else self.dy.out,
            dscale,
            self._of_bias(self.dx_bias, p.x_bias),
            self._of_bias(self.dy_bias, p.y_bias),
        )

    def _of_bias(self, total: Tensor | None, bias: Tensor | None) -> Tensor | None:
        return None if total is None or bias is None else (total * self.unscale).to(bias.dtype)


def possible(needs: PairNeeds, p: PairInputs) -> PairNeeds:
    return needs._replace(
        x_bias=needs.x_bias and p.x_bias is not None, y_bias=needs.y_bias and p.y_bias is not None
    )


# ---- attention ----------------------------------------------------------------------------------


def attending(p: PairInputs, positives: bool) -> tuple[PairInputs, int]:
    """Only one class of pairs takes part: one rule for both."""
    if p.triangle:
        raise ValueError("pair_attention: triangle is not supported, rows attend to columns")
    rule = p.positive if positives else p.negative
    p = p._replace(positive=rule, negative=rule, y_window=None)
    return p, POSITIVE if positives else NEGATIVE


def weight_base(lse: Tensor) -> Tensor:
    """[2, N] float32: the lse and exp(that - lse), so that nothing is lost to the rounding."""
    none = lse == -torch.inf
    rounded = lse.masked_fill(none, torch.inf).float()
    rest = (rounded - lse).exp().masked_fill(none, 0)
    return torch.stack((rounded, rest.float()))


def weight_unit(p: PairInputs) -> float:
    return WEIGHT_UNIT if p.x.dtype == torch.float16 else 1.0
