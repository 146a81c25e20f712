"""The rules of a fold over classes in Triton: terms of a cosine and their slopes (`rules.py`)."""

# Triton types what its functions return as nothing that can be unpacked
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.primitives.pairs.triton_terms import softplus
from fused_losses.primitives.row_statistics.triton_backward import bent_slope
from fused_losses.primitives.row_statistics.triton_forward import bent

HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def arc_cosine(c):
    """acos of c, clamped to [-1, 1]: within 3e-7, by Cephes' polynomial of asin up to 1/2."""
    size = tl.abs(c)
    size = tl.where(size > 1.0, 1.0, size)
    far = size > 0.5
    # asin s = pi/2 - 2 asin sqrt((1 - s) / 2)
    square = tl.where(far, 0.5 * (1.0 - size), size * size)
    root = tl.where(far, tl.sqrt(square), size)
    series = 4.2163199048e-2 * square + 2.4181311049e-2
    series = (series * square + 4.5470025998e-2) * square + 7.4953002686e-2
    series = (series * square + 1.6666752422e-1) * square
    sine = root + root * series
    near = tl.where(c < 0.0, HALF_PI + sine, HALF_PI - sine)
    high = 2.0 * sine
    return tl.where(far, tl.where(c < 0.0, 2.0 * HALF_PI - high, high), near)


@triton.jit
def power(base, exponent):
    """base^exponent of base >= 0; exponent >= 0."""
    raised = tl.exp(exponent * tl.log(base))
    return tl.where(base == 0.0, tl.where(exponent == 0.0, 1.0, 0.0), raised)


@triton.jit
def above_zero(c):
    """(c + 1) / 2, not below 0."""
    half = 0.5 * (c + 1.0)
    return tl.where(half < 0.0, 0.0, half)


@triton.jit
def sphereface2_score(c, v, p):
    value = 2.0 * power(above_zero(c), p[2]) - 1.0
    return p[0] * (value + p[1]) + v[0]


@triton.jit
def terms(c, v, p, RULE: tl.constexpr, BENT: tl.constexpr):
    """What a cosine adds to the first and to the second statistic (the same again: there is none).

    v: the row's values, four of them; p: the rule's params, four of them.
    """
    if RULE == "sface":
        term = tl.sigmoid(p[0] * (p[1] - arc_cosine(c))) * c
        return term, term
    elif RULE == "sphereface2":
        z = sphereface2_score(c, v, p)
        return softplus(z), tl.sigmoid(z)
    else:  # softmax, summed_softmax
        z = c
        if BENT:
            z = bent(c, v[0], v[1], v[2], v[3])
        z = p[0] * z
        return z, z


@triton.jit
def slopes(c, v, p, RULE: tl.constexpr, BENT: tl.constexpr):
    """The derivatives of `terms` in c, of what is added to a sum or to a logarithm's exponent."""
    if RULE == "sface":
        slope = tl.sigmoid(p[0] * (p[1] - arc_cosine(c)))
        return slope, slope
    elif RULE == "sphereface2":
        share = tl.sigmoid(sphereface2_score(c, v, p))
        of_score = p[0] * p[2] * power(above_zero(c), p[2] - 1.0)
        # straight through
        slope = share * tl.where(p[3] != 0.0, p[0], of_score)
        return slope, slope * (1.0 - share)
    else:
        slope = tl.zeros_like(c) + p[0]
        if BENT:
            slope = p[0] * bent_slope(c, v[0], v[2], v[3])
        return slope, slope
