"""The median heuristic for a kernel's bandwidth, exact without a matrix of distances."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.blocks import runs
from fused_losses.base.examples import UNJUDGED, examples
from fused_losses.base.numerics import nan_where_infinite, no_autocast
from fused_losses.base.validation import check_both, check_count, check_rows
from fused_losses.pairwise.distance import pairwise_distance

ROWS = 1024  # of either side of a block
DIGIT = 16  # bits of a distance that are decided by one pass


@torch.no_grad()
def median_bandwidth(
    x: Tensor,  # [N, D]
    y: Tensor | None = None,  # [M, D]
    *,
    sample: int | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The median of |x_i - y_j| over all pairs, or of |x_i - x_j| over i < j (y None).

    A bandwidth for `kernel_mean`, `mmd` (of both samples together), `hsic` and the Cauchy-Schwarz
    divergences. Exact, the lower of two middles: distances are positive, so that their bits order
    them, and each pass over the pairs decides 16 more bits by a count.

    Args:
        sample: None: every row; else at most so many rows of each side, drawn by `seed`: then it is
            the sample's median. seed: an integer.

    Returns a scalar without a gradient, float32 (float64 for float64 inputs); 0 where half of the
    pairs are equal, NaN where a row is not finite. Reads counts on the host; not for compiled code.
    Raises ValueError, TypeError for bad arguments, or for less than one pair. Time O(2 N M D), for
    float64 twice that; memory a block.
    """
    if y is None:
        check_rows("x", x, "fp32")
    else:
        x = check_both("x", x, "y", y, "fp32")
    if sample is not None:
        check_count("sample", sample)
        generator = torch.Generator().manual_seed(seed)
        x = _drawn(x, sample, generator)
        y = None if y is None else _drawn(y, sample, generator)
    n, m = x.shape[0], 0 if y is None else y.shape[0]
    pairs = n * (n - 1) // 2 if y is None else n * m
    if pairs == 0:
        raise ValueError(f"x, y: expected at least one pair of rows, got {validation.describe(x)}")
    with no_autocast(x.device):
        if plans.explaining() or x.is_meta:
            block = min(n, ROWS) * min(n if y is None else m, ROWS)
            plans.needs(16 * block * x.element_size() + (8 << DIGIT))
            return x.new_ones((), dtype=torch.promote_types(x.dtype, torch.float32))
        found = _ranked(x, y, (pairs - 1) // 2, backend)
        for rows in (x,) if y is None else (x, y):
            found = found + nan_where_infinite(rows).sum().to(found.dtype)
        return found


def _drawn(rows: Tensor, sample: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(rows.shape[0], generator=generator)[:sample]
    return rows[order.to(rows.device)]


def _blocks(x: Tensor, y: Tensor | None, backend: str | None) -> Iterator[Tensor]:
    """Distances of all pairs that count, flat."""
    for rows in runs(x.shape[0], ROWS):
        for cols in runs(x.shape[0] if y is None else y.shape[0], ROWS):
            if y is not None:
                yield pairwise_distance(x[rows], y[cols], backend=backend).flatten()
            elif cols.start > rows.start:
                yield pairwise_distance(x[rows], x[cols], backend=backend).flatten()
            elif cols.start == rows.start:
                own = pairwise_distance(x[rows], backend=backend)
                i, j = torch.triu_indices(*own.shape, offset=1, device=own.device)
                yield own[i, j]


def _ranked(x: Tensor, y: Tensor | None, rank: int, backend: str | None) -> Tensor:
    """The distance with so many below it, by its bits from the first on."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bits, size = (torch.int64, 64) if wide == torch.float64 else (torch.int32, 32)
    known = 0
    for shift in range(size - DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=x.device)
        for block in _blocks(x, y, backend):
            digits = block.abs().view(bits).long() >> shift  # a NaN may have a sign
            if shift + DIGIT < size:
                digits = digits[digits >> DIGIT == known]
            digits = digits & ((1 << DIGIT) - 1)
            counts += torch.bincount(digits, minlength=1 << DIGIT)
        below = counts.cumsum(0)
        digit = min(int((below <= rank).sum()), (1 << DIGIT) - 1)
        rank -= int(below[digit] - counts[digit])
        known = known << DIGIT | digit
    return torch.tensor(known, dtype=bits, device=x.device).view(wide)


examples(median_bandwidth, lambda f, t: f(t.x, t.y), bound=UNJUDGED, precisions=("fp32",))
