"""`explain(fn, *args, **kw)`: which backend a call would run on, why, and what it would need."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends, functional
from fused_losses.class_losses import ClassLoss
from fused_losses.mining import batch as mining_batch
from fused_losses.pairwise import topk as neighbors
from fused_losses.primitives.class_rules import bounded as class_tiles
from fused_losses.primitives.distances import inputs as distances_inputs
from fused_losses.primitives.distances import op as distance_matrix
from fused_losses.primitives.maxsim.op import maxsim
from fused_losses.primitives.pairs import op as pairs
from fused_losses.primitives.row_rules import bounded as row_rules_bounded
from fused_losses.primitives.row_statistics.op import row_statistics
from fused_losses.primitives.shared_negatives import bounded as shared_negatives_bounded
from fused_losses.primitives.topk import certified
from fused_losses.primitives.topk.inputs import QuantizedRows
from fused_losses.primitives.topk.listed import LISTED_BYTES
from fused_losses.similarity.trilinear import TRILINEAR_ROWS

SLACK = 1 << 18  # of small tensors
ROW_BYTES = 200  # of vectors a row, of one sweep over classes
PAIR_ROW_BYTES = 400  # of float64 statistics and what autograd keeps of them, a row or column
REFERENCE_MATRICES = 24  # alive at once, of the size of the scores


@dataclass(frozen=True)
class Plan:
    """How a call would run."""

    backend: str
    reasons: dict[str, list[str]]  # why the backends that were passed over cannot take the call
    # beyond inputs and gradients, forward and backward. Of a matrix of distances, neighbours and
    # mined lists the result and its gradient are not counted either, nor the parts of a list
    peak_extra_bytes: int

    def __str__(self) -> str:
        passed = "".join(f"\n  not {who}: {', '.join(w)}" for who, w in self.reasons.items())
        return f"{self.backend}, at most {self.peak_extra_bytes / 2**20:.1f} MiB extra{passed}"


class Call(NamedTuple):
    """What a call asks of a backend."""

    like: Tensor  # whose device and dtype decide who runs
    precision: str
    extra: Callable[[str], int]  # a backend's name -> peak bytes
    kind: str | None = None  # of a matrix of distances: not every backend has every one
    backend: str | None = None  # of a function that has no choice
    operation: str = "row_statistics"  # as the dispatch table calls it, where there is no kind


Arguments = dict[str, Any]
Reader = Callable[[Arguments], Call]


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """The plan of `fn(*args, **kwargs)`, which is not run.

    fn: a function of `fused_losses.functional`, row_statistics, pair_statistics, pair_attention or
    maxsim. Raises RuntimeError where the call itself would (no backend can take it) and ValueError
    for another function.
    """
    if fn not in READERS:
        known = ", ".join(f.__name__ for f in READERS)
        raise ValueError(f"fn: expected one of {known}, got {getattr(fn, '__name__', fn)!r}")
    # by place or by name, as the call itself takes them
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()
    call = READERS[fn](bound.arguments)
    asked = call.backend or bound.arguments.get("backend")
    asked_of = (call.like.device, call.like.dtype, call.precision)
    if call.kind is None:
        name, refused = backends.choose(asked, *asked_of, call.operation, call.like.shape[-1])
    else:
        name, refused = distance_matrix.choose(asked, *asked_of, call.kind)
    return Plan(name, refused, call.extra(name))


def _size(dtype: torch.dtype) -> int:
    """Bytes of an element as it is accumulated."""
    return 8 if dtype == torch.float64 else 4


# ---- over classes -------------------------------------------------------------------------------


def _over_class_tiles(a: Arguments) -> Call:
    """`class_loss`: tiles of classes with their rule in PyTorch."""
    rows, weight = a["embeddings"], a["weight"]
    (n, d), size = rows.shape, _size(weight.dtype)
    centers = weight.shape[1] if weight.dim() == 3 else 1
    labels = a["labels"].shape[1] if a["labels"].dim() == 2 else 1
    taking_part = weight.shape[0] if a["classes"] is None else a["classes"].shape[0]
    around = 8 * n * d * size + SLACK + ROW_BYTES * n * labels

    def extra(name: str) -> int:
        if name == "reference":
            matrices = REFERENCE_MATRICES * n * taking_part * centers * 8
            return around + matrices + n * labels * taking_part + 4 * weight.numel() * size
        tile = class_tiles.extra_bytes(n, d, centers, weight.dtype, rows.device)
        if name in ("triton", "cuda"):
            many = class_tiles.tile_bytes(rows.device) // (centers * (n + d) * size) * centers
            tile += _matrix_bytes(name, n, max(many, 1), d, weight.dtype, "dot", a["precision"])
        return around + tile

    return Call(weight, a["precision"], extra, operation="distance_products")


def _shared_pairs(a: Arguments) -> Call:
    """`shared_negatives`: tiles of the batch's own pairs."""
    rows = a["embeddings"]
    (n, d), dtype = rows.shape, rows.dtype

    def extra(name: str) -> int:
        side = min(shared_negatives_bounded.tile_side(rows.device), n)
        pairs = n * n if name == "reference" else side * side
        return 8 * n * d * _size(dtype) + SLACK + shared_negatives_bounded.LIVE_BYTES * pairs

    return Call(rows, "fp32", extra, operation="pairs")


