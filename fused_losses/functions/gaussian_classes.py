"""Classes that are Gaussians: log densities, the cross entropy of naive Bayes, and CAFA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.blocks import runs
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    nan_where_infinite,
    no_autocast,
    recomputed,
    reduced,
    row_dtype,
)
from fused_losses.base.validation import check_both, describe
from fused_losses.pairwise.class_covariance import class_distances, class_roots
from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.pairwise.metrics import check_values
from fused_losses.primitives.distances.op import choose

BLOCK_BYTES = 4 << 20  # of scores that are there at once


class _Classes(NamedTuple):
    """Class Gaussians, ready for blocks of rows."""

    means: Tensor  # [C, D]
    spread: Tensor  # variance [C, D], or L_c^-1 [C, D, D]
    constant: Tensor  # [C] float64, log prior less half of D log 2 pi + log det


def _classes(
    x: Tensor,
    means: Tensor,
    variance: Tensor | None,
    covariance: Tensor | None,
    prior: Tensor | None,
    precision: str,
    backend: str | None,
) -> _Classes:
    c, d = means.shape
    if (variance is None) == (covariance is None):
        raise ValueError("variance, covariance: expected one of them, got both or neither")
    wide = row_dtype(x.device)
    if covariance is not None:
        if not isinstance(covariance, Tensor):
            got = type(covariance).__name__
            raise TypeError(f"covariance: expected a tensor [{c}, {d}, {d}], got {got}")
        # differences and their factors are PyTorch's on every backend
        choose(backend, x.device, x.dtype, precision, "euclidean")
        spread, log_det = class_roots(covariance, means)
    else:
        if not isinstance(variance, Tensor) or not variance.is_floating_point():
            got = describe(variance) if isinstance(variance, Tensor) else type(variance).__name__
            raise TypeError(f"variance: expected a floating point tensor [{c}, {d}], got {got}")
        if variance.shape != means.shape:
            raise ValueError(
                f"variance: expected shape ({c}, {d}) as means has, got {describe(variance)}"
            )
        validation.check_device("x", x, "variance", variance)
        spread, log_det = variance, variance.to(wide).log().sum(dim=1)
        # as with a covariance, whose distances have it, a class with inf is one with NaN
        log_det = log_det + nan_where_infinite(variance) + nan_where_infinite(means)
    constant = -(log_det + d * math.log(2 * math.pi)) / 2
    if prior is not None:
        validation.check_vector("prior", prior, c, "one a class", x)
        constant = constant + prior.to(wide).log() + nan_where_infinite(prior[:, None])
    # a sum over runs is rounded once
    wide = accumulate_dtype(means.dtype)
    spread = spread if covariance is not None else spread.to(wide)
    return _Classes(means.to(wide), spread, constant)


def _squares(x: Tensor, of: _Classes, precision: str, backend: str | None) -> Tensor:
    """Squared Mahalanobis distances [N, C]; a run's gradients are not rounded to 16 bits."""
    x = x.to(of.means.dtype)
    if of.spread.dim() == 3:
        return class_distances(x, of.means, of.spread, squared=True)
    if choose(backend, x.device, x.dtype, precision, "scaled")[0] == "reference":
        # the square of a root has no curve where a row is a mean
        check_values("variance", of.spread, lambda v: v > 0, "values > 0")
        each = (x[:, None] - of.means) * of.spread.rsqrt()
        return each.square().sum(dim=2) + nan_where_infinite(x)[:, None]
    apart = pairwise_distance(
        x, of.means, "mahalanobis", variance=of.spread, precision=precision, backend=backend
    )
    # in place, where a square keeps its input alone: no further [N, C]
    return apart.square().add_(nan_where_infinite(x)[:, None])


def _scores(x: Tensor, of: _Classes, precision: str, backend: str | None) -> Tensor:
    return of.constant - _squares(x, of, precision, backend).to(of.constant.dtype) / 2


