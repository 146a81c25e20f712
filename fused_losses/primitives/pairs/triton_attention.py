"""Triton kernels over pairs: attention."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import products, row_offsets
from fused_losses.primitives.pairs.gpu import Block
from fused_losses.primitives.pairs.triton_backward import store_tile
from fused_losses.primitives.pairs.triton_terms import (
    POSITIVE,
    VARYING,
    inside,
    root_slope,
    scores,
    term,
)


@triton.jit(do_not_specialize=[*VARYING, "unit"])
def attention_tiles(
    x,  # as in `statistics_tiles`
    y,  # without a window: the rows' softmax asks nothing of the columns
    scale,
    exclude,
    squares,
    stride_squares,
    base,  # [2, N] lse in float32, and exp(that - lse) for what the rounding lost
    weights,  # [block rows, stride_ds] unit softmax(z), rounded; or None
    grad_out,  # [N, Dv] of the dtype of values, or None: no gradient
    values,  # [M, Dv], or None
    shift,  # [N] grad_lse - <grad_out, out>, or None
    ds,  # [block rows, stride_ds] G, rounded; or None
    unit,
    positive,  # `Rule`
    negative,  # `Rule`
    stride_grad_out,
    stride_values,
    stride_ds,
    excluded,
    total_rows,
    total_columns,
    first_row,
    row_end,
    first_column,
    column_end,
    d,
    width,
    row_tiles,
    REACH: tl.constexpr,
    ROOT: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
    KIND: tl.constexpr,  # the class of the pairs that are attended to
    EVEN_WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of the attention's weights and of its G, for the library products."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    block = Block(first_row, row_end, first_column, column_end)
    rows = first_row + row_tile * BM + tl.arange(0, BM)
    columns = first_column + tile * BN + tl.arange(0, BN)
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
    rule = positive if KIND == POSITIVE else negative
    z, slope = term(s, x, y, rows, columns, block, rule, KIND, REACH)
    z = inside(z, s, x.window, rows, row_end, total_rows, KIND, 1)
    real = rows < row_end
    lse = tl.load(base + rows, mask=real, other=0.0)
    rest = tl.load(base + total_rows + rows, mask=real, other=0.0)
    p = tl.exp(z - lse[:, None]) * rest[:, None]
    if weights is not None:
        store_tile(weights, p * unit, rows, columns, block, stride_ds)
    if ds is not None:
        p *= slope
        if ROOT:
            p *= root_slope(s)
        from_rows = row_offsets(rows, row_end, None, stride_grad_out)
        from_columns = row_offsets(columns, column_end, None, stride_values)
        g = products(grad_out, values, from_rows, from_columns, width, BK, EVEN_WIDTH, BF16, DOT)
        g += tl.load(shift + rows, mask=real, other=0.0)[:, None]
        g *= p
        store_tile(ds, g, rows, columns, block, stride_ds)