def _with_shared_pairs(a: Arguments) -> Call:
    """`unpg_margin_softmax`: one after the other."""
    classes, shared = _over_classes(a), _shared_pairs(a)
    return classes._replace(extra=lambda name: classes.extra(name) + shared.extra(name))


def _over_either(a: Arguments) -> Call:
    """`margin_softmax`, which is a `class_loss` with sub-centres and the like."""
    by_tiles = a["weight"].dim() == 3 or a["labels"].dim() == 2
    by_tiles = by_tiles or isinstance(a["margin"], ClassLoss)
    return _over_class_tiles(a) if by_tiles else _over_classes(a)


def _over_classes(a: Arguments) -> Call:
    rows, weight = list(a.values())[:2]
    n, (c, d) = 1 if rows.dim() == 1 else rows.shape[0], weight.shape
    dtype, size = weight.dtype, _size(weight.dtype)
    # all of them, or their sample
    taking_part = c if a.get("classes") is None else a["classes"].shape[0]
    precision = a.get("precision", "fp32")

    def extra(name: str) -> int:
        # rows made float, normalised, scaled, and their gradients
        around = 8 * n * d * size + SLACK + ROW_BYTES * n
        if name == "reference":
            return around + 8 * n * taking_part * size + 2 * c * d * size
        budget = a.get("memory_budget", 0) if name == "cpu" else 0
        kept = min(budget, n * taking_part * size)
        return (
            around
            + kept
            + backends.module("row_statistics", name).extra_bytes(n, d, dtype, precision)
        )

    return Call(weight, precision, extra)


# ---- over pairs ---------------------------------------------------------------------------------


def _sweep_bytes(
    name: str, n: int, m: int, d: int, dtype: torch.dtype, precision: str, width: int
) -> int:
    if name == "reference":
        return REFERENCE_MATRICES * n * m * _size(dtype)
    if name == "cpu":
        return backends.module("pairs", name).extra_bytes(n, m, d, dtype, precision, width)
    return backends.module("pairs", name).extra_bytes(n, m, d + width, dtype, precision)


def _over_pairs(
    a: Arguments,
    like: Tensor,
    shape: tuple[int, int, int],
    copied: float,
    width: int = 0,
    more: int = 0,
) -> Call:
    """A sweep of N rows by M columns of D features, and what is copied around it.

    copied: rows of D elements alive beyond inputs and gradients, width: of an attention's values,
    more: further bytes.
    """
    n, m, d = shape
    size = _size(like.dtype)
    around = int(copied * d * size) + PAIR_ROW_BYTES * (n + m) + SLACK + more

    def extra(name: str) -> int:
        return around + _sweep_bytes(name, n, m, d, like.dtype, a["precision"], width)

    return Call(like, a["precision"], extra, operation="pairs")


