"""`pairwise_topk`: the k nearest (or farthest) rows of a bank by any metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base import plans, validation
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    followed,
    no_autocast,
    power_of_two,
    root,
    row_dtype,
)
from fused_losses.base.sides import Integers, integers
from fused_losses.base.validation import check_plain
from fused_losses.pairwise.distance import check_options, check_weighted, pairwise_distance
from fused_losses.pairwise.lengths import of_some_length
from fused_losses.pairwise.metrics import METRICS
from fused_losses.pairwise.whitening import whitened
from fused_losses.primitives.distances.inputs import FLAT
from fused_losses.primitives.topk.inputs import MATCHES, SCREENS, QuantizedRows, TopkInputs
from fused_losses.primitives.topk.listed import listed
from fused_losses.primitives.topk.op import best_screen, select
from fused_losses.primitives.topk.reference import allowed, best

BLOCK_BYTES = 8 << 20  # of a block, for the metrics that no product screens
BYTES_A_PAIR = 48  # a distance and what sorting it takes
MOST = 2_048  # k


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
    x: Tensor,  # [N, D]
    y: Tensor | QuantizedRows | None,  # [M, D]; None: x itself
    k: int,
    metric: str = "euclidean",
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
    screen: str | QuantizedRows = "auto",
    backend: str | None = None,
    **metric_options: Any,
) -> tuple[Tensor, Tensor]:
    """The k best rows of a bank y for each row of x, streamed: never an N x M matrix.

    Args:
        x: [N, D] queries, float32, bfloat16, float16 or float64; bool for hamming and jaccard.
        y: [M, D] the bank, of any of these types (x's own or not), or `QuantizedRows`, rows in
            int8. It may be memory-mapped and larger than the memory: it is read once a run of
            queries, in place. None: x itself.
        k: how many, in [1, 2048].
        metric: any of `pairwise_distance`, or "dot".
        p, metric_options: as in `pairwise_distance` (w, VI, covariance, variance, base).
        largest: default: the smallest distances, the largest products.
        x_labels, y_labels, match: with match="same" or "different" only pairs whose integer labels
            are equal, or are not. y_labels of y=None: x_labels.
        x_ids, y_ids: integers; pairs with equal ids are left out.
        skip_self: leave out i == j.
        exclude: [N, E] integers, columns that a row leaves out; -1: none.
        screen: what the products that screen are made in: "fp32", "bf16" (CPUs with AVX512_BF16)
            or the `QuantizedRows` of y, read in its place; "auto": the fastest that can run. It
            never changes the answer: what a bound on its rounding cannot rule out is scored in
            float64. Metrics that are not made of products are computed in full.

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
    _check(x, y, k, metric, match, screen)
    bank = x if y is None else y
    rows = bank.codes if isinstance(bank, QuantizedRows) else bank
    numbers = integers(
        x,
        rows,
        ("x_", "y_"),
        alone=y is None,
        labels=(x_labels, y_labels),
        ids=(x_ids, y_ids),
        exclude=exclude,
    )
    if match != "any" and x_labels is None:
        raise ValueError(f"x_labels: expected labels with match={match!r}, got None")
    asked = dict(
        x_labels=None if match == "any" else numbers.x_labels,
        y_labels=None if match == "any" else numbers.y_labels,
        x_ids=numbers.x_ids,
        y_ids=numbers.y_ids,
        exclude=numbers.exclude,
        k=k,
        largest=metric == "dot" if largest is None else largest,
        match=match,
        skip_self=skip_self,
        symmetric=y is None and mirrored(numbers),
    )
    return best_columns(
        x, bank, metric, asked, p=p, screen=screen, backend=backend, **metric_options
    )


def best_columns(
    x: Tensor,
    bank: Tensor | QuantizedRows,  # x itself where asked["symmetric"]
    metric: str,
    asked: dict[str, Any],
    *,
    p: float = 2.0,
    screen: str | QuantizedRows = "auto",
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`pairwise_topk` behind its door; asked: fields of `TopkInputs`, checked and numbered."""
    _check_options(metric, p, options)
    order = ORDERS.get(metric)
    if options.get("w") is not None or options.get("variance") is not None:
        order = None
    with no_autocast(x.device):
        if order is None:
            return _in_full(x, bank, metric, asked, {"p": p, "backend": backend, **options})
        return _by_products(x, bank, metric, order, asked, screen, backend, options)


def _by_products(
    x: Tensor,
    bank: Tensor | QuantizedRows,
    metric: str,
    order: _Order,
    asked: dict[str, Any],
    screen: str | QuantizedRows,
    backend: str | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The metrics whose order is that of a product, a cosine or a squared distance."""
    y_scale = None
    if isinstance(bank, QuantizedRows):
        bank, y_scale = bank.codes, bank.scale
        if order.rows is not None or metric == "mahalanobis":
            raise ValueError(f"y: expected float rows with metric={metric!r}, got QuantizedRows")
    dtype, same = accumulate_dtype(x.dtype), bank is x
    if metric == "mahalanobis" or order.rows is not None:
        # rows that are rounded once more have an order of their own
        x = x.to(row_dtype(x.device))
        bank = x if same else bank.to(x.dtype)
    if metric == "mahalanobis":
        x, bank, _ = whitened(x, bank, options.get("VI"), options.get("covariance"))
    elif order.rows is not None:
        x, bank = order.rows(x), order.rows(bank)
    elif order.kind == "cosine":
        x, bank, y_scale, screen = of_some_length(x, bank, y_scale, screen)
    bank = x if same else bank
    codes = screen if isinstance(screen, QuantizedRows) else (None, None, None)
    name = screen if isinstance(screen, str) else ""
    inputs = TopkInputs(
        x,
        bank,
        y_scale,
        *codes,
        kind=order.kind,
        # codes are read in the place of products of y
        screen=name if name in SCREENS[1:] else best_screen(x, backend),
        **{**asked, "largest": asked["largest"] != order.similar},
    )
    keys, index = select(inputs, backend)
    if followed(x) or (y_scale is None and followed(bank)):
        keys = listed(x, bank, index, order.kind, y_scale)
    values = keys if order.value is None else order.value(keys)
    return _finished(x, values.to(dtype), index, asked["largest"]), index


def _finished(x: Tensor, values: Tensor, index: Tensor, largest: bool) -> Tensor:
    # a padded value is a constant
    nothing = -torch.inf if largest else torch.inf
    values = torch.where(index < 0, nothing, values)
    on_host = x.device.type == "cpu" and not torch.compiler.is_compiling()
    # without a padded value no row has NaN: asking is cheaper than reading x
    if not x.is_floating_point() or (on_host and not bool((index < 0).any())):
        return values
    return torch.where(x.isnan().any(dim=1, keepdim=True), torch.nan, values)


def _in_full(
    x: Tensor,
    bank: Tensor | QuantizedRows,
    metric: str,
    asked: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Metrics without a product: blocks of distances, the best carried from block to block."""
    if isinstance(bank, QuantizedRows):
        raise ValueError(f"y: expected float rows with metric={metric!r}, got QuantizedRows")
    n, m, k = x.shape[0], bank.shape[0], asked["k"]
    inputs = TopkInputs(x, bank, kind=metric, **asked)
    dtype = torch.promote_types(x.dtype, bank.dtype)
    variance = options.pop("variance", None)

    def distances(rows: Tensor, others: Tensor, at: slice | Tensor) -> Tensor:
        some = {} if variance is None else {"variance": variance[at]}
        return pairwise_distance(rows.to(dtype), others.to(dtype), metric, **options, **some)

    wide = max(k, 2_048)
    step = max(1, BLOCK_BYTES // (wide * BYTES_A_PAIR))
    found = [torch.zeros((0, k), dtype=torch.int64, device=x.device)]
    with torch.no_grad():
        for i in range(0, n, step):
            run = slice(i, min(i + step, n))
            index = torch.full((run.stop - i, k), -1, device=x.device)
            keys = torch.full(
                index.shape, torch.nan, device=x.device, dtype=accumulate_dtype(dtype)
            )
            for j in range(0, m, wide):
                block = slice(j, min(j + wide, m))
                fresh = distances(x[run], bank[block], block)
                fresh = torch.where(allowed(inputs, run, block), fresh, torch.nan)
                at = torch.arange(j, block.stop, device=x.device).expand(fresh.shape)
                keys, index = best(
                    torch.cat([keys, fresh], 1), torch.cat([index, at], 1), k, inputs.largest
                )
            found.append(index)
    index = torch.cat(found)
    values = [torch.zeros((0, k), dtype=accumulate_dtype(dtype), device=x.device)]
    step = max(1, BLOCK_BYTES // (k * max(x.shape[1], 1) * BYTES_A_PAIR))
    for i in range(0, n if m else 0, step):
        at = index[i : i + step].clamp_min(0)

        def of_rows(rows: Tensor, others: Tensor, at: Tensor = at) -> Tensor:
            return distances(rows[:, None], others[at], at)[:, 0]

        part = x[i : i + step]
        if followed(x, bank):
            values.append(checkpoint(of_rows, part, bank, use_reentrant=False))
        else:
            values.append(of_rows(part, bank))
    values = torch.cat(values) if m else values[0].new_zeros((n, k))
    values = values.to(accumulate_dtype(x.dtype))
    if followed(x, bank) and not (n and m):  # gradients of nothing
        values = values + (x[:0].sum() + bank[:0].sum()).to(values.dtype)
    return _finished(x, values, index, asked["largest"]), index


def mirrored(numbers: Integers) -> bool:
    """Whether i sees j where j sees i, of one set of rows."""
    return numbers.x_labels is numbers.y_labels and numbers.x_ids is numbers.y_ids


def _check_options(metric: str, p: float, options: dict[str, Any]) -> None:
    """The options of `pairwise_distance`, and no others, where the metric has them."""
    if metric not in METRICS and metric not in ORDERS:
        known = ", ".join(sorted({*METRICS, "dot"}))
        raise ValueError(f"metric: expected one of {known}, got {metric!r}")
    stray = sorted(set(options) - {"w", "VI", "covariance", "variance", "base"})
    if stray:
        raise TypeError(
            f"{stray[0]}: expected one of w, VI, covariance, variance and base, which "
            f"pairwise_distance takes"
        )
    rest = {name: value for name, value in options.items() if name != "w"}
    check_options(metric, p, **rest)
    if options.get("w") is not None:
        check_weighted(metric)


def _check_side(name: str, rows: Tensor, shape: str, metric: str) -> None:
    bits = metric in FLAT and isinstance(rows, Tensor) and rows.dtype == torch.bool
    validation.check_matrix(name, rows[:0].float() if bits else rows, shape)


def _check(
    x: Tensor,
    y: Tensor | QuantizedRows | None,
    k: int,
    metric: str,
    match: str,
    screen: str | QuantizedRows,
) -> None:
    _check_side("x", x, "[N, D]", metric)
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k: expected an integer in [1, {MOST}], got {type(k).__name__}")
    if not 1 <= k <= MOST:
        raise ValueError(f"k: expected a value in [1, {MOST}], got {k}")
    validation.check_choice("match", match, MATCHES)
    for name, value in (("y", y), ("screen", screen)):
        if isinstance(value, QuantizedRows):
            _check_quantized(name, value)
    if not isinstance(y, QuantizedRows) and y is not None:
        _check_side("y", y, "[M, D]", metric)
    rows = x if y is None else y.codes if isinstance(y, QuantizedRows) else y
    if rows.shape[1] != x.shape[1]:
        raise ValueError(
            f"y: expected [M, {x.shape[1]}] to match x [N, {x.shape[1]}], got "
            f"{validation.describe(rows)}"
        )
    validation.check_device("x", x, "y", rows)
    if not isinstance(screen, QuantizedRows):
        validation.check_choice("screen", screen, SCREENS)
    elif tuple(screen.codes.shape) != tuple(rows.shape) or isinstance(y, QuantizedRows):
        raise ValueError(
            f"screen: expected the QuantizedRows of float rows y {tuple(rows.shape)}, got codes "
            f"{validation.describe(screen.codes)}"
        )


def _check_quantized(name: str, rows: QuantizedRows) -> None:
    m = rows.codes.shape[0]
    if rows.codes.dtype != torch.int8 or rows.codes.dim() != 2:
        raise TypeError(
            f"{name}.codes: expected int8 [M, D], got {validation.describe(rows.codes)}"
        )
    for field in ("scale", "error"):
        vector = getattr(rows, field)
        if vector.dtype != torch.float32 or tuple(vector.shape) != (m,):
            raise TypeError(
                f"{name}.{field}: expected float32 [{m}], got {validation.describe(vector)}"
            )
        validation.check_device(f"{name}.codes", rows.codes, f"{name}.{field}", vector)


_INDICES: dict[str, Any] = dict(
    name="topk", bound=EXACT, value=lambda found: found[1], precisions=("fp32", "bf16")
)
examples(
    pairwise_topk,
    lambda f, t: f(t.x, t.y, 9),
    {m: dict(metric=m) for m in ("dot", "euclidean", "cosine")},
    **_INDICES,
)
examples(
    pairwise_topk,
    lambda f, t: f(t.x, None, 9, "dot", x_labels=t.labels, match="different"),
    {"own rows": dict(skip_self=True)},
    **_INDICES,
)
