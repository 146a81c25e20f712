"""The streamed primitive of class losses: tiles of classes folded by a rule, written in PyTorch.

    c_ij = pool_k <x_i, w_jk>                      a class's cosine, over its K centres
    statistic_si = sum_j term_s(c_ij)              or log sum_j exp term_s(c_ij), over the negatives
    targets_il = c_i,y_il                          the classes of the row's own labels

A rule says what the terms are; a class that is none of a row's labels is its negative. Statistics
of tiles, and of shards of the classes, merge by `merge`, and the gradient of a tile needs nothing
but the merged ones: the same op serves one process and a sharded head. It is for losses that
`row_statistics` cannot express (sub-centres, several labels a row, no softmax): their rule runs in
PyTorch on a tile, its products on the backend. Tiles are computed again in backward; nothing N x C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import ZERO_NORM, accumulate_dtype, row_dtype, unit_rows
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.primitives.distances.op import DISTANCE_MATRIX
from fused_losses.primitives.op import LIBRARY, PYTHON_BACKENDS, StreamedOp

TILE_BYTES = 2 << 20  # of products and of weights in a tile, together
GPU_TILE_BYTES = 16 << 20  # enough classes for every processor; a tile stays in L2
LIVE_TILES = 8.0  # how many such are alive at the peak, in backward (tests/test_class_losses.py)

# ---- rules --------------------------------------------------------------------------------------

Terms = Callable[[Tensor, Tensor | None, list[float]], tuple[Tensor, ...]]
Slopes = Callable[[Tensor, Tensor | None, list[float]], tuple[Tensor | float, ...]]


class Rule(NamedTuple):
    """What a cosine of a negative class adds to the row's statistics.

    terms(c [N, T], values [R, N, 1] or None, params) gives one [N, T] a statistic, in PyTorch that
    autograd follows; slopes gives their derivatives in c (of an lse a number will do). values and
    params carry no gradient.
    """

    kinds: tuple[str, ...]  # of each statistic: "lse" or "sum"
    terms: Terms
    slopes: Slopes
    params: int  # how many
    values: tuple[int, ...]  # how many rows of them it may have


def bent(c: Tensor, values: Tensor | None) -> Tensor:
    """psi(c): c up to the row's threshold t, p + q c + r c^2 above it; values = t, p, q, r."""
    if values is None:
        return c
    t, p, q, r = values
    return torch.where(c <= t, c, p + c * (q + r * c))


def _softmax_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    return (params[0] * bent(c, values),)


def _softmax_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor | float]:
    if values is None:
        return (params[0],)
    t, _, q, r = values
    return (params[0] * torch.where(c <= t, 1, q + 2 * r * c),)


def _sface_weight(c: Tensor, params: list[float]) -> Tensor:
    k, b = params
    # rounding takes a cosine beyond 1, where acos is NaN
    return torch.sigmoid(k * (b - c.detach().clamp(-1, 1).acos()))


def _sface_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    return (_sface_weight(c, params) * c,)


def _sface_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    return (_sface_weight(c, params),)


def raised(c: Tensor, t: float, straight_through: bool) -> Tensor:
    """2 ((c + 1) / 2)^t - 1, SphereFace2's map of a cosine; straight_through: with slope 1."""
    value = 2 * ((c + 1) / 2).clamp_min(0) ** t - 1
    return c + (value - c).detach() if straight_through else value


def _sphereface2_score(c: Tensor, values: Tensor, params: list[float]) -> Tensor:
    scale, margin, t, straight_through = params
    return scale * (raised(c, t, bool(straight_through)) + margin) + values[0]


def _sphereface2_terms(c: Tensor, values: Tensor, params: list[float]) -> tuple[Tensor, Tensor]:
    """softplus(z), and its slope in the bias."""
    z = _sphereface2_score(c, values, params)
    return -torch.nn.functional.logsigmoid(-z), torch.sigmoid(z)