# how many times the rows are alive once more
UNIT = SORTED = 2.0  # a copy and its gradient
MOVED = 4.0  # a copy about the columns' mean, its norms' gradient, and the sum of two
CHOSEN = 9  # the chosen positive and negative of each row, their differences and gradients
AGAIN = 2.0  # the gradients of a further sweep, or of a tensor that is both sides, and their sum


def _copies(a: Arguments) -> float:
    """Those that `pair_front.scored` makes for the arguments' score."""
    unit = a.get("normalize") or a.get("similarity") == "cosine" or a.get("cost") == "cosine"
    moved = a.get("similarity") in ("rbf", "euclidean")
    return UNIT * bool(unit) + MOVED * moved


def _batch(rows: str, copies: float = 0.0) -> Reader:
    """One batch against itself."""

    def read(a: Arguments) -> Call:
        x = a[rows]
        again = AGAIN if a.get("anchor_count") is not None or a.get("form") == "pairs" else 0.0
        found = copies + again + (UNIT if a.get("normalize") else 0.0)
        return _over_pairs(a, x, (len(x), len(x), x.shape[1]), found * len(x))

    return read


def _two(rows: str, columns: str, copies: float = 0.0) -> Reader:
    """Rows against columns; columns None: the rows."""

    def read(a: Arguments) -> Call:
        x = a[rows]
        y = x if a[columns] is None else a[columns]
        again = AGAIN * len(x) if y is x else 0.0
        copied = (copies + _copies(a)) * (len(x) + len(y))
        return _over_pairs(a, y, (len(x), len(y), x.shape[1]), copied + again)

    return read


def _info_nce(a: Arguments) -> Call:
    query, key, queue = a["query"], a["key"], a["queue"]
    banks = [] if queue is None else [queue] if isinstance(queue, Tensor) else list(queue)
    n, d = query.shape
    again = AGAIN * (bool(banks) + (a["hardness"] > 0) + (key is query)) + _copies(a)
    size = _size(key.dtype)
    more = 4 * sum(b.numel() for b in banks) * size if a["normalize"] else 0
    if a["negatives"] is not None:
        more += 4 * a["negatives"].numel() * size
    columns = max(len(t) for t in (key, *banks))
    return _over_pairs(a, key, (n, columns, d), again * (n + len(key)), more=more)


def _side_by_side(copies: float, *others: str) -> Reader:
    """Kernels on x and on other features of the same samples, and on both side by side."""

    def read(a: Arguments) -> Call:
        x = a["x"]
        d = x.shape[1] + a[others[0]].shape[1]
        return _over_pairs(a, x, (len(x), len(x), d), copies * len(x))

    return read


def _attention(a: Arguments) -> Call:
    q, k, v = a["query"], a["key"], a["value"]
    items = q.shape[:-2].numel()
    size, each = _size(q.dtype), q.numel() + k.numel() + v.numel()
    n, m = q.shape[-2], k.shape[-2]
    # each item's output as accumulated, its gradient, and all of them stacked
    outputs = 5 * items * n * v.shape[-1] + (2 * each + n * items * 64 if items > 1 else 0)
    copied = _copies(a) * items * (n + m)
    return _over_pairs(a, q, (n, m, q.shape[-1]), copied, v.shape[-1], outputs * size)


def _trilinear(a: Arguments) -> Call:
    q, k2, v2 = a["q"], a["k2"], a["v2"]
    n, size = q.shape[-2], _size(q.dtype)
    rows = max(n, TRILINEAR_ROWS)  # products of queries and a block of first keys
    around = 4 * sum(a[name].numel() for name in ("q", "k1", "k2", "v1", "v2")) * size
    more = around + 8 * rows * v2.shape[-1] * size
    return _over_pairs(a, q, (rows, k2.shape[-2], q.shape[-1]), 4 * rows, v2.shape[-1], more)


