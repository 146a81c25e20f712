"""Triton kernels of `divergence`, forward: both score matrices, tile by tile, never stored.

A program goes through a run of classes for its rows and keeps their statistics in registers; the
runs are merged in float64 on vectors of rows (`triton_merge.py`). The KL of two softmaxes p (which
leads) and q, with d = log of their scores' ratio, z_p - z_q, and c its mean under p:

    KL = log(1 + r),    r = mean under p of exp(c - d) - 1 - (c - d) >= 0

A sum of terms that are none of them negative, so that near agreement it keeps its digits.
"""

# Triton types what its functions return as nothing that can be unpacked
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import products, row_offsets
from fused_losses.primitives.divergence.triton_near import near_difference, near_flags
from fused_losses.primitives.divergence.triton_rules import exp_excess, shares, term


@triton.jit
def scores(
    side,  # `ScoreSide`
    ids,  # [K] int64 or None
    rows,
    local,
    columns,  # first + local
    n,
    count,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The scores of one side, without biases. [BM, BN]"""
    real = columns < count
    x_rows = row_offsets(rows, n, None, side.stride)
    if side.weight is None:
        at = columns
        if ids is not None:
            at = tl.load(ids + columns, mask=real, other=0)
        # the width, not the count: whether it is a number of whole vectors decides the loads
        inside = real if ids is not None else columns < side.width
        where = at.to(tl.int64) * side.stride_class
        z = tl.load(
            side.rows + x_rows[:, None] + where[None, :], mask=inside[None, :], other=0.0
        ).to(tl.float32)
        if side.scale is not None:
            z *= tl.load(side.scale + rows, mask=rows < n, other=0.0)[:, None]
    else:
        w_rows = row_offsets(columns, count, ids, side.stride_class)
        z = products(side.rows, side.weight, x_rows, w_rows, side.width, BK, EVEN, BF16, DOT)
        if side.inverse is not None:
            z *= tl.load(side.inverse + local, mask=real, other=0.0)[None, :]
    return z


@triton.jit
def bias_of(side, ids, columns, count):
    """The classes' biases [BN], 0 where there are none."""
    out = tl.zeros(columns.shape, tl.float32)
    if side.bias is not None:
        real = columns < count
        at = columns
        if ids is not None:
            at = tl.load(ids + columns, mask=real, other=0)
        out = tl.load(side.bias + at, mask=real, other=0.0).to(tl.float32)
    return out


@triton.jit
def both_scores(
    student,  # `ScoreSide`
    teacher,
    near,  # `NearRows` or None
    ids,
    rows,
    local,
    columns,
    n,
    count,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """u, v and u - v, which near agreement has more digits than both. [BM, BN] each"""
    u = scores(student, ids, rows, local, columns, n, count, BK, EVEN, BF16, DOT)
    if near is None:
        v = scores(teacher, ids, rows, local, columns, n, count, BK, TEACHER_EVEN, BF16, DOT)
        if student.bias is not None:
            u += bias_of(student, ids, columns, count)[None, :]
        if teacher.bias is not None:
            v += bias_of(teacher, ids, columns, count)[None, :]
        d = u - v
    else:
        row_near, shrink = near_flags(near, rows, columns, n, count)
        class_near = shrink == shrink
        v = u
        if (tl.min(row_near.to(tl.int32), 0) & tl.min(class_near.to(tl.int32), 0)) == 0:
            v = scores(teacher, ids, rows, local, columns, n, count, BK, EVEN, BF16, DOT)
        if (tl.max(row_near.to(tl.int32), 0) & tl.max(class_near.to(tl.int32), 0)) != 0:
            between = near_difference(
                student,
                teacher,
                near,
                u,
                shrink,
                ids,
                rows,
                local,
                columns,
                n,
                count,
                BK,
                EVEN,
                DOT,
            )
            close = row_near[:, None] & class_near[None, :]
            d = tl.where(close, between, u - v)
            v = tl.where(close, u - between, v)
        else:
            d = u - v
        if student.bias is not None or teacher.bias is not None:
            of_student = bias_of(student, ids, columns, count)
            of_teacher = bias_of(teacher, ids, columns, count)
            u += of_student[None, :]
            v += of_teacher[None, :]
            d += (of_student - of_teacher)[None, :]
    return u, v, d


@triton.jit
def finite(top):
    """A maximum to be subtracted; 0 where there is no score."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def joined(top, mass, new_top, new_mass):
    """Two sums of exponentials as one: maximum, sum, and the second's share of it."""
    high = tl.maximum(top, new_top)
    base = finite(high)
    more = new_mass * tl.exp(new_top - base)
    total = mass * tl.exp(top - base) + more
    return high, total, tl.where(total == 0.0, 0.0, more / total)


@triton.jit
def lifted(kept, reach, mass, top, t, new_reach):
    """The sum of exp(z_p) (exp(c - d) - 1 - (c - d)) about a mean c that is t higher."""
    near = tl.abs(t) < 0.5
    base = tl.exp(top - new_reach)
    apart = tl.exp(top + t - new_reach) - base * (1.0 + t)
    moved = tl.where(near, base * exp_excess(tl.where(near, t, 0.0)), apart)
    return tl.exp(reach + t - new_reach) * kept + mass * moved


@triton.jit
def tile_excess(d, e_p, top_p, mass_p, e_q, top_q):
    """The mean c of d = z_p - z_q under p, the sum of `lifted` about it, and its exponent."""
    mean = tl.sum(e_p * d, 1) / tl.where(mass_p == 0.0, 1.0, mass_p)
    reach = tl.maximum(top_p, top_q + mean)
    base = finite(reach)
    e_p *= tl.exp(top_p - base)[:, None]
    e_q *= tl.exp(top_q + mean - base)[:, None]
    t = mean[:, None] - d
    near = tl.abs(t) < 0.5
    excess = tl.where(near, e_p * exp_excess(tl.where(near, t, 0.0)), e_q - e_p * (1.0 + t))
    return mean, tl.sum(excess, 1), reach


@triton.jit(do_not_specialize=["n", "count", "row_tiles", "steps", "size"])
def divergence_runs(
    student,  # `ScoreSide`
    teacher,
    near,  # `NearRows` or None
    ids,  # [K] int64 or None
    of_row,  # `DivergenceRows`
    part,  # [P, runs, N] float32
    param,
    n,
    count,
    row_tiles,
    steps,  # tiles of a run
    size,  # of a statistic: runs N
    KIND: tl.constexpr,
    LEAD: tl.constexpr,  # "teacher", "student" or ""
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """Of a run of classes: maximum and sum of both sides, leading side first, and the kind's own.

    A lead: the mean of the difference, and the sum of `lifted`. A power: maximum, sum, and the mean
    of u under it. Else the sum of the terms, if it needs no more than the scores.
    """
    row_tile = tl.program_id(0) % row_tiles
    run = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    p_top = tl.full([BM], float("-inf"), tl.float32)
    q_top = p_top
    e_top = p_top
    p_mass = tl.zeros([BM], tl.float32)
    q_mass = p_mass
    e_mass = p_mass
    mean = p_mass
    total = p_mass
    for step in range(0, steps):
        # past the last class tile everything is masked
        columns = (run * steps + step) * BN + tl.arange(0, BN)
        u, v, d = both_scores(
            student, teacher, near, ids, rows, columns, columns, n, count,
            BK, EVEN, TEACHER_EVEN, BF16, DOT,
        )  # fmt: skip
        other = (columns < count)[None, :] & (columns[None, :] != position[:, None])
        p = tl.where(other, u if LEAD == "student" else v, float("-inf"))
        q = tl.where(other, v if LEAD == "student" else u, float("-inf"))
        p_high = tl.max(p, 1)
        q_high = tl.max(q, 1)
        e_p = tl.exp(p - finite(p_high)[:, None])
        e_q = tl.exp(q - finite(q_high)[:, None])
        p_sum = tl.sum(e_p, 1)
        q_sum = tl.sum(e_q, 1)
        p_new, p_all, p_share = joined(p_top, p_mass, p_high, p_sum)
        q_new, q_all, _ = joined(q_top, q_mass, q_high, q_sum)
        if LEAD != "":
            d = tl.where(other, d if LEAD == "student" else -d, 0.0)
            tile_mean, kept, tile_reach = tile_excess(d, e_p, p_high, p_sum, e_q, q_high)
            middle = mean + p_share * (tile_mean - mean)
            reach = finite(tl.maximum(p_new, q_new + middle))
            old_reach = tl.maximum(p_top, q_top + mean)
            total = lifted(total, old_reach, p_mass, p_top, middle - mean, reach)
            total += lifted(kept, tile_reach, p_sum, p_high, middle - tile_mean, reach)
            mean = middle
        elif KIND == "power":
            z = tl.where(other, param * v, float("-inf"))
            high = tl.max(z, 1)
            e = tl.exp(z - finite(high)[:, None])
            mass = tl.sum(e, 1)
            tile_mean = tl.sum(e * tl.where(other, u, 0.0), 1) / tl.where(mass == 0.0, 1.0, mass)
            e_top, e_mass, share = joined(e_top, e_mass, high, mass)
            mean += share * (tile_mean - mean)
        elif KIND != "":
            total += tl.sum(tl.where(other, term(u, v, d, param, KIND), 0.0), 1)
        p_top, p_mass, q_top, q_mass = p_new, p_all, q_new, q_all
    real = rows < n
    out = part + run.to(tl.int64) * n + rows
    tl.store(out, p_top, mask=real)
    tl.store(out + size, p_mass, mask=real)
    tl.store(out + 2 * size, q_top, mask=real)
    tl.store(out + 3 * size, q_mass, mask=real)
    if LEAD != "":
        tl.store(out + 4 * size, mean, mask=real)
        tl.store(out + 5 * size, total, mask=real)
    elif KIND == "power":
        tl.store(out + 4 * size, e_top, mask=real)
        tl.store(out + 5 * size, e_mass, mask=real)
        tl.store(out + 6 * size, mean, mask=real)
    elif KIND != "":
        tl.store(out + 4 * size, total, mask=real)


@triton.jit
def row_values(of_row, rows, n):
    """lse of both sides and their difference; exp(z - lse) is 0 of a row without other classes."""
    real = rows < n
    lse = tl.load(of_row.lse + rows, mask=real, other=float("inf"))
    teacher_lse = tl.load(of_row.teacher_lse + rows, mask=real, other=float("inf"))
    between = tl.load(of_row.between + rows, mask=real, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse, tl.where(teacher_lse == float("-inf"), float("inf"), teacher_lse), between


@triton.jit(do_not_specialize=["n", "count", "row_tiles", "steps", "size"])
def share_runs(
    student,
    teacher,
    near,
    ids,
    of_row,  # with both lse
    part,  # [3, runs, N] float32
    param,
    n,
    count,
    row_tiles,
    steps,
    size,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The second sweep of kinds of probabilities: sums of a run's values and slopes."""
    row_tile = tl.program_id(0) % row_tiles
    run = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    lse, teacher_lse, between = row_values(of_row, rows, n)
    value = tl.zeros([BM], tl.float32)
    sum_s = value
    sum_t = value
    for step in range(0, steps):
        columns = (run * steps + step) * BN + tl.arange(0, BN)
        u, v, d = both_scores(
            student, teacher, near, ids, rows, columns, columns, n, count,
            BK, EVEN, TEACHER_EVEN, BF16, DOT,
        )  # fmt: skip
        other = (columns < count)[None, :] & (columns[None, :] != position[:, None])
        q_s = tl.where(other, tl.exp(u - lse[:, None]), 0.0)
        q_t = tl.where(other, tl.exp(v - teacher_lse[:, None]), 0.0)
        gap = tl.where(other, d - between[:, None], 0.0)
        found, of_s, of_t = shares(q_s, q_t, gap, param, KIND)
        value += tl.sum(found, 1)
        sum_s += tl.sum(of_s, 1)
        sum_t += tl.sum(of_t, 1)
    real = rows < n
    out = part + run.to(tl.int64) * n + rows
    tl.store(out, value, mask=real)
    tl.store(out + size, sum_s, mask=real)
    tl.store(out + 2 * size, sum_t, mask=real)