def _sphereface2_slopes(c: Tensor, values: Tensor, params: list[float]) -> tuple[Tensor, Tensor]:
    scale, _, t, straight_through = params
    share = torch.sigmoid(_sphereface2_score(c, values, params))
    of_score: Tensor | float = scale
    if not straight_through:
        of_score = scale * t * ((c + 1) / 2).clamp_min(0) ** (t - 1)
    return share * of_score, share * (1 - share) * of_score


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        # params: scale; values: none, or the bend's four
        "softmax": Rule(("lse",), _softmax_terms, _softmax_slopes, 1, (0, 4)),
        # params: k, b
        "sface": Rule(("sum",), _sface_terms, _sface_slopes, 2, (0,)),
        # params: scale, margin, t, whether straight through; values: the bias
        "sphereface2": Rule(("sum", "sum"), _sphereface2_terms, _sphereface2_slopes, 4, (1,)),
    }
)


def merge(kinds: tuple[str, ...], a: Tensor, b: Tensor) -> Tensor:
    """Statistics [S, N] over two disjoint sets of classes -> those over both."""
    merged = (torch.logaddexp if kind == "lse" else torch.add for kind in kinds)
    return torch.stack([both(a[s], b[s]) for s, both in enumerate(merged)])


def nothing(kinds: tuple[str, ...], n: int, device: torch.device) -> Tensor:
    """Statistics [S, N] over no classes at all."""
    start = [-torch.inf if kind == "lse" else 0.0 for kind in kinds]
    return torch.tensor(start, dtype=row_dtype(device), device=device)[:, None].repeat(1, n)


# ---- what the op is given -----------------------------------------------------------------------

INPUTS = (
    "Tensor x, Tensor weight, Tensor labels, Tensor? classes, Tensor? values, "
    "str rule, float[] params, int centers, float softness, bool normalize, str precision"
)
FORWARD = f"({INPUTS}) -> (Tensor statistics, Tensor targets, Tensor hardest, Tensor hardest_score)"
BACKWARD = (
    f"(Tensor grad_statistics, Tensor grad_targets, Tensor statistics, {INPUTS}, bool compact, "
    "bool need_x, bool need_weight) -> (Tensor dx, Tensor dweight)"
)


class ClassInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D], unit rows where products are to be cosines
    weight: Tensor  # [C K, D], the K centres of a class one after the other
    labels: Tensor  # [N, L] int64, -1: nothing there, or a class that is not in this weight
    classes: Tensor | None = None  # [M] int64, increasing: the classes that take part
    values: Tensor | None = None  # [R, N], numbers of each row that the rule takes; no gradient
    rule: str = "softmax"  # a name in RULES
    params: tuple[float, ...] | list[float] = ()
    centers: int = 1  # K
    softness: float = 0.0  # how a class pools its centres (`pool`), 0: the best one
    normalize: bool = True  # rows of weight by their norm
    precision: str = "fp32"

    @property
    def taking_part(self) -> int:
        rows = self.weight.shape[0] // self.centers
        return rows if self.classes is None else self.classes.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)


class ClassStatistics(NamedTuple):
    """What the op knows of each row."""

    statistics: Tensor  # [S, N] in `row_dtype`, over the negatives that take part
    targets: Tensor  # [N, L] in `row_dtype`; 0 where the label is -1
    hardest: Tensor  # [N] int64, the negative class of highest cosine, -1: there is none
    hardest_score: Tensor  # [N] its cosine (before any bend), -inf: there is none


def class_statistics(inputs: ClassInputs, *, backend: str | None = None) -> ClassStatistics:
    """The rule's statistics and the cosines of the labels, differentiable in x and weight.

    Raises ValueError, TypeError or IndexError for inputs that do not fit each other;
    NotImplementedError for a second derivative, but on "reference". Labels must be among `classes`.
    Time O(N M K D) and the rule's own; memory O(N D) and a few tiles (`extra_bytes`).
    """
    _check(inputs)
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    name = _choose(inputs, backend)
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "reference":
            return reference(inputs)
        return ClassStatistics(*CLASS_RULES(name, *inputs))