def _sinkhorn(a: Arguments) -> Call:
    x, y = a["x"], a["y"]
    copies = {"dot": 1.0, "cosine": UNIT + 1, "sqeuclidean": 6.0}[a["cost"]]
    copied = copies * (len(x) + len(y))
    return _over_pairs(a, y, (len(x), len(y), x.shape[1]), copied, x.shape[1] + 1)


def _inputs(a: Arguments) -> Call:
    """The primitive itself."""
    p = a["inputs"]
    width = a["values"].shape[1] if "values" in a else 0
    shape = (len(p.x), len(p.y), p.x.shape[1])
    more = 2 * shape[0] * width * _size(p.x.dtype)
    return _over_pairs({"precision": p.precision}, p.x, shape, 0.0, width, more)


def _maxsim(a: Arguments) -> Call:
    queries, documents = a["queries"], a["documents"]
    dtype, precision, d = queries.dtype, a["precision"], queries.shape[-1]
    size, tokens, found = _size(dtype), queries[..., 0].numel(), documents[..., 0].numel()
    count = len(documents if a["lengths"] is None else a["lengths"])
    # real tokens are copied where a mask says which they are
    masked = (a["query_mask"], a["document_mask"]) != (None, None)
    copies = 2 if masked or (documents.dim() == 3 and a["lengths"] is not None) else 0
    # the index, and scores with their gradient
    around = 4 * tokens * count + 3 * len(queries) * count * size + SLACK
    around += copies * (tokens + found) * d * size

    def extra(name: str) -> int:
        if name == "reference":
            return around + 4 * tokens * found * size
        if name == "cpu":
            module = backends.module("maxsim", name)
            return around + module.extra_bytes(tokens, found, d, dtype, precision)
        block = backends.module("maxsim", "bounded").BLOCK_BYTES
        if name == "cuda":
            block = max(block, backends.module("maxsim", "cuda").TILE_BYTES)
        widened = 2 * (tokens + found) * d * 4 if dtype.itemsize == 2 else 0
        return around + 5 * block + 4 * tokens * d * size + widened

    return Call(queries, precision, extra, operation="maxsim")


# ---- distances ----------------------------------------------------------------------------------

# what a metric's rows are compared by
KIND_OF = {
    **{name: name for name in distances_inputs.KINDS},
    **dict.fromkeys(("cosine", "correlation", "snr", "lorentz", "rbf"), "sqeuclidean"),
    **dict.fromkeys(("angular", "hellinger", "poincare", "mahalanobis"), "euclidean"),
    **dict.fromkeys(("polynomial", "sigmoid"), "dot"),
    "laplacian": "cityblock",
}
# matrices alive at once beside the result and its gradient, of what is a function of a kind
MATRICES = {
    "angular": 9,
    "snr": 7,
    "poincare": 9,
    "lorentz": 12,
    "jensenshannon": 3,
    "rbf": 4,
    "laplacian": 4,
    "polynomial": 6,
    "sigmoid": 6,
}
# how many times the rows of both sides are alive once more
ROWS = {
    "cosine": 6.0,
    "jaccard": 2.0,
    "correlation": 10.0,
    "angular": 6.0,
    "hellinger": 8.0,
    "jensenshannon": 8.0,
    "snr": 6.0,
    "poincare": 4.0,
    "lorentz": 4.0,
    "mahalanobis": 14.0,
}
# of the reference, matrices [N, M, D] alive at once
TERMS = {"dot": 0, "canberra": 16, "braycurtis": 14, "jensenshannon": 24, "kl": 18}


