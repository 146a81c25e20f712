"""What a class adds to a row, and the slopes, in Triton: the twin of `rules.py`, named as it is.

u: the student's scores, v: the teacher's; gap = log q_s - log q_t. All in float32 and exact near
agreement: no difference of nearly equal numbers but u - v itself.
"""

# Triton types what it iterates over as nothing that can be gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def exp_excess(r):
    """exp(r) - 1 - r >= 0 of |r| < 0.5."""
    series = 1.0 + r * (1.0 / 10)
    for n in tl.static_range(9, 2, -1):
        series = 1.0 + r * (1.0 / n) * series
    return 0.5 * r * r * series


@triton.jit
def expm1(r):
    small = tl.abs(r) < 0.5
    s = tl.where(small, r, 0.0)
    return tl.where(small, s + exp_excess(s), tl.exp(r) - 1.0)


@triton.jit
def log_excess(y):
    """y - log(1 + y) >= 0 of y > -1."""
    small = tl.abs(y) < 0.35
    s = tl.where(small, y, 0.0)
    half = s / (2.0 + s)  # log(1 + y) = 2 atanh(y / (2 + y))
    square = half * half
    series = 1.0 / 9 + square * (1.0 / 11)
    series = 1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * series))
    return tl.where(small, s * half - 2.0 * half * square * series, y - tl.log(1.0 + y))


@triton.jit
def log1p(y):
    return y - log_excess(y)


@triton.jit
def difference(q_s, q_t, gap):
    """q_s - q_t."""
    return tl.where(gap > 0.0, -q_s, q_t) * expm1(-tl.abs(gap))


@triton.jit
def mixed(gap, param):
    """y of m = q (1 + y), q the larger of q_s and q_t, m = param q_t + (1 - param) q_s."""
    return tl.where(gap > 0.0, param, 1.0 - param) * expm1(-tl.abs(gap))


@triton.jit
def jensen_shares(q_s, q_t, gap, param):
    """Slopes in log q_s and log q_t, each summed with what makes its terms not negative.

    q log(q / m) - q + m is q (y - log(1 + y)) of the larger q; of the smaller its own y may be
    large, and there its terms are no longer nearly equal.
    """
    more = gap > 0.0
    share = tl.where(more, param, 1.0 - param)  # of the smaller in the mixture
    shrink = expm1(-tl.abs(gap))
    excess = log_excess(share * shrink)
    larger = tl.where(more, q_s, q_t)
    smaller = tl.where(more, q_t, q_s)
    near = tl.abs(gap) < 1.0
    grown = tl.where(near, -(1.0 - share) * shrink / (1.0 + shrink), 0.0)
    below = -tl.abs(gap) - (share * shrink - excess)  # log(smaller / m)
    far = smaller * below - (1.0 - share) * shrink * larger
    of_larger = (1.0 - share) * larger * excess
    of_smaller = share * tl.where(near, smaller * log_excess(grown), far)
    return tl.where(more, of_larger, of_smaller), tl.where(more, of_smaller, of_larger)


@triton.jit
def shares(q_s, q_t, gap, param, KIND: tl.constexpr):
    """Value, slope in log q_s, slope in log q_t."""
    if KIND == "jensen_shannon":
        of_s, of_t = jensen_shares(q_s, q_t, gap, param)
        value = of_s + of_t
    else:
        tl.static_assert(KIND == "total_variation")
        sign = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
        value = 0.5 * tl.abs(difference(q_s, q_t, gap))
        of_s = sign * q_s
        of_t = -sign * q_t
    return value, of_s, of_t


@triton.jit
def within(z, limit):
    """z where it is within the limit, which it counts as elsewhere; NaN stays NaN."""
    return tl.where(z > limit, limit, tl.where(z < -limit, -limit, z))


