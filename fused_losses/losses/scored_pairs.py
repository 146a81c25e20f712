"""What the functions over pairs share around the sweep: scores by name, a batch by its labels.

A score by name becomes u = scale <x, y>, or apart u = -scale |x - y|^2: "rbf"; "euclidean" is the
root of that with the scale squared, -scale |x - y|.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_losses.base.numerics import exactly_centered
from fused_losses.base.sides import Sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import number
from fused_losses.primitives.pairs.inputs import PairInputs

SCORED_BY = ("dot", "cosine", "rbf", "euclidean")


def scored(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    *,
    similarity: str = "dot",
    normalize: bool = False,
    precision: str = "fp32",
) -> PairInputs:
    """The pairs of x and y (None: x itself) with their score by name."""
    if normalize or similarity == "cosine":
        x, y = unit(x), None if y is None else unit(y)
    if similarity in ("dot", "cosine"):
        x = x.contiguous()
        return PairInputs(x, x if y is None else y.contiguous(), scale, precision=precision)
    x, y = exactly_centered(x, y)
    x = x.contiguous()
    y = x if y is None else y.contiguous()
    # the root is taken of u: g |x - y| is the root of g^2 |x - y|^2
    scale = scale.square() if similarity == "euclidean" else scale
    score = "root" if similarity == "euclidean" else "linear"
    return PairInputs(x, y, scale, score=score, apart=True, precision=precision)


def triangle(inputs: PairInputs) -> PairInputs:
    """The same pairs, y being x and i == j left out, at half the work."""
    return inputs._replace(
        triangle=True, y_bias=None, y_labels=None, y_ids=None, y_groups=None, y_window=None
    )


class ByLabel(NamedTuple):
    """One batch with its rows in the order of their labels.

    Positives then sit near the diagonal, and a kernel needs no masks away from it.
    """

    x: Tensor  # [N, D]
    labels: Tensor  # [N] int32, increasing
    order: Tensor  # [N]: where each row stood

    def restored(self, values: Tensor) -> Tensor:
        """A value a row [N], in the rows' first order."""
        return values.index_select(0, self.order.argsort())


def by_label(both: Sides, normalize: bool) -> ByLabel:
    """Sorts a batch, and divides its rows by their norms; O(N D) memory, no host sync."""
    numbers, order = both.labels[0].sort(stable=True)
    x = unit(both.x, order) if normalize else both.x.index_select(0, order)
    return ByLabel(x, numbers, order)


def labelled_pairs(
    both: Sides,
    similarity: str,
    normalize: bool,
    precision: str,
    scale: Tensor | None = None,
) -> tuple[ByLabel, PairInputs]:
    """A batch in the order of its labels, and the upper triangle of its pairs; scale None: 1."""
    rows = by_label(both, normalize)
    scale = number("scale", 1.0, both.x) if scale is None else scale
    inputs = scored(rows.x, None, scale, similarity=similarity, precision=precision)
    return rows, triangle(inputs._replace(x_labels=rows.labels))
