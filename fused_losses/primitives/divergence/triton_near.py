"""Triton kernels of `divergence` where both sides may be near each other (`near.py`).

u - v without biases, with a = 1/|w| (1 where rows are not normalised) and b = 1/|wt|:

    s = <x - t, w> + <t, w - wt>,    u - v = a s + (u - a s) (1 - b/a)

A score of the teacher is u less that where its row and its class are near, and its own product
elsewhere: no score depends on what else is in its tile.
"""

# Triton types what its functions return as nothing that can be unpacked
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import (
    LEAST_SQUARE,
    MOST_SQUARE,
    load,
    multiply,
    products,
    row_offsets,
)


@triton.jit(do_not_specialize=["count"])
def class_shrink(
    w,  # [C, D] float32
    wt,
    ids,  # [K] int64 or None
    shrink,  # [K] float32: 1 - b/a, NaN where |w - wt|^2 > small |w|^2
    small,
    stride,
    teacher_stride,
    count,
    d,
    NORMALIZE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Which classes are near, and how their lengths differ.

    1 - b/a = <wt - w, wt + w> / (|wt|^2 + |w| |wt|)
    """
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    w_tile = w + row_offsets(columns, count, ids, stride)[:, None] + depth[None, :]
    wt_tile = wt + row_offsets(columns, count, ids, teacher_stride)[:, None] + depth[None, :]
    whole = tl.zeros([BN, BK], tl.float32)
    teacher = whole
    moved = whole
    longer = whole
    for start in range(0, d, BK):
        a = load(w_tile + start, depth[None, :], d - start, EVEN)
        b = load(wt_tile + start, depth[None, :], d - start, EVEN)
        whole += a * a
        teacher += b * b
        moved += (a - b) * (a - b)
        longer += (b - a) * (b + a)
    square = tl.sum(whole, 1)
    # a row of zeros, or one whose length is out of range, is multiplied as it comes
    near = (square >= LEAST_SQUARE) & (square <= MOST_SQUARE) & (tl.sum(moved, 1) <= small * square)
    out = tl.zeros([BN], tl.float32)
    if NORMALIZE:
        of_teacher = tl.sum(teacher, 1)
        out = tl.sum(longer, 1) / (of_teacher + tl.sqrt(square * of_teacher))
    tl.store(shrink + columns, tl.where(near, out, float("nan")), mask=columns < count)


@triton.jit
def moved_products(
    x, w, wt, x_rows, w_rows, wt_rows, d, product, BK: tl.constexpr, EVEN: tl.constexpr, DOT
):  # fmt: skip
    """product + <x_i, w_j - wt_j> [BM, BN]."""
    depth = tl.arange(0, BK)
    x_tile = x + x_rows[:, None] + depth[None, :]
    w_tile = w + w_rows[:, None] + depth[None, :]
    wt_tile = wt + wt_rows[:, None] + depth[None, :]
    for start in range(0, d, BK):
        a = load(x_tile, depth[None, :], d - start, EVEN)
        b = load(w_tile, depth[None, :], d - start, EVEN)
        b -= load(wt_tile, depth[None, :], d - start, EVEN)
        product = multiply(a, tl.trans(b), product, DOT)
        x_tile += BK
        w_tile += BK
        wt_tile += BK
    return product


@triton.jit
def near_flags(near, rows, columns, n, count):
    """Which rows are near [BM], and of the classes 1 - b/a [BN], NaN of one that is not."""
    row_near = tl.load(near.rows + tl.minimum(rows, n - 1))
    return row_near > 0.0, tl.load(near.shrink + tl.minimum(columns, count - 1))


@triton.jit
def near_difference(
    student,  # `ScoreSide`
    teacher,
    near,  # `NearRows`
    u,  # [BM, BN] without bias
    shrink,
    ids,
    rows,
    local,
    columns,
    n,
    count,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """u - v from products of differences. [BM, BN]"""
    w_rows = row_offsets(columns, count, ids, student.stride_class)
    wt_rows = row_offsets(columns, count, ids, teacher.stride_class)
    apart_rows = row_offsets(rows, n, None, near.stride)
    s = products(
        near.apart, student.weight, apart_rows, w_rows, student.width, BK, EVEN, False, DOT
    )
    t_rows = row_offsets(rows, n, None, teacher.stride)
    s = moved_products(
        teacher.rows, student.weight, teacher.weight, t_rows, w_rows, wt_rows, student.width, s,
        BK, EVEN, DOT,
    )  # fmt: skip
    if student.inverse is not None:
        s *= tl.load(student.inverse + local, mask=columns < count, other=0.0)[None, :]
        s += (u - s) * shrink[None, :]
    return s
