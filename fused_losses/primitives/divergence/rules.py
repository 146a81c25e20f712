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

from fused_losses.base.numerics import exp_excess, log_excess, softplus


class Mean(NamedTuple):
    """A mean as the value of its heaviest class and what the others make of it.

    Where one class has nearly all of the weight its value less the mean is the offset, a sum of
    small terms; of the mean alone nothing would be left but its rounding.
    """

    anchor: Tensor
    offset: Tensor

    @property
    def value(self) -> Tensor:
        return self.anchor + self.offset

    def of(self, values: Tensor) -> Tensor:
        """The values less the mean."""
        return (values - self.anchor) - self.offset

    def joined(self, share: Tensor, other: Mean, rest: Tensor) -> Mean:
        """This one by its share and the other by the rest."""
        apart, leads = other.anchor - self.anchor, share >= rest
        here = self.offset + torch.where(leads, 0, -apart)
        there = other.offset + torch.where(leads, apart, 0)
        anchor = torch.where(leads, self.anchor, other.anchor)
        return Mean(anchor, share * here + rest * there)


class ClassScores(NamedTuple):
    """A tile of classes as slopes are made of it, [N, T] each, and vectors of the rows, [N, 1]."""

    u: Tensor
    v: Tensor
    q_s: Tensor
    q_t: Tensor
    gap: Tensor  # log q_s - log q_t, of a power log q_s - log of its softmax
    folds: tuple[Tensor, ...]  # [N, 1] each, what the forward found
    means: tuple[Mean, ...]  # [N, 1] each: what slopes are less (`Divergence.kept`)

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
    # of those, the slopes a unit of q_s and of q_t
    logs: Callable[[ClassScores, DivergenceParams], tuple[Tensor, Tensor]] | None = None

    @property
    def kept(self) -> int:
        """Rows of numbers beside the folds, pairs (`Mean`): lse - teacher_lse (of power lse - P).

        Then the means of u - v under the leading softmax, of u under the power's, or of `logs`
        under q_s and under q_t.
        """
        return 6 if self.shares else 4 if self.lead or self.power else 0


def means_of(kind: str, lse: Tensor, teacher_lse: Tensor, folds: Tensor) -> list[Mean]:
    """What the forward kept as pairs, [N] each; of folds that others joined, what these tell."""
    rule = DIVERGENCES[kind]
    if not rule.kept:
        return []
    if folds.shape[0] > rule.folds:
        kept = folds[rule.folds :]
        pairs = [Mean(*kept[at : at + 2].unbind()) for at in range(0, rule.kept, 2)]
        return [_in_digits(pair) for pair in pairs]
    between = torch.where(lse == -torch.inf, 0, lse - teacher_lse)
    if rule.power:
        between, rest = torch.where(lse == -torch.inf, 0, lse - folds[0]), [folds[1]]
    elif rule.lead:
        rest = [between - folds[0] if rule.lead == "teacher" else between + folds[0]]
    else:
        rest = list(folds[1:3])
    return [Mean(value, torch.zeros_like(value)) for value in (between, *rest)]


def _in_digits(mean: Mean) -> Mean:
    """The same with no more of it beyond the anchor than there is of it."""
    whole = mean.value
    own = mean.offset.abs() <= whole.abs()
    return Mean(torch.where(own, mean.anchor, whole), torch.where(own, mean.offset, 0))


# ---- Kullback-Leibler ---------------------------------------------------------------------------


def _forward_slopes(
    s: ClassScores, grads: tuple, params: DivergenceParams
) -> tuple[Tensor, Tensor]:
    (g,), (mean,) = grads, s.means
    return g * s.difference, -g * s.q_t * mean.of(s.u - s.v)


def _reverse_slopes(
    s: ClassScores, grads: tuple, params: DivergenceParams
) -> tuple[Tensor, Tensor]:
    (g,), (mean,) = grads, s.means
    return g * s.q_s * mean.of(s.u - s.v), -g * s.difference


# ---- a power of the teacher's softmax -----------------------------------------------------------


def _power_slopes(s: ClassScores, grads: tuple, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    """That in u without what lse takes with it, to_mean q_s."""
    (to_lse, to_mean), (lse, _), (mean,), (eps,) = grads, s.folds, s.means, params
    # a row without other classes has lse = -inf, and nothing to share out
    share = (eps * s.v - torch.where(lse == -torch.inf, 0, lse)).exp()
    beside = s._replace(q_t=share).difference  # q_s - share
    return -to_mean * beside, eps * share * (to_lse + to_mean * mean.of(s.u))


# ---- of probabilities ---------------------------------------------------------------------------


def _shared_slopes(
    logs: Callable[[ClassScores, DivergenceParams], tuple[Tensor, Tensor]],
) -> DivergenceSlopes:
    """Slopes in log q_s and log q_t -> in the scores, by what the softmaxes share out."""

    def slopes(s: ClassScores, grads: tuple, params: DivergenceParams) -> tuple[Tensor, Tensor]:
        found = zip((s.q_s, s.q_t), s.means, logs(s, params), strict=True)
        of_s, of_t = (grads[0] * q * mean.of(slope) for q, mean, slope in found)
        return of_s, of_t

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


def _jensen_logs(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    (beta,) = params
    return -(1 - beta) * _above(-s.gap, beta), -beta * _above(s.gap, 1 - beta)


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


def _variation_logs(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor]:
    sign = s.gap.sign() / 2
    return sign, -sign


def _variation_shares(s: ClassScores, params: DivergenceParams) -> tuple[Tensor, Tensor, Tensor]:
    of_s, of_t = _variation_logs(s, params)
    return s.difference.abs() / 2, of_s * s.q_s, of_t * s.q_t


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
            ("beta",),
            3,
            1,
            _shared_slopes(_jensen_logs),
            shares=_jensen_shares,
            logs=_jensen_logs,
        ),
        "total_variation": Divergence(
            (),
            3,
            1,
            _shared_slopes(_variation_logs),
            shares=_variation_shares,
            logs=_variation_logs,
        ),
        # limit: scores beyond it count as it, without gradient; inf: none do
        "bernoulli": Divergence(("limit",), 1, 1, _bernoulli_slopes, term=_bernoulli_term),
        "bernoulli_norm": Divergence(("limit",), 1, 1, _norm_slopes, term=_norm_term),
        "squared": Divergence((), 1, 1, _squared_slopes, term=lambda u, v, _: (u - v) ** 2),
    }
)
