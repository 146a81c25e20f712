"""The sweep over pairs on Triton, as `fused_losses.pairs` defines it.

Forward: partial statistics of every tile (at most PARTIAL_BYTES at a time), merged in float64.
Backward: a chunk of G at a time, and library products of it. Memory beyond the outputs: those two,
float32 sums of N x D and of a chunk's columns; never N x M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import triton_launch as base
from fused_losses.backends.bounded_pairs import both_sides
from fused_losses.backends.triton import accumulate, float16_scale, library_tf32
from fused_losses.backends.triton_launch import Problem, ceil_div
from fused_losses.backends.triton_pair_tiles import PAIR_TABLES
from fused_losses.backends.triton_tiles import Tile
from fused_losses.inputs import Inputs
from fused_losses.pair_inputs import (
    BEST,
    COUNT,
    NEGATIVE,
    POSITIVE,
    TOTAL,
    VALUE,
    PairInputs,
    PairNeeds,
)
from fused_losses.rows import row_dtype

PARTIAL_BYTES = 64 << 20
SWEEP_ROWS = 8192  # rows of a forward block: 8 MiB at D = 512 in 16 bits stay in L2
ROW_BLOCK = 4096  # rows of G stored at a time: 4096 x 512 is 128 tiles of 128 x 128, a full H100
MAX_CHUNK = 16384  # columns; bounds the float32 sums of a chunk where N is small
WEIGHT_UNIT = 4096.0  # float16 attention weights are stored times this: float16 starts at 6e-8

# the vectors of PairInputs, by what the kernels read
FLOATS = ("x_bias", "y_bias", "x_window", "y_window")
INTEGERS = ("x_labels", "y_labels", "x_ids", "y_ids", "x_groups", "y_groups", "exclude")

Block = tuple[int, int, int, int]  # first row, end row, first column, end column


def kernels() -> ModuleType:
    from fused_losses.backends import triton_pair_kernels

    return triton_pair_kernels


def extra_bytes(n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32") -> int:
    """Peak memory of forward and backward beyond inputs and gradients, at most."""
    # of G, of attention weights, and float32 sums of a chunk's columns for y and for the values
    chunk = 2 * max(t.ds_bytes for t in PAIR_TABLES.values()) + 2 * MAX_CHUNK * d * 4
    return max(PARTIAL_BYTES, chunk) + 3 * (n + m) * d * 4 + 200 * (n + m)


@dataclass(frozen=True)
class Sweep:
    """One call as the kernels want it."""

    p: PairInputs  # y is x with triangle, and so are its vectors
    operands: Problem  # x and y (as its weight), tiles, products
    scale: Tensor  # [1] float32

    @property
    def n(self) -> int:
        return self.p.x.shape[0]

    @property
    def m(self) -> int:
        return self.p.y.shape[0]

    def tile(self, kernel: str, two_sides: bool = False, more: bool = False) -> Tile:
        """A tile of the table; the narrower of two where a pair has more to hold."""
        p = self.p
        masks = p.x_ids, p.x_groups, p.exclude, p.x_window, p.y_window
        more = more or p.score == "root" or self.reach or any(t is not None for t in masks)
        return self.operands.tile(f"{kernel}_two" if two_sides else kernel, more)

    @property
    def reach(self) -> bool:
        return min(self.p.positive.reach, self.p.negative.reach) < float("inf")

    def launch(
        self,
        kernel: Any,
        tile: Tile,
        block: Block,
        after: tuple,
        strides: tuple = (),
        widths: tuple = (),
        **constants: Any,
    ) -> None:
        """One program a tile of the block."""
        p, o = self.p, self.operands
        first_row, row_end, first_column, column_end = block
        row_tiles = ceil_div(row_end - first_row, tile.rows)
        excluded = 0 if p.exclude is None else p.exclude.shape[1]
        base.launch(
            kernel,
            row_tiles * ceil_div(column_end - first_column, tile.columns),
            (o.x, o.weight, self.scale, p.x_bias, p.y_bias, p.x_labels, p.y_labels)
            + (p.x_ids, p.y_ids, p.x_groups, p.y_groups, p.exclude, p.x_window, p.y_window)
            + (*after, *map(float, p.positive), *map(float, p.negative))
            + (o.x.stride(0), o.weight.stride(0), *strides)
            + (excluded, self.n, self.m, *block, o.d, *widths, row_tiles),
            dict(
                REACH=self.reach,
                ROOT=p.score == "root",
                SKIP_SELF=p.skip_self,
                TRIANGLE=p.triangle,
                BM=tile.rows,
                BN=tile.columns,
                BK=tile.depth,
                EVEN=o.even(tile.depth),
                BF16=o.bf16,
                DOT=o.dot,
            )
            | constants,
            tile,
        )


def sweep(p: PairInputs, gradient: bool) -> Sweep:
    p = both_sides(p)
    nothing = p.x.new_empty(0, dtype=torch.int32)
    # the operands of a row_statistics without bias, normalisation or classes
    inputs = Inputs(p.x, p.y, nothing, None, None, None, False, False, p.precision)
    operands = base.problem(inputs, gradient)
    operands = replace(operands, table=PAIR_TABLES[base.architecture(p.x.device)])

    def rows(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if t is None else t.to(dtype).contiguous()

    vectors = {name: rows(getattr(p, name), torch.float32) for name in FLOATS}
    vectors |= {name: rows(getattr(p, name), torch.int32) for name in INTEGERS}
    p = p._replace(**vectors)
    return Sweep(p, operands, p.scale.to(p.x.device, torch.float32).reshape(1))


def blocks(s: Sweep, height: int, width: int) -> Iterator[Block]:
    """The matrix in blocks, all rows of a run of columns in a row; none below the diagonal."""
    for first in range(0, s.m, max(width, 1)):
        for top in range(0, s.n, max(height, 1)):
            block = top, min(top + height, s.n), first, min(first + width, s.m)
            if not s.p.triangle or block[3] - 1 > top:
                yield block


# ---- statistics ---------------------------------------------------------------------------------


def statistics(p: PairInputs, reduction: str, cols: bool) -> tuple[Tensor, Tensor]:
    """rows and columns of `fused_losses.pairs`, [4, 2, N] and [4, 2, M or 0]."""
    s = sweep(p, gradient=False)
    new = dict(dtype=row_dtype(p.x.device), device=p.x.device)
    rows = _nothing(s.n, new)
    columns = rows if p.triangle else _nothing(s.m if cols else 0, new)
    both = p.triangle or cols
    tile = s.tile("statistics", both)
    classes = 1 if s.p.x_labels is None else 2
    height = min(s.n, ceil_div(SWEEP_ROWS, tile.rows) * tile.rows)
    # four float32 statistics a class for each row of a column tile, and the same the other way
    tile_bytes = (
        16 * classes * (height + (ceil_div(height, tile.rows) * tile.columns if both else 0))
    )
    width = max(1, PARTIAL_BYTES // max(tile_bytes, 1)) * tile.columns
    for block in blocks(s, height, width):
        first_row, row_end, first, end = block
        high, wide = row_end - first_row, end - first
        down, across = ceil_div(high, tile.rows), ceil_div(wide, tile.columns)
        values = dict(dtype=torch.float32, device=p.x.device)
        row_part = torch.empty((4, classes, across, high), **values)
        column_part = torch.empty((4, classes, down, wide), **values) if both else None
        s.launch(
            kernels().statistics_tiles, tile, block, (row_part, column_part), REDUCTION=reduction
        )
        _merge(s, row_part, rows, (first_row, first), (tile.rows, tile.columns), reduction, False)
        if both:
            firsts, sizes = (first, first_row), (tile.columns, tile.rows)
            _merge(s, column_part, columns, firsts, sizes, reduction, True)
    for out in (rows,) if p.triangle else (rows, columns):
        _finish(out, reduction)
    return rows, rows[..., :0].contiguous() if p.triangle else columns


def _nothing(size: int, new: dict) -> Tensor:
    out = torch.zeros((4, 2, size), **new)
    out[BEST] = -torch.inf
    return out


def _merge(
    s: Sweep,
    part: Tensor,  # [4, classes, groups, length]
    out: Tensor,  # [4, 2, N or M]
    firsts: tuple[int, int],
    sizes: tuple[int, int],
    reduction: str,
    columns: bool,
) -> None:
    """Adds a block's partials to the statistics of its rows (or columns)."""
    tile = Tile(16, 16, 0, 4, 2)
    _, classes, groups, length = part.shape
    programs = ceil_div(length, tile.rows)
    base.launch(
        kernels().merge_tiles,
        programs * classes,
        (part, out, out.shape[-1], firsts[0], length, firsts[1], groups, programs),
        dict(
            CLASSES=classes,
            COLUMNS=columns,
            TRIANGLE=s.p.triangle,
            LSE=reduction == "lse",
            OWN=sizes[0],
            OTHER=sizes[1],
            BM=tile.rows,
            BT=tile.columns,
        ),
        tile,
    )


