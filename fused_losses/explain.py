"""`explain(fn, *args, **kw)`: which backend a call would run on, why, and what it would need."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends, functional, pairs
from fused_losses.late_interaction import maxsim
from fused_losses.sweep import row_statistics
from fused_losses.trilinear import TRILINEAR_ROWS

SLACK = 1 << 18  # of small tensors
ROW_BYTES = 200  # of vectors a row, of one sweep over classes
PAIR_ROW_BYTES = 400  # of float64 statistics and what autograd keeps of them, a row or column
REFERENCE_MATRICES = 24  # alive at once, of the size of the scores


@dataclass(frozen=True)
class Plan:
    """How a call would run."""

    backend: str
    reasons: dict[str, list[str]]  # why the backends that were passed over cannot take the call
    peak_extra_bytes: int  # beyond inputs and gradients, forward and backward

    def __str__(self) -> str:
        passed = "".join(f"\n  not {who}: {', '.join(w)}" for who, w in self.reasons.items())
        return f"{self.backend}, at most {self.peak_extra_bytes / 2**20:.1f} MiB extra{passed}"


class Call(NamedTuple):
    """What a call asks of a backend."""

    like: Tensor  # whose device and dtype decide who runs
    precision: str
    extra: Callable[[str], int]  # a backend's name -> peak bytes


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
    asked = bound.arguments.get("backend")
    name, refused = backends.choose(asked, call.like.device, call.like.dtype, call.precision)
    return Plan(name, refused, call.extra(name))


def _size(dtype: torch.dtype) -> int:
    """Bytes of an element as it is accumulated."""
    return 8 if dtype == torch.float64 else 4


# ---- over classes -------------------------------------------------------------------------------


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
        return around + kept + backends.module(name).extra_bytes(n, d, dtype, precision)

    return Call(weight, precision, extra)


# ---- over pairs ---------------------------------------------------------------------------------


def _sweep_bytes(
    name: str, n: int, m: int, d: int, dtype: torch.dtype, precision: str, width: int
) -> int:
    if name == "reference":
        return REFERENCE_MATRICES * n * m * _size(dtype)
    if name == "cpu":
        return backends.module(name).pair_extra_bytes(n, m, d, dtype, precision, width)
    return backends.module(f"{name}_pairs").extra_bytes(n, m, d + width, dtype, precision)


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

    return Call(like, a["precision"], extra)


# how many times the rows are alive once more
UNIT = SORTED = 2.0  # a copy and its gradient
MOVED = 4.0  # a copy about the columns' mean, its norms' gradient, and the sum of two
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
            module = backends.module(name)
            return around + module.maxsim_extra_bytes(tokens, found, d, dtype, precision)
        block = backends.module("bounded_maxsim").BLOCK_BYTES
        widened = 2 * (tokens + found) * d * 4 if dtype.itemsize == 2 else 0
        return around + 5 * block + 4 * tokens * d * size + widened

    return Call(queries, precision, extra)


READERS: dict[Callable[..., Any], Reader] = {
    functional.margin_softmax: _over_classes,
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
    pairs.pair_statistics: _inputs,
    pairs.pair_attention: _inputs,
    maxsim: _maxsim,
}
