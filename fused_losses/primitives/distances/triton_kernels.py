"""Triton kernels of `distance_matrix`: distances made of products, and their two gradients.

    dot: <x_i, y_j>    sqeuclidean: a_i + b_j - 2 <x_i, y_j>    euclidean: its root
    dx_i = sum_j G_ij (x_i - y_j), dy_j = sum_i G_ij (y_j - x_i)
    G = grad (dot: and no x_i - in the sums), 2 grad, or grad / out

A pair that is near, measured by its norms a and b, has lost digits in a product: a second kernel
computes it from differences, where there is one. Every program owns what it writes: no atomics, no
locks, a fixed order of sums. Offsets of rows are 64-bit.
"""

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import (
    NOWHERE,
    bound,
    load,
    multiply,
    operand,
    products,
    rounded,
    row_offsets,
)


@triton.jit(do_not_specialize=["n"])
def row_squares(
    x,  # [N, D]
    squares,  # [N] float32
    stride_x,
    n,
    d,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
):
    """|x_i|^2 of the operands as products see them."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    x_rows = row_offsets(rows, n, None, stride_x)
    depth = tl.arange(0, BK)
    total = tl.zeros([BM, BK], tl.float32)
    for start in range(0, d, BK):
        at = x + x_rows[:, None] + (start + depth)[None, :]
        a = rounded(load(at, depth[None, :], d - start, EVEN), BF16)
        total += a * a
    tl.store(squares + rows, tl.sum(total, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "row_tiles"])
def distance_tiles(
    x,  # [N, D]
    y,  # [M, D]
    x_squares,  # [N] float32 |x_i|^2, or None: products alone
    y_squares,  # [M]
    out,  # [N, M] float32; -1 where the pair is near
    near_rows,  # [tiles, BM] int8: whether a pair of the tile's row is
    stride_x,
    stride_y,
    n,
    m,
    d,
    row_tiles,
    ROOT: tl.constexpr,
    SHARE: tl.constexpr,  # d^2 / (a + b) below which a pair is near
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of the distances."""
    # the row tile runs fastest, so that all row tiles of a column tile find it in L2
    rows = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    columns = (tl.program_id(0) // row_tiles) * BN + tl.arange(0, BN)
    x_rows = row_offsets(rows, n, None, stride_x)
    y_rows = row_offsets(columns, m, None, stride_y)
    z = products(x, y, x_rows, y_rows, d, BK, EVEN, BF16, DOT)
    if x_squares is not None:
        # rows past the end are the last one again, here too: not near where no pair is
        a = tl.load(x_squares + tl.minimum(rows, n - 1))
        b = tl.load(y_squares + tl.minimum(columns, m - 1))
        both = a[:, None] + b[None, :]
        z = both - 2.0 * z
        # a NaN counts as near
        close = (z >= SHARE * both) == 0
        if ROOT:
            z = tl.sqrt_rn(z)
        z = tl.where(close, -1.0, z)
        # by rows: one number of a tile is a reduction that Triton 3.6 cannot lower for sm_100
        marks = near_rows + tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        tl.store(marks, (tl.min(z, 1) < 0.0).to(tl.int8))
    at = out + rows.to(tl.int64)[:, None] * m + columns[None, :]
    tl.store(at, z, mask=(rows < n)[:, None] & (columns < m)[None, :])


@triton.jit(do_not_specialize=["n", "row_tiles"])
def near_distances(
    x,  # [N, D]
    y,  # [M, D]
    out,  # [N, M] float32
    near_rows,  # [tiles, DOWN BM] int8
    stride_x,
    stride_y,
    n,
    m,
    d,
    row_tiles,
    DOWN: tl.constexpr,  # pieces of a tile
    ACROSS: tl.constexpr,
    ROOT: tl.constexpr,
    BM: tl.constexpr,  # of a piece
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The distances of a piece of a tile that are still -1, from differences."""
    tile = tl.program_id(0) // (DOWN * ACROSS)
    piece = tl.program_id(0) % (DOWN * ACROSS)
    marks = near_rows + (tile.to(tl.int64) * DOWN + piece % DOWN) * BM + tl.arange(0, BM)
    if tl.max(tl.load(marks), 0) == 0:
        return
    rows = ((tile % row_tiles) * DOWN + piece % DOWN) * BM + tl.arange(0, BM)
    columns = ((tile // row_tiles) * ACROSS + piece // DOWN) * BN + tl.arange(0, BN)
    at = out + rows.to(tl.int64)[:, None] * m + columns[None, :]
    pair = (rows < n)[:, None] & (columns < m)[None, :]
    z = tl.load(at, mask=pair, other=0.0)
    if tl.min(tl.min(z, 1), 0) >= 0.0:
        return
    x_at = x + row_offsets(rows, n, None, stride_x)
    y_at = y + row_offsets(columns, m, None, stride_y)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        # a slice of its own: one sum over all of D would round too often
        part = tl.zeros([BM, BN], tl.float32)
        for k in range(0, BK):
            inside = start + k < d
            a = tl.load(x_at + start + k, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(y_at + start + k, mask=inside, other=0.0).to(tl.float32)
            gap = a[:, None] - b[None, :]
            part += gap * gap
        total += part
    if ROOT:
        total = tl.sqrt_rn(total)
    # loaded again: kept across the loop it costs a register a pair
    again = tl.load(at, mask=pair, other=0.0, volatile=True)
    tl.store(at, total, mask=again < 0.0)


# ---- gradients ----------------------------------------------------------------------------------


@triton.jit
def factor(a, BF16: tl.constexpr, DOT: tl.constexpr):
    """A factor of a gradient's products: bfloat16, or float32 (which holds a float16 too)."""
    if BF16:
        return operand(a, True, DOT)
    elif DOT == "tf32":
        # to nearest, here: the tensor cores would cut the last 13 bits off
        bits = a.to(tl.float32).to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)
    else:
        return a.to(tl.float32)


@triton.jit
def slopes(g, distance, both, near, ROOT: tl.constexpr):
    """G of pairs, and which of them are near."""
    if ROOT:
        square = distance * distance
        g = tl.where(distance == 0.0, 0.0, g / distance)
    else:
        square = distance
        g = 2.0 * g
    # written so that a NaN counts as near
    return g, (square >= near * both) == 0


@triton.jit
def tile_slopes(
    grad_rows,
    out_rows,
    a,
    other_squares,
    rows_real,
    others,
    end,
    grad_other,
    out_other,
    near,
    ROOT: tl.constexpr,
):
    """G of a tile, and which of its pairs are near; a pair past the end is far, with G = 0."""
    # masked, not clamped: what is clamped is read element by element
    pair = rows_real[:, None] & (others < end)[None, :]
    at = others.to(tl.int64) * grad_other
    g = tl.load(grad_rows[:, None] + at[None, :], mask=pair, other=0.0)
    at = others.to(tl.int64) * out_other
    z = tl.load(out_rows[:, None] + at[None, :], mask=pair, other=float("inf"))
    b = tl.load(other_squares + others, mask=others < end, other=0.0)
    return slopes(g, z, a[:, None] + b[None, :], near, ROOT)


@triton.jit(do_not_specialize=["depth_tiles", "row_tiles", "near"])
def product_gradients(
    own,  # [N, D]: the rows whose gradient this is
    other,  # [M, D]
    own_squares,  # [N] float32, or None: of products
    other_squares,  # [M]
    grad,  # [N, M] or its transpose: float32, by its two strides
    distances,  # as grad, or None
    to,  # [splits, N, D] float32
    near_range,  # [2, splits, row tiles] int32: the first and the last tile that has a near pair
    near,
    stride_own,
    stride_other,
    grad_own,
    grad_other,
    out_own,
    out_other,
    n,
    m,
    d,
    span,
    depth_tiles,
    row_tiles,
    ROOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The part of a tile of own's gradient that comes from the far ones of `span` rows of other."""
    # the pieces of a row run fastest: they read the same G, and find it in L2
    depth = (tl.program_id(0) % depth_tiles) * BK + tl.arange(0, BK)
    part = tl.program_id(0) // depth_tiles
    split = part // row_tiles
    rows = (part % row_tiles) * BM + tl.arange(0, BM)
    begin = split * span
    end = tl.minimum(begin + span, m)
    real = rows < n
    grad_rows = grad + rows.to(tl.int64) * grad_own
    total = tl.zeros([BM, BK], tl.float32)
    if distances is not None:
        out_rows = distances + rows.to(tl.int64) * out_own
        a = tl.load(own_squares + rows, mask=real, other=0.0)
        mass = tl.zeros([BM, BN], tl.float32)
        first = tl.full([BM, BN], NOWHERE, tl.int32)
        last = tl.full([BM, BN], -1, tl.int32)
    for start in range(bound(begin, DOT == "interpret"), bound(end, DOT == "interpret"), BN):
        others = start + tl.arange(0, BN)
        if distances is not None:
            g, close = tile_slopes(
                grad_rows,
                out_rows,
                a,
                other_squares,
                real,
                others,
                end,
                grad_other,
                out_other,
                near,
                ROOT,
            )
            g = factor(tl.where(close, 0.0, g), BF16, DOT)
            first = tl.where(close, tl.minimum(first, start), first)
            last = tl.where(close, start, last)
            # of the rounded G, as the product is: the two must cancel
            mass += g.to(tl.float32)
        else:
            pair = real[:, None] & (others < end)[None, :]
            at = others.to(tl.int64) * grad_other
            g = tl.load(grad_rows[:, None] + at[None, :], mask=pair, other=0.0)
            g = factor(g, BF16, DOT)
        other_rows = row_offsets(others, m, None, stride_other)
        v = load(other + other_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
        total = multiply(g, factor(v, BF16, DOT), total, DOT)
    if distances is not None:
        own_rows = row_offsets(rows, n, None, stride_own)
        u = load(own + own_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
        total = tl.sum(mass, 1)[:, None] * u.to(tl.float32) - total
        # every piece of a row says the same
        if tl.program_id(0) % depth_tiles == 0:
            ranges = tl.num_programs(0) // depth_tiles
            tl.store(near_range + part, tl.min(tl.min(first, 1), 0))
            tl.store(near_range + ranges + part, tl.max(tl.max(last, 1), 0))
    at = to + (split.to(tl.int64) * n + rows)[:, None] * d + depth[None, :]
    tl.store(at, total, mask=real[:, None] & (depth < d)[None, :])


@triton.jit(do_not_specialize=["n", "m", "span", "depth_tiles", "row_tiles", "near"])
def near_gradients(
    own,  # as in `product_gradients`
    other,
    own_squares,
    other_squares,
    grad,
    distances,
    to,
    near_range,
    near,
    stride_own,
    stride_other,
    grad_own,
    grad_other,
    out_own,
    out_other,
    n,
    m,
    d,
    span,
    depth_tiles,
    row_tiles,
    ROOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Adds what the near ones of `span` rows of other give, from differences."""
    part = tl.program_id(0) // depth_tiles
    first = tl.load(near_range + part)
    last = tl.load(near_range + tl.num_programs(0) // depth_tiles + part)
    if last < 0:
        return
    depth = (tl.program_id(0) % depth_tiles) * BK + tl.arange(0, BK)
    split = part // row_tiles
    rows = (part % row_tiles) * BM + tl.arange(0, BM)
    end = tl.minimum(split * span + span, m)
    real = rows < n
    grad_rows = grad + row_offsets(rows, n, None, grad_own)
    out_rows = distances + row_offsets(rows, n, None, out_own)
    a = tl.load(own_squares + rows, mask=real, other=0.0)
    own_rows = row_offsets(rows, n, None, stride_own)
    u = load(own + own_rows[:, None] + depth[None, :], depth[None, :], d, EVEN).to(tl.float32)
    total = tl.zeros([BM, BK], tl.float32)
    for start in range(bound(first, INTERPRET), bound(last + 1, INTERPRET), BN):
        _, close = tile_slopes(
            grad_rows,
            out_rows,
            a,
            other_squares,
            real,
            start + tl.arange(0, BN),
            end,
            grad_other,
            out_other,
            near,
            ROOT,
        )
        if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
            for j in range(start, start + BN):
                there = real & (j < end)
                g = tl.load(
                    grad_rows + row_offsets(j, end, None, grad_other), mask=there, other=0.0
                )
                at = out_rows + row_offsets(j, end, None, out_other)
                z = tl.load(at, mask=there, other=float("inf"))
                both = a + tl.load(other_squares + tl.minimum(j, end - 1))
                g, near_j = slopes(g, z, both, near, ROOT)
                at_v = other + row_offsets(j, end, None, stride_other) + depth
                v = load(at_v, depth, d, EVEN).to(tl.float32)
                total += tl.where(near_j, g, 0.0)[:, None] * (u - v[None, :])
    at = to + (split.to(tl.int64) * n + rows)[:, None] * d + depth[None, :]
    inside = real[:, None] & (depth < d)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
