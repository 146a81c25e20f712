"""Means of kernel matrices and what is made of them: MMD, HSIC, uniformity, Cauchy-Schwarz."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    exactly_centered,
    merged,
    no_autocast,
    over_last,
    row_dtype,
)
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_both, check_rows, number
from fused_losses.functions.scored_pairs import scored, triangle
from fused_losses.primitives.pairs.inputs import NEGATIVE
from fused_losses.primitives.pairs.op import pair_statistics

KERNELS = {"gaussian": "rbf", "laplacian": "euclidean"}


def _checked(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    bandwidth: float | Tensor,
    precision: str,
    alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """x, under autocast in y's dtype, and the bandwidth, float64 []; alone: there is no y."""
    if alone:
        check_rows("x", x, precision)
    else:
        x = check_both("x", x, "y", y, precision)
    validation.check_choice("kernel", kernel, tuple(KERNELS))
    return x, number("bandwidth", bandwidth, x)


def _log_row_sums(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    bandwidth: Tensor,
    precision: str,
    backend: str | None,
    skip_self: bool = False,
) -> Tensor:
    """log sum_j k(x_i, y_j), [N] float64; y None: x itself, from half the pairs."""
    scale = 1 / (2 * bandwidth.square()) if kernel == "gaussian" else 1 / bandwidth
    inputs = scored(x, y, scale, similarity=KERNELS[kernel], precision=precision)
    inputs = triangle(inputs) if y is None else inputs
    lse = pair_statistics(inputs, backend=backend)[0].value[NEGATIVE]
    # k(x, x) = 1
    return lse if y is not None or skip_self else merged(lse, torch.zeros_like(lse))


def _log_mean(row_sums: Tensor, pairs: int) -> Tensor:
    return over_last(row_sums) - _log(pairs, row_sums)


def _log(count: int, like: Tensor) -> Tensor:
    """log of a count, 0 of none; a tensor, or a compiled call would be of this count alone."""
    return torch.full((), count, dtype=like.dtype, device=like.device).clamp_min(1).log()


