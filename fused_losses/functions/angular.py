"""The angular loss: a positive pair against all negatives of its anchor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import plans
from fused_losses.base.examples import examples
from fused_losses.base.indices import Indices, miner_pairs
from fused_losses.base.numerics import (
    accumulate_dtype,
    no_autocast,
    recomputed,
    row_dtype,
    softplus,
)
from fused_losses.base.sides import Sides, batch_sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_plain, number
from fused_losses.functions.listed_triplets import listed_example
from fused_losses.functions.scored_pairs import by_label
from fused_losses.functions.scored_rows import class_sizes
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.inputs import NEGATIVE, PairInputs
from fused_losses.primitives.pairs.op import pair_statistics


def angular(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    indices: Indices | None = None,
    alpha: float = 40.0,
    normalize: bool = False,
    normalize_negatives: bool | None = None,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Angular loss, all rows alike (`AngularLoss`: normalize_negatives=False).

    Over the positive pairs (a, p), t = tan(alpha)^2.

        loss_ap = log(1 + sum_N e^(4 t <a + p, n> - 2 (1 + t) <a, p>))

    embeddings [N, D] (norm 1 in the paper), labels [N] integers, and ref_embeddings [M, D],
    ref_labels [M] for positives and negatives outside the batch. indices: a miner's (a, p, n) or
    (a, p, a, n), int64, or `Triplets`, `Pairs`: its pairs (a, p) are the positive ones; negatives
    are all rows of other labels than a's, as in pytorch-metric-learning. alpha: in degrees, in
    (0, 90). normalize_negatives: None: as normalize; pytorch-metric-learning divides a and p by
    their norms but not n (True, False). reduction: "mean" over the positive pairs (with no negative
    their loss is 0), "sum" over the ordered ones, "none" [N]: the sum of each anchor's.

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. Time O(P N D) over the P unordered positive pairs, a sweep for each row of the
    largest class, whose size the host reads; over P ordered ones with ref_embeddings or indices,
    O(P M D), as many pairs a sweep as there are rows; memory O((N + M) D + P). Paper: Wang et al.,
    Deep Metric Learning with Angular Loss, 2017.
    """
    check_plain(alpha=alpha)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    if not 0 < alpha < 90:
        raise ValueError(f"alpha: expected degrees in (0, 90), got {alpha}")
    t = math.tan(math.radians(alpha)) ** 2
    with no_autocast(embeddings.device):
        name, dtype = backends.requested(backend), accumulate_dtype(both.x.dtype)
        if indices is not None or not both.mirrored:
            lengths = (normalize, normalize_negatives)
            loss, ordered = _listed(both, indices, *lengths, t, precision, name)
        else:
            rows = by_label(both, normalize)
            y = _columns(both.x, rows.x, normalize, normalize_negatives, rows.order)
            loss = _ANGULAR(rows.x, y, rows.labels, t, precision, name)
            loss = loss if reduction != "none" else rows.restored(loss)
            ordered = class_sizes(both)[0].sum()
        if reduction == "mean":
            return (loss.sum() / ordered.clamp_min(1)).to(dtype)
        return (loss.sum() if reduction == "sum" else loss).to(dtype)


def _columns(
    given: Tensor, rows: Tensor, normalize: bool, wanted: bool | None, order: Tensor | None
) -> Tensor:
    """The negatives: `rows`, or those that were given in another length."""
    if wanted is None or wanted == normalize:
        return rows
    y = given if order is None else given.index_select(0, order)
    return unit(y) if wanted else y


