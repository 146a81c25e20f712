"""Triton kernels of `row_statistics`, backward: G is recomputed tile by tile from the saved lse.

    G_ij = psi_i' (grad_lse_i exp(z_ij - lse_i) + grad_weighted_i v_j) ; grad_target_i at the target
    dx = G What ; dw_j = (dwhat_j - what_j <what_j, dwhat_j>) / |w_j|, dwhat = G^T x

Two forms: `gradient_tiles` stores a chunk of G for two library products; `owner_*` keep it in
registers where D fits in one tile. No atomics: the owner of an output adds it up.
"""

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import (
    inverse_of,
    load,
    multiply,
    narrow,
    operand,
    power_of_two,
    products,
    row_offsets,
)
from fused_losses.primitives.row_statistics.triton_forward import bent, column_values, row_bends


@triton.jit
def _row_gradients(of_row, rows, n):
    """The row values of the backward; rows past the end get gradient 0."""
    real = rows < n
    row_lse = tl.load(of_row.lse + rows, mask=real, other=float("inf"))
    # a row without any score: exp(z - inf) = 0 where exp(z + inf) would be infinite
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    g_lse = tl.load(of_row.grad_lse + rows, mask=real, other=0.0)
    g_target = tl.load(of_row.grad_target + rows, mask=real, other=0.0)
    g_weighted = g_lse
    if of_row.grad_weighted is not None:
        g_weighted = tl.load(of_row.grad_weighted + rows, mask=real, other=0.0)
    return row_lse, g_lse, g_target, g_weighted


@triton.jit
def bent_slope(z, t, q, r):
    """The derivative of `bent`."""
    return tl.where(z > t, q + 2 * r * z, 1.0)


@triton.jit
def share(z, row_lse, BENT: tl.constexpr):
    """exp(z - lse)."""
    below = z - row_lse
    if BENT:
        # z may round to the other side of a threshold than in the forward, and psi may jump there
        below = tl.where(below > 0.0, 0.0, below)
    return tl.exp(below)


