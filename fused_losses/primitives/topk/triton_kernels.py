"""Triton kernels of the top-k's screen: keys m_j <x_i, y_j - c> + a_j, and the best of each row.

`best_columns` streams over a range of columns with the best in registers: whatever of a tile beats
the worst of them is moved over, one column of each row at a time, so that a tile without such a
column costs one comparison. `key_tiles` stores the keys of a block instead, for many at a time.
Every program owns what it writes: no atomics, no locks. Offsets of rows are 64-bit.

A key and its column are one int64, larger for a larger key and, of equals, for a lower column.
"""

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import (
    NOWHERE,
    bound,
    equal,
    load,
    multiply,
    operand,
    row_offsets,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite float32


@triton.jit
def tile_keys(
    x,
    y,
    center,
    offset,
    multiplier,
    x_labels,
    y_labels,
    x_ids,
    y_ids,
    exclude,
    stride_x,
    stride_y,
    excluded,
    rows,
    columns,
    n,
    end,
    d,
    MATCH: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """Keys of a tile, -inf alone where a pair is left out; a NaN counts as inf. [BM, BN]"""
    depth = tl.arange(0, BK)
    x_tile = x + row_offsets(rows, n, None, stride_x)[:, None] + depth[None, :]
    y_tile = y + row_offsets(columns, end, None, stride_y)[:, None] + depth[None, :]
    z = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        u = load(x_tile, depth[None, :], d - start, EVEN)
        v = load(y_tile, depth[None, :], d - start, EVEN)
        # y may be of a narrower type, int8 among them: exact in that of x
        if center is not None:
            c = load(center + start + depth, depth, d - start, EVEN)
            v = (v.to(tl.float32) - c[None, :]).to(x.dtype.element_ty)
        elif x.dtype.element_ty != y.dtype.element_ty:
            v = v.to(tl.float32).to(x.dtype.element_ty)
        v = tl.trans(operand(v, BF16, DOT))
        z = multiply(operand(u, BF16, DOT), v, z, DOT)
        x_tile += BK
        y_tile += BK
    if multiplier is not None:
        z *= tl.load(multiplier + columns, mask=columns < end, other=0.0)[None, :]
    z += tl.load(offset + columns, mask=columns < end, other=0.0)[None, :]
    z = tl.where(z != z, float("inf"), tl.where(z < LOWEST, LOWEST, z))
    pair = (rows < n)[:, None] & (columns < end)[None, :]
    if SKIP_SELF:
        pair &= rows[:, None] != columns[None, :]
    if MATCH == "same":
        pair &= equal(x_labels, y_labels, rows, columns, n, end)
    elif MATCH == "different":
        pair &= equal(x_labels, y_labels, rows, columns, n, end) == 0
    if x_ids is not None:
        pair &= equal(x_ids, y_ids, rows, columns, n, end) == 0
    z = tl.where(pair, z, float("-inf"))
    if exclude is not None:
        listed = exclude + rows.to(tl.int64) * excluded
        for k in range(0, excluded):
            column = tl.load(listed + k, mask=rows < n, other=-1)
            z = tl.where(column[:, None] == columns[None, :], float("-inf"), z)
    return z


@triton.jit
def packed(key, column):
    """One int64 that orders keys, then columns."""
    # -0 is 0; a negative float's bits run the other way
    bits = tl.where(key == 0.0, 0.0, key).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - column.to(tl.int64))


@triton.jit(do_not_specialize=["excluded", "n", "m", "span", "splits", "row_tiles", "keep"])
def best_columns(
    x,  # [N, D]
    y,  # [M, D]
    center,  # [D] float32, or None
    offset,  # [M] float32
    multiplier,  # [M] float32, or None; so are all that follow
    x_labels,  # [N] int32
    y_labels,  # [M]
    x_ids,  # [N] int32
    y_ids,  # [M]
    exclude,  # [N, excluded] int32
    to,  # [N, splits, keep] int64, in no order
    stride_x,
    stride_y,
    excluded,
    n,
    m,
    d,
    span,
    splits,
    row_tiles,
    keep,
    MATCH: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    K: tl.constexpr,  # a power of two, `keep` or more
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The `keep` best of `span` columns, for BM rows."""
    # the row tile runs fastest, so that all row tiles of a range of columns find it in L2
    rows = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    split = tl.program_id(0) // row_tiles
    begin = split * span
    end = tl.minimum(begin + span, m)
    slot = tl.arange(0, K)
    column = tl.arange(0, BN)
    # slots past `keep` are never the worst; empty ones are, each told apart by its column
    best = tl.full([BM, K], float("-inf"), tl.float32)
    best = tl.where((slot < keep)[None, :], best, float("inf"))
    at = tl.full([BM, K], NOWHERE, tl.int32) - slot[None, :]
    low = tl.full([BM], float("-inf"), tl.float32)
    worst = tl.full([BM], NOWHERE, tl.int32)
    for start in range(bound(begin, DOT == "interpret"), bound(end, DOT == "interpret"), BN):
        z = tile_keys(
            x,
            y,
            center,
            offset,
            multiplier,
            x_labels,
            y_labels,
            x_ids,
            y_ids,
            exclude,
            stride_x,
            stride_y,
            excluded,
            rows,
            start + column,
            n,
            end,
            d,
            MATCH,
            SKIP_SELF,
            BM,
            BN,
            BK,
            EVEN,
            BF16,
            DOT,
        )
        # the first of equals; one no better than the worst comes later than it, and stays out
        high, place = tl.max(z, 1, return_indices=True)
        more = high > low
        while tl.max(more.to(tl.int32), 0) > 0:
            z = tl.where(more[:, None] & (column[None, :] == place[:, None]), float("-inf"), z)
            out = more[:, None] & (at == worst[:, None])
            best = tl.where(out, high[:, None], best)
            at = tl.where(out, (start + place)[:, None], at)
            low = tl.min(best, 1)
            worst = tl.max(tl.where(best == low[:, None], at, -1), 1)
            high, place = tl.max(z, 1, return_indices=True)
            more = high > low
    where = to + (rows.to(tl.int64)[:, None] * splits + split) * keep + slot[None, :]
    tl.store(where, packed(best, at), mask=(rows < n)[:, None] & (slot < keep)[None, :])


@triton.jit(do_not_specialize=["excluded", "m", "first_row", "row_end", "first", "row_tiles"])
def key_tiles(
    x,  # as in `best_columns`, up to exclude
    y,
    center,
    offset,
    multiplier,
    x_labels,
    y_labels,
    x_ids,
    y_ids,
    exclude,
    to,  # [block rows, stride_to] int64
    stride_x,
    stride_y,
    stride_to,
    excluded,
    first_row,
    row_end,
    first,
    m,
    d,
    row_tiles,
    MATCH: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The keys of one tile of a block."""
    local = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    along = (tl.program_id(0) // row_tiles) * BN + tl.arange(0, BN)
    rows = first_row + local
    columns = first + along
    z = tile_keys(
        x,
        y,
        center,
        offset,
        multiplier,
        x_labels,
        y_labels,
        x_ids,
        y_ids,
        exclude,
        stride_x,
        stride_y,
        excluded,
        rows,
        columns,
        row_end,
        m,
        d,
        MATCH,
        SKIP_SELF,
        BM,
        BN,
        BK,
        EVEN,
        BF16,
        DOT,
    )
    at = to + local.to(tl.int64)[:, None] * stride_to + along[None, :]
    real = (rows < row_end)[:, None] & (columns < m)[None, :]
    tl.store(at, packed(z, columns[None, :]), mask=real)
