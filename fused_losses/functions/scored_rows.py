"""What the losses over triplets and rankings share: scores of rows by name, and their means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.indices import ListedPairs
from fused_losses.base.sides import Sides
from fused_losses.base.unit_norm import wide_unit
from fused_losses.primitives.listed.op import listed_row_losses
from fused_losses.primitives.row_rules.inputs import RowInputs
from fused_losses.primitives.row_rules.op import row_losses

DISTANCES = ("euclidean", "sqeuclidean", "cosine")


def scored_rows(both: Sides, distance: str, precision: str, normalize: bool = False) -> RowInputs:
    """The primitive's inputs but for its rule; rows of norm 1 if so wanted.

    distance: one of DISTANCES, or "dot" for the product itself.
    """
    x, y = both.x, both.y
    if normalize:
        # the blocks are in this dtype: nothing is won by rounding before
        x = wide_unit(x)
        y = x if both.y is both.x else wide_unit(both.y)
    score = {"cosine": "minus_dot"}.get(distance, distance)
    options: dict[str, Any] = dict(score=score, skip_self=both.alone, precision=precision)
    if both.listed is None:
        return RowInputs(x, y, *both.labels, **options)
    # the list says which pairs are meant
    nothing = torch.zeros(0, dtype=torch.int32, device=x.device)
    return RowInputs(x, y, nothing, nothing, **options)


def folded_rows(inputs: RowInputs, listed: ListedPairs | None, backend: str | None) -> Tensor:
    """`row_losses` over all pairs or, of a rule that is a sum over pairs, those listed. [N, S]"""
    if listed is None:
        return row_losses(inputs, backend=backend)
    return listed_row_losses(inputs, listed, backend=backend)


def over_nonzero(total: Tensor, count: Tensor) -> Tensor:
    """Sum of the totals over the sum of the counts, 0 over none."""
    return total.sum() / count.sum().clamp_min(1)


def over_terms(total: Tensor, count: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Rows' sums of terms [N] and their numbers: the mean over terms, the sum, or the rows'."""
    if reduction == "mean":
        total = over_nonzero(total, count)
    elif reduction == "sum":
        total = total.sum()
    return total.to(dtype)


def class_sizes(both: Sides) -> tuple[Tensor, Tensor]:
    """How many positives and negatives each row has, [N] each; O((N + M) log M)."""
    labels, others = both.labels
    ordered = others.sort().values
    last = torch.searchsorted(ordered, labels, right=True)
    same = last - torch.searchsorted(ordered, labels)
    if both.alone:
        same = same - (labels == others[: labels.shape[0]]).long()
    return same, both.y.shape[0] - int(both.alone) - same
