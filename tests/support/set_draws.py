"""Gaussian classes, Grams and the median of distances, for the draws; literal formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from class_pair_draws import best
from metric_draws import inverse
from pair_cases import Case
from pair_rows import Inputs, distance, proxies, samples, unit
from row_option_draws import row
from torch import Tensor

import fused_losses.functional as fl

W = ("x", "w")


def covariances(means: Tensor) -> Tensor:
    """A fixed matrix a class."""
    factor = 1 + torch.arange(len(means), dtype=torch.float64) % 3
    return factor[:, None, None] * inverse(means.shape[1]).inverse()


def squares(x: Tensor, means: Tensor) -> Tensor:
    apart, of = x[:, None] - means, covariances(means).inverse()
    return torch.einsum("ncd,cde,nce->nc", apart, of.to(apart), apart)


def densities(x: Tensor, means: Tensor) -> Tensor:
    spread = torch.logdet(covariances(means)) + means.shape[1] * math.log(2 * math.pi)
    return -(squares(x, means) + spread.to(x)) / 2


def diagonal(x: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    # a row with inf is one with NaN
    apart = x[:, None] - means + (0 * x).sum(dim=1)[:, None, None] + (0 * means).sum(dim=1)[:, None]
    return -(apart.square() / variance + (2 * math.pi * variance).log()).sum(dim=2) / 2


def variances(t: Inputs) -> Tensor:
    return 0.5 + (torch.arange(t.w.numel()).view(t.w.shape) % 3).to(t.w.dtype)


def priors(t: Inputs) -> Tensor:
    return 1 + (torch.arange(len(t.w)) % 2).to(t.w.dtype)


def surprise(scores: Tensor, t: Inputs) -> Tensor:
    rows = torch.arange(len(scores))
    return scores.logsumexp(1) - scores[rows, t.targets]


def covaried(function: Any, t: Inputs, *given: Any, **more: Any) -> Tensor:
    return function(*given, covariance=covariances(t.w), **more)


def share(t: Inputs) -> Tensor:
    d = squares(t.x, t.w)
    return d[torch.arange(len(d)), t.targets].log() - d.sum(1).log()


def nearest(t: Inputs) -> Tensor:
    of = squares(t.x, t.w)
    none = of <= 0  # a NaN stays one
    return best(torch.where(none, 0, torch.where(none, 1, of).sqrt()), t.x)


def alignment(t: Inputs) -> Tensor:
    k, l = (r @ r.T for r in (t.x - t.x.mean(0), t.y - t.y.mean(0)))
    below = k.norm() * l.norm()
    return (k * l).sum() / below if below > 0 else (k * l).sum() * 0


def rate(x: Tensor, weight: Tensor, eps: float = 0.5) -> Tensor:
    """Of rows that count so much, times how many they are."""
    mass, d = weight.sum(), x.shape[1]
    gram = torch.eye(d).to(x) + d / (mass * eps**2) * (x.T * weight) @ x
    wide = torch.promote_types(gram.dtype, torch.float32)
    return mass * torch.logdet(gram.to(wide)).to(gram.dtype) / 2


def rates(t: Inputs) -> Tensor:
    x = unit(t.x)
    parts = [rate(x, (t.targets == k).to(x)) for k in t.targets.unique()]
    return sum(parts) / len(x)


def soft_rates(t: Inputs) -> Tensor:
    return sum(rate(t.x, w, 0.7) for w in shares(t).T) / len(t.x)


def shares(t: Inputs) -> Tensor:
    step = torch.arange(len(t.x), device=t.x.device)[:, None] + torch.arange(3)
    return (1 + step % 3).to(t.x.dtype) / 6


def middle(values: Tensor) -> Tensor:
    return values.flatten().median()


def widths(t: Inputs, backend: str | None = None) -> Tensor:
    return fl.median_bandwidth(t.x, t.w, backend=backend) + 0 * t.x.sum()


def of_some(t: Inputs, backend: str | None = None) -> Tensor:
    found = fl.median_bandwidth(t.x, t.w, sample=10**6, seed=3, backend=backend)
    return found + 0 * t.x.sum()


def measured(t: Inputs) -> Tensor:
    return middle(distance(t.x, t.w)) + 0 * t.x.sum()


def paired(t: Inputs, backend: str | None = None) -> Tensor:
    return fl.cka(t.x, t.y)


def coded(t: Inputs, backend: str | None = None, normalize: bool = True) -> Tensor:
    return fl.coding_rate(t.x, labels=t.targets, normalize=normalize)


def softly_coded(t: Inputs, backend: str | None = None, normalize: bool = False) -> Tensor:
    return fl.coding_rate(t.x, membership=shares(t), eps=0.7, normalize=normalize)


def _drawn(function: Any, told: str, formula: Any, call: Any, leaves: Any = W, **more: Any) -> Case:
    return row(function, told, formula, more.get("make", proxies), leaves, call=call)


DRAWN = [
    _drawn(
        fl.gaussian_scores,
        "covariance",
        lambda t: densities(t.x, t.w),
        lambda t, **more: covaried(fl.gaussian_scores, t, t.x, t.w, **more),
    ),
    _drawn(
        fl.gaussian_scores,
        "variance",
        lambda t: diagonal(t.x, t.w, variances(t)) + priors(t).log(),
        lambda t, **more: fl.gaussian_scores(
            t.x, t.w, variance=variances(t), prior=priors(t), **more
        ),
    ),
    _drawn(
        fl.gaussian_cross_entropy,
        "covariance",
        lambda t: surprise(densities(t.x, t.w) + priors(t).log(), t),
        lambda t, **more: covaried(
            fl.gaussian_cross_entropy,
            *(t, t.x, t.targets, t.w),
            prior=priors(t),
            reduction="none",
            **more,
        ),
    ),
    _drawn(
        fl.gaussian_cross_entropy,
        "variance",
        lambda t: surprise(diagonal(t.x, t.w, variances(t)), t).mean(),
        lambda t, **more: fl.gaussian_cross_entropy(
            t.x, t.targets, t.w, variance=variances(t), **more
        ),
    ),
    _drawn(
        fl.class_aware_alignment,
        "none",
        share,
        lambda t, **more: fl.class_aware_alignment(
            t.x, t.targets, t.w, covariances(t.w), reduction="none", **more
        ),
    ),
    _drawn(
        fl.pairwise_topk,
        "class_covariance",
        nearest,
        lambda t, **more: covaried(
            fl.pairwise_topk, *(t, t.x, t.w, min(5, len(t.w)), "mahalanobis"), **more
        )[0],
    ),
    _drawn(fl.cka, "paired", alignment, paired, ("x", "y"), make=samples),
    _drawn(fl.coding_rate, "labels", rates, coded, ("x",)),
    _drawn(fl.coding_rate, "membership", soft_rates, softly_coded, ("x",)),
    _drawn(fl.median_bandwidth, "two", measured, widths, ("x",)),
    _drawn(fl.median_bandwidth, "sample", measured, of_some, ("x",)),
]
