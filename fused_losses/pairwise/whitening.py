"""Mahalanobis: rows whitened by a covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.numerics import (
    accumulate_dtype,
    exactly_centered,
    nan_where_infinite,
    row_dtype,
)
from fused_losses.base.products import product
from fused_losses.base.validation import describe


def _check_square(name: str, matrix: Tensor, x: Tensor) -> None:
    d = x.shape[-1]
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = describe(matrix) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{name}: expected a floating point tensor [{d}, {d}], got {got}")
    if tuple(matrix.shape) != (d, d):
        raise ValueError(f"{name}: expected shape ({d}, {d}), got {describe(matrix)}")
    validation.check_device("x", x, name, matrix)


def wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def exactly_about(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both moved towards 0, differences as they were: a later factor then rounds less."""
    flat = x.flatten(0, -2)
    if y is x:
        moved = exactly_centered(flat, None)[0].reshape(x.shape)
        return moved, moved
    moved, other = exactly_centered(flat, y.flatten(0, -2))
    return moved.reshape(x.shape), other.reshape(y.shape)


def whitened(
    x: Tensor,  # [..., N, D]
    y: Tensor,  # [..., M, D]
    VI: Tensor | None = None,  # [D, D]
    covariance: Tensor | None = None,  # [D, D]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose Euclidean distances are Mahalanobis distances, and the factor they were times.

    y may be x. VI = L L^T: rows times L; covariance = L L^T: rows times L^-T (None: of the rows of
    x and y, of x alone where y is x). Computed in float64 of rows moved towards 0, returned in
    float32, or float64 for float64 rows; the factor [D, D] in float64. Raises ValueError where a
    matrix is not symmetric positive definite.
    """
    dtype, wide = accumulate_dtype(x.dtype), row_dtype(x.device)
    same = y is x
    x = x.to(wide)
    y = x if same else y.to(wide)
    if VI is not None:
        _check_square("VI", VI, x)
        factor = _cholesky("VI", VI.to(wide))
    else:
        if covariance is None:
            covariance = _covariance(x, y)
        else:
            _check_square("covariance", covariance, x)
        root = _cholesky("covariance", covariance.to(wide))
        one = torch.eye(x.shape[-1], dtype=wide, device=x.device)
        factor = torch.linalg.solve_triangular(root, one, upper=False).mT
    x, y = exactly_about(x, y)

    def times(rows: Tensor) -> Tensor:
        # what a sum makes of inf is its order's own
        return (product(rows, factor.mT) + nan_where_infinite(rows).unsqueeze(-1)).to(dtype)

    moved = times(x)
    return moved, moved if same else times(y), factor


def _covariance(x: Tensor, y: Tensor) -> Tensor:
    d = x.shape[-1]
    sides = (x,) if y is x else (x, y)
    rows = torch.cat([r.flatten(0, -2) for r in sides])
    if rows.shape[0] <= d:
        raise ValueError(
            f"covariance: expected one, or VI or variance: {rows.shape[0]} rows of size {d} have a "
            f"singular covariance, at least {d + 1} are needed"
        )
    return torch.cov(rows.mT).reshape(d, d)


def _cholesky(name: str, matrix: Tensor) -> Tensor:
    # a quadratic form sees the symmetric part only
    factor, info = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    unread = torch.compiler.is_compiling() or plans.explaining() or matrix.is_meta
    if not unread and int(info) != 0:
        raise ValueError(
            f"{name}: expected a symmetric positive definite matrix, but its leading minor of "
            f"order {int(info)} is not; a small multiple of the identity may be added to it"
        )
    return factor