def _matrix_bytes(
    name: str,
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    kind: str,
    precision: str = "fp32",
    gradient: bool = True,
) -> int:
    """Of `distance_matrix`, beyond inputs, result and, where there is one, their gradients."""
    size = _size(dtype)
    if name == "reference":
        return (TERMS.get(kind, 8) * d + 4) * n * m * size
    if name == "cpu":
        module = backends.module("distances", name)
        return module.extra_bytes(n, m, d, dtype, kind, precision, gradient)
    if name == "triton":
        return backends.module("distances", "triton").extra_bytes(n, m, d, dtype, precision)
    if name == "cuda":
        return backends.module("distances", "cuda").extra_bytes(n, m, d, dtype, kind)
    if kind == "dot":
        # plain products
        return 8 * (n + m) * d if dtype.itemsize == 2 else 0
    module = backends.module("distances", "bounded")
    block = max(d, n * m * (1 if kind in distances_inputs.PRODUCTS else d)) * size
    spare = max(0, module.BLOCK_BYTES - block) * module.LIVE_BLOCKS[kind]
    found = module.extra_bytes(n, m, d, dtype, kind) - spare
    return found if gradient else found // 2


def _distances(what: str) -> Reader:
    """`pairwise_distance` or `pairwise_similarity`; what: the argument that names the metric."""

    def read(a: Arguments) -> Call:
        x = a["x"]
        y = x if a["y"] is None else a["y"]
        metric = a[what]
        kind = "dot" if (what, metric) == ("similarity", "cosine") else KIND_OF[metric]
        if metric == "minkowski" and a["p"] in (1, 2, float("inf")):
            kind = {1: "cityblock", 2: "euclidean"}.get(a["p"], "chebyshev")
        if a.get("variance") is not None:
            kind = "scaled"
        (n, d), m, size = x.shape[-2:], y.shape[-2], _size(x.dtype)
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]).numel()
        sets = (x.shape[:-2].numel(), y.shape[:-2].numel())
        # where both sides have several sets of rows each pair of sets is computed, then stacked
        each = min(sets) > 1
        rows, columns = (n, m) if each else (n * sets[0], m * sets[1])
        copies = ROWS.get(metric, 0.0) + (0.0 if x.is_contiguous() and y.is_contiguous() else 2.0)
        if a.get("w") is not None and kind not in distances_inputs.WEIGHTED:
            # rows about their mean, times the weights
            copies += 4.0
        if x.dtype == torch.bool and a.get("w") is not None:
            # bits with weights are compared as floats
            copies += 1.0
        if kind == "scaled":
            # 1 / variance
            copies = 3.0
        matrices = MATRICES.get(metric, 0) + (2 if max(sets) > 1 else 0)
        around = int(copies * (n * sets[0] + m * sets[1]) * d * size)
        around += matrices * lead * n * m * size + SLACK

        def extra(name: str) -> int:
            sizes = (rows, columns, d)
            differentiable = kind not in distances_inputs.FLAT
            found = _matrix_bytes(name, *sizes, x.dtype, kind, a["precision"], differentiable)
            return around + found

        return Call(x, a["precision"], extra, kind)

    return read


# ---- neighbours and mining ----------------------------------------------------------------------

LISTED_BLOCKS = 8  # of gathered rows and their gradients
SCREEN_BLOCKS = 8  # of certified_topk's


