"""What the functions over pairs share around the sweep: scores by name, a batch by its labels.

A score by name becomes u = scale <x, y>, or apart u = -scale |x - y|^2: "rbf"; "euclidean" is the
root of that with the scale squared, -scale |x - y|; "power" is -scale log |x - y|.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.indices import ListedPairs
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype, exactly_centered
from fused_losses.base.sides import Sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import number
from fused_losses.primitives.listed.op import listed_statistics
from fused_losses.primitives.pairs.inputs import PairInputs, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_statistics

FEW = 256  # rows whose tiles are computed in less time than an order of their labels takes
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
    if similarity == "power":
        return PairInputs(x, y, scale, score="power", apart=True, precision=precision)
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


class BatchPairs(NamedTuple):
    """The pairs of a call with their score: of one batch, of two, or those that are listed."""

    inputs: PairInputs
    order: Tensor | None = None  # [N]: where each row stood, if the batch is in its labels' order
    listed: ListedPairs | None = None
    room: Room | None = None  # for scores that sweeps keep

    def statistics(
        self,
        *,
        positive: Rule = Rule(),
        negative: Rule = Rule(),
        reduction: str = "lse",
        window: Tensor | None = None,  # [4, N]
        x_bias: Tensor | None = None,  # [N], of the rows and not of the columns
        backend: str | None = None,
    ) -> PairStatistics:
        """`pair_statistics` of the batch's rows, in their first order."""
        order = self.order
        if order is not None:
            window = None if window is None else window.index_select(1, order)
            x_bias = None if x_bias is None else x_bias.index_select(0, order)
        p = self.inputs._replace(positive=positive, negative=negative)
        p = p if window is None else p._replace(x_window=window)
        if x_bias is not None and p.triangle:
            # with triangle a bias is that of the columns, too
            p = p._replace(triangle=False, skip_self=True, y_labels=p.x_labels)
        p = p if x_bias is None else p._replace(x_bias=x_bias)
        if self.listed is not None:
            return listed_statistics(p, self.listed, reduction=reduction, backend=backend)
        stats, _ = pair_statistics(p, reduction=reduction, room=self.room, backend=backend)
        if order is None:
            return stats
        back = order.argsort()
        return PairStatistics(*(t.index_select(1, back) for t in stats))


def has_both(stats: PairStatistics) -> Tensor:
    """Which rows have a positive and a negative, [N]."""
    return (stats.count > 0).all(dim=0)


def sum_of_both(stats: PairStatistics) -> tuple[Tensor, Tensor]:
    """lse over the positives + lse over the negatives, 0 on rows without one, and who has both."""
    both = has_both(stats)
    return torch.where(both, stats.value.sum(dim=0), 0), both


def batch_pairs(
    both: Sides,
    similarity: str,
    normalize: bool,
    precision: str,
    scale: Tensor | None = None,
    *,
    once: bool = True,
) -> BatchPairs:
    """The pairs of a call; scale None: 1. once: what is listed twice counts once."""
    scale = number("scale", 1.0, both.x) if scale is None else scale
    if both.listed is None and both.mirrored:
        if both.x.shape[0] <= FEW and not torch.compiler.is_compiling():
            how: dict[str, Any] = dict(similarity=similarity, normalize=normalize)
            inputs = scored(both.x, None, scale, precision=precision, **how)
            inputs = triangle(inputs._replace(x_labels=both.labels[0]))
            return BatchPairs(inputs, room=both.room)
        rows, inputs = labelled_pairs(both, similarity, normalize, precision, scale)
        return BatchPairs(inputs, rows.order, room=both.room)
    x, y, listed = both.x, both.other, both.listed
    if listed is not None:
        # no product wants the rows narrow
        wide = accumulate_dtype(x.dtype)
        x, y = x.to(wide), None if y is None else y.to(wide)
        listed = listed.once(both.y.shape[0]) if once else listed
    inputs = scored(x, y, scale, similarity=similarity, normalize=normalize, precision=precision)
    numbers = both.numbers._asdict() if listed is None else {}
    skip_self = both.alone and listed is None
    inputs = inputs._replace(skip_self=skip_self, **numbers)
    return BatchPairs(inputs, None, listed, both.room)


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
