"""Triton kernels of `class_rules`, forward: a class's cosine from its K centres, then the rule.

c_ij = pool_k <x_i, w_jk> [/ |w_jk|]; the K products of a tile follow one another, so that a tile of
cosines is all there is of them. Ownership, loads and offsets as in `row_statistics`.
"""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import NOWHERE, products, row_offsets
from fused_losses.primitives.class_rules.triton_rules import terms
from fused_losses.primitives.row_statistics.triton_forward import row_bends

# of a class: one centre, the best of K, or their mean by a softmax
ONE = tl.constexpr(0)
BEST = tl.constexpr(1)
SOFT = tl.constexpr(2)


@triton.jit
def cosines(
    x,
    w,
    of_class,
    x_rows,
    columns,
    k,
    first,
    count,
    centers,
    stride_w,
    d,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of the rows with the k-th centres of the columns. [BM, BN]"""
    near = tl.minimum(columns, count - 1)
    centre = near.to(tl.int64) * centers + k
    if of_class.ids is not None:
        centre = tl.load(of_class.ids + centre)
    z = products(x, w, x_rows, centre * stride_w, d, BK, EVEN, BF16, DOT)
    if of_class.inverse is not None:
        at = of_class.inverse + ((near - first).to(tl.int64) * centers + k)
        z *= tl.load(at, mask=columns < count, other=0.0)[None, :]
    return z


@triton.jit
def pooled(
    x,
    w,
    of_class,
    x_rows,
    columns,
    first,
    count,
    centers,
    sharpness,
    stride_w,
    d,
    POOL: tl.constexpr,
    WHICH: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The classes' cosines, and with WHICH what `spread` needs: the best centre, or the softmax's
    highest product and its sum of exponentials.
    """
    c = cosines(
        x, w, of_class, x_rows, columns, 0, first, count, centers, stride_w, d, BK, EVEN, BF16, DOT
    )
    best = tl.zeros(c.shape, tl.int32)
    top = c
    mass = tl.full(c.shape, 1.0, tl.float32)
    if POOL != ONE:
        for k in range(1, centers):
            z = cosines(
                x, w, of_class, x_rows, columns, k, first, count, centers, stride_w, d, BK, EVEN,
                BF16, DOT,
            )  # fmt: skip
            if POOL == BEST:
                # of equal ones the first; a NaN stays
                better = (z > c) | (z != z)
                c = tl.where(better, z, c)
                if WHICH:
                    best = tl.where(better, k, best)
            else:
                high = tl.maximum(top, z)
                before = mass * tl.exp((top - high) * sharpness)
                now = tl.exp((z - high) * sharpness)
                mass = before + now
                # their mean so far
                c += (z - c) * (now / mass)
                top = high
    return c, best, top, mass


@triton.jit
def row_values(values, rows, n, BENT: tl.constexpr):
    """A row's values against columns: the bend's four, or the one that there is. Each [BM, 1]"""
    a = tl.zeros(rows.shape, tl.float32)
    b, c, d = a, a, a
    if BENT:
        a, b, c, d = row_bends(values, rows, n)
    elif values is not None:
        a = tl.load(values + rows, mask=rows < n, other=0.0)
    return a[:, None], b[:, None], c[:, None], d[:, None]


@triton.jit
def finite_or_zero(peak):
    """What is taken from exponents: a row without any, or one of infinite ones, has nothing."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit(do_not_specialize=["n", "first", "count", "row_tiles", "labels", "centers"])
def forward_classes(
    x,  # [N, D]
    w,  # [C K, D]
    of_class,  # `ClassVectors` of centres; 1/|w_jk| from the first centre of the chunk
    of_row,  # `RuleRows`
    part,  # `RulePartials`, [T, N] of class tiles
    of_rule,  # `Params`; called `params` a launch would lose it
    stride_x,
    stride_w,
    n,
    first,
    count,
    d,
    row_tiles,
    labels,
    centers,
    sharpness,  # 1 / softness
    RULE: tl.constexpr,
    BENT: tl.constexpr,
    POOL: tl.constexpr,
    MANY: tl.constexpr,  # labels a row
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """Partial statistics and the highest cosine of one class tile for one row tile."""
    # the row tile runs fastest, so that all row tiles of a class tile find it in L2
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    columns = first + tile * BN + tl.arange(0, BN)
    x_rows = row_offsets(rows, n, None, stride_x)
    c, _, _, _ = pooled(
        x, w, of_class, x_rows, columns, first, count, centers, sharpness, stride_w, d, POOL, False,
        BK, EVEN, BF16, DOT,
    )  # fmt: skip
    v = row_values(of_row.numbers, rows, n, BENT)
    one, two = terms(c, v, of_rule, RULE, BENT)
    nothing = 0.0 if part.peak is None else float("-inf")
    real = (columns < count)[None, :]
    if MANY:
        for label in range(labels):
            at = of_row.places + rows.to(tl.int64) * labels + label
            place = tl.load(at, mask=rows < n, other=-1)
            own = columns[None, :] == place[:, None]
            c = tl.where(own, float("-inf"), c)
            one = tl.where(own, nothing, one)
            if part.second is not None:
                two = tl.where(own, 0.0, two)
    else:
        place = tl.load(of_row.places + rows, mask=rows < n, other=-1)
        real = real & (columns[None, :] != place[:, None])
    c = tl.where(real, c, float("-inf"))
    one = tl.where(real, one, nothing)
    out = tile.to(tl.int64) * n + rows
    # ties go to the lowest column
    high, where = tl.max(c, 1, return_indices=True)
    tl.store(part.high + out, high, mask=rows < n)
    tl.store(part.best + out, first + tile * BN + where, mask=rows < n)
    if part.second is not None:
        tl.store(part.second + out, tl.sum(tl.where(real, two, 0.0), 1), mask=rows < n)
    if part.peak is not None:
        peak = tl.max(one, 1)
        tl.store(part.peak + out, peak, mask=rows < n)
        one = tl.exp(one - finite_or_zero(peak)[:, None])
    tl.store(part.total + out, tl.sum(one, 1), mask=rows < n)


@triton.jit(do_not_specialize=["n", "groups"])
def merge_classes(
    part,  # `RulePartials`, [T, N]
    so_far,  # `RulePartials`, [N], sums in float64
    n,
    groups,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """The partials of a segment of classes into the rows' statistics, in ascending order."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    real = rows < n
    high = tl.load(so_far.high + rows, mask=real, other=float("-inf"))
    best = tl.load(so_far.best + rows, mask=real, other=-1)
    total = tl.load(so_far.total + rows, mask=real, other=0.0)
    if part.peak is not None:
        peak = tl.load(so_far.peak + rows, mask=real, other=float("-inf"))
    if part.second is not None:
        second = tl.load(so_far.second + rows, mask=real, other=0.0)
    for start in range(0, groups, BT):
        group = start + tl.arange(0, BT)
        at = group.to(tl.int64)[:, None] * n + rows[None, :]
        there = (group < groups)[:, None] & real[None, :]
        part_high = tl.load(part.high + at, mask=there, other=float("-inf"))
        part_best = tl.load(part.best + at, mask=there, other=NOWHERE)
        top = tl.max(part_high, 0)
        tied = part_high == top[None, :]
        first = tl.min(tl.where(tied, part_best, NOWHERE), 0)
        best = tl.where(top > high, first, best)
        high = tl.maximum(high, top)
        mass = tl.load(part.total + at, mask=there, other=0.0)
        if part.peak is not None:
            part_peak = tl.load(part.peak + at, mask=there, other=float("-inf"))
            peak_now = tl.maximum(peak, tl.max(part_peak, 0))
            base = finite_or_zero(peak_now)
            total *= tl.exp(peak - base).to(tl.float64)
            mass *= tl.exp(part_peak - base[None, :])
            peak = peak_now
        total += tl.sum(mass.to(tl.float64), 0)
        if part.second is not None:
            second += tl.sum(tl.load(part.second + at, mask=there, other=0.0).to(tl.float64), 0)
    tl.store(so_far.high + rows, high, mask=real)
    tl.store(so_far.best + rows, best, mask=real)
    tl.store(so_far.total + rows, total, mask=real)
    if part.peak is not None:
        tl.store(so_far.peak + rows, peak, mask=real)
    if part.second is not None:
        tl.store(so_far.second + rows, second, mask=real)
