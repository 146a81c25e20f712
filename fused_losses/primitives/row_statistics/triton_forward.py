"""Triton kernels of `row_statistics`, forward: products of x [N, D] and W [C, D], tile by tile.

z_ij = psi_i(<x_i, w_j> [/ |w_j|]) + bias_j. Every program owns what it writes: no atomics, no
locks, a fixed order of sums. Loads are clamped to the last row instead of masked, which takes fewer
registers; what a clamped row gives is dropped at the end. Offsets of rows are 64-bit.
"""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import (
    NOWHERE,
    bound,
    inverse_norms_of,
    load,
    multiply,
    operand,
    products,
    rounded,
    row_offsets,
)


@triton.jit
def column_values(of_class, local, columns, count):
    """1/|w_j|, bias_j, v_j of the columns (1, 0, 1 where not given); 0 past the end."""
    real = columns < count
    ids = columns
    if of_class.ids is not None:
        ids = tl.load(of_class.ids + columns, mask=real, other=0)
    scale = tl.where(real, 1.0, 0.0)
    v = scale
    shift = tl.zeros_like(scale)
    if of_class.inverse is not None:
        scale = tl.load(of_class.inverse + local, mask=real, other=0.0)
    if of_class.bias is not None:
        shift = tl.load(of_class.bias + ids, mask=real, other=0.0).to(tl.float32)
    if of_class.weight is not None:
        v = tl.load(of_class.weight + ids, mask=real, other=0.0)
    return scale, shift, v


@triton.jit
def row_bends(bend, rows, n):
    """t, p, q, r of the rows, from [N, 4]."""
    at, real = bend + 4 * rows.to(tl.int64), rows < n
    t = tl.load(at, mask=real, other=0.0)
    p = tl.load(at + 1, mask=real, other=0.0)
    q = tl.load(at + 2, mask=real, other=0.0)
    r = tl.load(at + 3, mask=real, other=0.0)
    return t, p, q, r


@triton.jit
def bent(z, t, p, q, r):
    """z up to t, p + q z + r z^2 above it; NaN stays NaN."""
    return tl.where(z > t, p + (q + r * z) * z, z)