def class_gradients(
    inputs: ClassInputs,
    statistics: Tensor,  # [S, N], merged over all shards
    grad_statistics: Tensor,  # [S, N]
    grad_targets: Tensor,  # [N, L]
    *,
    compact: bool = False,
    need_x: bool = True,
    need_weight: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """dx [N, D] and dweight of one shard, by hand: for heads that merge statistics over ranks.

    dweight is [C K, D], or with `compact` and `classes` [M K, D], the rows of these classes;
    what is not needed is empty. Time and memory as `class_statistics`, and dweight.
    """
    inputs = inputs._replace(params=[float(p) for p in inputs.params])
    name = _choose(inputs, backend)
    if name == "reference":
        raise ValueError("backend: expected a streamed one, got 'reference', which autograd serves")
    op = CLASS_RULES.op(name, "_backward")
    return op(grad_statistics, grad_targets, statistics, *inputs, compact, need_x, need_weight)


def _choose(p: ClassInputs, backend: str | None) -> str:
    width = p.x.shape[1]
    name, _ = backends.choose(
        backend, p.x.device, p.weight.dtype, p.precision, "distance_products", width
    )
    # kernels need a coordinate
    return name if width or name == "reference" else "bounded"


def _check(p: ClassInputs) -> None:
    """What the tiles rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("weight", p.weight, "[C K, D]")
    n = p.x.shape[0]
    if p.x.shape[1] != p.weight.shape[1]:
        raise ValueError(
            f"weight: expected [C K, {p.x.shape[1]}] as x has, got {describe(p.weight)}"
        )
    if p.x.dtype not in (p.weight.dtype, p.dtype):
        raise TypeError(
            f"x: expected {p.weight.dtype} or {p.dtype} beside weight, got {describe(p.x)}"
        )
    validation.check_device("x", p.x, "weight", p.weight)
    validation.check_choice("rule", p.rule, tuple(RULES))
    validation.check_choice("precision", p.precision, validation.PRECISIONS)
    if p.centers < 1 or p.weight.shape[0] % p.centers:
        raise ValueError(
            f"centers: expected a divisor of weight's {p.weight.shape[0]} rows, got {p.centers}"
        )
    if not p.softness >= 0:
        raise ValueError(f"softness: expected a value >= 0, got {p.softness}")
    if p.labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64 class ids, got {describe(p.labels)}")
    if p.labels.dim() != 2 or p.labels.shape[0] != n:
        raise ValueError(f"labels: expected shape ({n}, L), got {describe(p.labels)}")
    rule = RULES[p.rule]
    if len(p.params) != rule.params:
        raise ValueError(f"params: expected {rule.params} of {p.rule!r}, got {len(p.params)}")
    given = 0 if p.values is None else p.values.shape[0]
    if given not in rule.values or (p.values is not None and tuple(p.values.shape) != (given, n)):
        wanted = " or ".join(f"({r}, {n})" if r else "None" for r in rule.values)
        got = "None" if p.values is None else describe(p.values)
        raise ValueError(f"values: expected {wanted} with rule {p.rule!r}, got {got}")


def tile_bytes(device: torch.device | None) -> int:
    return GPU_TILE_BYTES if device is not None and device.type == "cuda" else TILE_BYTES


def tile_classes(p: ClassInputs) -> int:
    """How many classes a tile has, one at least."""
    return max(1, tile_bytes(p.x.device) // _class_bytes(*p.x.shape, p.centers, p.dtype))


def _class_bytes(n: int, d: int, centers: int, dtype: torch.dtype) -> int:
    return max(1, centers * (n + d) * dtype.itemsize)


def extra_bytes(
    n: int, d: int, centers: int, dtype: torch.dtype, device: torch.device | None = None
) -> int:
    """Peak memory of forward and backward beyond inputs, outputs and gradients."""
    wide = accumulate_dtype(dtype)
    tile = max(tile_bytes(device), _class_bytes(n, d, centers, wide))
    return int(LIVE_TILES * tile) + 4 * n * d * wide.itemsize


# ---- tiles of classes ---------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A run of T classes against every row."""

    part: slice  # of the classes that take part
    rows: slice | Tensor  # of weight, T K
    weight: Tensor  # [T K, D] as multiplied
    norm: Tensor | None  # [T K, 1]
    product: Tensor  # [N, T K]
    cosine: Tensor  # [N, T]
    column: Tensor  # [N, L] of each label in this tile, T: it is in another one

    @property
    def positive(self) -> Tensor:
        """[N, T] bool: the class is among the row's labels."""
        n, size = self.cosine.shape
        marks = self.cosine.new_zeros((n, size + 1), dtype=torch.bool)
        return marks.scatter_(1, self.column, True)[:, :size]


def pool(product: Tensor, softness: float) -> Tensor:
    """A class's cosine from those of its centres, [..., K] -> [...].

    softness 0: the highest (of equal ones the first, which also gets the gradient); else their mean
    by softmax(product / softness), SoftTriple's relaxed similarity (Qian et al., 2019).
    """
    if product.shape[-1] == 1:
        return product[..., 0]
    if softness == 0:
        return product.max(dim=-1).values
    return (torch.softmax(product / softness, dim=-1) * product).sum(dim=-1)


def _spread(grad: Tensor, tile: _Tile, p: ClassInputs) -> Tensor:
    """dL/dcosine [N, T] -> dL/dproduct [N, T K]."""
    if p.centers == 1:
        return grad
    product = tile.product.unflatten(1, (-1, p.centers))
    if p.softness == 0:
        best = product.max(dim=-1, keepdim=True).indices
        return torch.zeros_like(product).scatter_(-1, best, grad[..., None]).flatten(1)
    share = torch.softmax(product / p.softness, dim=-1)
    share *= 1 + (product - tile.cosine[..., None]) / p.softness
    return share.mul_(grad[..., None]).flatten(1)


def _places(p: ClassInputs) -> Tensor:
    """[N, L]: where each label stands among the classes that take part; -1: nowhere."""
    if p.classes is None:
        return p.labels
    if p.classes.numel() == 0:
        return torch.full_like(p.labels, NO_TARGET)
    place = torch.searchsorted(p.classes, p.labels).clamp_max(p.classes.numel() - 1)
    return torch.where(p.classes[place] == p.labels, place, NO_TARGET)


def _weight_rows(p: ClassInputs, part: slice) -> slice | Tensor:
    k = p.centers
    if p.classes is None:
        return slice(part.start * k, part.stop * k)
    ids = p.classes[part]
    return ids if k == 1 else (ids[:, None] * k + torch.arange(k, device=ids.device)).flatten()


def _tiles(backend: str, p: ClassInputs, x: Tensor) -> Iterator[_Tile]:
    """The classes that take part, a tile at a time, against the rows x (p.x as accumulated)."""
    if x.shape[0] == 0:
        return
    step, place = tile_classes(p), _places(p)
    dot = DISTANCE_MATRIX.op(backend)
    for start in range(0, p.taking_part, step):
        part = slice(start, min(start + step, p.taking_part))
        size = part.stop - start
        rows = _weight_rows(p, part)
        weight = p.weight[rows].to(x.dtype)
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True) if p.normalize else None
        weight = unit_rows(weight) if p.normalize else weight
        product = dot(x, weight, None, "dot", 2.0, p.precision)
        cosine = pool(product.unflatten(1, (size, p.centers)), p.softness)
        column = place - start
        column = torch.where((column < 0) | (column >= size), size, column)
        yield _Tile(part, rows, weight, norm, product, cosine, column)