def kernel_mean(
    x: Tensor,  # [N, D]
    y: Tensor | None = None,  # [M, D]
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    *,
    skip_self: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The mean of a kernel matrix, or of each of its rows, without the matrix.

    Args:
        x, y: [N, D] and [M, D]; y None: x itself (half the work).
        kernel: "gaussian" exp(-|x - y|^2 / (2 bandwidth^2)), "laplacian" exp(-|x - y| / bandwidth),
            both of the Euclidean norm.
        bandwidth: > 0; a number or a scalar tensor, which may need a gradient.
        skip_self: leaves out i == j (y None only): the unbiased mean.
        reduction: "mean" over all pairs, "none" [N]: each row's mean.

    Returns float32 (float64 for float64 inputs); over no pairs 0. Raises ValueError, TypeError for
    bad arguments. Time O(N M D); memory O((N + M) D).
    """
    x, width = _checked(x, y, kernel, bandwidth, precision, alone=y is None)
    validation.check_choice("reduction", reduction, ("mean", "none"))
    if y is not None and skip_self:
        raise ValueError("skip_self: expected False where y is given, got True")
    m = (x if y is None else y).shape[0] - skip_self
    with no_autocast(x.device):
        dtype = accumulate_dtype(x.dtype)
        if reduction == "none":
            sums = _log_row_sums(x, y, kernel, width, precision, backend, skip_self)
            return (sums - _log(m, sums)).exp().to(dtype)
        return _mean(x, y, kernel, width, precision, backend, skip_self).to(dtype)


def _mean(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    width: Tensor,
    precision: str,
    backend: str | None,
    skip_self: bool = False,
) -> Tensor:
    """The mean of a kernel matrix in the row dtype; over no pairs 0."""
    n, m = x.shape[0], (x if y is None else y).shape[0] - skip_self
    if n == 0 or m <= 0:
        return x.new_zeros((), dtype=row_dtype(x.device)) + x.sum() * 0
    sums = _log_row_sums(x, y, kernel, width, precision, backend, skip_self)
    return _log_mean(sums, n * m).exp()


def mmd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    kernel: str = "gaussian",
    bandwidth: float | Tensor = 1.0,
    *,
    unbiased: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy: mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    unbiased: without the pairs of a row with itself. Arguments, errors and cost as in
    `kernel_mean`. Paper: Gretton et al., 2012.
    """
    x, width = _checked(x, y, kernel, bandwidth, precision)
    with no_autocast(x.device):
        given = kernel, width, precision, backend
        within = [_mean(t, None, *given, skip_self=unbiased) for t in (x, y)]
        # the means agree in their first digits: not rounded before they are subtracted
        return (within[0] + within[1] - 2 * _mean(x, y, *given)).to(accumulate_dtype(x.dtype))


def uniformity(
    x: Tensor,  # [N, D]
    *,
    t: float = 2.0,
    normalize: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """log mean_{i != j} exp(-t |x_i - x_j|^2) of rows as they are (`UniformityLoss`: of unit rows).

    How evenly a batch covers the sphere.

    x [N, D] (norm 1 in the paper: normalize=True), t > 0. Returns float32 (float64 for float64
    inputs); for one row 0. Raises ValueError, TypeError for bad arguments.
    Time O(N^2 D / 2); memory O(N D). Paper: Wang and Isola, 2020.
    """
    check_rows("x", x, precision)
    scale, n = number("t", t, x), x.shape[0]
    with no_autocast(x.device):
        if n < 2:
            return x.sum().to(accumulate_dtype(x.dtype)) * 0
        x = unit(x) if normalize else x
        width = (1 / (2 * scale)).sqrt()
        sums = _log_row_sums(x, None, "gaussian", width, precision, backend, skip_self=True)
        return _log_mean(sums, n * (n - 1)).to(accumulate_dtype(x.dtype))


def _side_by_side(x: Tensor, y: Tensor, ratio: Tensor) -> Tensor:
    """[x, ratio y]: its Gaussian kernel is that of x times that of y, of bandwidths in this ratio.

    In the accumulation dtype; the factor rounds the rows that it is given.
    """
    dtype = accumulate_dtype(x.dtype)
    return torch.cat([x.to(dtype), (y.to(dtype) * ratio).to(dtype)], dim=1)


def _log_joint_rows(
    x: Tensor, y: Tensor, widths: tuple[Tensor, Tensor], precision: str, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log row sums of K L, K and L.

    The product of two Gaussian kernels is one Gaussian kernel on the features side by side.
    """
    # what three sweeps send to a row cancels: 16 bits would round each
    x, y = (t.to(accumulate_dtype(t.dtype)) for t in (x, y))
    # near 0 a factor rounds less
    moved, _ = exactly_centered(y, None)
    joint = _side_by_side(x, moved, widths[0] / widths[1])
    given = (joint, widths[0]), (x, widths[0]), (y, widths[1])
    sums = [_log_row_sums(t, None, "gaussian", w, precision, backend) for t, w in given]
    return sums[0], sums[1], sums[2]


def _of_same_samples(x_name: str, x: Tensor, y_name: str, y: Tensor, precision: str) -> Tensor:
    """Two sets of features, of any two widths, of the same samples, checked; y, to go with x."""
    check_rows(x_name, x, precision)
    check_rows(y_name, y, precision)
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{y_name}: expected {x.shape[0]} rows to match {x_name}, got {validation.describe(y)}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"{x_name}: expected at least one row, got {validation.describe(x)}")
    return validation.beside(x_name, x, y_name, y)


def hsic(
    x: Tensor,  # [N, Dx]
    y: Tensor,  # [N, Dy]
    *,
    x_bandwidth: float | Tensor = 1.0,
    y_bandwidth: float | Tensor = 1.0,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Hilbert-Schmidt independence criterion (biased) of paired samples, Gaussian kernels K and L.

        tr(K H L H) / N^2 = sum K L / N^2 + sum K sum L / N^4 - 2 sum_i k_i l_i / N^3

    with row sums k and l. x [N, Dx], y [N, Dy]; bandwidths > 0, numbers or scalar tensors. Returns
    float32 (float64 for float64 inputs). Raises ValueError, TypeError for bad arguments.
    Time O(N^2 (Dx + Dy)); memory O(N (Dx + Dy)). Paper: Gretton et al., 2005.
    """
    y = _of_same_samples("x", x, "y", y, precision)
    widths = number("x_bandwidth", x_bandwidth, x), number("y_bandwidth", y_bandwidth, y)
    n = x.shape[0]
    with no_autocast(x.device):
        joint, k, l = _log_joint_rows(x, y, widths, precision, backend)
        log_n = _log(n, joint)
        joint, k, l = (joint - log_n).exp(), (k - log_n).exp(), (l - log_n).exp()
        # row means: the sum of (k - mean k)(l - mean l) cancels less than its expansion
        cross = ((k - k.mean()) * (l - l.mean())).mean()
        apart = joint.mean() - k.mean() * l.mean()
        return (apart - 2 * cross).to(accumulate_dtype(x.dtype))


def cauchy_schwarz_qmi(
    x: Tensor,  # [N, Dx]
    y: Tensor,  # [N, Dy]
    *,
    x_bandwidth: float | Tensor = 1.0,
    y_bandwidth: float | Tensor = 1.0,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Cauchy-Schwarz quadratic mutual information of paired samples, in nats (authors: in bits).

        log(sum K L / N^2) + log(sum K sum L / N^4) - 2 log(sum_i k_i l_i / N^3)

    Arguments, errors and cost as in `hsic`. Paper: Yu et al., 2024.
    """
    y = _of_same_samples("x", x, "y", y, precision)
    widths = number("x_bandwidth", x_bandwidth, x), number("y_bandwidth", y_bandwidth, y)
    with no_autocast(x.device):
        joint, k, l = _log_joint_rows(x, y, widths, precision, backend)
        # the powers of N cancel
        out = over_last(joint) + over_last(k) + over_last(l) - 2 * over_last(k + l)
        return out.to(accumulate_dtype(x.dtype))


def cauchy_schwarz_divergence(
    x: Tensor,  # [N, Dx]
    target: Tensor,  # [N, Dy]
    predicted: Tensor,  # [N, Dy]
    *,
    bandwidth: float | Tensor = 1.0,
    target_bandwidth: float | Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Conditional Cauchy-Schwarz divergence of p(target | x) and p(predicted | x), in nats.

        T(M) = sum_i (sum_j K_ij M_ij) / (sum_j K_ij^2)
        log T(L_target) + log T(L_predicted) - 2 log T(L_between)

    K Gaussian on x, L on targets, L_between,ij = k(predicted_i, target_j). target_bandwidth None:
    `bandwidth`. The authors' code is in bits. Arguments, errors and cost as in `hsic`.
    Paper: Yu et al., 2024.
    """
    target = _of_same_samples("x", x, "target", target, precision)
    predicted = _of_same_samples("x", x, "predicted", predicted, precision)
    if target.shape != predicted.shape:
        raise ValueError(
            f"predicted: expected shape {tuple(target.shape)}, got {validation.describe(predicted)}"
        )
    width = number("bandwidth", bandwidth, x)
    other = width if target_bandwidth is None else number("target_bandwidth", target_bandwidth, x)
    with no_autocast(x.device):

        def rows(u: Tensor, v: Tensor | None, width: Tensor = width) -> Tensor:
            return _log_row_sums(u, v, "gaussian", width, precision, backend)

        x, *both = (t.to(accumulate_dtype(t.dtype)) for t in (x, target, predicted))
        # K^2 is the Gaussian kernel of a bandwidth smaller by sqrt(2)
        weight = rows(x, None, width / math.sqrt(2))
        sides = exactly_centered(*both)
        true, guess = (_side_by_side(x, t, width / other) for t in sides)
        terms = [
            over_last(s - weight) for s in (rows(true, None), rows(guess, None), rows(guess, true))
        ]
        return (terms[0] + terms[1] - 2 * terms[2]).to(accumulate_dtype(x.dtype))


_WIDTHS = dict(x_bandwidth=1.3, y_bandwidth=0.8)
_paired = lambda f, t: f(t.x, t.y[: len(t.x)])
examples(
    kernel_mean,
    lambda f, t: f(t.x, t.other, bandwidth=t.width),
    {"": {}, "none": dict(reduction="none")},
)
examples(
    mmd,
    lambda f, t: f(t.x, t.other, bandwidth=1.3),
    {"": {}, "laplacian unbiased": dict(kernel="laplacian", unbiased=True)},
)
examples(uniformity, lambda f, t: f(t.x, normalize=True))
examples(hsic, _paired, {"": _WIDTHS})
examples(cauchy_schwarz_qmi, _paired, {"": _WIDTHS})
examples(
    cauchy_schwarz_divergence,
    lambda f, t: f(t.x, t.y[: len(t.x)], t.z[: len(t.x)], bandwidth=1.3, target_bandwidth=0.8),
)
