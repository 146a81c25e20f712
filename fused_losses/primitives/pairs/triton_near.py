"""Triton kernels over pairs apart, backward: what of G goes into products, and sums of near pairs.

The squared distances are those of `distances`, made from differences where pairs are near.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import load, narrow, row_offsets


@triton.jit
def is_near(square, both, share):
    # written so that a NaN counts as near
    return (square >= share * both) == 0


@triton.jit(do_not_specialize=["n", "m", "row_tiles", "share"])
def split_tiles(
    g,  # [n, stride_g] G
    squares,  # [n, stride_squares] |x - y|^2
    x_norms,  # [n] |x|^2
    y_norms,  # [m]
    far,  # [n, stride_far] G as products take it, 0 for near pairs
    row_sums,  # [column tiles, n] of `far`
    column_sums,  # [row tiles, m]
    moments,  # [column tiles, n] sum of G |x - y|^2 over all pairs
    near_rows,  # [column tiles, n] int8: whether a near pair of the row has a G in the tile
    near_columns,  # [row tiles, m] int8
    share,
    stride_g,
    stride_squares,
    stride_far,
    n,
    m,
    row_tiles,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of G without its near pairs; what stands past the columns' end is read, not used."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    real = rows < n
    real_columns = columns < m
    # a mask of rows alone: one of columns would narrow the loads
    at = g + rows.to(tl.int64)[:, None] * stride_g + columns[None, :]
    gradient = tl.load(at, mask=real[:, None], other=0.0)
    at = squares + rows.to(tl.int64)[:, None] * stride_squares + columns[None, :]
    square = tl.load(at, mask=real[:, None], other=0.0)
    a = tl.load(x_norms + rows, mask=real, other=0.0)
    b = tl.load(y_norms + columns, mask=real_columns, other=0.0)
    # a pair with G = 0 needs no difference, and its square may be NaN
    counts = real[:, None] & real_columns[None, :] & (gradient != 0.0)
    close = is_near(square, a[:, None] + b[None, :], share) & counts
    moment = tl.sum(tl.where(counts, gradient * square, 0.0), 1)
    kept = narrow(tl.where(counts & (close == 0), gradient, 0.0), far.dtype.element_ty)
    at = far + rows.to(tl.int64)[:, None] * stride_far + columns[None, :]
    tl.store(at, kept, mask=real[:, None] & real_columns[None, :])
    # of what is multiplied
    kept = kept.to(tl.float32)
    marks = close.to(tl.int32)
    of_row = tile.to(tl.int64) * n + rows
    tl.store(moments + of_row, moment, mask=real)
    tl.store(row_sums + of_row, tl.sum(kept, 1), mask=real)
    tl.store(near_rows + of_row, tl.max(marks, 1).to(tl.int8), mask=real)
    of_column = row_tile.to(tl.int64) * m + columns
    tl.store(column_sums + of_column, tl.sum(kept, 0), mask=real_columns)
    tl.store(near_columns + of_column, tl.max(marks, 0).to(tl.int8), mask=real_columns)


@triton.jit(do_not_specialize=["n", "m", "depth_tiles", "share"])
def near_sums(
    own,  # [n, D]: the rows whose gradient this is
    other,  # [m, D]
    own_norms,  # [n] |row|^2
    other_norms,  # [m]
    g,  # [n, m] or its transpose: float32, by its two strides
    squares,
    near,  # [tiles of other, n] int8 of `split_tiles`
    to,  # [n, D] float32
    share,
    stride_own,
    stride_other,
    g_own,
    g_other,
    squares_own,
    squares_other,
    n,
    m,
    d,
    depth_tiles,
    BM: tl.constexpr,
    BN: tl.constexpr,  # of other in a tile of `split_tiles`
    BK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Adds sum_j G_ij (other_j - own_i) over the near pairs of a tile of own, from differences."""
    depth = (tl.program_id(0) % depth_tiles) * BK + tl.arange(0, BK)
    rows = (tl.program_id(0) // depth_tiles) * BM + tl.arange(0, BM)
    real = rows < n
    inside = real[:, None] & (depth < d)[None, :]
    most = tl.zeros([BM], tl.int32)
    for start in range(0, m, BN):
        marks = tl.load(near + (start // BN) * n + rows, mask=real, other=0)
        most = tl.maximum(most, marks.to(tl.int32))
    if tl.max(most, 0) == 0:
        return
    a = tl.load(own_norms + rows, mask=real, other=0.0)
    own_rows = row_offsets(rows, n, None, stride_own)
    u = load(own + own_rows[:, None] + depth[None, :], depth[None, :], d, EVEN).to(tl.float32)
    total = tl.zeros([BM, BK], tl.float32)
    for start in range(0, m, BN):
        marks = tl.load(near + (start // BN) * n + rows, mask=real, other=0)
        if tl.max(marks.to(tl.int32), 0) > 0:
            for k in range(0, BN):
                j = start + k
                there = real & (j < m)
                at = g + row_offsets(rows, n, None, g_own) + row_offsets(j, m, None, g_other)
                gradient = tl.load(at, mask=there, other=0.0)
                at = squares + row_offsets(rows, n, None, squares_own)
                at += row_offsets(j, m, None, squares_other)
                square = tl.load(at, mask=there, other=0.0)
                b = tl.load(other_norms + tl.minimum(j, m - 1))
                close = is_near(square, a + b, share)
                at_v = other + row_offsets(j, m, None, stride_other) + depth
                v = load(at_v, depth, d, EVEN).to(tl.float32)
                total += tl.where(close, gradient, 0.0)[:, None] * (v[None, :] - u)
    at = to + rows.to(tl.int64)[:, None] * d + depth[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
