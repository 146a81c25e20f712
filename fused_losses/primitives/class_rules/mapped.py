"""Terms of scores that a whole row has a say in: u_j = a(z_j) e^l, the same l for all of a row.

a(z) = z, with the row's sum of |z| in l, or softplus(z), with the sum of those. What l was made of
comes before the sweep; that the sums have gradients, too, is what the other statistics are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import softplus

TINY = 1e-30  # stands for what is not positive, below a logarithm


def log_softplus(z: Tensor) -> Tensor:
    """log log(1 + e^z), also where e^z is no number: there z."""
    far = z < -15
    near = softplus(torch.where(far, 0, z)).log()
    return torch.where(far, z - torch.where(far, z, 0).exp() / 2, near)


def log_softplus_slope(z: Tensor) -> Tensor:
    """sigmoid(z) / softplus(z)"""
    far = z < -15
    near = torch.where(far, 0, z)
    return torch.where(far, 1 - torch.where(far, z, 0).exp() / 2, near.sigmoid() / softplus(near))


def mapped(z: Tensor, lift: Tensor, soft: bool) -> Tensor:
    """u of a score, and of the row's l."""
    return (log_softplus(z) + lift).exp() if soft else z * lift.exp()


def _mapped_slope(z: Tensor, lift: Tensor, soft: bool) -> Tensor:
    if soft:
        return mapped(z, lift, True) * log_softplus_slope(z)
    return lift.exp().expand_as(z)


def _signed_logs(u: Tensor, soft: bool) -> list[Tensor]:
    return [side.clamp_min(TINY).log() for side in ((u,) if soft else (u, -u))]


def mapped_terms(
    c: Tensor, values: Tensor | None, params: list[float], soft: bool
) -> tuple[Tensor, ...]:
    """u t; u t + log u of u > 0, and + log -u of u < 0, whose sums are a mean of u; what l sums."""
    assert values is not None
    z, (lift, sharpness) = params[0] * c, values
    u = mapped(z, lift, soft)
    score = u * sharpness
    of_row = log_softplus(z) if soft else z.abs()
    return score, *(score + log for log in _signed_logs(u, soft)), of_row


def mapped_slopes(
    c: Tensor, values: Tensor | None, params: list[float], soft: bool
) -> tuple[Tensor, ...]:
    assert values is not None
    z, (lift, sharpness) = params[0] * c, values
    u, slope = mapped(z, lift, soft), params[0] * _mapped_slope(z, lift, soft)
    share = slope / torch.where(u.abs() > TINY, u, 1)
    logs = [torch.where(side > TINY, share, 0) for side in ((u,) if soft else (u, -u))]
    of_row = params[0] * (log_softplus_slope(z) if soft else z.sign())
    return slope * sharpness, *(slope * sharpness + log for log in logs), of_row


def row_sum_terms(
    c: Tensor,
    values: Tensor | None,
    params: list[float],
    soft: bool,
) -> tuple[Tensor]:
    """What l sums, alone."""
    z = params[0] * c
    return (log_softplus(z) if soft else z.abs(),)


def row_sum_slopes(
    c: Tensor,
    values: Tensor | None,
    params: list[float],
    soft: bool,
) -> tuple[Tensor]:
    z = params[0] * c
    return (params[0] * (log_softplus_slope(z) if soft else z.sign()),)


def _share(u: Tensor, values: Tensor, params: list[float]) -> tuple[Tensor, Tensor]:
    """p = e^{u t - L}, and q = (p + eps) / (1 + K eps)."""
    _, eps, count = params
    p = (u * values[1] - values[2]).exp()
    return p, (p + eps) / (1 + count * eps)


def divergence_terms(
    c: Tensor, values: Tensor | None, params: list[float], soft: bool
) -> tuple[Tensor]:
    """q log(K q) of the softmax of u t, whose denominator's logarithm is L."""
    assert values is not None
    _, q = _share(mapped(params[0] * c, values[0], soft), values, params)
    return (q * (params[2] * q).log(),)


def divergence_slopes(
    c: Tensor, values: Tensor | None, params: list[float], soft: bool
) -> tuple[Tensor]:
    assert values is not None
    z = params[0] * c
    p, q = _share(mapped(z, values[0], soft), values, params)
    slope = params[0] * _mapped_slope(z, values[0], soft) * values[1]
    return (slope * p / (1 + params[2] * params[1]) * ((params[2] * q).log() + 1),)


def steepest_mapped(values: Tensor | None) -> Tensor | float:
    """A bound on the slopes of the scores and of what l sums, [N], for a scale of 1."""
    if values is None:
        return 1.0
    return (values[0].exp() * values[1].abs().clamp_min(1)).clamp_min(1)
