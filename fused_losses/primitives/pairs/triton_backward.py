"""Triton kernels over pairs, backward: tiles of gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import narrow
from fused_losses.primitives.pairs.gpu import Block
from fused_losses.primitives.pairs.triton_terms import (
    NEGATIVE,
    POSITIVE,
    VARYING,
    VECTORS,
    below,
    inside,
    root_slope,
    scores,
    spread,
    term,
)


@triton.jit
def side_share(
    vectors,
    s,
    z,
    window,
    index,
    end,
    total,
    KIND: tl.constexpr,
    REDUCTION: tl.constexpr,
    AXIS: tl.constexpr,
):
    """dL/dz through one class's value and total of one side, 0 where a pair does not count."""
    at = vectors + KIND * VECTORS * total + index
    real = index < end
    z = inside(z, s, window, index, end, total, KIND, AXIS)
    rest = spread(tl.load(at + 2 * total, mask=real, other=0.0), AXIS)
    share = spread(tl.load(at + 3 * total, mask=real, other=0.0), AXIS)
    if REDUCTION == "lse":
        base = spread(tl.load(at, mask=real, other=0.0), AXIS)
        mean = spread(tl.load(at + total, mask=real, other=0.0), AXIS)
        e = tl.exp(z - base)
        g = rest * e + share * (e - mean)
    elif REDUCTION == "softplus":
        g = rest * tl.sigmoid(z) + share
    else:
        g = tl.where(z > 0.0, rest, 0.0) + share
    return tl.where(z == float("-inf"), 0.0, g)


@triton.jit
def store_tile(ds, g, rows, columns, block, stride_ds):
    at = ds + (rows - block.first_row).to(tl.int64)[:, None] * stride_ds
    at += (columns - block.first_column)[None, :]
    real = (rows < block.row_end)[:, None] & (columns < block.column_end)[None, :]
    tl.store(at, narrow(g, ds.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=VARYING)
def gradient_tiles(
    x,  # as in `statistics_tiles`
    y,
    scale,
    exclude,
    squares,
    stride_squares,
    row_vectors,  # [2, VECTORS, N]
    column_vectors,  # [2, VECTORS, M], or None: columns have no statistics
    ds,  # [block rows, stride_ds] G, rounded to the dtype of the products that follow
    positive,  # `Rule`
    negative,  # `Rule`
    stride_ds,
    excluded,
    total_rows,
    total_columns,
    first_row,
    row_end,
    first_column,
    column_end,
    d,
    row_tiles,
    REACH: tl.constexpr,
    ROOT: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
    REDUCTION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of G = dL/du for the library products."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    block = Block(first_row, row_end, first_column, column_end)
    rows = first_row + row_tile * BM + tl.arange(0, BM)
    columns = first_column + tile * BN + tl.arange(0, BN)
    if TRIANGLE:
        if below(first_row, first_column, row_tile, tile, BM, BN):
            store_tile(ds, tl.zeros([BM, BN], tl.float32), rows, columns, block, stride_ds)
            return
    s = scores(
        x,
        y,
        scale,
        exclude,
        squares,
        stride_squares,
        excluded,
        rows,
        columns,
        row_tile,
        tile,
        block,
        d,
        ROOT,
        SKIP_SELF,
        TRIANGLE,
        BK,
        EVEN,
        BF16,
        DOT,
    )
    FIRST: tl.constexpr = NEGATIVE if x.labels is None else POSITIVE
    total = tl.zeros([BM, BN], tl.float32)
    for KIND in tl.static_range(FIRST, 2):
        rule = positive if KIND == POSITIVE else negative
        z, slope = term(s, x, y, rows, columns, block, rule, KIND, REACH)
        g = side_share(row_vectors, s, z, x.window, rows, row_end, total_rows, KIND, REDUCTION, 1)
        if column_vectors is not None:
            g += side_share(
                column_vectors,
                s,
                z,
                y.window,
                columns,
                column_end,
                total_columns,
                KIND,
                REDUCTION,
                0,
            )
        total += g * slope
    if ROOT:
        total *= root_slope(s)
    store_tile(ds, total, rows, columns, block, stride_ds)
