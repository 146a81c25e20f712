"""Rules that weigh or choose a row's pairs, some by a second product of each pair.

    hardest   z = scale s        negatives: the ceil(share n) nearest of a row's n, by rank
    guided    z = scale s        negatives: those whose second product is not above the row's bound
    ratio     z = scale s / sqrt(second), 0 where second <= 0
    tempered  s / t and log t + 1 / t, t = low + (high - low) sigmoid(-second), over the nearest
    weighted  z = scale s        a pair is w = second of a positive and 1 - w of a negative

All but tempered give log sum e^z and the count of the positives, then of the negatives. Their
gradients are autograd's, over one block, whose scores and products are made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import logistic, over_last
from fused_losses.primitives.row_rules.inputs import RowBlock, RowRule

# of a share times a count, so that 0.07 of 100 is 7
WITHIN_A_ROUNDING = 1 - 2.0**-50


def by_autograd(formula: Callable[[RowBlock], Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of a formula in a block's scores, values and second products."""

    def gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor | None, ...]:
        # an op's body runs below autograd, which is let in again
        key = torch._C.DispatchKey.AutogradFunctionality
        with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
            given = {
                name: t.detach().requires_grad_()
                for name in ("score", "values", "second")
                if (t := getattr(b, name)) is not None
            }
            out = formula(b._replace(**given))
            asked: Any = dict(allow_unused=True, materialize_grads=True)
            leaves = list(given.values())
            # of no columns nothing reaches it
            found = (
                torch.autograd.grad(out, leaves, grad.to(out.dtype), **asked)
                if out.requires_grad
                else [torch.zeros_like(t) for t in leaves]
            )
        named = dict(zip(given, found, strict=True))
        return named["score"], named.get("values"), named.get("second")

    return gradient


def nearest(score: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] largest scores of each row under the mask, equal ones by their column."""
    hidden = score.detach().masked_fill(~mask, -torch.inf)
    order = hidden.sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(score.shape[1], device=score.device) < count[:, None]
    # a score of -inf may tie with what the mask hides
    return torch.zeros_like(mask).scatter(1, order, chosen) & mask


def _values(b: RowBlock, k: int) -> Tensor:
    """The k-th number of each row. [B, 1], in the scores' dtype"""
    assert b.values is not None
    return b.values[:, k, None].to(b.score.dtype)


def _second(b: RowBlock) -> Tensor:
    assert b.second is not None
    return b.second


def _sums(b: RowBlock, z: Tensor, negative: Tensor) -> list[Tensor]:
    """log sum e^z and the count, of the positives and of some negatives. [B] each"""
    out = []
    for mask in (b.positive, negative):
        lse = over_last(z, mask) if z.shape[1] else z.sum(dim=1) - torch.inf
        out += [lse.to(b.wide), mask.sum(dim=1).to(b.wide)]
    return out


# ---- hardest: params: share in (0, 1]; values: scale --------------------------------------------


def _hardest(b: RowBlock) -> Tensor:
    # times a Python number, integers would become float32
    count = (b.negative.sum(dim=1).to(b.wide) * (b.params[0] * WITHIN_A_ROUNDING)).ceil()
    chosen = nearest(b.score, b.negative, count)
    return torch.stack(_sums(b, _values(b, 0) * b.score, chosen), dim=1)


# ---- guided: params: absolute and relative margin; values: scale, and the bound where it is given
# the fifth statistic is the bound: the best second product of the row's positives


def _guided(b: RowBlock) -> Tensor:
    assert b.values is not None
    second = _second(b).detach()
    if b.values.shape[1] > 1:
        bound = _values(b, 1).detach()
    else:
        best = second.masked_fill(~b.positive, -torch.inf)
        bound = best.amax(dim=1, keepdim=True) if best.shape[1] else best.sum(dim=1, keepdim=True)
        bound = torch.where(b.positive.any(dim=1, keepdim=True), bound, torch.inf)
    limit = bound if not any(b.params) else bound - b.params[0] - b.params[1] * bound.abs()
    # so written, a NaN takes part
    kept = b.negative & ~(second > torch.where(bound == torch.inf, bound, limit))
    sums = _sums(b, _values(b, 0) * b.score, kept)
    return torch.stack([*sums, bound[:, 0].to(b.wide)], dim=1)


# ---- ratio: values: scale -----------------------------------------------------------------------


def _ratio(b: RowBlock) -> Tensor:
    second = _second(b)
    # `not <=`: a NaN stays one
    some = ~(second <= 0)
    root = torch.where(some, second, 1).sqrt()
    z = torch.where(some, _values(b, 0) * (b.score / root), 0)
    return torch.stack(_sums(b, z, b.negative), dim=1)


# ---- tempered: sums over the k nearest negatives (k = 0: all) of s / t and log t + 1 / t, and k --
# params: k, low, high


def _tempered(b: RowBlock) -> Tensor:
    k, low, high = b.params
    count = b.negative.sum(dim=1)
    kept = nearest(b.score, b.negative, count.clamp_max(int(k))) if k else b.negative
    t = low + (high - low) * logistic(-_second(b))
    t = torch.where(kept, t, 1)
    parts = torch.where(kept, b.score, 0) / t, torch.where(kept, t.log() + 1 / t, 0)
    sums = [part.sum(dim=1, dtype=b.wide) for part in parts]
    return torch.stack([*sums, kept.sum(dim=1).to(b.wide)], dim=1)


# ---- weighted: of labels that are not asked, w of each pair in [0, 1]; values: scale -------------


def _mass(z: Tensor, w: Tensor, kept: Tensor) -> Tensor:
    """log sum w e^z over what is kept, -inf over nothing. [B]"""
    some = kept & ~(w == 0)
    if not z.shape[1]:
        return z.sum(dim=1) - torch.inf
    top = z.detach().masked_fill(~some, -torch.inf).amax(dim=1, keepdim=True)
    shift = torch.where(top.isinf(), 0, top)
    # of weight 0 a term may lie beyond the others' top, and has a slope in its weight
    reach = math.log(torch.finfo(z.dtype).max) / 2
    each = w * torch.where(kept, z - shift, 0).clamp_max(reach).exp()
    mass = torch.where(kept, each, 0).sum(dim=1, keepdim=True)
    dead = ~some.any(dim=1, keepdim=True)
    return torch.where(dead, -torch.inf, torch.where(dead, 1, mass).log() + shift)[:, 0]


def _weighted(b: RowBlock) -> Tensor:
    kept, z, out = b.positive | b.negative, _values(b, 0) * b.score, []
    # a sum of products may round beyond its ends
    for share in (_second(b).clamp_min(0), (1 - _second(b)).clamp_min(0)):
        count = (kept & ~(share == 0)).sum(dim=1)
        out += [_mass(z, share, kept).to(b.wide), count.to(b.wide)]
    return torch.stack(out, dim=1)


JOINT_FOLDS = {
    "hardest": RowRule(lambda p: 4, _hardest, _hardest, by_autograd(_hardest), lambda p: 10),
    "guided": RowRule(
        lambda p: 5, _guided, _guided, by_autograd(_guided), lambda p: 11, seconds=True
    ),
    "ratio": RowRule(lambda p: 4, _ratio, _ratio, by_autograd(_ratio), lambda p: 12, seconds=True),
    "tempered": RowRule(
        lambda p: 3, _tempered, _tempered, by_autograd(_tempered), lambda p: 15, seconds=True
    ),
    "weighted": RowRule(
        lambda p: 4, _weighted, _weighted, by_autograd(_weighted), lambda p: 15, seconds=True
    ),
}
