"""Slopes of distillation's kinds in a row's scores, of 200 digits and more.

Written over lists of numbers, with no tensor and nothing of the package.
"""

from __future__ import annotations

from typing import Any

import mpmath
from mpmath import mpf

DIGITS = 220  # a share of e^-400 beside 1


def _softmax(z: list[Any]) -> tuple[list[Any], list[Any]]:
    """Its shares, and their logarithms."""
    lse = mpmath.log(mpmath.fsum(map(mpmath.exp, z)))
    logs = [a - lse for a in z]
    return [mpmath.exp(a) for a in logs], logs


def _in_scores(shares: list[Any], slopes: list[Any]) -> list[float]:
    """Slopes in the logarithms of shares, in the scores."""
    total = mpmath.fsum(slopes)
    return [float(g - p * total) for p, g in zip(shares, slopes, strict=True)]


def slopes(
    kind: str, student: list[float], teacher: list[float], label: int, option: float = 1.0
) -> tuple[list[float], list[float]]:
    """By the student's scores and by the teacher's; option: beta, alpha."""
    with mpmath.workdps(DIGITS):
        s, log_s = _softmax([mpf(a) for a in student])
        t, log_t = _softmax([mpf(a) for a in teacher])
        o = mpf(option)
        found = [
            _of_class(kind, s[j], log_s[j], t[j], log_t[j], j == label, o) for j in range(len(s))
        ]
        return _in_scores(s, [a for a, _ in found]), _in_scores(t, [b for _, b in found])


def _of_class(
    kind: str, s: Any, log_s: Any, t: Any, log_t: Any, own: bool, o: Any
) -> tuple[Any, Any]:
    if kind == "kl":
        return -t, t * (log_t - log_s + 1)
    if kind == "reverse_kl":
        return s * (log_s - log_t + 1), -s
    if kind == "tv":
        sign = mpmath.sign(s - t) / 2
        return sign * s, -sign * t
    if kind == "jsd":
        m = o * t + (1 - o) * s
        return (1 - o) * s * mpmath.log(s / m), o * t * mpmath.log(t / m)
    share = 1 if kind in ("soft_ce", "ofa") else o
    hot = (1 - share) * own
    return -(hot + share * t), -share * t * log_s
