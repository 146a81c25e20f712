"""Divergences on tiles of products: both matrices go by in the same tiles of classes.

Products are the backend's, in the accumulation dtype; all that is made of them is PyTorch in
`row_dtype`. It is the form of every backend that has no kernels of its own for this primitive.
Extra memory O(N D + tile), whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import merged, over_last, row_dtype, unit_rows
from fused_losses.base.unit_norm import UnitRows, unit_parts
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.distances.op import DISTANCE_MATRIX
from fused_losses.primitives.divergence.inputs import (
    DivergenceGradients,
    DivergenceInputs,
    DivergenceNeeds,
    DivergenceSaved,
    check_ids,
    gradient_shapes,
)
from fused_losses.primitives.divergence.near import NearSides, may_be_near
from fused_losses.primitives.divergence.rules import (
    DIVERGENCES,
    ClassScores,
    Mean,
    means_of,
)
from fused_losses.primitives.divergence.sums import (
    GapSums,
    between_of,
    finite,
    gap_of,
    joined,
    leibler,
    mean_of,
    mean_under,
)

TILE_BYTES = 1 << 20  # of a tile's scores in row_dtype and of its rows of both weights
# how many tiles of scores, and of weights, are alive at the peak (test_workspace.py)
LIVE_SCORES, LIVE_SHARES, LIVE_WEIGHTS = 17.5, 22.0, 2.5
NEAR_WEIGHTS = 2  # more where both sides may be near each other
ROW_BYTES = 400  # of vectors


def _depth(p: DivergenceInputs) -> int:
    """Of both sides' rows together."""
    return p.x.shape[1] + (0 if p.teacher_weight is None else p.teacher.shape[1])


def _class_bytes(p: DivergenceInputs) -> tuple[int, int]:
    """Of a class in a tile: its scores and its rows of both weights."""
    scores = p.x.shape[0] * row_dtype(p.x.device).itemsize
    return max(1, scores), _depth(p) * p.dtype.itemsize


