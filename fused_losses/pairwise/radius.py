"""`radius_search`: all rows of a bank within a radius, as ragged lists."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype
from fused_losses.base.parameters import check_parameter
from fused_losses.base.validation import check_number, check_plain
from fused_losses.pairwise.own_metric import OwnMetric
from fused_losses.pairwise.topk import ORDERS, compared, is_product
from fused_losses.pairwise.topk_arguments import check_named, check_topk, taking_part
from fused_losses.pairwise.topk_in_full import Unscreened
from fused_losses.primitives.topk.inputs import QuantizedRows, TopkInputs
from fused_losses.primitives.topk.listed import listed
from fused_losses.primitives.topk.within import Edge, Taken, gathered, within, within_bytes


class RadiusNeighbors(NamedTuple):
    """Row i's neighbours are indices[offsets[i] : offsets[i + 1]], and so their values."""

    offsets: Tensor  # [N + 1] int64, from 0 to P
    indices: Tensor  # [P] int64, of each row in rising order
    values: Tensor  # [P] float32, or float64 for float64 x

    def rows(self) -> Tensor:
        """The row of each neighbour. [P] int64"""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


@plans.hands_out
def radius_search(
    x: Tensor,  # [N, D]
    y: Tensor | QuantizedRows | None,  # [M, D]; None: x itself
    radius: float,
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
    backend: str | None = None,
    **metric_options: Any,
) -> RadiusNeighbors:
    """All rows of a bank within a radius of each row of x, streamed: never an N x M matrix.

        {j : d(x_i, y_j) <= radius},   of "dot" {j : <x_i, y_j> >= radius}

    Args:
        radius: a number, of distances >= 0, and what lies at it is within. A cosine of at least s
            is a distance "cosine" of at most 1 - s.
        largest: default: distances at most, products at least the radius; True: at least, False: at
            most.

    The others as in `pairwise_topk`.

    A pair is within if its value in float64 is, on every backend: products in x's own accumulation
    dtype decide what a bound on their rounding leaves no doubt of, float64 the rest. Metrics that
    are not made of products are computed in float64 in full, a function of your own in x's
    accumulation dtype. A pair whose value is NaN is not
    within; a row of x with NaN has no neighbours.

    Returns `RadiusNeighbors`: lists one after another, as a matrix in CSR. values are
    differentiable in x and y, once, as those of `pairwise_topk`; they are rounded to their dtype
    after the choice. Their number is known when they are found: compiled code breaks its graph.
    Raises ValueError, TypeError for arguments that do not fit each other; RuntimeError where the
    backend cannot run. Time O(N M D); memory that of P neighbours, O((N + P / N) D) and a few
    blocks, and copies of the rows in float64 as `pairwise_topk` makes them.
    """
    check_plain(p=p, radius=radius)
    check_topk(x, y, 1, metric, match, "auto")
    check_named(metric, p, metric_options)
    _check_radius(radius, metric)
    bank = x if y is None else y
    labels, ids = (x_labels, y_labels), (x_ids, y_ids)
    asked, _ = taking_part(x, y, labels, ids, exclude, match, skip_self)
    asked["largest"] = metric == "dot" if largest is None else largest
    with no_autocast(x.device):
        if callable(metric) or not is_product(metric, metric_options):
            options = {"p": p, "backend": backend, **metric_options}
            return _in_full(x, bank, radius, metric, asked, options)
        return _by_products(x, bank, radius, metric, asked, backend, metric_options)


def _by_products(
    given: Tensor,
    bank: Tensor | QuantizedRows,
    radius: float,
    metric: str,
    asked: dict[str, Any],
    backend: str | None,
    options: dict[str, Any],
) -> RadiusNeighbors:
    x, y, y_scale, _ = compared(given, bank, metric, "auto", options)
    order, largest = ORDERS[metric], asked["largest"]
    value = order.value or (lambda keys: keys)
    inputs = TopkInputs(
        x, y, y_scale, kind=order.kind, **{**asked, "largest": largest != order.similar}
    )

    def passes(keys: Tensor) -> Tensor:
        return value(keys) >= radius if largest else value(keys) <= radius

    key = _key(metric, radius)
    size = max(abs(key), 1.0) if order.kind == "cosine" else 0.0 if metric == "dot" else abs(key)
    if plans.explaining():
        offsets, j, index, pieces, real = _told(inputs)
    else:
        i, j = within(inputs, Edge(key, size, passes), backend)
        offsets, index, pieces, real = _in_pieces(i, j, x.shape[0])
    keys = listed(x[pieces], y, index, order.kind, y_scale)[real]
    return RadiusNeighbors(offsets, j, value(keys).to(accumulate_dtype(given.dtype)))


