"""Rows in coordinates along the axes of their largest spread, which screen a level at a time.

docs/topk.md derives the bounds; `HeadBound` in csrc/topk.h is theirs in the compiled kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import ROUNDOFF, row_dtype
from fused_losses.primitives.topk.bounds import LIMIT, TINY
from fused_losses.primitives.topk.inputs import STEP, PrincipalRows

FIRST = 16  # the first level's coordinates are a multiple of it, or D
# how much of the spread the first level may leave, and all of them
LEFT_OF_FIRST, LEFT = 1 / 8, 1 / 32


def principal_rows(
    y: Tensor, *, coordinates: tuple[int, int] | None = None, rows: int = 8_192
) -> PrincipalRows:
    """Turns rows [M, D] to their principal axes and keeps the coordinates of the most spread.

    As `screen` of `pairwise_topk` the first coordinates are read of every pair, the next of pairs
    that a bound on the others leaves open, and rows of y for what is open then: the answer stays
    exact. It pays where few axes hold most of the spread, as of real embeddings.

    Args:
        y: [M, D] of any floating point type, or a view of a file.
        coordinates: how many are read of every pair, and how many are kept, at most D; the second
            goes up to a multiple of 32 beyond the first. None: as many as leave an eighth of the
            spread, and a 32nd.
        rows: how many at a time, at least 1.

    Raises ValueError, TypeError unless y is a floating point matrix, and of options that do not
    fit. Time O(M D H + D^3) of H coordinates kept; memory of a run's rows in float64, and
    O(D^2).
    """
    validation.check_matrix("y", y, "[M, D]")
    validation.check_count("rows", rows)
    m, d = y.shape
    if coordinates is not None:
        _check_coordinates(coordinates, d)
    axes, spread = _axes(y)
    first, kept = _chosen(spread) if coordinates is None else coordinates
    levels = -(-(kept - first) // STEP)
    axes = axes[:, : first + levels * STEP].contiguous()
    wide = axes.dtype
    # how far A^T y, added up in `wide`, is from coordinates along orthonormal axes
    unit, width = ROUNDOFF[wide], axes.shape[1]
    apart = torch.linalg.matrix_norm(axes.T @ axes - torch.eye(width, dtype=wide, device=y.device))
    moved = float(apart) + d * unit * 1.01 * (width + math.sqrt(width))
    room = 3 * moved + (3 * d + 8) * unit
    head = y.new_empty((m, first), dtype=torch.float32)
    rest = y.new_zeros((m, levels, STEP), dtype=torch.float32)
    tails = y.new_empty((levels + 2, m), dtype=torch.float32)
    for i in range(0, m, rows):
        run = slice(i, i + rows)
        part = y[run].to(wide)
        squared, along = part.square().sum(dim=1), part @ axes
        head[run] = along[:, :first]
        rest[run].flatten(1)[:, : width - first] = along[:, first:]
        tails[0, run] = squared.sqrt()
        before = along[:, :first].square().sum(dim=1)
        for level in range(levels + 1):
            left = (squared - before).clamp_min(0) + room * squared
            # a bound must not be rounded down
            tails[level + 1, run] = left.sqrt() * (1 + 1e-6) + TINY[torch.float32]
            at = first + level * STEP
            before = before + along[:, at : at + STEP].square().sum(dim=1)
    return PrincipalRows(head, rest, tails, axes, moved)


def _check_coordinates(coordinates: tuple[int, int], d: int) -> None:
    both = isinstance(coordinates, tuple) and len(coordinates) == 2
    if not both or any(isinstance(c, bool) or not isinstance(c, int) for c in coordinates):
        raise TypeError(f"coordinates: expected two integers or None, got {coordinates!r}")
    first, kept = coordinates
    if not min(1, d) <= first <= kept <= d:
        raise ValueError(f"coordinates: expected 1 <= first <= kept <= {d}, got {first} and {kept}")


def _axes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes of a sample, [D, D], the most spread first, and the spread of each, [D]."""
    wide, d = row_dtype(y.device), y.shape[1]
    sample = y[:: max(1, len(y) // max(4_096, 8 * d))].to(wide)
    length = torch.linalg.vector_norm(sample, dim=1)
    sample = sample[length < LIMIT[torch.float32]]
    if not sample.numel():
        return torch.eye(d, dtype=wide, device=y.device), y.new_ones(d, dtype=wide)
    # squares stay within the type
    sample = sample / sample.abs().max().clamp_min(TINY[torch.float32])
    axes = torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1)
    return axes, (sample @ axes).var(dim=0, unbiased=False)


def _chosen(spread: Tensor) -> tuple[int, int]:
    """How many coordinates are read of all pairs, and how many are kept."""
    d, total = len(spread), float(spread.sum())
    left = total - spread.cumsum(0)
    enough = lambda share: 1 + int((left[:-1] > share * total).sum()) if d else 0
    first = min(d, -(-enough(LEFT_OF_FIRST) // FIRST) * FIRST)
    return first, max(first, enough(LEFT))
