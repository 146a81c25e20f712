"""`pairwise_topk`: the k nearest (or farthest) rows of a bank by any metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    followed,
    no_autocast,
    power_of_two,
    root,
    row_dtype,
)
from fused_losses.base.sides import Integers
from fused_losses.base.validation import check_plain
from fused_losses.pairwise.class_covariance import of_classes
from fused_losses.pairwise.lengths import of_some_length
from fused_losses.pairwise.own_metric import OwnMetric
from fused_losses.pairwise.topk_arguments import check_batches, check_named, check_topk, taking_part
from fused_losses.pairwise.topk_in_full import finished, in_full
from fused_losses.pairwise.whitening import whitened
from fused_losses.primitives.topk.inputs import (
    HEADS,
    SCREENS,
    Prepared,
    PrincipalRows,
    QuantizedRows,
    TopkInputs,
)
from fused_losses.primitives.topk.listed import listed
from fused_losses.primitives.topk.op import best_screen, select
from fused_losses.primitives.topk.rotation import rotated


def _angle(cosine: Tensor) -> Tensor:
    """arccos / pi, gradient 0 at the ends."""
    inside = cosine.abs() < 1
    ends = torch.where(cosine >= 1, 0.0, torch.where(cosine <= -1, 1.0, cosine))
    return torch.where(inside, torch.where(inside, cosine, 0).arccos() / math.pi, ends)


def _without_mean(x: Tensor) -> Tensor:
    moved = x - x.mean(dim=-1, keepdim=True)
    # what rounding leaves of a constant row is no direction; any other has one, however short
    moved = torch.where((x == x[..., :1]).all(dim=-1, keepdim=True), 0, moved)
    return moved * power_of_two(moved)


def _roots(x: Tensor) -> Tensor:
    """Square roots with gradient 0 at 0; NaN below."""
    return torch.where(x < 0, torch.nan, root(x))


class _Order(NamedTuple):
    """A metric by products: what the rows become, whose scores are taken, and their meaning."""

    kind: str
    rows: Callable[[Tensor], Tensor] | None = None  # of and to float64
    value: Callable[[Tensor], Tensor] | None = None
    similar: bool = False  # a large score is a small value


ORDERS = {
    "dot": _Order("dot"),
    "sqeuclidean": _Order("sqeuclidean"),
    "euclidean": _Order("sqeuclidean", None, root),
    "cosine": _Order("cosine", None, lambda c: 1 - c, True),
    "angular": _Order("cosine", None, _angle, True),
    "correlation": _Order("cosine", _without_mean, lambda c: 1 - c, True),
    "hellinger": _Order("sqeuclidean", _roots, lambda s: root(s / 2)),
    "mahalanobis": _Order("sqeuclidean", None, root),
}


@plans.hands_out
def pairwise_topk(
    x: Tensor,  # [N, D] or [B, N, D]
    y: Tensor | QuantizedRows | None,  # [M, D] or [B, M, D]; None: x itself
    k: int,
    metric: str | OwnMetric = "euclidean",
    *,
    p: float = 2.0,
    largest: bool | None = None,
    x_labels: Tensor | None = None,  # [N]
    y_labels: Tensor | None = None,  # [M]
    match: str = "any",
    x_ids: Tensor | None = None,  # [N]
    y_ids: Tensor | None = None,  # [M]
    skip_self: bool = False,
    exclude: Tensor | None = None,  # [N, E]
    screen: str | Prepared = "auto",
    backend: str | None = None,
    **metric_options: Any,
) -> tuple[Tensor, Tensor]:
    """The k best rows of a bank y for each row of x, streamed: never an N x M matrix.

    Args:
        x: [N, D] queries, float32, bfloat16, float16 or float64; bool for hamming and jaccard.
        y: [M, D] the bank, of any of these types (x's own or not), or `QuantizedRows`, rows in
            int8. It may be memory-mapped and larger than the memory: it is read once a run of
            queries, in place. None: x itself.
        k: how many, in [1, max(2048, M)]; beyond 2048 a GPU's kernels have no list, and
            bounded runs.
        metric: any of `pairwise_distance`, a function of your own among them, or "dot".
        p, metric_options: as in `pairwise_distance` (w, VI, covariance, variance, base).
        largest: default: the smallest distances, the largest products.
        x_labels, y_labels, match: with match="same" or "different" only pairs whose integer labels
            are equal, or are not. y_labels of y=None: x_labels.
        x_ids, y_ids: integers; pairs with equal ids are left out.
        skip_self: leave out i == j.
        exclude: [N, E] integers, columns that a row leaves out; -1: none.
        screen: what the products that screen are made in: "fp32", "bf16" (CPUs with AVX512_BF16)
            or the `QuantizedRows` of y, read in its place, or its `PrincipalRows`, of which few
            coordinates are read where few hold most of the spread; "auto": the fastest that can
            run. It never changes the answer: what a bound cannot rule out is scored in float64.
            Metrics that are not made of products are computed in full.

    x [B, N, D] with y [B, M, D] or None: B searches, of item b's rows in item b's alone. Labels,
    ids and exclusions then are [B, .] too, and so is what is returned; y and screen are not
    prepared; options of the metric are those of every item.

    Returns (values [N, k] float32, or float64 for float64 x, best first; indices [N, k] int64).
    Equal scores go by the lowest index. A row with fewer than k candidates is padded with index -1
    and +inf (-inf when largest). A pair whose score is NaN is no candidate, and a row of x with NaN
    has the index -1 and the value NaN throughout. A row of zeros
    has cosine 0 with every row.
    values are differentiable in x and y, once; nothing flows through a padded value.
    Raises ValueError, TypeError for arguments that do not fit each other; RuntimeError where the
    backend or the screen cannot run.
    Time O(N M D), half where y is None and skip_self; memory O(N k + N D) and a few blocks, and a
    copy of y in float64 for correlation, hellinger and mahalanobis.
    """
    check_plain(p=p)
    if isinstance(x, Tensor) and x.dim() == 3:
        given = dict(p=p, largest=largest, match=match, skip_self=skip_self, screen=screen)
        sided = dict(x_labels=x_labels, y_labels=y_labels, x_ids=x_ids, y_ids=y_ids)
        given |= dict(backend=backend, **metric_options)
        return _of_batches(x, y, k, metric, dict(**sided, exclude=exclude), given)
    check_topk(x, y, k, metric, match, screen)
    bank = x if y is None else y
    labels, ids = (x_labels, y_labels), (x_ids, y_ids)
    asked, numbers = taking_part(x, y, labels, ids, exclude, match, skip_self)
    asked["largest"] = metric == "dot" if largest is None else largest
    asked |= dict(k=k, symmetric=y is None and mirrored(numbers))
    return best_columns(
        x, bank, metric, asked, p=p, screen=screen, backend=backend, **metric_options
    )


def _of_batches(
    x: Tensor,  # [B, N, D]
    y: Tensor | QuantizedRows | None,
    k: int,
    metric: str | OwnMetric,
    sided: dict[str, Tensor | None],  # [B, ...]
    given: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Item by item."""
    y = check_batches(x, y, sided, given["screen"])
    # of one item the slope is not B items long, as that of an index would be
    banks = None if y is None else y.unbind(0)
    told = {name: t.unbind(0) for name, t in sided.items() if t is not None}
    found = []
    for b, rows in enumerate(x.unbind(0)):
        options: dict[str, Any] = {name: t[b] for name, t in told.items()}
        bank = None if banks is None else banks[b]
        found.append(pairwise_topk(rows, bank, k, metric, **options, **given))
    if not found:
        shape = (0, x.shape[1], k)
        values = x.new_zeros(shape, dtype=accumulate_dtype(x.dtype))
        return values, torch.zeros(shape, dtype=torch.int64, device=x.device)
    values, index = zip(*found, strict=True)
    return torch.stack(values), torch.stack(index)


def best_columns(
    x: Tensor,
    bank: Tensor | QuantizedRows,  # x itself where asked["symmetric"]
    metric: str | OwnMetric,
    asked: dict[str, Any],
    *,
    p: float = 2.0,
    screen: str | Prepared = "auto",
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`pairwise_topk` behind its door; asked: fields of `TopkInputs`, checked and numbered."""
    check_named(metric, p, options)
    with no_autocast(x.device):
        if callable(metric) or not is_product(metric, options):
            return in_full(x, bank, metric, asked, {"p": p, "backend": backend, **options})
        return _by_products(x, bank, metric, asked, screen, backend, options)


def is_product(metric: str, options: dict[str, Any]) -> bool:
    """Whether a metric with these options has the order of a kind."""
    of_rows = options.get("variance") is not None or of_classes(options.get("covariance"))
    return metric in ORDERS and options.get("w") is None and not of_rows


class Compared(NamedTuple):
    """Rows as a kind compares them."""

    x: Tensor
    y: Tensor  # x itself where the bank is
    y_scale: Tensor | None
    screen: str | Prepared


def compared(
    x: Tensor,
    bank: Tensor | QuantizedRows,
    metric: str,
    screen: str | Prepared,
    options: dict[str, Any],
) -> Compared:
    """What the rows of a metric of `ORDERS` become."""
    order, y_scale = ORDERS[metric], None
    transformed = order.rows is not None or metric == "mahalanobis"
    if not isinstance(screen, str) and transformed:
        raise ValueError(
            f"screen: expected one of {', '.join(SCREENS)} with metric={metric!r}, whose rows are "
            f"not those of the codes, got {type(screen).__name__}"
        )
    if isinstance(bank, QuantizedRows):
        bank, y_scale, signs = bank.codes, bank.scale, bank.signs
        if transformed:
            raise ValueError(f"y: expected float rows with metric={metric!r}, got QuantizedRows")
        if signs is not None:
            x = rotated(x.to(row_dtype(x.device)), signs)
    same = bank is x
    if transformed:
        # rows that are rounded once more have an order of their own
        x = x.to(row_dtype(x.device))
        bank = x if same else bank.to(x.dtype)
    if metric == "mahalanobis":
        x, bank, _ = whitened(x, bank, options.get("VI"), options.get("covariance"))
    elif order.rows is not None:
        x, bank = order.rows(x), order.rows(bank)
    elif order.kind == "cosine":
        x, bank, y_scale, screen = of_some_length(x, bank, y_scale, screen)
    return Compared(x, x if same else bank, y_scale, screen)


def _by_products(
    given: Tensor,
    bank: Tensor | QuantizedRows,
    metric: str,
    asked: dict[str, Any],
    screen: str | Prepared,
    backend: str | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The metrics whose order is that of a product, a cosine or a squared distance."""
    x, y, y_scale, screen = compared(given, bank, metric, screen, options)
    order = ORDERS[metric]
    codes = screen if isinstance(screen, QuantizedRows) else (None,) * 4
    heads = screen if isinstance(screen, PrincipalRows) else (None,) * 4 + (0.0,)
    name = screen if isinstance(screen, str) else ""
    inputs = TopkInputs(
        x,
        y,
        y_scale,
        *codes,
        kind=order.kind,
        # codes are read in the place of products of y
        screen=name if name in SCREENS[1:] else best_screen(x, backend),
        **{**asked, "largest": asked["largest"] != order.similar},
        **dict(zip(HEADS, heads, strict=True)),
    )
    keys, index = select(inputs, backend)
    if followed(x) or (y_scale is None and followed(y)):
        keys = listed(x, y, index, order.kind, y_scale)
    values = keys if order.value is None else order.value(keys)
    return finished(x, values.to(accumulate_dtype(given.dtype)), index, asked["largest"]), index


def mirrored(numbers: Integers) -> bool:
    """Whether i sees j where j sees i, of one set of rows."""
    return numbers.x_labels is numbers.y_labels and numbers.x_ids is numbers.y_ids


_INDICES: dict[str, Any] = dict(
    name="topk", bound=EXACT, value=lambda found: found[1], precisions=("fp32", "bf16")
)
examples(
    pairwise_topk,
    lambda f, t: f(t.x, t.y, 9),
    {m: dict(metric=m) for m in ("dot", "euclidean", "cosine")},
    **_INDICES,
)
examples(pairwise_topk, lambda f, t: f(t.x, t.y, 200, "dot"), {"many": {}}, **_INDICES)
examples(
    pairwise_topk,
    lambda f, t: f(t.x, None, 9, "dot", x_labels=t.labels, match="different"),
    {"own rows": dict(skip_self=True)},
    **_INDICES,
)