@triton.jit(do_not_specialize=["n", "first", "count", "row_tiles"])
def forward_tiles(
    x,  # [N, D]
    w,  # [C, D]
    of_class,  # `ClassVectors`; 1/|w_j| from the first column of the chunk
    of_row,  # `RowVectors`
    part,  # `Partials`, [T, N] of class tiles
    stride_x,
    stride_w,
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
    """Partial maximum, sum of exponentials, arg-maximum of one class tile for one row tile."""
    # the row tile runs fastest, so that all row tiles of a class tile find it in L2
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    local = tile * BN + tl.arange(0, BN)
    columns = first + local
    x_rows = row_offsets(rows, n, None, stride_x)
    w_rows = row_offsets(columns, count, of_class.ids, stride_w)
    z = products(x, w, x_rows, w_rows, d, BK, EVEN, BF16, DOT)
    real = columns < count
    scale, shift, v = column_values(of_class, local, columns, count)
    if of_class.inverse is not None:
        z *= scale[None, :]
    if of_row.bend is not None:
        t, p, q, r = row_bends(of_row.bend, rows, n)
        z = bent(z, t[:, None], p[:, None], q[:, None], r[:, None])
    if of_class.bias is not None:
        z += shift[None, :]
    # loaded after the products: before them it costs registers across the whole loop
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    other = real[None, :] & (columns[None, :] != position[:, None])
    out = tile.to(tl.int64) * n + rows
    if part.moment is not None:
        tl.store(part.moment + out, tl.sum(tl.where(other, z * v[None, :], 0.0), 1), mask=rows < n)
    z = tl.where(other, z, float("-inf"))
    # ties go to the lowest column; comparing z to its maximum afterwards instead spills on sm_100
    high, where = tl.max(z, 1, return_indices=True)
    # a row without any score in the tile has maximum -inf: subtract 0 from its scores instead
    base = tl.where(high == float("-inf"), 0.0, high)
    tl.store(part.peak + out, high, mask=rows < n)
    tl.store(part.total + out, tl.sum(tl.exp(z - base[:, None]), 1), mask=rows < n)
    tl.store(part.best + out, first + tile * BN + where, mask=rows < n)


@triton.jit
def in_registers(a, BM: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    """a, laid out as the result of a product: that is what a product takes from registers."""
    if DOT == "interpret":
        return a
    zero = tl.zeros([BM, 16], a.dtype)
    return tl.dot(zero, tl.zeros([16, BK], a.dtype), a.to(tl.float32)).to(a.dtype)


@triton.jit
def pieces(
    x,
    x_rows,
    DEPTH: tl.constexpr,
    HELD: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Whole rows in DEPTH pieces of BK, the first HELD of them in registers."""
    at = x + x_rows[:, None] + tl.arange(0, BK)[None, :]
    row = ()
    for k in tl.static_range(DEPTH):
        a = operand(tl.load(at + k * BK), False, DOT)
        if k < HELD:
            a = in_registers(a, BM, BK, DOT)
        row = row + (a,)
    return row


@triton.jit
def fold(z, first, scale, other, high, mass, where, NORMALIZE: tl.constexpr):
    """Maximum, sum exp(z - maximum) and arg-maximum with another tile's scores added."""
    if NORMALIZE:
        z *= scale[None, :]
    z = tl.where(other, z, float("-inf"))
    top, at = tl.max(z, 1, return_indices=True)
    where = tl.where(top > high, first + at, where)
    top = tl.maximum(high, top)
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = mass * tl.exp(high - base) + tl.sum(tl.exp(z - base[:, None]), 1)
    return top, mass, where


@triton.jit
def store_partial(part, out, rows, n, high, mass, where):
    tl.store(part.peak + out + rows, high, mask=rows < n)
    tl.store(part.total + out + rows, mass, mask=rows < n)
    tl.store(part.best + out + rows, where, mask=rows < n)


@triton.jit(do_not_specialize=["n", "first", "count", "row_tiles", "span"])
def forward_resident(
    x,  # [N, D]
    w,  # [C, D]
    of_class,  # as in `forward_tiles`, but without bias and weight
    of_row,  # without bends
    part,  # [T, N] of spans
    stride_x,
    stride_w,
    n,
    first,
    count,
    row_tiles,
    span,
    DEPTH: tl.constexpr,
    HELD: tl.constexpr,
    BM: tl.constexpr,  # half the rows of a program
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Partial statistics of `span` classes for 2 BM rows, which are read once and stay.

    Half of the rows lies in shared memory; of the other half as much as fits, the rest in
    registers: 256 rows at D = 512 read a row of W once where tiles of 128 x 256 read it twice, and
    x not at all. Two halves, because a product of 256 rows takes all its rows from one place.
    """
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles
    rows = row_tile * (2 * BM) + tl.arange(0, BM)
    low_rows = rows + BM
    a = pieces(x, row_offsets(rows, n, None, stride_x), DEPTH, HELD, BM, BK, DOT)
    b = pieces(x, row_offsets(low_rows, n, None, stride_x), DEPTH, 0, BM, BK, DOT)
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    low_position = tl.load(of_row.positions + low_rows, mask=low_rows < n, other=-1)
    high = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    where = tl.full([BM], NOWHERE, tl.int32)
    low_high, low_mass, low_where = high, mass, where
    begin = first + split * span
    end = tl.minimum(begin + span, count)
    for start in range(bound(begin, DOT == "interpret"), bound(end, DOT == "interpret"), BN):
        columns = start + tl.arange(0, BN)
        real = columns < end
        w_rows = row_offsets(columns, count, of_class.ids, stride_w)
        at = w + w_rows[:, None] + tl.arange(0, BK)[None, :]
        scale = tl.where(real, 1.0, 0.0)
        if of_class.inverse is not None:
            scale = tl.load(of_class.inverse + columns - first, mask=real, other=0.0)
        z = tl.zeros([BM, BN], tl.float32)
        low = z
        for k in tl.static_range(DEPTH):
            c = tl.trans(operand(tl.load(at + k * BK), False, DOT))
            z = multiply(a[k], c, z, DOT)
            low = multiply(b[k], c, low, DOT)
        other = real[None, :] & (columns[None, :] != position[:, None])
        high, mass, where = fold(
            z, start, scale, other, high, mass, where, of_class.inverse is not None
        )
        other = real[None, :] & (columns[None, :] != low_position[:, None])
        low_high, low_mass, low_where = fold(
            low, start, scale, other, low_high, low_mass, low_where, of_class.inverse is not None
        )
    out = split.to(tl.int64) * n
    store_partial(part, out, rows, n, high, mass, where)
    store_partial(part, out, low_rows, n, low_high, low_mass, low_where)


@triton.jit
def merge(part, rows, n, groups, BM: tl.constexpr, BT: tl.constexpr):
    """Maximum, sum exp, arg-maximum, sum v z over [groups, N] partials, in ascending order."""
    real = rows < n
    high = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    where = tl.full([BM], NOWHERE, tl.int32)
    mean = tl.zeros([BM], tl.float32)
    for start in range(0, groups, BT):
        group = start + tl.arange(0, BT)
        at = group.to(tl.int64)[:, None] * n + rows[None, :]
        there = (group < groups)[:, None] & real[None, :]
        part_high = tl.load(part.peak + at, mask=there, other=float("-inf"))
        part_mass = tl.load(part.total + at, mask=there, other=0.0)
        part_where = tl.load(part.best + at, mask=there, other=NOWHERE)
        block_high = tl.max(part_high, 0)
        tied = part_high == block_high[None, :]
        block_where = tl.min(tl.where(tied, part_where, NOWHERE), 0)
        where = tl.where(block_high > high, block_where, where)
        new_high = tl.maximum(high, block_high)
        shift = tl.where(new_high == float("-inf"), 0.0, new_high)
        mass = mass * tl.exp(high - shift)
        mass += tl.sum(part_mass * tl.exp(part_high - shift[None, :]), 0)
        high = new_high
        if part.moment is not None:
            mean += tl.sum(tl.load(part.moment + at, mask=there, other=0.0), 0)
    return high, mass, where, mean


@triton.jit(do_not_specialize=["n", "groups"])
def merge_tiles(
    part,  # `Partials`, [T, N]
    to,  # `Partials`, [N]
    n,
    groups,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """The partials of a segment of classes as one partial, so that few are alive at a time."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    high, mass, where, mean = merge(part, rows, n, groups, BM, BT)
    tl.store(to.peak + rows, high, mask=rows < n)
    tl.store(to.total + rows, mass, mask=rows < n)
    tl.store(to.best + rows, where, mask=rows < n)
    if part.moment is not None:
        tl.store(to.moment + rows, mean, mask=rows < n)


@triton.jit(do_not_specialize=["n", "groups"])
def forward_rows(
    x,  # [N, D]
    w,  # [C, D]
    positions,  # [N] int32
    classes,  # [count] int64 or None
    part,  # `Partials`, [T, N]
    lse,  # [N]
    target,  # [N]
    weighted,  # [N] or None
    hardest,  # [N] int64
    hardest_score,  # [N]
    stride_x,
    stride_w,
    n,
    groups,
    d,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BF16: tl.constexpr,
):
    """Merges the partials of BM rows in ascending order; <x_i, w_label> from the row itself."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < n
    high, mass, where, mean = merge(part, rows, n, groups, BM, BT)
    position = tl.load(positions + rows, mask=real, other=-1)
    labelled = position >= 0
    w_index = tl.maximum(position, 0).to(tl.int64)
    if classes is not None:
        w_index = tl.load(classes + w_index)
    w_rows = w_index * stride_w
    x_rows = row_offsets(rows, n, None, stride_x)
    depth = tl.arange(0, BK)
    dot = tl.zeros([BM, BK], tl.float32)
    square = tl.zeros([BM, BK], tl.float32)
    for start in range(0, d, BK):
        a = load(x + x_rows[:, None] + (start + depth)[None, :], depth[None, :], d - start, EVEN)
        b = load(w + w_rows[:, None] + (start + depth)[None, :], depth[None, :], d - start, EVEN)
        dot += rounded(a, BF16) * rounded(b, BF16)
        if NORMALIZE:
            square += b.to(tl.float32) * b.to(tl.float32)
    score = tl.sum(dot, 1)
    if NORMALIZE:
        score *= inverse_norms_of(tl.sum(square, 1), w, w_rows, d, BK, EVEN)
    tl.store(target + rows, tl.where(labelled, score, 0.0), mask=real)
    found = where != NOWHERE
    empty = mass == 0.0
    # no score at all: log 0 = -inf; a NaN among the scores is in `mass` and so in both outputs
    tl.store(
        lse + rows,
        tl.where(empty, float("-inf"), high + tl.log(tl.where(empty, 1.0, mass))),
        mask=real,
    )
    tl.store(hardest_score + rows, tl.where(mass == mass, high, mass), mask=real)
    best_class = tl.where(found, where, 0).to(tl.int64)
    if classes is not None:
        best_class = tl.load(classes + best_class)
    tl.store(hardest + rows, tl.where(found, best_class, -1), mask=real)
    if part.moment is not None:
        tl.store(weighted + rows, mean, mask=real)


@triton.jit(do_not_specialize=["count"])
def inverse_norms(
    w,  # [C, D]
    classes,  # [*] int64 or None, from the first class of the chunk
    inverse,  # [count]
    stride_w,
    count,
    d,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """1/|w_j| of a chunk of classes."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    w_rows = row_offsets(columns, count, classes, stride_w)
    depth = tl.arange(0, BK)
    square = tl.zeros([BN, BK], tl.float32)
    for start in range(0, d, BK):
        at = w + w_rows[:, None] + (start + depth)[None, :]
        b = load(at, depth[None, :], d - start, EVEN).to(tl.float32)
        square += b * b
    found = inverse_norms_of(tl.sum(square, 1), w, w_rows, d, BK, EVEN)
    tl.store(inverse + columns, found, mask=columns < count)
