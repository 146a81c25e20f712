"""Folds over classes in PyTorch, on tiles of any backend's products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import row_dtype, unit_rows
from fused_losses.base.unit_norm import UnitRows, unit_parts
from fused_losses.primitives.class_rules.inputs import (
    ClassInputs,
    ClassNeeds,
    ClassStatistics,
    check_ids,
    places,
    rule_values,
    weight_rows,
)
from fused_losses.primitives.class_rules.rules import (
    CLASS_FOLDS,
    merge_statistics,
    no_classes,
    pool,
)
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.distances.op import DISTANCE_MATRIX

TILE_BYTES = 2 << 20  # of products and of weights in a tile, together

GPU_TILE_BYTES = 16 << 20  # enough classes for every processor; a tile stays in L2

# of gathered rows of labels: what these take some thirty launches for
GPU_TARGET_BYTES = 128 << 20

LIVE_TILES = 8.0  # how many such are alive at the peak, in backward (test_class_losses.py)


def tile_bytes(device: torch.device | None) -> int:
    return GPU_TILE_BYTES if device is not None and device.type == "cuda" else TILE_BYTES


def _target_bytes(device: torch.device) -> int:
    return GPU_TARGET_BYTES if device.type == "cuda" else TILE_BYTES


def tile_classes(p: ClassInputs) -> int:
    """How many classes a tile has, one at least."""
    n, d = p.x.shape
    return max(1, tile_bytes(p.x.device) // _class_bytes(n, d, p.centers, p.dtype))


def _class_bytes(n: int, d: int, centers: int, dtype: torch.dtype) -> int:
    return max(1, centers * (n + d) * dtype.itemsize)


def workspace(backend: str, p: ClassInputs, needs: ClassNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), size = p.x.shape, p.dtype.itemsize
    classes = min(tile_classes(p), p.taking_part)
    tile = classes * _class_bytes(n, d, p.centers, p.dtype)
    around = targets_workspace(p.x, p.labels, p.centers) + 4 * n * d * size
    live = LIVE_TILES + CLASS_FOLDS[p.rule].more_tiles
    return int(live * tile) + around + _product_bytes(backend, p, classes, needs)


def targets_workspace(x: Tensor, labels: Tensor, centers: int) -> int:
    """Bytes of `targets` beyond inputs and outputs, at most."""
    each = 40 * max(x.shape[1] * centers, 1)
    return min(labels.numel(), max(1, _target_bytes(x.device) * 5 // 4 // each)) * each


def _product_bytes(backend: str, p: ClassInputs, classes: int, needs: ClassNeeds | None) -> int:
    """Of a tile's products, and of their gradient."""
    x, weight = (
        torch.empty((count, p.x.shape[1]), dtype=p.dtype, device="meta")
        for count in (p.x.shape[0], classes * p.centers)
    )
    inputs = DistanceInputs(x, weight, None, "dot", 2.0, p.precision)
    form = DISTANCE_MATRIX.form(backend)
    return form.workspace(inputs, needs and DistanceNeeds(needs.x, needs.weight, False))


class _CenterTile(NamedTuple):
    """A run of T classes against every row."""

    part: slice  # of the classes that take part
    rows: slice | Tensor  # of weight, T K
    weight: Tensor  # [T K, D] as multiplied
    unit: UnitRows | None  # of those rows, where they are normalised
    product: Tensor  # [N, T K]
    cosine: Tensor  # [N, T]
    column: Tensor  # [N, L] of each label in this tile, T: it is in another one

    @property
    def positive(self) -> Tensor:
        """[N, T] bool: the class is among the row's labels."""
        n, size = self.cosine.shape
        marks = self.cosine.new_zeros((n, size + 1), dtype=torch.bool)
        return marks.scatter_(1, self.column, True)[:, :size]


def _spread(grad: Tensor, tile: _CenterTile, p: ClassInputs) -> Tensor:
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


def _tiles(
    backend: str,
    p: ClassInputs,
    x: Tensor,
    kept: Tensor | None = None,
    known: bool = False,
) -> Iterator[_CenterTile]:
    """The classes that take part, a tile at a time, against the rows x (p.x as accumulated).

    kept: room for the products of the first tiles, written there or with known read.
    """
    if x.shape[0] == 0:
        return
    step, place = tile_classes(p), places(p)
    for start in range(0, p.taking_part, step):
        part = slice(start, min(start + step, p.taking_part))
        size = part.stop - start
        rows = weight_rows(p, part)
        weight = p.weight[rows].to(x.dtype)
        unit = unit_parts(weight) if p.normalize else None
        weight = weight if unit is None else unit.rows
        room = None if kept is None else _kept_tile(p, kept, part)
        if room is not None and known:
            product = room
        else:
            product = DISTANCE_MATRIX(backend, x, weight, None, "dot", 2.0, p.precision)
            if room is not None:
                room.copy_(product)
        cosine = pool(product.unflatten(1, (size, p.centers)), p.softness)
        column = place - start
        column = torch.where((column < 0) | (column >= size), size, column)
        yield _CenterTile(part, rows, weight, unit, product, cosine, column)


