"""Triton kernels on vectors of a row's length before and after a sweep over classes.

One program goes through all rows, so that a sum and a verdict need no second launch.
"""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "classes", "ignored"])
def target_labels(
    labels,  # [N]
    out,  # [N] -1 where ignored, and a stray -1 as -2
    fine,  # [1] 1 if all are in [0, classes) or ignored
    n,
    classes,
    ignored,
    BM: tl.constexpr,
):
    at = tl.arange(0, BM)
    wrong = tl.zeros([BM], tl.int32)
    for start in range(0, n, BM):
        there = start + at < n
        label = tl.load(labels + start + at, mask=there, other=0)
        skipped = label == ignored
        bad = ((label < 0) | (label >= classes)) & (skipped == 0) & there
        wrong |= bad.to(tl.int32)
        named = tl.where(skipped, -1, tl.where(label == -1, -2, label))
        tl.store(out + start + at, named.to(out.dtype.element_ty), mask=there)
    tl.store(fine, (tl.max(wrong, 0) == 0).to(tl.int8))


@triton.jit
def wide(high, low, BM: tl.constexpr):
    """A float64 of the two floats that it was passed in. [BM]"""
    return tl.full([BM], high, tl.float64) + tl.full([BM], low, tl.float64)


@triton.jit
def log1p(e):
    """log(1 + e) of e in [0, 1], exact near 0, too."""
    u = e + 1.0
    # log(u) is of the rounded sum; its error and that of u - 1 are one
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def moved_cosine(t, cos_m, sin_m, step, BEYOND: tl.constexpr):
    """cos(acos(t) + m) and its slope in t, which is 0 from |t| = 1 on."""
    inside = tl.abs(t) < 1.0
    known = t == t
    end = tl.where(t < 0.0, -1.0, 1.0)
    near = tl.where(inside, t, end)
    sine = tl.sqrt((1.0 - near) * (1.0 + near))
    value = near * cos_m - sine * sin_m
    slope = tl.where(inside, cos_m + near * (sin_m / tl.where(inside, sine, 1.0)), 0.0)
    if BEYOND == "linear":
        within = near > -cos_m
        value = tl.where(within, value, t - step)
        slope = tl.where(within, slope, 1.0)
    elif BEYOND == "easy":
        value = tl.where(t > 0.0, value, t)
        slope = tl.where(t > 0.0, slope, 1.0)
    elif BEYOND == "monotone":
        within = near > -cos_m
        value = tl.where(within, value, -value - 2.0)
        slope = tl.where(within, slope, -slope)
    return tl.where(known, value, t), tl.where(known, slope, t)


@triton.jit(do_not_specialize=["n"])
def target_losses(
    lse,  # [N] float64
    target,  # [N] float64
    labels,  # [N], -1: none
    loss,  # [1]
    slopes,  # [2, N] float64, of the loss in lse and target
    scale,  # each number in two floats
    scale_low,
    cos_m,
    cos_low,
    sin_m,
    sin_low,
    step,  # linear beyond pi: t - step
    step_low,
    m3,
    m3_low,
    n,
    MARGIN: tl.constexpr,  # "none", "minus" or "angle"
    BEYOND: tl.constexpr,
    MEAN: tl.constexpr,
    BM: tl.constexpr,
):
    at = tl.arange(0, BM)
    inverse = 1.0
    if MEAN:
        present = tl.zeros([BM], tl.int32)
        for start in range(0, n, BM):
            label = tl.load(labels + start + at, mask=start + at < n, other=-1)
            present += (label != -1).to(tl.int32)
        count = tl.maximum(tl.sum(present, 0), 1).to(tl.float64)
        inverse = 1.0 / count
    factor = wide(scale, scale_low, BM)
    total = tl.zeros([BM], tl.float64)
    for start in range(0, n, BM):
        there = start + at < n
        counts = tl.load(labels + start + at, mask=there, other=-1) != -1
        others = tl.load(lse + start + at, mask=there, other=0.0)
        t = tl.load(target + start + at, mask=there, other=0.0) / factor
        slope = tl.full([BM], 1.0, tl.float64)
        if MARGIN != "none":
            # a margin may be finite there, but a fault must show
            fault = t == float("inf")
            t = tl.where(fault, float("nan"), t)
        if MARGIN == "angle":
            cosine, sine = wide(cos_m, cos_low, BM), wide(sin_m, sin_low, BM)
            t, slope = moved_cosine(t, cosine, sine, wide(step, step_low, BM), BEYOND)
        if MARGIN != "none":
            t = t - wide(m3, m3_low, BM)
            slope = tl.where(fault, 0.0, slope)
        z = t * factor
        reached = (others != -float("inf")) | (z != z)
        z = tl.where(z == float("inf"), float("nan"), z)
        some = others != -float("inf")
        gap = tl.where(some, others, 0.0) - z
        e = tl.exp(-tl.abs(gap))
        value = tl.where(gap > 0.0, gap, 0.0) + log1p(e)
        share = tl.where(gap > 0.0, 1.0, e) / (1.0 + e)
        # against nothing 0, and a fault as a fault
        value = tl.where(some, value, z * 0.0)
        total += tl.where(counts, value, 0.0)
        share = share * inverse
        # where a margin is flat, so is the loss, whatever its share is
        along = tl.where(reached & (slope != 0.0), -share * slope, 0.0)
        share = tl.where(some, share, 0.0)
        tl.store(slopes + start + at, tl.where(counts, share, 0.0), mask=there)
        tl.store(slopes + n + start + at, tl.where(counts, along, 0.0), mask=there)
    tl.store(loss, (tl.sum(total, 0) * inverse).to(loss.dtype.element_ty))