@triton.jit(do_not_specialize=["n", "first", "count", "row_tiles"])
def gradient_tiles(
    x,  # [N, D]
    w,  # [C, D]
    of_class,  # as in `forward_tiles`
    of_row,
    ds,  # [N, chunk] G_ij times `rest` of 1/|w_j|, in the dtype of the products that follow
    bias_sum,  # [row tiles, chunk] sum over non-targets of G_ij, or None
    stride_x,
    stride_w,
    stride_ds,
    n,
    first,
    count,
    d,
    row_tiles,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of G for the two library products, with its column sums for the bias."""
    row_tile = tl.program_id(0) % row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    local = (tl.program_id(0) // row_tiles) * BN + tl.arange(0, BN)
    columns = first + local
    x_rows = row_offsets(rows, n, None, stride_x)
    w_rows = row_offsets(columns, count, of_class.ids, stride_w)
    z = products(x, w, x_rows, w_rows, d, BK, EVEN, BF16, DOT)
    scale, shift, v = column_values(of_class, local, columns, count)
    if of_class.inverse is not None:
        z *= scale[None, :]
    if of_row.bend is not None:
        t, p, q, r = row_bends(of_row.bend, rows, n)
        slope = bent_slope(z, t[:, None], q[:, None], r[:, None])
        z = bent(z, t[:, None], p[:, None], q[:, None], r[:, None])
    if of_class.bias is not None:
        z += shift[None, :]
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    row_lse, g_lse, g_target, g_weighted = _row_gradients(of_row, rows, n)
    g = g_lse[:, None] * share(z, row_lse[:, None], of_row.bend is not None)
    if of_row.grad_weighted is not None:
        g += g_weighted[:, None] * v[None, :]
    is_target = columns[None, :] == position[:, None]
    real = columns < count
    if bias_sum is not None:
        sums = row_tile.to(tl.int64) * stride_ds + local
        tl.store(bias_sum + sums, tl.sum(tl.where(is_target, 0.0, g), 0), mask=real)
    if of_row.bend is not None:
        g *= slope
    g = tl.where(is_target, g_target[:, None], g)
    if of_class.inverse is not None:
        # read again past the compiler's eyes: keeping it alive from above spills on sm_90
        again = tl.load(of_class.rest + local, mask=real, other=0.0, volatile=True)
        g *= again[None, :]
    at = ds + rows.to(tl.int64)[:, None] * stride_ds + local[None, :]
    tl.store(at, narrow(g, ds.dtype.element_ty), mask=(rows < n)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["first", "count", "row_tiles"])
def finish_weight(
    gradient,  # [chunk, D] float32: sum_i G_ij x_i / |w_j|
    w,  # [C, D]
    inverse,  # [chunk] or None
    classes,  # [count] int64 or None
    bias_sum,  # [row tiles, chunk] or None
    unscale,  # [1] or None
    dweight,  # [C, D] or with COMPACT [count, D], or None where only dbias is wanted
    dbias,  # [C] or None
    stride_w,
    stride_dw,
    stride_sums,
    first,
    count,
    d,
    row_tiles,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """dw_j = g_j - w_j <w_j, g_j> / |w_j|^2, and dbias_j, for a chunk of classes.

    <w_j, g_j> is taken here from the rows that are read anyway: as column sums of G it spilled in
    `gradient_tiles` (128 x 256 on sm_90), and here dw_j is orthogonal to w_j whatever G's rounding.
    """
    local = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = first + local
    real = columns < count
    ids = tl.minimum(columns, count - 1).to(tl.int64)
    if classes is not None:
        ids = tl.load(classes + ids)
    factor = 1.0
    if unscale is not None:
        factor = tl.load(unscale)
    if dbias is not None:
        push = tl.zeros([BN], tl.float32)
        for row_tile in range(0, row_tiles):
            at = tl.cast(row_tile, tl.int64) * stride_sums + local
            push += tl.load(bias_sum + at, mask=real, other=0.0)
        tl.store(dbias + ids, push * factor, mask=real)
    if dweight is not None:
        depth = tl.arange(0, BK)
        near = tl.minimum(local, count - 1 - first).to(tl.int64)
        from_row = gradient + near[:, None] * d + depth[None, :]
        w_row = w + ids[:, None] * stride_w + depth[None, :]
        to = columns.to(tl.int64) if COMPACT else ids
        to_row = dweight + to[:, None] * stride_dw + depth[None, :]
        pull = tl.zeros([BN, BK], tl.float32)
        if inverse is not None:
            for start in range(0, d, BK):
                left = d - start
                value = load(from_row + start, depth[None, :], left, EVEN)
                pull += value * load(w_row + start, depth[None, :], left, EVEN).to(tl.float32)
        along = tl.sum(pull, 1)
        if inverse is not None:
            scale = tl.load(inverse + local, mask=real, other=0.0)
            along *= scale
        for start in range(0, d, BK):
            left = d - start
            value = load(from_row + start, depth[None, :], left, EVEN)
            if inverse is not None:
                row = load(w_row + start, depth[None, :], left, EVEN).to(tl.float32)
                value -= row * scale[:, None] * along[:, None]
                # a class of zeros has no direction: NaN of a row over its length is none either
                value = tl.where(scale[:, None] == 0, 0.0, value)
            inside = real[:, None] & (depth < left)[None, :]
            tl.store(to_row + start, value * factor, mask=inside)


@triton.jit(do_not_specialize=["n", "count", "row_tiles", "steps"])
def owner_rows(
    x,  # [N, D]
    w,  # [C, D]
    of_class,  # as in `forward_tiles`, 1/|w_j| of all
    of_row,
    dx,  # [splits, N, D] float32
    stride_x,
    stride_w,
    n,
    count,
    d,
    row_tiles,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """dx of one row tile over `steps` class tiles; D fits in one tile, so no G is stored.

    1/|w_j| comes from memory: a tile of W that is also read into registers loses one of its buffers
    in the pipeline of Triton 3.6.0, and the next copy then runs into a wgmma (seen on sm_90).
    """
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    depth = tl.arange(0, BD)
    x_rows = row_offsets(rows, n, None, stride_x)
    a = operand(load(x + x_rows[:, None] + depth[None, :], depth[None, :], d, EVEN), BF16, DOT)
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    row_lse, g_lse, g_target, g_weighted = _row_gradients(of_row, rows, n)
    if of_row.bend is not None:
        t, p, q, r = row_bends(of_row.bend, rows, n)
    total = tl.zeros([BM, BD], tl.float32)
    for step in range(0, steps):
        # past the last class tile everything is masked
        columns = (split * steps + step) * BN + tl.arange(0, BN)
        w_rows = row_offsets(columns, count, of_class.ids, stride_w)
        b = load(w + w_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
        scale, shift, v = column_values(of_class, columns, columns, count)
        b = operand(b, BF16, DOT)
        z = multiply(a, tl.trans(b), tl.zeros([BM, BN], tl.float32), DOT)
        if of_class.inverse is not None:
            z *= scale[None, :]
        if of_row.bend is not None:
            slope = bent_slope(z, t[:, None], q[:, None], r[:, None])
            z = bent(z, t[:, None], p[:, None], q[:, None], r[:, None])
        if of_class.bias is not None:
            z += shift[None, :]
        g = g_lse[:, None] * share(z, row_lse[:, None], of_row.bend is not None)
        if of_row.grad_weighted is not None:
            g += g_weighted[:, None] * v[None, :]
        if of_row.bend is not None:
            g *= slope
        g = tl.where(columns[None, :] == position[:, None], g_target[:, None], g)
        # `scale` is 0 past the last class
        g = tl.where((columns < count)[None, :], g * scale[None, :], 0.0)
        total = multiply(operand(narrow(g, x.dtype.element_ty), BF16, DOT), b, total, DOT)
    at = (split.to(tl.int64) * n + rows)[:, None] * d + depth[None, :]
    tl.store(dx + at, total, mask=(rows < n)[:, None] & (depth < d)[None, :])


@triton.jit(do_not_specialize=["n", "count"])
def owner_classes(
    x,  # [N, D]
    w,  # [C, D]
    of_class,  # as in `forward_tiles`, without 1/|w_j|
    of_row,
    inverse,  # [count] receives 1/|w_j|, or None
    unscale,  # [1] or None
    dweight,  # [C, D] or with COMPACT [count, D], or None where only dbias is wanted
    dbias,  # [C] or None
    stride_x,
    stride_w,
    stride_dw,
    n,
    count,
    d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COMPACT: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """dw and dbias of one class tile over all rows, the projection finished where it is summed."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BD)
    w_rows = row_offsets(columns, count, of_class.ids, stride_w)
    w_at = w + w_rows[:, None] + depth[None, :]
    b = load(w_at, depth[None, :], d, EVEN)
    scale, shift, v = column_values(of_class, columns, columns, count)
    if NORMALIZE:
        wide = b.to(tl.float32)
        factor = power_of_two(tl.max(tl.abs(wide), 1))
        wide *= factor[:, None]
        scale *= inverse_of(tl.sum(wide * wide, 1), factor)
    if inverse is not None:
        tl.store(inverse + columns, scale, mask=columns < count)
    b = operand(b, BF16, DOT)
    total = tl.zeros([BN, BD], tl.float32)
    push = tl.zeros([BN], tl.float32)
    for start in range(0, n, BM):
        rows = start + tl.arange(0, BM)
        x_rows = row_offsets(rows, n, None, stride_x)
        a = load(x + x_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
        a = operand(a, BF16, DOT)
        z = multiply(b, tl.trans(a), tl.zeros([BN, BM], tl.float32), DOT)
        if NORMALIZE:
            z *= scale[:, None]
        if of_row.bend is not None:
            t, p, q, r = row_bends(of_row.bend, rows, n)
            slope = bent_slope(z, t[None, :], q[None, :], r[None, :])
            z = bent(z, t[None, :], p[None, :], q[None, :], r[None, :])
        if of_class.bias is not None:
            z += shift[:, None]
        position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
        row_lse, g_lse, g_target, g_weighted = _row_gradients(of_row, rows, n)
        g = g_lse[None, :] * share(z, row_lse[None, :], of_row.bend is not None)
        if of_row.grad_weighted is not None:
            g += g_weighted[None, :] * v[:, None]
        is_target = columns[:, None] == position[None, :]
        if dbias is not None:
            push += tl.sum(tl.where(is_target, 0.0, g), 1)
        if of_row.bend is not None:
            g *= slope
        g = tl.where(is_target, g_target[None, :], g)
        total = multiply(operand(narrow(g, x.dtype.element_ty), BF16, DOT), a, total, DOT)
    if NORMALIZE:
        # read again: keeping the tile through the loop costs its registers there
        unit = load(w_at, depth[None, :], d, EVEN).to(tl.float32) * scale[:, None]
        total *= scale[:, None]
        total -= unit * tl.sum(total * unit, 1)[:, None]
    factor = 1.0
    if unscale is not None:
        factor = tl.load(unscale)
    real = columns < count
    ids = tl.minimum(columns, count - 1).to(tl.int64)
    if of_class.ids is not None:
        ids = tl.load(of_class.ids + ids)
    if dbias is not None:
        tl.store(dbias + ids, push * factor, mask=real)
    if dweight is not None:
        to = columns.to(tl.int64) if COMPACT else ids
        tl.store(
            dweight + to[:, None] * stride_dw + depth[None, :],
            total * factor,
            mask=real[:, None] & (depth < d)[None, :],
        )
