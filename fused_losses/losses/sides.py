"""What the losses over triplets and rankings share: two sides, checked, and their means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.integers import dense, dense_pair
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_both, check_integers, check_rows
from fused_losses.primitives.row_rules.inputs import RowInputs

DISTANCES = ("euclidean", "sqeuclidean", "cosine")

SMALLEST_SQUARE = 1e-12  # the authors' floor under the squared distances of a centroid triplet


class Sides(NamedTuple):
    """Rows and columns with their labels as int32 numbers."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], x itself where a batch meets itself
    x_labels: Tensor  # [N] int32
    y_labels: Tensor  # [M] int32
    alone: bool  # the batch meets itself

    def rows(self, distance: str, precision: str, normalize: bool = False) -> RowInputs:
        """The primitive's inputs but for its rule; rows of norm 1 if so wanted.

        distance: one of DISTANCES, or "dot" for the product itself.
        """
        x, y = self.x, self.y
        if normalize:
            # the blocks are in this dtype: nothing is won by rounding before
            dtype = accumulate_dtype(x.dtype)
            x = unit(x.to(dtype))
            y = x if self.y is self.x else unit(self.y.to(dtype))
        score = {"cosine": "minus_dot"}.get(distance, distance)
        labels = self.x_labels, self.y_labels
        return RowInputs(x, y, *labels, score=score, skip_self=self.alone, precision=precision)


def check_sides(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    reduction: str,
    precision: str,
) -> Tensor:
    """A batch [N, D] with labels [N], alone or against a second; under autocast in its dtype."""
    if (ref_embeddings is None) != (ref_labels is None):
        given, missing = ("ref_embeddings", "ref_labels")[:: 1 if ref_labels is None else -1]
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if ref_embeddings is None:
        check_rows("embeddings", embeddings, precision)
    else:
        embeddings = check_both(
            "embeddings", embeddings, "ref_embeddings", ref_embeddings, precision
        )
        check_integers("ref_labels", ref_labels, (ref_embeddings.shape[0],), embeddings)
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    return embeddings


def sides(x: Tensor, labels: Tensor, y: Tensor | None, y_labels: Tensor | None) -> Sides:
    """Both sides, y being x without a second."""
    if y is None:
        numbers = dense(labels)
        return Sides(x, x, numbers, numbers, True)
    return Sides(x, y, *dense_pair(labels, y_labels), False)


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
    ordered = both.y_labels.sort().values
    last = torch.searchsorted(ordered, both.x_labels, right=True)
    same = last - torch.searchsorted(ordered, both.x_labels)
    return same - int(both.alone), both.y.shape[0] - same
