"""What the Triton kernels over pairs share: scores, which pairs take part, their terms."""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import equal, products, row_offsets

# classes and statistics, as in `pair_inputs`
POSITIVE = tl.constexpr(0)

NEGATIVE = tl.constexpr(1)

VALUE = tl.constexpr(0)

TOTAL = tl.constexpr(1)

COUNT = tl.constexpr(2)

BEST = tl.constexpr(3)

# of a class in the backward: base, mean, rest, share
VECTORS = tl.constexpr(4)

# what changes from tile to tile or from batch to batch and must not compile anew; none of it stands
# in a group, whose members Triton 3.6 specialises whatever this says
VARYING = [
    "excluded",
    "total_rows",
    "total_columns",
    "first_row",
    "row_end",
    "first_column",
    "column_end",
    "row_tiles",
]


@triton.jit
def spread(vector, AXIS: tl.constexpr):
    """A vector of rows (AXIS 1) or of columns (AXIS 0) against the other dimension."""
    return tl.expand_dims(vector, AXIS)


@triton.jit
def same(x_vector, y_vector, rows, columns, block):
    """Where the integers of row and column are equal. [BM, BN]"""
    return equal(x_vector, y_vector, rows, columns, block.row_end, block.column_end)


@triton.jit
def taking_part(x, y, rows, columns, block, SKIP_SELF: tl.constexpr, TRIANGLE: tl.constexpr):
    """Which pairs are not left out, windows apart. [BM, BN]"""
    pair = (rows < block.row_end)[:, None] & (columns < block.column_end)[None, :]
    if TRIANGLE:
        pair &= rows[:, None] < columns[None, :]
    elif SKIP_SELF:
        pair &= rows[:, None] != columns[None, :]
    if x.ids is not None:
        pair &= same(x.ids, y.ids, rows, columns, block) == 0
    if x.groups is not None:
        pair &= same(x.groups, y.groups, rows, columns, block)
    return pair


@triton.jit
def scores(
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
    ROOT: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """s = psi(u) of a tile, -inf where a pair is left out."""
    if squares is not None:
        # from the block's corner, and no mask of columns: either would narrow the loads
        BM: tl.constexpr = rows.shape[0]
        BN: tl.constexpr = columns.shape[0]
        at = squares + (row_tile * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * stride_squares
        at += (tile * BN + tl.arange(0, BN))[None, :]
        u = tl.load(at, mask=(rows < block.row_end)[:, None], other=0.0)
    else:
        x_rows = row_offsets(rows, block.row_end, None, x.stride)
        y_rows = row_offsets(columns, block.column_end, None, y.stride)
        u = products(x.rows, y.rows, x_rows, y_rows, d, BK, EVEN, BF16, DOT)
    u *= tl.load(scale)
    if x.bias is not None:
        u += tl.load(x.bias + rows, mask=rows < block.row_end, other=0.0)[:, None]
    if y.bias is not None:
        u += tl.load(y.bias + columns, mask=columns < block.column_end, other=0.0)[None, :]
    if ROOT:
        # written so that a NaN stays one
        u = tl.where(u >= 0.0, 0.0, -tl.sqrt(-u))
    pair = taking_part(x, y, rows, columns, block, SKIP_SELF, TRIANGLE)
    s = tl.where(pair, u, float("-inf"))
    if exclude is not None:
        listed = exclude + rows.to(tl.int64) * excluded
        for k in range(0, excluded):
            column = tl.load(listed + k, mask=rows < block.row_end, other=-1)
            s = tl.where(column[:, None] == columns[None, :], float("-inf"), s)
    return s


@triton.jit
def root_slope(s):
    """ds/du of s = -sqrt(-u), 0 where u >= 0."""
    return tl.where(s < 0.0, -0.5 / s, 0.0)


@triton.jit
def term(s, x, y, rows, columns, block, rule, KIND: tl.constexpr, REACH: tl.constexpr):
    """z of one class, -inf for the other pairs, and dz/ds."""
    member = s != float("-inf")
    if x.labels is not None:
        member &= same(x.labels, y.labels, rows, columns, block) == (KIND == POSITIVE)
    slope = rule.factor
    if REACH:
        weight = rule.reach + tl.where(rule.factor < 0.0, -s, s)
        # an infinite reach leaves the weight out; a NaN score stays one
        slope *= tl.where(rule.reach == float("inf"), 1.0, tl.where(weight < 0.0, 0.0, weight))
        slope = tl.where(member, slope, 0.0)
    return tl.where(member, slope * (s - rule.center), float("-inf")), slope


@triton.jit
def inside(z, s, window, index, end, total, KIND: tl.constexpr, AXIS: tl.constexpr):
    """z, -inf where the score lies outside the window of one side for one class."""
    if window is not None:
        low = tl.load(window + 2 * KIND * total + index, mask=index < end, other=0.0)
        high = tl.load(window + (2 * KIND + 1) * total + index, mask=index < end, other=0.0)
        # written so that a NaN score takes part
        z = tl.where(s <= spread(low, AXIS), float("-inf"), z)
        z = tl.where(s >= spread(high, AXIS), float("-inf"), z)
    return z


@triton.jit
def below(first_row, first_column, row_tile, tile, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has no pair above the diagonal."""
    return first_column + (tile + 1) * BN - 1 <= first_row + row_tile * BM


@triton.jit
def softplus(z):
    """log(1 + exp z) to the last digits also where it is tiny."""
    t = tl.exp(-tl.abs(z))
    # log(1 + t) = 2 artanh(r); r <= 1/3: eight terms reach float32
    r = t / (2.0 + t)
    q = r * r
    series = 1.0 / 15.0
    for k in tl.static_range(7):
        series = series * q + 1.0 / (13.0 - 2.0 * k)
    return tl.where(z < 0.0, 0.0, z) + 2.0 * r * series
