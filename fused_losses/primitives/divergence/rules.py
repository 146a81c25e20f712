"""The kinds of divergence: what a class's two scores add to a row, and the slopes (`DIVERGENCES`).

u: the student's scores, v: the teacher's, q_s and q_t their softmaxes over the classes other than
the label. All is exact near agreement: no difference of nearly equal numbers but u - v itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import softplus

# below it exp(r) - 1 - r and y - log(1 + y) are series, which are exact to 4e-17 of their value
SMALL = 0.1


def exp_excess(r: Tensor) -> Tensor:
    """exp(r) - 1 - r >= 0, exact near 0 too."""
    small = r.abs() < SMALL
    s = torch.where(small, r, 0)
    series = torch.ones_like(s)
    for n in range(11, 2, -1):  # r^2 / 2 (1 + r / 3 (1 + r / 4 (...)))
        series = 1 + s / n * series
    return torch.where(small, s * s / 2 * series, torch.expm1(r) - r)


def log_excess(y: Tensor) -> Tensor:
    """y - log(1 + y) >= 0 for y > -1, exact near 0 too."""
    small = y.abs() < SMALL
    s = torch.where(small, y, 0)
    half = s / (2 + s)  # log(1 + y) = 2 atanh(y / (2 + y))
    square = half * half
    series = torch.full_like(s, 1 / 13)
    for n in range(11, 2, -2):
        series = 1 / n + square * series
    return torch.where(small, s * half - 2 * half * square * series, y - torch.log1p(y))


class ClassScores(NamedTuple):
    """A tile of classes as slopes are made of it, [N, T] each, and vectors of the rows, [N, 1]."""

    u: Tensor
    v: Tensor
    q_s: Tensor
    q_t: Tensor
    gap: Tensor  # log q_s - log q_t
    folds: tuple[Tensor, ...]  # [N, 1] each, what the forward found

    @property
    def difference(self) -> Tensor:
        """q_s - q_t, from the gap."""
        shrink = torch.expm1(-self.gap.abs())
        return torch.where(self.gap > 0, -self.q_s, self.q_t) * shrink


DivergenceParams = list[float]
DivergenceSlopes = Callable[
    [ClassScores, tuple[Tensor, ...], DivergenceParams], tuple[Tensor, Tensor]
]


class Divergence(NamedTuple):
    """One kind; of lead, power, term and shares it has one.

    slopes(scores, gradients of the differentiable folds [N, 1] each, params): what the folds' part
    of the loss moves by in u and in v.
    """

    params: tuple[str, ...]
    folds: int
    differentiable: int  # the first folds; the others are kept for the backward
    slopes: DivergenceSlopes
    lead: str = ""  # "teacher": KL(q_t || q_s), "student": KL(q_s || q_t)
    power: bool = False  # log sum exp(eps v), and the mean of u under that softmax
    # summed: one term a class
    term: Callable[[Tensor, Tensor, DivergenceParams], Tensor] | None = None
    # summed once both lse are known: value, slope in log q_s, slope in log q_t
    shares: Callable[[ClassScores, DivergenceParams], tuple[Tensor, Tensor, Tensor]] | None = None


# ---- Kullback-Leibler ---------------------------------------------------------------------------


def _forward_slopes(
    s: ClassScores, grads: tuple, params: DivergenceParams
) -> tuple[Tensor, Tensor]:
    (g,), (value,) = grads, s.folds
    return g * s.difference, -g * s.q_t * (s.gap + value)


def _reverse_slopes(
    s: ClassScores, grads: tuple, params: DivergenceParams
) -> tuple[Tensor, Tensor]:
    (g,), (value,) = grads, s.folds
    return g * s.q_s * (s.gap - value), -g * s.difference


# ---- a power of the teacher's softmax -----------------------------------------------------------


def _power_slopes(s: ClassScores, grads: tuple, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    (to_lse, to_mean), (lse, mean), (eps,) = grads, s.folds, params
    # a row without other classes has lse = -inf, and nothing to share out
    share = (eps * s.v - torch.where(lse == -torch.inf, 0, lse)).exp()
    return to_mean * share, eps * share * (to_lse + to_mean * (s.u - mean))


# ---- of probabilities ---------------------------------------------------------------------------


def _shared_slopes(
    shares: Callable[[ClassScores, DivergenceParams], tuple[Tensor, Tensor]],
) -> DivergenceSlopes:
    """DivergenceSlopes in log q_s and log q_t -> in the scores, by what the softmaxes share out."""

    def slopes(s: ClassScores, grads: tuple, params: DivergenceParams) -> tuple[Tensor, Tensor]:
        _, sum_s, sum_t = s.folds
        of_s, of_t = shares(s, params)
        return grads[0] * (of_s - s.q_s * sum_s), grads[0] * (of_t - s.q_t * sum_t)

    return slopes


def _above(t: Tensor, share: float) -> Tensor:
    """log((1 - share) + share e^t), of any t."""
    shrink = torch.expm1(-t.abs())
    up, down = t + torch.log1p((1 - share) * shrink), torch.log1p(share * shrink)
    near = t.abs() < 1
    return torch.where(
        near,
        torch.log1p(share * torch.expm1(torch.where(near, t, 0))),
        torch.where(t > 0, up, down),
    )


def _jensen_slopes(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    (beta,) = params
    of_s = -(1 - beta) * s.q_s * _above(-s.gap, beta)
    return of_s, -beta * s.q_t * _above(s.gap, 1 - beta)


def _from_mixture(q: Tensor, t: Tensor, share: float, further: Tensor) -> Tensor:
    """q log(q / m) - q + m >= 0, of m = q ((1 - share) + share e^t); further: m - q."""
    near = t.abs() < 1
    close = q * log_excess(share * torch.expm1(torch.where(near, t, 0)))
    return torch.where(near, close, further - q * _above(t, share))


def _jensen_shares(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor, Tensor]:
    (beta,) = params
    of_s = (1 - beta) * _from_mixture(s.q_s, -s.gap, beta, -beta * s.difference)
    of_t = beta * _from_mixture(s.q_t, s.gap, 1 - beta, (1 - beta) * s.difference)
    return of_s + of_t, of_s, of_t


def _variation_slopes(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    sign = s.gap.sign() / 2
    return sign * s.q_s, -sign * s.q_t


def _variation_shares(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor, Tensor]:
    return s.difference.abs() / 2, *_variation_slopes(s, params)


# ---- of each class alone ------------------------------------------------------------------------


def bernoulli_kl(u: Tensor, v: Tensor) -> Tensor:
    """KL(Bern(sigmoid(v)) || Bern(sigmoid(u))), exact near agreement and of any scores."""
    low = torch.where(v > 0, -v, v)  # the rarer outcome's logit; abs has no slope at 0
    h = torch.where(v > 0, v - u, u - v)
    rare = torch.sigmoid(low)
    near = h.abs() < 1
    t = torch.where(near, h, 0)
    close = rare * exp_excess(t) - log_excess(rare * torch.expm1(t))
    return torch.where(near, close, softplus(low + h) - softplus(low) - rare * h)


def sigmoid_difference(u: Tensor, v: Tensor) -> Tensor:
    """sigmoid(u) - sigmoid(v), exact near agreement and of any scores."""
    shrink = torch.expm1(-(u - v).abs())
    high, low = torch.maximum(u, v), torch.minimum(u, v)
    return torch.where(u > v, -1, 1) * torch.sigmoid(high) * torch.sigmoid(-low) * shrink


def _bernoulli_term(u: Tensor, v: Tensor, params: DivergenceParams) -> Tensor:
    (limit,) = params
    return bernoulli_kl(u.clamp(-limit, limit), v.clamp(-limit, limit))


def _bernoulli_slopes(
    s: ClassScores, grads: tuple, params: DivergenceParams
) -> tuple[Tensor, Tensor]:
    (g,), (limit,) = grads, params
    u, v = s.u.clamp(-limit, limit), s.v.clamp(-limit, limit)
    of_u = torch.where(s.u.abs() > limit, 0, g * sigmoid_difference(u, v))
    of_v = g * torch.sigmoid(v) * torch.sigmoid(-v) * (v - u)
    return of_u, torch.where(s.v.abs() > limit, 0, of_v)


def _norm_term(u: Tensor, v: Tensor, params: DivergenceParams) -> Tensor:
    return _bernoulli_term(u - v, torch.zeros_like(u), params)


def _norm_slopes(s: ClassScores, grads: tuple, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    (g,), (limit,) = grads, params
    h = s.u - s.v
    slope = torch.where(h.abs() > limit, 0, g / 2 * torch.tanh(h / 2))
    return slope, -slope


def _squared_slopes(
    s: ClassScores, grads: tuple, params: DivergenceParams
) -> tuple[Tensor, Tensor]:
    slope = 2 * grads[0] * (s.u - s.v)
    return slope, -slope


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "forward": Divergence((), 1, 1, _forward_slopes, lead="teacher"),
        "reverse": Divergence((), 1, 1, _reverse_slopes, lead="student"),
        "power": Divergence(("eps",), 2, 2, _power_slopes, power=True),
        "jensen_shannon": Divergence(
            ("beta",), 3, 1, _shared_slopes(_jensen_slopes), shares=_jensen_shares
        ),
        "total_variation": Divergence(
            (), 3, 1, _shared_slopes(_variation_slopes), shares=_variation_shares
        ),
        # limit: scores beyond it count as it, without gradient; inf: none do
        "bernoulli": Divergence(("limit",), 1, 1, _bernoulli_slopes, term=_bernoulli_term),
        "bernoulli_norm": Divergence(("limit",), 1, 1, _norm_slopes, term=_norm_term),
        "squared": Divergence((), 1, 1, _squared_slopes, term=lambda u, v, _: (u - v) ** 2),
    }
)