def _values(p: ClassInputs, dtype: torch.dtype) -> Tensor | None:
    return None if p.values is None else p.values.to(dtype)[:, :, None]


def _fold(kind: str, term: Tensor, positive: Tensor) -> Tensor:
    """A tile's part of a statistic, [N] in `row_dtype`."""
    wide = row_dtype(term.device)
    if kind == "sum":
        return term.masked_fill(positive, 0).sum(dim=1).to(wide)
    term = term.masked_fill(positive, -torch.inf)
    top = term.amax(dim=1)
    top = torch.where(top.isfinite(), top, 0)
    # the maximum apart: a float32 logarithm would end at its sixth digit before the point
    total = term.sub_(top[:, None]).exp_().sum(dim=1)
    return top.to(wide) + total.to(wide).log()


def _targets(
    x: Tensor, weight: Tensor, labels: Tensor, centers: int, softness: float, normalize: bool
) -> Tensor:
    """<x_i, w_y> pooled over the centres, [N, L] in `row_dtype`; 0 where the label is -1.

    Summed in that dtype, as the target of `row_statistics` is. So many at a time that the gathered
    rows are a tile.
    """
    wide = row_dtype(x.device)
    flat = labels.flatten()
    out = torch.zeros_like(flat, dtype=wide)
    if weight.shape[0] == 0:
        return out.view_as(labels)
    weight = weight.unflatten(0, (-1, centers))
    step = max(1, tile_bytes(x.device) // (32 * max(x.shape[1] * centers, 1)))
    for start in range(0, flat.shape[0], step):
        of = torch.arange(start, min(start + step, flat.shape[0]), device=x.device)
        w = weight[flat[of].clamp_min(0)].to(wide)
        w = unit_rows(w) if normalize else w
        rows = x[of // labels.shape[1]].to(wide)
        out[of] = pool((w * rows[:, None]).sum(dim=2), softness)
    return torch.where(labels < 0, 0, out.view_as(labels))


def class_targets(p: ClassInputs) -> Tensor:
    """Cosines of the rows with their labels, [N, L] in `row_dtype`, 0 where the label is -1.

    Without gradient: for values that the rule needs before the sweep, which gives them again with
    one. Labels must be in range. Time O(N L K D), memory a tile.
    """
    op = torch.ops.fused_losses.class_targets.default
    return op(p.x.detach(), p.weight.detach(), p.labels, p.centers, p.softness, p.normalize)


def _check_ids(p: ClassInputs) -> None:
    """Labels and classes in range, before anything is read by them."""
    count = p.weight.shape[0] // p.centers
    validation.check_labels(p.labels, count if p.taking_part else 0)
    if p.classes is not None and p.taking_part and not p.labels.is_cuda:
        validation.check_classes(p.classes, count)
        validation.check_labels_in_classes(p.labels.flatten(), p.classes)


def _forward(backend: str, p: ClassInputs) -> ClassStatistics:
    _check_ids(p)
    rule, params = RULES[p.rule], list(p.params)
    x = p.x.to(p.dtype)
    n, values = x.shape[0], _values(p, x.dtype)
    statistics = nothing(rule.kinds, n, x.device)
    hardest = torch.full((n,), -1, device=x.device)
    hardest_score = x.new_full((n,), -torch.inf)
    for tile in _tiles(backend, p, x):
        positive = tile.positive
        terms = rule.terms(tile.cosine, values, params)
        found = [_fold(kind, term, positive) for kind, term in zip(rule.kinds, terms, strict=True)]
        statistics = merge(rule.kinds, statistics, torch.stack(found))
        best = tile.cosine.masked_fill(positive, -torch.inf).max(dim=1)
        better = best.values > hardest_score
        place = best.indices + tile.part.start
        hardest = torch.where(better, place if p.classes is None else p.classes[place], hardest)
        hardest_score = torch.where(better, best.values, hardest_score)
    targets = _targets(p.x, p.weight, p.labels, p.centers, p.softness, p.normalize)
    return ClassStatistics(statistics, targets, hardest, hardest_score)


def _tile_gradient(
    p: ClassInputs, tile: _Tile, grads: Tensor, merged: Tensor, grad_targets: Tensor
) -> Tensor:
    """dL/dcosine [N, T] of a tile, from the merged statistics [S, N] and their gradients.

    A row without negatives has lse = -inf, and infinities here that are masked.
    """
    rule, params = RULES[p.rule], list(p.params)
    values = _values(p, tile.cosine.dtype)
    terms = rule.terms(tile.cosine, values, params) if "lse" in rule.kinds else ()
    parts = []
    for s, slope in enumerate(rule.slopes(tile.cosine, values, params)):
        part = grads[s, :, None] * slope
        if rule.kinds[s] == "lse":
            part = (terms[s] - merged[s, :, None]).exp_().mul_(part)
        parts.append(part)
    total = sum(parts[1:], start=parts[0]).masked_fill_(tile.positive, 0)
    # labels of other tiles add 0 to the last column
    inside = tile.column < total.shape[1]
    column = tile.column.clamp_max(total.shape[1] - 1)
    return total.scatter_add_(1, column, torch.where(inside, grad_targets, 0))


def _backward(
    backend: str,
    grad_statistics: Tensor,
    grad_targets: Tensor,
    statistics: Tensor,
    p: ClassInputs,
    compact: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    x = p.x.to(p.dtype)
    dx = torch.zeros_like(x) if need_x else p.x.new_empty(0)
    dweight = p.weight.new_zeros(_gradient_shape(p, compact) if need_weight else 0)
    compact = compact and p.classes is not None
    merged, grads = statistics.to(x.dtype), grad_statistics.to(x.dtype)
    of_targets = grad_targets.to(x.dtype)
    backward = DISTANCE_MATRIX.op(backend, "_backward")
    for tile in _tiles(backend, p, x) if need_x or need_weight else ():
        g = _spread(_tile_gradient(p, tile, grads, merged, of_targets), tile, p)
        given = (g, tile.product, x, tile.weight, None, "dot", 2.0, p.precision)
        of_x, of_weight, _ = backward(*given, need_x, need_weight, False)
        if need_x:
            dx += of_x
        if need_weight:
            if tile.norm is not None:
                of_weight = _through_norm(of_weight, tile.weight, tile.norm)
            part = slice(tile.part.start * p.centers, tile.part.stop * p.centers)
            dweight[part if compact else tile.rows] = of_weight.to(dweight.dtype)
    return (dx.to(p.x.dtype) if need_x else dx), dweight


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """dL/dw of dL/du, u = w / |w|; 0 for a zero row."""
    along = (grad * unit).sum(dim=1, keepdim=True)
    return ((grad - along * unit) / norm).masked_fill_(norm <= ZERO_NORM, 0)


def _gradient_shape(p: ClassInputs, compact: bool) -> tuple[int, int]:
    rows, d = p.weight.shape
    return (p.taking_part * p.centers, d) if compact else (rows, d)


# ---- the formula, materialised ------------------------------------------------------------------


def reference(p: ClassInputs) -> ClassStatistics:
    """The same from the whole N x M matrix, in PyTorch that any order of autograd follows."""
    _check_ids(p)
    rule, wide = RULES[p.rule], row_dtype(p.x.device)
    rows = _weight_rows(p, slice(0, p.taking_part))
    weight = unit_rows(p.weight[rows]) if p.normalize else p.weight[rows]
    product = p.x.to(weight.dtype) @ weight.T
    cosine = pool(product.unflatten(1, (p.taking_part, p.centers)), p.softness)
    place = _places(p)
    ids = torch.arange(p.taking_part, device=p.x.device)
    positive = (place[:, :, None] == ids).any(dim=1)
    terms = rule.terms(cosine, _values(p, cosine.dtype), list(p.params))
    statistics = []
    for kind, term in zip(rule.kinds, terms, strict=True):
        term = term.to(wide).masked_fill(positive, -torch.inf if kind == "lse" else 0)
        statistics.append(torch.logsumexp(term, dim=1) if kind == "lse" else term.sum(dim=1))
    found = cosine.gather(1, place.clamp_min(0)) if p.taking_part else torch.zeros_like(place)
    with torch.no_grad():
        others = torch.cat([torch.full_like(cosine[:, :1], -torch.inf), cosine], dim=1)
        others[:, 1:].masked_fill_(positive, -torch.inf)
        best = others.max(dim=1)
        hardest = ids if p.classes is None else p.classes
        hardest = torch.cat([hardest.new_full((1,), -1), hardest])[best.indices]
    targets = torch.where(place < 0, 0, found.to(wide))
    return ClassStatistics(torch.stack(statistics), targets, hardest, best.values)


# ---- the op: autograd and registration ----------------------------------------------------------

FIELDS = len(ClassInputs._fields)
TENSORS = ClassInputs._fields.index("rule")  # how many fields, the first ones, are tensors


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    statistics, _, hardest, hardest_score = output
    ctx.mark_non_differentiable(hardest, hardest_score)
    ctx.save_for_backward(*inputs[:TENSORS], statistics)
    ctx.rest = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _gradients(backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
    *tensors, statistics = ctx.saved_tensors
    of_statistics, of_targets = grads[:2]
    none = (None,) * (FIELDS - 2)
    if of_statistics is None and of_targets is None:
        return None, None, *none
    if of_statistics is None:
        of_statistics = torch.zeros_like(statistics)
    if of_targets is None:
        of_targets = torch.zeros_like(tensors[2], dtype=statistics.dtype)
    dx, dweight = backward_op(
        of_statistics.contiguous(), of_targets.contiguous(), statistics, *tensors, *ctx.rest,
        False, *needed[:2],
    )  # fmt: skip
    return dx if needed[0] else None, dweight if needed[1] else None, *none


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    p = ClassInputs(*arguments)
    n, wide = p.x.shape[0], row_dtype(p.x.device)
    return (
        p.x.new_empty((len(RULES[p.rule].kinds), n), dtype=wide),
        p.x.new_empty(p.labels.shape, dtype=wide),
        p.labels.new_empty(n),
        p.x.new_empty(n, dtype=p.dtype),
    )


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    p, (compact, need_x, need_weight) = ClassInputs(*arguments[3:-3]), arguments[-3:]
    return (
        p.x.new_empty(p.x.shape if need_x else 0),
        p.weight.new_empty(_gradient_shape(p, compact) if need_weight else 0),
    )


def _python(direction: str, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    with torch.autocast(arguments[0].device.type, enabled=False):
        if not direction:
            return tuple(_forward(backend, ClassInputs(*arguments)))
        return _backward(backend, *arguments[:3], ClassInputs(*arguments[3:-3]), *arguments[-3:])


CLASS_RULES = StreamedOp(
    name="class_rules",
    forward=FORWARD,
    backward=BACKWARD,
    setup_context=_setup_context,
    gradients=_gradients,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    python=_python,
    # rules are Python on the CPU too, its products are the compiled op's
    python_backends=(*PYTHON_BACKENDS, "cpu"),
)
CLASS_RULES.define()

LIBRARY.define(
    "class_targets(Tensor x, Tensor weight, Tensor labels, int centers, float softness, "
    "bool normalize) -> Tensor"
)
LIBRARY.impl("class_targets", _targets, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fused_losses::class_targets",
    lambda x, weight, labels, *_: x.new_empty(labels.shape, dtype=row_dtype(x.device)),
)