def _tile_classes(p: DivergenceInputs) -> int:
    return max(16, TILE_BYTES // sum(_class_bytes(p)))


def workspace(p: DivergenceInputs, needs: DivergenceNeeds | None, backend: str = "bounded") -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    n, depth = p.x.shape[0], _depth(p)
    classes = min(_tile_classes(p), p.taking_part)
    scores, weights = (classes * each for each in _class_bytes(p))
    live = LIVE_SHARES if DIVERGENCES[p.kind].shares and needs is None else LIVE_SCORES
    tile = int(live * scores + LIVE_WEIGHTS * weights)
    gathered = 3 * min(TILE_BYTES, 32 * n * depth)  # of targets
    rows = (1 if needs is None else 2) * n * depth * p.dtype.itemsize
    further = _product_bytes(backend, p, classes, needs)
    if may_be_near(p):
        rows += n * p.x.shape[1] * p.dtype.itemsize
        further += NEAR_WEIGHTS * weights
    return max(tile + further, gathered) + rows + n * ROW_BYTES


def _product_bytes(
    backend: str, p: DivergenceInputs, classes: int, needs: DivergenceNeeds | None
) -> int:
    """Of a tile's products on a backend, and of their gradient."""
    if backend == "bounded":
        return 0
    x, weight = (
        torch.empty((count, max(1, _depth(p))), dtype=p.dtype, device="meta")
        for count in (p.x.shape[0], classes)
    )
    inputs = DistanceInputs(x, weight, None, "dot", 2.0, p.precision)
    form = DISTANCE_MATRIX.form(backend)
    return form.workspace(inputs, None if needs is None else DistanceNeeds(True, True, False))


class _ScoredSide(NamedTuple):
    """Rows, a tile of their weight and their products."""

    rows: Tensor  # [N, D]
    weight: Tensor  # [T, D] as multiplied
    unit: UnitRows | None  # of those rows, where they are normalised
    product: Tensor  # [N, T]


class _PairedTile(NamedTuple):
    """A run of T classes against every row, on both sides."""

    ids: slice | Tensor  # of the classes
    part: slice  # of those that take part
    student: _ScoredSide
    teacher: _ScoredSide | None
    dense: Tensor | None  # [N, T] scores of a teacher without a weight, as given
    u: Tensor  # [N, T] in row_dtype
    v: Tensor  # [N, T]
    others: Tensor  # [N, T] bool: no target


def _side(
    backend: str,
    rows: Tensor,
    weight: Tensor,
    ids: slice | Tensor,
    normalize: bool,
    precision: str,
) -> _ScoredSide:
    part = weight[ids].to(rows.dtype)
    unit = unit_parts(part) if normalize else None
    part = part if unit is None else unit.rows
    return _ScoredSide(rows, part, unit, _product(backend, precision, rows, part))


def _product(backend: str, precision: str, rows: Tensor, weight: Tensor) -> Tensor:
    """<x_i, w_j> [N, T]."""
    if backend == "bounded":
        return rows @ weight.T
    return DISTANCE_MATRIX(backend, rows, weight, *_dot(precision))


def _dot(precision: str) -> tuple[None, str, float, str]:
    """What says that `DISTANCE_MATRIX` multiplies."""
    return None, "dot", 2.0, precision


def _tiles(p: DivergenceInputs, backend: str) -> Iterator[_PairedTile]:
    wide, n = row_dtype(p.x.device), p.x.shape[0]
    x = p.x.to(p.dtype)
    t = p.teacher if p.teacher_weight is None else p.teacher.to(p.dtype)
    near = NearSides(x, t, p.normalize) if may_be_near(p) else None
    step, total = _tile_classes(p), p.taking_part
    for start in range(0, total if n else 0, step):
        part = slice(start, min(start + step, total))
        ids = part if p.classes is None else p.classes[part]
        student = _side(backend, x, p.weight, ids, p.normalize, p.precision)
        teacher, dense = None, None
        u = student.product.to(wide)
        if p.teacher_weight is None:
            dense = t[:, ids]
            v = dense.to(wide)
            v = v if p.teacher_scale is None else v * p.teacher_scale.to(wide)[:, None]
        else:
            teacher = _side(backend, t, p.teacher_weight, ids, p.teacher_normalize, p.precision)
            v = teacher.product.to(wide)
            if near is not None and p.teacher_weight is not None:
                multiply = partial(_product, backend, p.precision)
                v = near.adjusted(u, v, p.weight[ids], p.teacher_weight[ids], multiply)
        u = u if p.bias is None else u + p.bias[ids].to(wide)
        v = v if p.teacher_bias is None else v + p.teacher_bias[ids].to(wide)
        numbers = torch.arange(part.start, part.stop, device=u.device)
        others = torch.ne(p.labels[:, None], numbers if p.classes is None else p.classes[part])
        yield _PairedTile(ids, part, student, teacher, dense, u, v, others)


# ---- targets ------------------------------------------------------------------------------------


def _target(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: bool, p: DivergenceInputs
) -> Tensor:
    """A row's score of its label, summed in `row_dtype`; 0 without one. [N]"""
    wide, here, picked = row_dtype(rows.device), p.labels >= 0, p.labels.clamp_min(0)
    if weight is None:
        found = rows.gather(1, picked[:, None])[:, 0].to(wide)
        found = found if p.teacher_scale is None else found * p.teacher_scale.to(wide)
    else:
        step = max(1, TILE_BYTES // (32 * max(rows.shape[1], 1)))
        parts = []
        for start in range(0, max(len(rows), 1), step):
            w = weight[picked[start : start + step]].to(wide)
            w = unit_rows(w) if normalize else w
            parts.append((rows[start : start + step].to(wide) * w).sum(dim=1))
        found = torch.cat(parts)
    found = found if bias is None else found + bias[picked].to(wide)
    return torch.where(here, found, 0)


# ---- sums over the classes ----------------------------------------------------------------------


def _scores_of(p: DivergenceInputs, tile: _PairedTile, saved: DivergenceSaved) -> ClassScores:
    """Of a tile, once both lse are known; the target's are as an equal class of no weight."""
    u = torch.where(tile.others, tile.u, 0)
    v = torch.where(tile.others, tile.v, 0)
    lse, teacher_lse = finite(saved.lse), finite(saved.teacher_lse)
    folds = tuple(saved.folds[: DIVERGENCES[p.kind].folds, :, None])
    q_s = torch.where(tile.others, (u - lse).exp(), 0)
    q_t = torch.where(tile.others, (v - teacher_lse).exp(), 0)
    found = means_of(p.kind, saved.lse, saved.teacher_lse, saved.folds)
    means = tuple(Mean(mean.anchor[:, None], mean.offset[:, None]) for mean in found)
    gap = u - p.params[0] * v if DIVERGENCES[p.kind].power else u - v
    if means:
        gap = torch.where(tile.others, means[0].of(gap), 0)
    return ClassScores(u, v, q_s, q_t, gap, folds, means[1:])


def forward(
    p: DivergenceInputs, backend: str = "bounded"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, teacher_lse, target, teacher_target, folds (`divergence`)."""
    check_ids(p)
    rule, params = DIVERGENCES[p.kind], list(p.params)
    n, wide = p.x.shape[0], row_dtype(p.x.device)
    nothing = p.x.new_zeros(n, dtype=wide)
    none = torch.full_like(nothing, -torch.inf)
    lse, teacher_lse, total = none, none, nothing
    never = torch.zeros_like(nothing, dtype=torch.bool)
    gap = power = GapSums(none, Mean(nothing, nothing), nothing, never)
    # a power of 1 is the teacher's softmax
    plain = rule.power and params[0] == 1
    lead = rule.lead or ("teacher" if rule.shares is not None or plain else "")
    for tile in _tiles(p, backend):
        lse = merged(lse, over_last(tile.u, tile.others))
        teacher_lse = merged(teacher_lse, over_last(tile.v, tile.others))
        if lead:
            sides = (tile.v, tile.u) if lead == "teacher" else (tile.u, tile.v)
            gap = joined(gap, gap_of(*sides, tile.others))
        if rule.power:
            # the mean of u, as that of a gap from 0
            power = joined(power, mean_of(params[0] * tile.v, tile.u, tile.others))
        elif rule.term is not None:
            total = total + torch.where(tile.others, rule.term(tile.u, tile.v, params), 0).sum(
                dim=1
            )
    # an infinite score is a fault that must show
    lse, teacher_lse = (torch.where(t == torch.inf, torch.nan, t) for t in (lse, teacher_lse))
    folds, kept = (total,), ()
    if lead:
        value = leibler(gap, lse if lead == "teacher" else teacher_lse)
        kept = between_of(gap, value, lse, teacher_lse, lead)
        folds = (value,)
    if rule.power:
        found = power.lse, power.mean.value
        if not plain:
            kept = (torch.where(lse == -torch.inf, 0, lse - power.lse), nothing)
        folds, kept = found, (*kept[:2], *power.mean)
    elif rule.shares is not None:
        folds, means = _shares_of(p, lse, teacher_lse, kept[:2], backend)
        kept = (*kept[:2], *means)
    of_target = _target(p.x, p.weight, p.bias, p.normalize, p)
    of_teacher = _target(p.teacher, p.teacher_weight, p.teacher_bias, p.teacher_normalize, p)
    return lse, teacher_lse, of_target, of_teacher, torch.stack([*folds, *kept])


def shares(p: DivergenceInputs, lse: Tensor, teacher_lse: Tensor, backend: str) -> Tensor:
    """Folds of a kind of probabilities, whose lse [N] may be of more classes than these. [F, N]"""
    between = torch.where(lse == -torch.inf, 0, lse - teacher_lse)
    return _shares_of(p, lse, teacher_lse, (between, torch.zeros_like(between)), backend)[0]


def _shares_of(
    p: DivergenceInputs,
    lse: Tensor,
    teacher_lse: Tensor,
    between: tuple[Tensor, ...],  # a pair
    backend: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The folds, and both means of `logs` as pairs."""
    rule, params, n = DIVERGENCES[p.kind], list(p.params), p.x.shape[0]
    assert rule.shares is not None and rule.logs is not None
    folds = p.x.new_zeros((rule.folds, n), dtype=row_dtype(p.x.device))
    nothing = torch.zeros_like(folds[0])
    masses, means = [nothing] * 2, [Mean(nothing, nothing)] * 2
    padding = [nothing] * (rule.folds + rule.kept - 2)
    given = torch.stack([*padding[: rule.folds], *between, *padding[rule.folds :]])
    saved = DivergenceSaved(lse, teacher_lse, given)
    for tile in _tiles(p, backend):
        s = _scores_of(p, tile, saved)
        folds = folds + torch.stack([part.sum(dim=1) for part in rule.shares(s, params)])
        for at, (q, slope) in enumerate(zip((s.q_s, s.q_t), rule.logs(s, params), strict=True)):
            mass = q.sum(dim=1)
            mean, _ = mean_under(q / torch.where(mass == 0, 1, mass)[:, None], slope)
            whole = masses[at] + mass
            some = torch.where(whole == 0, 1, whole)
            means[at] = means[at].joined(masses[at] / some, mean, mass / some)
            masses[at] = whole
    kept = []
    for mean, total in zip(means, folds[1:], strict=True):
        # terms that are not negative are summed better where no class has nearly all
        one = 16 * mean.offset.abs() <= total.abs()
        kept += [torch.where(one, mean.anchor, total), torch.where(one, mean.offset, 0)]
    return folds, tuple(kept)


# ---- gradients ----------------------------------------------------------------------------------


def backward(
    p: DivergenceInputs,
    saved: DivergenceSaved,
    grads: DivergenceGradients,
    needs: DivergenceNeeds,
    backend: str = "bounded",
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, teacher, teacher_weight, bias, teacher_bias and teacher_scale."""
    rule, params = DIVERGENCES[p.kind], list(p.params)
    out = [like.new_zeros(shape) for like, shape in gradient_shapes(p, needs)]
    _, dweight, dteacher, dteacher_weight, dbias, dteacher_bias, dscale = out
    dx = torch.zeros_like(p.x, dtype=p.dtype) if needs.x else None
    dense = p.teacher_weight is None
    dt = torch.zeros_like(p.teacher, dtype=p.dtype) if needs.teacher and not dense else None
    wide = row_dtype(p.x.device)
    scale_sum = p.x.new_zeros(p.x.shape[0], dtype=wide)
    of_folds = tuple(grads.folds[: rule.differentiable, :, None])
    compact = needs.compact and p.classes is not None
    # a row that nothing is asked of gives nothing, whatever its scores are
    asked = [grads.folds[: rule.differentiable].any(dim=0), *(g != 0 for g in grads[:4])]
    asked = torch.stack(asked).any(dim=0)[:, None]
    # a power's slope in u is that of lse and of what differs from it
    to_lse = (grads.lse + grads.folds[1] if rule.power else grads.lse)[:, None]
    for tile in _tiles(p, backend):
        s = _scores_of(p, tile, saved)
        of_u, of_v = rule.slopes(s, of_folds, params)
        of_u = torch.where(tile.others, of_u + to_lse * s.q_s, grads.target[:, None])
        of_u = torch.where(asked, of_u, 0)
        rows = tile.part if compact else tile.ids
        _accumulate(
            backend, p.precision, of_u, tile.student, dx, dweight if needs.weight else None, rows
        )
        if needs.bias:
            dbias[tile.ids] = of_u.sum(dim=0).to(dbias.dtype)
        if not needs.of_teacher:
            continue
        of_v = of_v + grads.teacher_lse[:, None] * s.q_t
        of_v = torch.where(tile.others, of_v, grads.teacher_target[:, None])
        of_v = torch.where(asked, of_v, 0)
        if needs.teacher_bias:
            dteacher_bias[tile.ids] = of_v.sum(dim=0).to(dteacher_bias.dtype)
        if tile.teacher is not None:
            of_weight = dteacher_weight if needs.teacher_weight else None
            _accumulate(backend, p.precision, of_v, tile.teacher, dt, of_weight, rows)
            continue
        assert tile.dense is not None
        if needs.teacher_scale:
            scale_sum += torch.where(asked, of_v * tile.dense.to(wide), 0).sum(dim=1)
        if needs.teacher:
            scale = 1 if p.teacher_scale is None else p.teacher_scale.to(wide)[:, None]
            dteacher[:, tile.ids] = (of_v * scale).to(dteacher.dtype)
    if dx is not None:
        out[0] = dx.to(p.x.dtype)
    if dt is not None:
        out[2] = dt.to(p.teacher.dtype)
    if needs.teacher_scale:
        out[6] = scale_sum.to(dscale.dtype)
    return tuple(out)


def _accumulate(
    backend: str,
    precision: str,
    of_scores: Tensor,
    side: _ScoredSide,
    of_rows: Tensor | None,
    of_weight: Tensor | None,
    ids: slice | Tensor,
) -> None:
    """The gradients of a tile's products, into those of the rows and of the weight."""
    g, needs = of_scores.to(side.rows.dtype), (of_rows is not None, of_weight is not None)
    if not any(needs):
        return
    if backend == "bounded":
        found = g @ side.weight if needs[0] else g, g.T @ side.rows if needs[1] else g
    else:
        given = (g, side.product, side.rows, side.weight, *_dot(precision))
        found = DISTANCE_MATRIX.run_backward(backend, *given, *needs, False)
    if of_rows is not None:
        of_rows += found[0]
    if of_weight is not None:
        rows = found[1] if side.unit is None else side.unit.backward(found[1])
        of_weight[ids] = rows.to(of_weight.dtype)