def _finish(out: Tensor, reduction: str) -> None:
    mass = out[VALUE]
    # the kernels' maximum passes over a NaN, the sum does not
    out[BEST] = torch.where(out[TOTAL].isnan(), torch.nan, out[BEST])
    if reduction == "lse":
        lse = out[BEST] + torch.where(mass == 0, 1, mass).log()
        out[VALUE] = torch.where(mass == 0, -torch.inf, lse)


# ---- gradients ----------------------------------------------------------------------------------


def stored(s: Sweep, tile: Tile, count: int) -> Iterator[tuple[Block, list[Tensor]]]:
    """Blocks whose tiles are stored for library products, and where to store them."""
    low, height = s.operands.low, min(s.n, ROW_BLOCK)
    width = s.operands.table.ds_bytes // (max(height, 1) * low.itemsize * tile.columns)
    width = min(max(width, 1), max(1, MAX_CHUNK // tile.columns), ceil_div(s.m, tile.columns))
    width *= tile.columns
    buffers = torch.empty((count, height, width), dtype=low, device=s.p.x.device)
    for block in blocks(s, height, width):
        yield block, list(buffers)


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

    def add(self, block: Block, a: Tensor, b: Tensor) -> None:
        top, stop, first, end = block
        if top == 0:
            self.sums = self.sums.new_empty((end - first, self.out.shape[1]))
        add(self.sums, a.T, b[top:stop], float(top > 0))
        if stop == self.height:
            self.out[first:end] = self.sums * self.factor


class Gradients:
    """What G = dL/du makes of x, y, scale and the biases, block by block."""

    def __init__(self, s: Sweep, needs: PairNeeds, unscale: Tensor | float) -> None:
        p, x = s.p, s.operands.x
        self.s, self.needs, self.unscale = s, needs, unscale
        sums, wide = (dict(dtype=t, device=x.device) for t in (torch.float32, row_dtype(x.device)))
        self.scale = s.scale * unscale
        self.x = x.to(s.operands.low)
        self.dx = torch.zeros((s.n, x.shape[1]), **sums) if needs.x or needs.scale else None
        self.dy = None
        if needs.y:
            dy = torch.empty(p.y.shape, dtype=p.y.dtype, device=x.device)
            self.dy = ColumnSums(dy if s.n else dy.zero_(), s.n, self.scale)
        self.dx_bias = torch.zeros(s.n, **wide) if needs.x_bias else None
        self.dy_bias = torch.zeros(s.m, **wide) if needs.y_bias else None

    def add(self, block: Block, g: Tensor) -> None:
        top, stop, first, end = block
        triangle = self.s.p.triangle
        if self.dx is not None:
            y = self.x if triangle else self.s.operands.weight
            add(self.dx[top:stop], g, y[first:end].to(g.dtype))
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
        p, needs = self.s.p, self.needs
        dscale = None
        if needs.scale:
            # with triangle dx holds each pair twice
            factor = self.unscale * (0.5 if p.triangle else 1.0)
            dscale = (p.x.float() * self.dx).sum(dtype=row_dtype(p.x.device)) * factor
            dscale = dscale.reshape(()).to(p.scale)
        return (
            (self.dx * self.scale).to(p.x.dtype) if needs.x else None,
            self.dy.out if needs.y else None,
            dscale,
            (self.dx_bias * self.unscale).to(p.x_bias.dtype) if needs.x_bias else None,
            (self.dy_bias * self.unscale).to(p.y_bias.dtype) if needs.y_bias else None,
        )


def possible(needs: PairNeeds, p: PairInputs) -> PairNeeds:
    return needs._replace(
        x_bias=needs.x_bias and p.x_bias is not None, y_bias=needs.y_bias and p.y_bias is not None
    )


def statistics_backward(
    grad_rows: Tensor,  # [2, 2, N]: of value and total
    grad_columns: Tensor,
    rows: Tensor,  # [4, 2, N]
    columns: Tensor,
    p: PairInputs,
    reduction: str,
    cols: bool,
    needs: PairNeeds,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, scale, x_bias and y_bias, each None where it is not needed."""
    s, both = sweep(p, gradient=True), p.triangle or cols
    sides = [_vectors(grad_rows, rows, reduction)]
    if both:
        sides += sides if p.triangle else [_vectors(grad_columns, columns, reduction)]
    gain: Tensor | float = 1.0
    if p.x.dtype == torch.float16 and s.n and s.m:
        factor = max(abs(p.positive.factor), abs(p.negative.factor))
        gain = float16_scale(
            [v.abs() * factor for v in (grad_rows, grad_columns) if v.numel()], None
        )
    packed = [_packed(side, gain) for side in sides]
    tile = s.tile("gradient", both)
    gradients = Gradients(s, possible(needs, p), 1 / gain)
    with library_tf32(p.precision == "tf32" and p.x.is_cuda):
        for block, (ds,) in stored(s, tile, 1):
            s.launch(
                kernels().gradient_tiles,
                tile,
                block,
                (packed[0], packed[1] if both else None, ds),
                strides=(ds.stride(0),),
                REDUCTION=reduction,
            )
            gradients.add(block, cut(ds, block))
    return gradients.results()


def _vectors(grad: Tensor, stats: Tensor, reduction: str) -> tuple[Tensor, ...]:
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


def _packed(side: tuple[Tensor, ...], gain: Tensor | float) -> Tensor:
    """[2, VECTORS, N] float32, gradients times gain."""
    base, mean, rest, share = side
    return torch.stack((base, mean, rest * gain, share * gain), 1).float().contiguous()


# ---- attention ----------------------------------------------------------------------------------


def _attending(p: PairInputs, positives: bool) -> tuple[PairInputs, int]:
    """Only one class of pairs takes part: one rule for both."""
    if p.triangle:
        raise ValueError("pair_attention: triangle is not supported, rows attend to columns")
    rule = p.positive if positives else p.negative
    p = p._replace(positive=rule, negative=rule, y_window=None)
    return p, POSITIVE if positives else NEGATIVE


def _base(lse: Tensor) -> Tensor:
    """[2, N] float32: the lse and exp(that - lse), so that nothing is lost to the rounding."""
    none = lse == -torch.inf
    rounded = lse.masked_fill(none, torch.inf).float()
    rest = (rounded - lse).exp().masked_fill(none, 0)
    return torch.stack((rounded, rest.float()))


def attention(values: Tensor, p: PairInputs, positives: bool) -> tuple[Tensor, Tensor]:
    """out [N, Dv] and lse [N] of `fused_losses.pairs.pair_attention`."""
    p, kind = _attending(p, positives)
    lse = statistics(p, "lse", cols=False)[0][VALUE, kind].contiguous()
    s = sweep(p, gradient=False)
    # a rounded forward would be no float32 accuracy: mixed rounds in the backward alone
    if p.precision == "mixed":
        s = replace(s, operands=replace(s.operands, low=p.x.dtype))
    out = torch.zeros((s.n, values.shape[1]), dtype=torch.float32, device=p.x.device)
    tile, base_rows, unit = s.tile("attention"), _base(lse), _unit(p)
    with library_tf32(p.precision == "tf32" and p.x.is_cuda):
        for block, (weights,) in stored(s, tile, 1):
            _attend(s, tile, block, kind, base_rows, weights, None, None, None, None, unit)
            top, stop, first, end = block
            add(out[top:stop], cut(weights, block), values[first:end].to(weights.dtype))
    return out / unit, lse


def _unit(p: PairInputs) -> float:
    return WEIGHT_UNIT if p.x.dtype == torch.float16 else 1.0


def _attend(
    s: Sweep,
    tile: Tile,
    block: Block,
    kind: int,
    base_rows: Tensor,
    weights: Tensor | None,
    grad_out: Tensor | None,
    values: Tensor | None,
    shift: Tensor | None,
    ds: Tensor | None,
    unit: float,
) -> None:
    width = 0 if values is None else values.shape[1]
    stride = next(t.stride(0) for t in (weights, ds) if t is not None)
    strides = [0 if t is None else t.stride(0) for t in (grad_out, values)]
    s.launch(
        kernels().attention_tiles,
        tile,
        block,
        (base_rows, weights, grad_out, values, shift, ds, unit),
        strides=(*strides, stride),
        widths=(width,),
        KIND=kind,
        EVEN_WIDTH=width % tile.depth == 0,
    )


def attention_backward(
    grad_out: Tensor,  # [N, Dv]
    grad_lse: Tensor,  # [N]
    out: Tensor,
    lse: Tensor,
    values: Tensor,
    p: PairInputs,
    positives: bool,
    need_values: bool,
    needs: PairNeeds,
) -> tuple[Tensor | None, ...]:
    """Gradients of values, x, y, scale, x_bias and y_bias, each None where not needed."""
    p, kind = _attending(p, positives)
    s = sweep(p, gradient=True)
    low, unit, gain = s.operands.low, _unit(p), 1.0
    if p.x.dtype == torch.float16 and s.n and s.m:
        norm = torch.linalg.vector_norm(grad_out, dim=1)
        gain = float16_scale([norm * max(1.0, abs(p.negative.factor)), grad_lse.float()], None)
    # rounded as the products round it, so that G sums to zero over a row
    rounded = (grad_out * gain).to(low if s.operands.bf16 else values.dtype)
    shift = grad_lse * gain - (rounded.float() * out).sum(1)
    shift, base_rows = shift.float(), _base(lse)
    values = values if values.stride(-1) == 1 else values.contiguous()
    grad_rows = rounded.to(values.dtype).contiguous()
    grad_low = rounded.to(low)
    dvalues = None
    if need_values:
        dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        dvalues = ColumnSums(dvalues if s.n else dvalues.zero_(), s.n, 1 / (gain * unit))
    want = any(needs)
    uneven = values.shape[1] % 64 > 0 or values.stride(0) % 16 > 0
    tile = s.tile("attention_gradient" if want else "attention", more=want and uneven)
    gradients = Gradients(s, possible(needs, p), 1 / gain)
    with library_tf32(p.precision == "tf32" and p.x.is_cuda):
        for block, buffers in stored(s, tile, int(need_values) + int(want)):
            weights = buffers[0] if need_values else None
            ds = buffers[-1] if want else None
            _attend(s, tile, block, kind, base_rows, weights, grad_rows, values, shift, ds, unit)
            if dvalues is not None:
                dvalues.add(block, cut(weights, block), grad_low)
            if want:
                gradients.add(block, cut(ds, block))
    return (None if dvalues is None else dvalues.out, *gradients.results())