@triton.jit
def between_within(u, v, d, limit):
    """The difference of both within the limit, of d = u - v."""
    plain = (tl.abs(u) <= limit) & (tl.abs(v) <= limit)
    return tl.where(plain, d, within(u, limit) - within(v, limit))


@triton.jit
def bernoulli_kl(v, d):
    """KL(Bern(sigmoid(v)) || Bern(sigmoid(u))), d = u - v."""
    h = tl.where(v > 0.0, -d, d)
    odds = tl.exp(-tl.abs(v))  # of the rarer outcome
    rare = odds / (1.0 + odds)
    near = tl.abs(h) < 0.5
    t = tl.where(near, h, 0.0)
    excess = exp_excess(t)
    close = rare * excess - log_excess(rare * (t + excess))
    # softplus(u) - softplus(v)
    z = h - tl.abs(v)
    far = tl.where(z > 0.0, z, 0.0) + log1p(tl.exp(-tl.abs(z))) - log1p(odds)
    return tl.where(near, close, far - rare * h)


@triton.jit
def sigmoid_difference(u, v, d):
    """sigmoid(u) - sigmoid(v), d = u - v."""
    more = d > 0.0
    high, low = tl.where(more, u, v), tl.where(more, v, u)
    size = -tl.sigmoid(high) * tl.sigmoid(-low) * expm1(-tl.abs(d))
    return tl.where(more, size, -size)


@triton.jit
def term(u, v, d, param, KIND: tl.constexpr):
    if KIND == "squared":
        value = d * d
    elif KIND == "bernoulli_norm":
        value = bernoulli_kl(tl.zeros_like(d), within(d, param))
    else:
        value = bernoulli_kl(within(v, param), between_within(u, v, d, param))
    return value


@triton.jit
def slope(u, v, d, q_s, q_t, gap, fold, sum_s, sum_t, g, g_more, param, KIND, TEACHER):
    """What the folds' part of the loss moves by in u, or with TEACHER in v.

    d: u - v, which near agreement has more digits than both; fold: the row's first fold; sum_s,
    sum_t: the second (of power: the mean) and the third; g, g_more: the first two's gradients.
    """
    if KIND == "forward":
        out = -g * q_t * (gap + fold) if TEACHER else g * difference(q_s, q_t, gap)
    elif KIND == "reverse":
        out = -g * difference(q_s, q_t, gap) if TEACHER else g * q_s * (gap - fold)
    elif KIND == "power":
        # a row without other classes has lse = -inf, and nothing to share out
        share = tl.exp(param * v - tl.where(fold == float("-inf"), 0.0, fold))
        out = param * share * (g + g_more * (u - sum_s)) if TEACHER else g_more * share
    elif KIND == "jensen_shannon":
        larger = log1p(mixed(gap, param))  # log(m / the larger)
        if TEACHER:
            out = g * q_t * (param * (tl.where(gap > 0.0, -gap, 0.0) - larger) - sum_t)
        else:
            out = g * q_s * ((1.0 - param) * (tl.where(gap < 0.0, gap, 0.0) - larger) - sum_s)
    elif KIND == "total_variation":
        sign = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
        out = -g * q_t * (sign + sum_t) if TEACHER else g * q_s * (sign - sum_s)
    elif KIND == "bernoulli":
        a, b = within(u, param), within(v, param)
        h = between_within(u, v, d, param)
        if TEACHER:
            rare = tl.sigmoid(b) * tl.sigmoid(-b)
            out = tl.where(tl.abs(v) > param, 0.0, g * rare * -h)
        else:
            out = tl.where(tl.abs(u) > param, 0.0, g * sigmoid_difference(a, b, h))
    elif KIND == "bernoulli_norm":
        out = tl.where(tl.abs(d) > param, 0.0, g * sigmoid_difference(d, tl.zeros_like(d), d))
        out = -out if TEACHER else out
    else:
        tl.static_assert(KIND == "squared")
        out = -2.0 * g * d if TEACHER else 2.0 * g * d
    return out