@plans.hands_out
def gaussian_scores(
    x: Tensor,  # [N, D]
    means: Tensor,  # [C, D]
    *,
    variance: Tensor | None = None,  # [C, D]
    covariance: Tensor | None = None,  # [C, D, D]
    prior: Tensor | None = None,  # [C]
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """log N(x_i; mean_c, S_c) + log prior_c of every row and class, [N, C].

        -((x - mean)^T S^-1 (x - mean) + log det S + D log 2 pi) / 2 + log prior

    Logits of Gaussian naive Bayes (variance) and of quadratic discriminants (covariance). From
    differences: rows near a mean keep their digits.

    Args:
        x, means: [N, D], [C, D] of one dtype.
        variance: [C, D] > 0, a diagonal a class; or covariance: [C, D, D], positive definite (of a
            shared one an `expand`).
        prior: [C] > 0; None: 1.

    Returns float32 (float64 for float64 inputs). A row, or a class' mean, variance or prior, with
    inf is one with NaN; such a covariance is refused. Differentiable in all tensors; with
    covariance again. Raises ValueError, TypeError for bad arguments. Time O(N C D), with covariance
    O(C D^3 + N C D^2); memory beyond the result a block (and its like in the gradient). Paper:
    Zheng et al., "Revisiting discriminative vs. generative classifiers", 2023.
    """
    x = check_both("x", x, "means", means, precision, "C")
    with no_autocast(x.device):
        of = _classes(x, means, variance, covariance, prior, precision, backend)
        return _scores(x, of, precision, backend).to(accumulate_dtype(x.dtype))


def _by_runs(
    each: Callable[..., Tensor], x: Tensor, labels: Tensor, of: _Classes, reduction: str
) -> Tensor:
    """each(rows, labels, *classes) [n] over runs of rows, of which a backward keeps nothing."""
    size = max(1, BLOCK_BYTES // (8 * max(of.means.shape[0], 1)))
    parts = [recomputed(each, x[run], labels[run], *of) for run in runs(x.shape[0], size)]
    if not parts:
        nothing = torch.stack([t.sum().to(of.constant) for t in (x, *of)])
        parts = [nothing.sum().expand(1)[:0]]
    loss = torch.cat(parts)
    counted = torch.ones_like(loss, dtype=torch.bool)
    return reduced(loss, counted, reduction, accumulate_dtype(x.dtype))


def _labelled(
    x: Tensor, labels: Tensor, means: Tensor, precision: str, reduction: str
) -> tuple[Tensor, Tensor]:
    x = check_both("x", x, "means", means, precision, "C")
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_index_vector("labels", labels, x.shape[0], x)
    if means.shape[0] == 0:
        raise ValueError(f"means: expected at least one class, got {describe(means)}")
    validation.check_class_ids("labels", labels, means.shape[0])
    return x, labels.long()


def gaussian_cross_entropy(
    x: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    means: Tensor,  # [C, D]
    *,
    variance: Tensor | None = None,  # [C, D]
    covariance: Tensor | None = None,  # [C, D, D]
    prior: Tensor | None = None,  # [C]
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """-log p(label | x) where classes are Gaussians: cross entropy of `gaussian_scores`.

        loss_i = log sum_c e^(score_ic) - score_i,label

    labels: [N] integers in [0, C). reduction: "mean" (0 of no rows), "sum", "none" [N]. Other
    arguments as in `gaussian_scores`, and the same derivatives. Returns float32 (float64 for
    float64 inputs). Raises ValueError, TypeError, IndexError for bad arguments. Time as of the
    scores, twice with a gradient; memory O(N D + C D), with covariance C D^2, and a block: the
    N x C scores are never stored.
    """
    x, labels = _labelled(x, labels, means, precision, reduction)

    def each(rows: Tensor, own: Tensor, *of: Tensor) -> Tensor:
        scores = _scores(rows, _Classes(*of), precision, backend)
        return scores.logsumexp(dim=1) - scores.gather(1, own[:, None])[:, 0]

    with no_autocast(x.device):
        of = _classes(x, means, variance, covariance, prior, precision, backend)
        return _by_runs(each, x, labels, of, reduction)


def class_aware_alignment(
    x: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    means: Tensor,  # [C, D]
    covariance: Tensor,  # [C, D, D]
    *,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """CAFA: features drawn to the Gaussian of their predicted class, away from all others.

        loss_i = log(d_i,label / sum_c d_ic),    d_ic = (x_i - mean_c)^T S_c^-1 (x_i - mean_c)

    As the loss is remembered: the authors' code was not at hand, and the sum may leave the label
    out there. labels: [N] integers in [0, C), the model's predictions; -inf of a row on its own
    mean. reduction: "mean" (0 of no rows), "sum", "none" [N]. Differentiable in x, means and
    covariance, again too. Returns float32 (float64 for float64 inputs). Raises ValueError,
    TypeError, IndexError for bad arguments. Time O(C D^3 + N C D^2); memory O(N D + C D^2) and a
    block. Paper: Jung et al., 2022.
    """
    x, labels = _labelled(x, labels, means, precision, reduction)

    def each(rows: Tensor, own: Tensor, *of: Tensor) -> Tensor:
        squares = _squares(rows, _Classes(*of), precision, backend).to(of[-1].dtype)
        return squares.gather(1, own[:, None])[:, 0].log() - squares.sum(dim=1).log()

    with no_autocast(x.device):
        of = _classes(x, means, None, covariance, None, precision, backend)
        return _by_runs(each, x, labels, of, reduction)


def _spread(t: Tensor) -> Tensor:
    """Positive definite matrices of rows [C, D]."""
    t = t / max(t.shape[1], 1) ** 0.5
    one = torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
    return one + t[:, :, None] * t[:, None]


_COVARIED = lambda t: dict(covariance=_spread(t.w), prior=t.w.square().sum(dim=1) + 0.5)
_DIAGONAL = lambda t: dict(variance=t.w.square() + 1)
examples(
    gaussian_scores,
    lambda f, t: f(t.x, t.y),
    {"": _COVARIED, "diagonal": _DIAGONAL},
    precisions=("fp32",),
)
examples(
    gaussian_cross_entropy,
    lambda f, t: f(t.x, t.targets, t.y),
    {"": _COVARIED, "diagonal": _DIAGONAL},
    precisions=("fp32",),
)
examples(
    class_aware_alignment,
    lambda f, t: f(t.x, t.targets, t.y, _spread(t.w)),
    precisions=("fp32",),
)
