"""Formulas in 60 digits, for what float64 rounds: near rows, angles near 0 and pi, log-sums.

Written over lists of numbers, with no tensor and nothing of the package. Gradients are differences
of step 1e-20, whose own error is of its square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
from mpmath import mpf

DIGITS = 60
STEP = mpf(10) ** -20
Rows = list[list[Any]]
Exact = Callable[[Rows, Rows], list[Any]]  # x, y: values, a flat list


def dot(u: list[Any], v: list[Any]) -> Any:
    return mpmath.fdot(u, v)


def apart(u: list[Any], v: list[Any]) -> list[Any]:
    return [a - b for a, b in zip(u, v, strict=True)]


def length(u: list[Any]) -> Any:
    return mpmath.sqrt(dot(u, u))


def direction(u: list[Any]) -> list[Any]:
    size = length(u)
    return [a / size for a in u]


def pairs(f: Callable[[list[Any], list[Any]], Any]) -> Exact:
    return lambda x, y: [f(u, v) for u in x for v in y]


def cosine_of(u: list[Any], v: list[Any]) -> Any:
    return dot(u, v) / (length(u) * length(v))


def moved(u: list[Any]) -> list[Any]:
    mean = mpmath.fsum(u) / len(u)
    return [a - mean for a in u]


def shares(u: list[Any]) -> list[Any]:
    total = mpmath.fsum(map(abs, u))
    return [abs(a) / total for a in u]


def jensenshannon(u: list[Any], v: list[Any]) -> Any:
    p, q = shares(u), shares(v)
    parts = [
        a * mpmath.log(2 * a / (a + b)) + b * mpmath.log(2 * b / (a + b))
        for a, b in zip(p, q, strict=True)
    ]
    return mpmath.sqrt(mpmath.fsum(parts) / 2)


def hellinger(u: list[Any], v: list[Any]) -> Any:
    roots = [mpmath.sqrt(abs(a)) - mpmath.sqrt(abs(b)) for a, b in zip(u, v, strict=True)]
    return length(roots) / mpmath.sqrt(2)


def kl(u: list[Any], v: list[Any]) -> Any:
    return mpmath.fsum(abs(a) * mpmath.log(abs(a / b)) for a, b in zip(u, v, strict=True))


def poincare(u: list[Any], v: list[Any]) -> Any:
    u, v = [a / 4 for a in u], [b / 4 for b in v]  # as the draws' case calls it
    d = apart(u, v)
    return mpmath.acosh(1 + 2 * dot(d, d) / ((1 - dot(u, u)) * (1 - dot(v, v))))


def log_sum(z: list[Any]) -> Any:
    return mpmath.log(mpmath.fsum(map(mpmath.exp, z)))


def info_nce(x: Rows, y: Rows) -> list[Any]:
    """Temperature 0.2."""
    losses = []
    for i, u in enumerate(x):
        z = [dot(u, v) / mpf(0.2) for v in y]
        losses.append(log_sum(z) - z[i])
    return [mpmath.fsum(losses) / len(losses)]


def sigmoid(x: Rows, y: Rows) -> list[Any]:
    """Scale 3, bias -2."""
    total = mpf(0)
    for i, u in enumerate(x):
        for j, v in enumerate(y):
            z = 3 * dot(u, v) - 2
            total += mpmath.log1p(mpmath.exp(-z if i == j else z))
    return [total / len(x)]


def kernel_mean(x: Rows, y: Rows) -> Any:
    k = [mpmath.exp(-dot(apart(u, v), apart(u, v)) / (2 * mpf(1.3) ** 2)) for u in x for v in y]
    return mpmath.fsum(k) / len(k)


def mmd(x: Rows, y: Rows) -> list[Any]:
    return [kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)]


def uniformity(x: Rows, y: Rows) -> list[Any]:
    rows = [direction(u) for u in x]
    z = [
        -2 * dot(apart(u, v), apart(u, v))
        for i, u in enumerate(rows)
        for j, v in enumerate(rows)
        if i != j
    ]
    return [log_sum(z) - mpmath.log(len(z))]


def arcface(x: Rows, w: Rows) -> list[Any]:
    """cos(angle + 0.5) of the row's own class at scale 16."""
    losses = []
    for i, u in enumerate(x):
        z = [16 * cosine_of(u, v) for v in w]
        z[i] = 16 * mpmath.cos(mpmath.acos(cosine_of(u, w[i])) + mpf(0.5))
        losses.append(log_sum(z) - z[i])
    return [mpmath.fsum(losses) / len(losses)]


# by the names of the draws' cases: the fields that are x and y, and the formula
FORMULAS: dict[str, tuple[tuple[str, str], Exact]] = {
    **{
        f"pairwise_{name}": (("x", "y"), pairs(f))
        for name, f in {
            "euclidean": lambda u, v: length(apart(u, v)),
            "cosine": lambda u, v: 1 - cosine_of(u, v),
            "correlation": lambda u, v: 1 - cosine_of(moved(u), moved(v)),
            "angular": lambda u, v: mpmath.acos(cosine_of(u, v)) / mpmath.pi,
            "kl": kl,
            "jensenshannon": jensenshannon,
            "hellinger": hellinger,
            "poincare": poincare,
        }.items()
    },
    "info_nce": (("x", "y"), info_nce),
    "sigmoid_contrastive": (("x", "y"), sigmoid),
    "mmd": (("x", "other"), mmd),
    "uniformity": (("x", "y"), uniformity),
    "margin_ArcFace_none": (("x", "w"), arcface),
}


def exact(
    name: str, x: list[list[float]], y: list[list[float]], weight: list[float]
) -> list[list[float]]:
    """Values, and the gradients in x and y of their weighted sum; each rounded to float64 once."""
    with mpmath.workdps(DIGITS):
        f = FORMULAS[name][1]
        given = [[[mpf(a) for a in row] for row in side] for side in (x, y)]
        out = [[float(v) for v in f(*given)]]
        for side in given:
            slopes = []
            for row in side:
                for k, kept in enumerate(row):
                    ends = []
                    for step in (STEP, -STEP):
                        row[k] = kept + step
                        ends.append(mpmath.fdot(f(*given), map(mpf, weight)))
                    row[k] = kept
                    slopes.append(float((ends[0] - ends[1]) / (2 * STEP)))
            out.append(slopes)
        return out
