"""Sums and means of the rows of a label."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import check_class_ids, check_integers


def segment_sum(x: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """The sum of the rows of each label, 0 for a label without a row.

        s_c = sum_{labels_i = c} x_i

    x [N, D] of a floating point type, labels [N] integers in [0, num_segments), num_segments >= 1.
    Sums are in float64 where the device has it, in the order of the rows on a CPU and in one order
    on a GPU, and rounded once. A row with NaN or inf reaches its own segment alone.

    Returns [num_segments, D] in x's dtype, differentiable in x to any order and in forward mode.
    Raises ValueError, TypeError, IndexError for bad arguments. Time O(N D); memory O(N D).
    """
    _check(x, labels, num_segments)
    with no_autocast(x.device):
        return summed(x, labels, num_segments).to(x.dtype)


def segment_mean(x: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """The mean of the rows of each label, 0 for a label without a row.

        m_c = sum_{labels_i = c} x_i / #{labels_i = c}

    Class means, prototypes, centroids. Counts are integers, and exact. Arguments, what is returned
    and raised, and cost as in `segment_sum`.
    """
    _check(x, labels, num_segments)
    with no_autocast(x.device):
        counts = counted(labels, num_segments).clamp_min(1)
        return (summed(x, labels, num_segments) / counts[:, None]).to(x.dtype)


def counted(labels: Tensor, num_segments: int) -> Tensor:
    """How many rows have each label. [num_segments] int64"""
    counts = torch.zeros(num_segments, dtype=torch.int64, device=labels.device)
    return counts.index_add(0, labels.long(), torch.ones_like(labels, dtype=torch.int64))


def summed(x: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """`segment_sum` in float64 where the device has it; labels checked."""
    wide = x.to(row_dtype(x.device))
    sums = wide.new_zeros((num_segments, x.shape[1]))
    if x.is_cuda:  # sorted by label first: index_add's atomics have no order
        return sums.index_put((labels.long(),), wide, accumulate=True)
    return sums.index_add(0, labels.long(), wide)


def check_each_class(name: str, labels: Tensor, num_segments: int) -> None:
    """ValueError where a segment has no row; labels without values are not read."""
    if torch.compiler.is_compiling() or plans.explaining() or labels.is_meta:
        return
    empty = (counted(labels, num_segments) == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"{name}: expected a row of each of {num_segments} classes, got none of class "
            f"{int(empty[0])}"
        )


def _check(x: Tensor, labels: Tensor, num_segments: int) -> None:
    validation.check_matrix("x", x, "[N, D]")
    validation.check_count("num_segments", num_segments)
    check_integers("labels", labels, (x.shape[0],), x)
    check_class_ids("labels", labels, num_segments)


examples(segment_sum, lambda f, t: f(t.x, t.labels, t.n // 4 + 1))
examples(segment_mean, lambda f, t: f(t.x, t.labels, t.n // 4 + 1))