def _listed(
    both: Sides,
    indices: Indices | None,
    normalize: bool,
    wanted: bool | None,
    t: float,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Each anchor's sum [N] over listed positive pairs, or those of two batches; their number."""
    dtype = accumulate_dtype(both.x.dtype)
    x, given = both.x.to(dtype), both.y.to(dtype)
    x = unit(x) if normalize else x
    p = x if both.y is both.x else unit(given) if normalize else given
    y = _columns(given, p, normalize, wanted, None)
    first = second = None
    if indices is None:
        count = class_sizes(both)[0].sum()
    else:
        listed = miner_pairs(indices, x.shape[0], y.shape[0], x)
        first, second = listed.positive[:2]
        count = torch.full((), first.shape[0], device=x.device)
    loss = _ANGULAR_LISTED(x, p, y, *both.labels, first, second, t, precision, backend)
    return loss, count


def _angular(
    x: Tensor, y: Tensor, labels: Tensor, t: float, precision: str, backend: str
) -> Tensor:
    """Each anchor's sum over its positive pairs, of sorted rows. [N]"""
    # a zero that knows x, for a batch without positive pairs
    loss = (x * 0).sum(dim=1).to(row_dtype(x.device))
    for offset in range(1, x.shape[0]):
        first = (labels[:-offset] == labels[offset:]).nonzero()[:, 0]
        if first.shape[0] == 0:
            break
        given = (x, x, y, labels, labels, first, first + offset, t, precision, backend)
        each = recomputed(_angular_pairs, *given)
        loss = loss.index_add(0, first, each).index_add(0, first + offset, each)
    return loss


_ANGULAR = OpaqueOp(
    "angular",
    "(Tensor x, Tensor y, Tensor labels, float t, str precision, str backend)",
    _angular,
    lambda x, *_: x.new_empty(x.shape[0], dtype=row_dtype(x.device)),
)


def _runs(
    x_labels: Tensor, y_labels: Tensor, first: Tensor | None, second: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs of positive pairs, no more than there are rows: those listed, or each row's r-th."""
    n = x_labels.shape[0]
    if first is not None and second is not None:
        yield from zip(first.split(max(n, 1)), second.split(max(n, 1)), strict=True)
        return
    ordered, order = y_labels.sort(stable=True)
    start = torch.searchsorted(ordered, x_labels)
    size = torch.searchsorted(ordered, x_labels, right=True) - start
    # every pass takes the same memory: two tell of all
    passes = 2 if plans.explaining() else int(size.max()) if n else 0
    for r in range(passes):
        i = (size > r).nonzero()[:, 0]
        yield i, order[(start[i] + r).clamp_max(max(len(order) - 1, 0))]


def _angular_listed(
    x: Tensor,
    positives: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    t: float,
    precision: str,
    backend: str,
) -> Tensor:
    """Each anchor's sum, [N]."""
    loss = ((x * 0).sum(dim=1) + (positives.sum() + y.sum()) * 0).to(row_dtype(x.device))
    for i, j in _runs(x_labels, y_labels, first, second):
        given = (x, positives, y, x_labels, y_labels, i, j, t, precision, backend)
        loss = loss.index_add(0, i, recomputed(_angular_pairs, *given))
    return loss


_ANGULAR_LISTED = OpaqueOp(
    "angular_listed",
    "(Tensor x, Tensor positives, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? first, "
    "Tensor? second, float t, str precision, str backend)",
    _angular_listed,
    lambda x, *_: x.new_empty(x.shape[0], dtype=row_dtype(x.device)),
)


def _angular_pairs(
    x: Tensor,
    positives: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    i: Tensor,
    j: Tensor,
    t: float,
    precision: str,
    backend: str,
) -> Tensor:
    """The losses of the positive pairs (i, j), [P]."""
    dtype = accumulate_dtype(x.dtype)
    a, p = x.index_select(0, i).to(dtype), positives.index_select(0, j).to(dtype)
    bias = (-2 * (1 + t)) * (a * p).sum(dim=1)
    inputs = PairInputs(
        (a + p).contiguous(),
        y.to(dtype).contiguous(),
        number("scale", 4 * t, x),
        x_bias=bias,
        x_labels=x_labels.index_select(0, i),
        y_labels=y_labels,
        precision=precision,
    )
    stats, _ = pair_statistics(inputs, backend=backend)
    return softplus(stats.value[NEGATIVE])


examples(
    angular,
    lambda f, t: f(t.x, t.labels, normalize=True),
    {"": {}, "none": dict(reduction="none")},
)
examples(angular, lambda f, t: f(t.x, t.labels, t.y, t.y_labels, normalize=True), {"ref": {}})
examples(
    angular,
    lambda f, t: f(t.x, t.labels, indices=listed_example(len(t.x), t.x.device), normalize=True),
    {"listed": {}},
)