def _key(metric: str, radius: float) -> float:
    """The key whose value is the radius, but for a few roundings."""
    if metric in ("euclidean", "mahalanobis"):
        return radius * radius
    if metric == "hellinger":
        return 2 * radius * radius
    if metric in ("cosine", "correlation"):
        return 1 - radius
    if metric == "angular":
        # beyond half a turn nothing is farther, and nothing is nearer than no turn
        return math.cos(math.pi * radius) if radius <= 1 else -math.inf
    return radius


def _in_full(
    x: Tensor,
    bank: Tensor | QuantizedRows,
    radius: float,
    metric: str | OwnMetric,
    asked: dict[str, Any],
    options: dict[str, Any],
) -> RadiusNeighbors:
    """Metrics without a product: blocks of distances in float64."""
    if isinstance(bank, QuantizedRows):
        raise ValueError(f"y: expected float rows with metric={metric!r}, got QuantizedRows")
    own = callable(metric)
    inputs = TopkInputs(x, bank, kind="own" if own else metric, **asked)
    dtype = torch.promote_types(x.dtype, bank.dtype) if own else _wide(x)
    of = Unscreened(x, bank, metric, _widened(options, x), dtype)

    def taken(run: slice, block: slice) -> Tensor:
        d = of.distances(x[run], bank[block], block)
        return d >= radius if asked["largest"] else d <= radius

    if plans.explaining():
        offsets, j, index, pieces, real = _told(inputs)
    else:
        i, j = _found(inputs, taken)
        offsets, index, pieces, real = _in_pieces(i, j, x.shape[0])
    values = of.listed(x[pieces], index)[real]
    return RadiusNeighbors(offsets, j, values.to(accumulate_dtype(x.dtype)))


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.bool else row_dtype(x.device)


def _widened(options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The metric's tensors beside rows in float64."""
    weight = options.get("w")
    return options if weight is None else {**options, "w": weight.to(row_dtype(x.device))}


def _found(inputs: TopkInputs, taken: Taken) -> tuple[Tensor, Tensor]:
    if 0 in (inputs.x.shape[0], inputs.y.shape[0]):
        nothing = torch.zeros(0, dtype=torch.int64, device=inputs.x.device)
        return nothing, nothing
    with torch.no_grad():
        return gathered(inputs, taken)


def _in_pieces(i: Tensor, j: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs by row [P] as lines of one length, of which a long row has several.

    Offsets [N + 1], columns [L, W] with -1 in what is left over, each line's row [L], and where
    the pairs stand [L, W] bool. L <= 2 N and W is the mean of the rows' counts, rounded up.
    """
    counts = torch.zeros(n, dtype=torch.int64, device=i.device)
    counts = counts.index_add(0, i, torch.ones_like(i))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    width = max(1, -(-len(i) // max(1, n)))
    lines = (counts + width - 1) // width
    pieces = torch.arange(n, device=i.device).repeat_interleave(lines)
    first = torch.cat([lines.new_zeros(1), lines.cumsum(0)])
    place = torch.arange(len(i), device=i.device) - offsets[i]
    index = torch.full((len(pieces), width), -1, dtype=torch.int64, device=i.device)
    index[first[i] + place // width, place % width] = j
    return offsets, index, pieces, index >= 0


def _told(inputs: TopkInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For `explain`: as if each row had one neighbour; how many there are, values say."""
    plans.needs(within_bytes(inputs))
    n, device = inputs.x.shape[0], inputs.x.device
    pieces, j = torch.arange(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    index = torch.zeros((n, 1), dtype=torch.int64, device=device)
    return torch.arange(n + 1, device=device), j, index, pieces, index >= 0


def _check_radius(radius: float, metric: str | OwnMetric) -> None:
    if metric == "dot" or callable(metric):
        check_number("radius", radius)
        return
    if isinstance(radius, float) and radius == math.inf:
        return  # all that have a distance
    check_parameter("radius", radius, 0)


examples(
    radius_search,
    lambda f, t: f(t.x, t.y),
    {m: dict(metric=m, radius=r) for m, r in (("euclidean", 1.3), ("cosine", 0.8), ("dot", 0.1))},
    bound=EXACT,
    value=lambda found: found.indices,
    precisions=("fp32",),
)