def _topk_bytes(
    name: str,
    n: int,
    m: int,
    d: int,
    k: int,
    dtype: torch.dtype,
    triangle: bool = False,
    late: bool = False,
) -> int:
    """Of `selection.select`, beyond its inputs and what it returns."""
    if name == "reference":
        return 6 * n * m * (d + 4) * 8
    # numbers for labels and ids
    around = 64 * (n + m)
    if name == "cpu":
        return around + backends.module("topk", name).extra_bytes(n, d, k, dtype, triangle, late)
    block = certified.BLOCK_BYTES
    kept = k + max(16, k // 2)
    size = _size(dtype)
    if name == "triton":
        module = backends.module("topk", "triton")
        around += max(module.PARTIAL_BYTES, 8 * n * kept) + 3 * module.BLOCK_BYTES
    if name == "cuda":
        module = backends.module("topk", "cuda")
        around += max(module.PARTIAL_BYTES, 64 * n * kept) + 3 * module.TILE_BYTES
        around += 2 * module.BANK_BYTES
    return around + SCREEN_BLOCKS * block + 3 * n * d * size + 2 * m * size + 72 * n * kept


def _topk(a: Arguments) -> Call:
    x, y, k, metric = a["x"], a["y"], a["k"], a["metric"]
    bank = x if y is None else y.codes if isinstance(y, QuantizedRows) else y
    (n, d), m = x.shape, bank.shape[0]
    size, block = _size(x.dtype), min(LISTED_BYTES, 8 * n * k * d)
    options = a.get("metric_options", {})
    plan = neighbors.PLANS.get(metric)
    if options.get("w") is not None or options.get("variance") is not None:
        plan = None
    # the gathered rows of a block, and the gradient of y where it is not summed in place
    wants = x.requires_grad or bank.requires_grad
    listed = LISTED_BLOCKS * block + 24 * n * k if wants else 0
    summed = 4 * m * d if wants and bank.dtype.itemsize == 2 else 0
    copies = {"correlation": 3.0, "hellinger": 3.0, "mahalanobis": 8.0}.get(metric, 0.0)
    around = int(copies * (n + m) * d * size) + summed + 32 * n * k + SLACK
    if plan is not None:

        def extra(name: str) -> int:
            triangle = y is None and a["skip_self"]
            late = isinstance(a.get("screen"), QuantizedRows)
            return around + max(listed, _topk_bytes(name, n, m, d, k, x.dtype, triangle, late))

        return Call(x, "fp32", extra, operation="topk")
    wide = max(k, 2_048)
    tall = max(1, neighbors.BLOCK_BYTES // (wide * neighbors.BYTES_A_PAIR))
    kind = KIND_OF[metric]

    def in_full(name: str) -> int:
        rows, columns = min(n, tall), min(m, wide)
        pairs = rows * (columns + k) * neighbors.BYTES_A_PAIR
        gathered = min(neighbors.BLOCK_BYTES, n * k * d * neighbors.BYTES_A_PAIR)
        block = _matrix_bytes(name, rows, columns, d, x.dtype, kind, gradient=False)
        return around + max(gathered, pairs + block)

    return Call(x, "fp32", in_full, kind)


MINED_BLOCKS = 12  # alive at once


def _mining(a: Arguments) -> Call:
    x = a["embeddings"]
    y = x if a["ref_embeddings"] is None else a["ref_embeddings"]
    (n, d), m, size = x.shape, y.shape[0], _size(x.dtype)
    metric = a["metric"] or "euclidean"
    kind = "dot" if metric == "cosine" else metric
    copied = 3 * (n + m) * d * size * (a["normalize"] or metric == "cosine" or "strategy" in a)
    chosen = {a["positive"], a["negative"]} <= {"hardest", "easiest"} and "strategy" not in a
    if chosen and a["positive_range"] is a["negative_range"] is None:
        plan = {"x": x.detach(), "y": None if y is x else y.detach(), "k": 1, "metric": kind}
        call = _topk({**plan, "skip_self": True})
        return call._replace(extra=lambda name: copied + 128 * n + call.extra(name))

    def extra(name: str) -> int:
        tall = min(n, max(1, mining_batch.BLOCK_BYTES // (size * max(m, 1))))
        blocks = MINED_BLOCKS * tall * m * size + 64 * (n + m) + SLACK
        precision = a["precision"]
        return copied + blocks + _matrix_bytes(name, tall, m, d, x.dtype, kind, precision, False)

    return Call(x, a["precision"], extra, kind)


# ---- over rows ----------------------------------------------------------------------------------

# blocks alive at once, by what a row is folded into; choices have no gradient of their own
ROW_BLOCKS, CHOICE_BLOCKS, COUNTED_BLOCKS = 14, 4, 8
SORTED_BLOCKS = 22  # triplets counted by sorting


def _row_bytes(name: str, n: int, m: int, like: Tensor, precision: str, blocks: int) -> int:
    """Of `row_losses` with its gradient, beyond inputs and gradients; rows are as `like`."""
    d, dtype, size = like.shape[1], like.dtype, _size(like.dtype)
    if name == "reference":
        return (8 * d + REFERENCE_MATRICES) * n * m * size
    tall = min(n, max(1, row_rules_bounded.block_bytes(like.device) // (max(m, 1) * size)))
    around = blocks * tall * m * size + 2 * (n + m) * d * size
    gradient = blocks > CHOICE_BLOCKS
    return around + _matrix_bytes(name, tall, m, d, dtype, "euclidean", precision, gradient)


def _over_rows(
    rows: str, columns: str | None, copied: float = 0.0, more: int = 0, blocks: int = ROW_BLOCKS
) -> Reader:
    """Rows against columns (None: themselves).

    copied: rows of both sides alive once more, more: the same of the rows alone.
    """

    def read(a: Arguments) -> Call:
        x = a[rows]
        y = x if columns is None or a[columns] is None else a[columns]
        n, m, d, dtype = len(x), len(y), x.shape[1], x.dtype
        m += n if columns == "frozen" else 0
        found = copied + (UNIT if a.get("normalize") else 0.0)
        around = int((found * (n + m) + more * n) * d * _size(dtype))
        around += PAIR_ROW_BYTES * (n + m) + SLACK

        def extra(name: str) -> int:
            return around + _row_bytes(name, n, m, x, a["precision"], blocks)

        return Call(x, a["precision"], extra, operation="rows")

    return read


def _choice(rows: str, columns: str | None, more: int) -> Reader:
    """One positive and one negative a row: the extreme ones by two selections of one."""
    of_rows = _over_rows(rows, columns, 0.0, more, CHOICE_BLOCKS)

    def read(a: Arguments) -> Call:
        by_rule = of_rows(a)
        x = a[rows]
        alone = columns is None or a[columns] is None
        # centroids stand beside the rows
        n = 2 * len(x) if columns is None else len(x)
        m, d, dtype = n if alone else len(a[columns]), x.shape[1], x.dtype
        found = UNIT if a.get("normalize") else 0.0
        around = int((found * (n + m) + more * len(x)) * d * _size(dtype))
        # rows without NaN, and the numbers and labels of the chosen
        around += (n + (0 if alone else m)) * d * dtype.itemsize
        around += PAIR_ROW_BYTES * (n + m) + SLACK

        def extra(name: str) -> int:
            if name == "reference" or "semihard" in (a.get("positive"), a.get("negative")):
                return by_rule.extra(name)
            return around + _topk_bytes(name, n, m, d, 1, dtype, alone)

        return by_rule._replace(extra=extra)

    return read


def _triplets(columns: str, copied: float = 0.0) -> Reader:
    def read(a: Arguments) -> Call:
        plain = _over_rows("embeddings", columns, copied, 0, SORTED_BLOCKS)(a)
        smooth = a.get("smooth") or a["triplets"] == "easy"
        # counted in C++, but for softplus
        blocks = ROW_BLOCKS if smooth else COUNTED_BLOCKS
        compiled = _over_rows("embeddings", columns, copied, 0, blocks)(a)
        return plain._replace(extra=lambda name: (compiled if name == "cpu" else plain).extra(name))

    return read


def _both(first: Reader, second: Reader) -> Reader:
    """Two sweeps, one after the other."""

    def read(a: Arguments) -> Call:
        calls = first(a), second(a)
        return calls[0]._replace(extra=lambda name: max(call.extra(name) for call in calls))

    return read


def _nearest_rows(a: Arguments) -> Call:
    # the gathered neighbours of every row, their differences and the gradients of both
    return _choice("embeddings", None, 6 * a["window"])(a)


def _listed_triplets(a: Arguments) -> Call:
    anchor, triplets = a["anchor"], a["triplets"]
    count = len(anchor if triplets is None else triplets[0])
    size = _size(anchor.dtype)
    rows = sum(len(a[name]) for name in ("anchor", "positive", "negative"))
    widened = 8 * rows * anchor.shape[1] if anchor.dtype.itemsize == 2 else 0
    around = (10 * count + 2 * rows) * anchor.shape[1] * size + widened + 64 * count + SLACK
    return Call(anchor, "fp32", lambda name: around, backend="bounded")


READERS: dict[Callable[..., Any], Reader] = {
    functional.margin_softmax: _over_either,
    functional.class_loss: _over_class_tiles,
    functional.adaptive_margin_softmax: _over_classes,
    functional.shared_negatives: _shared_pairs,
    functional.unpg_margin_softmax: _with_shared_pairs,
    functional.linear_cross_entropy: _over_classes,
    row_statistics: _over_classes,
    functional.info_nce: _info_nce,
    functional.n_pairs: _two("anchors", "positives", copies=1.0),
    functional.sigmoid_contrastive: _two("x", "y"),
    functional.supervised_contrastive: _batch("embeddings", SORTED),
    functional.nt_xent: _batch("embeddings", SORTED),
    functional.soft_nearest_neighbor: _batch("embeddings", SORTED + MOVED),
    functional.multi_similarity: _batch("embeddings", SORTED),
    functional.orthogonal_projection: _batch("embeddings", SORTED + AGAIN),
    functional.circle: _batch("embeddings", SORTED),
    functional.lifted_structure: _batch("embeddings", SORTED + 2 * MOVED),
    functional.generalized_lifted_structure: _batch("embeddings", SORTED + MOVED),
    functional.proxy_nca: _two("embeddings", "proxies", MOVED),
    functional.proxy_anchor: _two("proxies", "embeddings"),
    functional.kernel_mean: _two("x", "y", MOVED),
    functional.mmd: _two("x", "y", 2 * MOVED),
    functional.uniformity: _batch("x", MOVED),
    functional.hsic: _side_by_side(2.5 * MOVED, "y"),
    functional.cauchy_schwarz_qmi: _side_by_side(2.5 * MOVED, "y"),
    functional.cauchy_schwarz_divergence: _side_by_side(3.5 * MOVED, "target"),
    functional.logsumexp_similarity: _two("x", "y"),
    functional.similarity_attention: _attention,
    functional.trilinear_attention: _trilinear,
    functional.sinkhorn: _sinkhorn,
    functional.pairwise_distance: _distances("metric"),
    functional.pairwise_similarity: _distances("similarity"),
    functional.pairwise_topk: _topk,
    functional.mine_triplets: _mining,
    functional.mine_pairs: _mining,
    functional.all_triplets: _triplets("ref_embeddings"),
    functional.harmonic_triplet: _triplets("frozen", SORTED),
    functional.triplet_margin: _listed_triplets,
    functional.batch_hard_triplet: _choice("embeddings", "ref_embeddings", CHOSEN),
    functional.batch_easy_hard_triplet: _choice("embeddings", "ref_embeddings", CHOSEN),
    functional.centroid_triplet: _choice("embeddings", None, 3 * CHOSEN),
    functional.prototype_triplet: _choice("embeddings", "prototypes", CHOSEN),
    functional.contrastive: _two("embeddings", "ref_embeddings", MOVED),
    functional.margin_loss: _two("embeddings", "ref_embeddings", MOVED),
    functional.snr_contrastive: _over_rows("embeddings", "ref_embeddings", MOVED),
    functional.tuplet_margin: _over_rows("embeddings", "ref_embeddings"),
    functional.angular: _batch("embeddings", SORTED + 2 * MOVED),
    functional.ranked_list: _over_rows("embeddings", None),
    functional.fast_ap: _over_rows("embeddings", "ref_embeddings"),
    functional.histogram: _over_rows("embeddings", None),
    functional.intra_pair_variance: _both(
        _batch("embeddings", AGAIN), _over_rows("embeddings", None, AGAIN)
    ),
    functional.icnn: _nearest_rows,
    pairs.pair_statistics: _inputs,
    pairs.pair_attention: _inputs,
    maxsim: _maxsim,
}
