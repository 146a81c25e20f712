"""Mahalanobis distances to classes with a covariance each, in blocks of differences.

    d(x, c)^2 = (x - mu_c)^T S_c^-1 (x - mu_c) = |(x - mu_c) L_c^-T|^2,    S_c = L_c L_c^T

Differences come first, in float64, and a class' factor multiplies them: what is near keeps its
digits. The [N, C, D] of all of them are never there at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.blocks import runs
from fused_losses.base.numerics import (
    accumulate_dtype,
    nan_where_infinite,
    power_of_two,
    recomputed,
    root,
    row_dtype,
)
from fused_losses.base.products import product

BLOCK_BYTES = 4 << 20  # of differences
BLOCK_ROWS = 512


def of_classes(covariance: Tensor | None) -> bool:
    """Whether there is one for each row of y."""
    return isinstance(covariance, Tensor) and covariance.dim() == 3


def class_roots(covariance: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """L_c^-1 [C, D, D], lower, and log det S_c [C], float64; time O(C D^3)."""
    c, d = y.shape[-2:]
    if not covariance.is_floating_point():
        raise TypeError(
            f"covariance: expected a floating point tensor [{c}, {d}, {d}], got "
            f"{validation.describe(covariance)}"
        )
    if y.dim() != 2 or tuple(covariance.shape) != (c, d, d):
        raise ValueError(
            f"covariance: expected shape ({d}, {d}), or ({c}, {d}, {d}) beside y [{c}, {d}], one "
            f"a row, got {validation.describe(covariance)}"
        )
    validation.check_device("y", y, "covariance", covariance)
    matrix = covariance.to(row_dtype(y.device))
    # a quadratic form sees the symmetric part only
    factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    # inf has a root, which is no factor
    failed = torch.where(info == 0, d * diagonal.isinf().any(dim=-1), info)
    unread = torch.compiler.is_compiling() or plans.explaining() or matrix.is_meta
    if not unread and bool(failed.any()):
        at = int(failed.nonzero()[0])
        raise ValueError(
            f"covariance: expected symmetric positive definite matrices, but the leading minor of "
            f"order {int(failed[at])} of class {at} is not; a small multiple of the identity may "
            "be added to it"
        )
    one = torch.eye(d, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    inverse = torch.linalg.solve_triangular(factor, one, upper=False)
    return inverse, 2 * diagonal.log().sum(dim=-1)


def _lengths(apart: Tensor, inverse: Tensor, squared: bool = False) -> Tensor:
    """|L^-1 v| of differences [C, n, D] and factors [C, D, D]. [C, n] float64"""
    # what a sum makes of inf is its order's own
    mark = nan_where_infinite(apart)
    if squared:
        return product(apart, inverse).square().sum(dim=-1) + mark
    by = power_of_two(apart)
    return root(product(apart * by, inverse).square().sum(dim=-1)) / by[..., 0] + mark


def _block(x: Tensor, y: Tensor, inverse: Tensor, squared: bool) -> Tensor:
    apart = x.to(inverse.dtype) - y.to(inverse.dtype)[:, None]
    return _lengths(apart, inverse, squared).T


def class_distances(x: Tensor, y: Tensor, inverse: Tensor, squared: bool = False) -> Tensor:
    """[N, C] in the accumulation dtype, block by block; a backward computes a block again."""
    n, d = x.shape
    dtype = accumulate_dtype(x.dtype)
    high = min(max(n, 1), BLOCK_ROWS)
    wide = max(1, BLOCK_BYTES // (high * max(d, 1) * inverse.element_size()))
    lines = [
        torch.cat(
            [
                recomputed(_block, x[rows], y[cols], inverse[cols], squared).to(dtype)
                for cols in runs(y.shape[0], wide)
            ],
            dim=1,
        )
        for rows in runs(n if y.shape[0] else 0, high)
    ]
    if not lines:
        # nothing, that is still a function of all
        return (x.sum() + y.sum() + inverse.sum()).to(dtype).expand(n, y.shape[0])
    return torch.cat(lines)


def listed_distances(x: Tensor, y: Tensor, inverse: Tensor, index: Tensor) -> Tensor:
    """[N, k] of the classes [N, k] that are listed; their factors are gathered, N k D^2."""
    flat = index.flatten()
    apart = x.to(inverse.dtype)[:, None] - y[index].to(inverse.dtype)
    found = _lengths(apart.flatten(0, 1)[:, None], inverse[flat])
    return found.reshape(index.shape).to(accumulate_dtype(x.dtype))