def _kept_tile(p: ClassInputs, kept: Tensor, part: slice) -> Tensor | None:
    """Where the products [N, T K] of these classes are kept; None: there is no room."""
    n, stop = p.x.shape[0], part.stop * p.centers
    if stop > kept.shape[0]:
        return None
    return kept.view(-1)[part.start * p.centers * n : stop * n].view(n, -1)


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


def targets(
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
    step = max(1, _target_bytes(x.device) // (32 * max(x.shape[1] * centers, 1)))
    for start in range(0, max(flat.shape[0], 1), step):  # once at least, that autograd follows
        of = torch.arange(start, min(start + step, flat.shape[0]), device=x.device)
        w = weight[flat[of].clamp_min(0)].to(wide)
        w = unit_rows(w) if normalize else w
        rows = x[of // labels.shape[1]].to(wide)
        out[of] = pool((w * rows[:, None]).sum(dim=2), softness)
    return torch.where(labels < 0, 0, out.view_as(labels))


def forward(backend: str, p: ClassInputs, kept: Tensor) -> ClassStatistics:
    """kept: room for products that the backward reads."""
    check_ids(p)
    rule, params = CLASS_FOLDS[p.rule], list(p.params)
    x = p.x.to(p.dtype)
    n, values = x.shape[0], rule_values(p, x.dtype)
    statistics = no_classes(rule.kinds, n, x.device)
    hardest = torch.full((n,), -1, device=x.device)
    hardest_score = x.new_full((n,), -torch.inf)
    for tile in _tiles(backend, p, x, kept):
        positive = tile.positive
        terms = rule.terms(tile.cosine, values, params)
        found = [_fold(kind, term, positive) for kind, term in zip(rule.kinds, terms, strict=True)]
        statistics = merge_statistics(rule.kinds, statistics, torch.stack(found))
        best = tile.cosine.masked_fill(positive, -torch.inf).max(dim=1)
        better = best.values > hardest_score
        place = best.indices + tile.part.start
        hardest = torch.where(better, place if p.classes is None else p.classes[place], hardest)
        hardest_score = torch.where(better, best.values, hardest_score)
    of_labels = targets(p.x, p.weight, p.labels, p.centers, p.softness, p.normalize)
    return ClassStatistics(statistics, of_labels, hardest, hardest_score)


def _tile_gradient(
    p: ClassInputs, tile: _CenterTile, grads: Tensor, merged: Tensor, grad_targets: Tensor
) -> Tensor:
    """dL/dcosine [N, T] of a tile, from the merged statistics [S, N] and their gradients.

    A row without negatives has lse = -inf, and infinities here that are masked.
    """
    rule, params = CLASS_FOLDS[p.rule], list(p.params)
    values = rule_values(p, tile.cosine.dtype)
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


def backward(
    backend: str,
    grad_statistics: Tensor,
    grad_targets: Tensor,
    statistics: Tensor,
    p: ClassInputs,
    compact: bool,
    need_x: bool,
    need_weight: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    x = p.x.to(p.dtype)
    dx = torch.zeros_like(x) if need_x else p.x.new_empty(0)
    dweight = p.weight.new_zeros(gradient_shape(p, compact) if need_weight else 0)
    compact = compact and p.classes is not None
    merged, grads = statistics.to(x.dtype), grad_statistics.to(x.dtype)
    of_targets = grad_targets.to(x.dtype)
    for tile in _tiles(backend, p, x, kept, True) if need_x or need_weight else ():
        g = _spread(_tile_gradient(p, tile, grads, merged, of_targets), tile, p)
        given = (g, tile.product, x, tile.weight, None, "dot", 2.0, p.precision)
        needs = (need_x, need_weight, False)
        of_x, of_weight, _ = DISTANCE_MATRIX.run_backward(backend, *given, *needs)
        if need_x:
            dx += of_x
        if need_weight:
            if tile.unit is not None:
                of_weight = tile.unit.backward(of_weight)
            part = slice(tile.part.start * p.centers, tile.part.stop * p.centers)
            dweight[part if compact else tile.rows] = of_weight.to(dweight.dtype)
    return (dx.to(p.x.dtype) if need_x else dx), dweight


def gradient_shape(p: ClassInputs, compact: bool) -> tuple[int, int]:
    rows, d = p.weight.shape
    return (p.taking_part * p.centers, d) if compact else (rows, d)
