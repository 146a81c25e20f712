"""What a row of scores is folded into (`op`): one rule, one entry of `ROW_FOLDS`.

A rule sees a block: the scores of some rows against every column, and which of these pairs are
positive and which negative. Sums come in `row_dtype`; scores are in the accumulation dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.numerics import softplus
from fused_losses.primitives.row_rules.inputs import PICKS, RowBlock, RowRule
from fused_losses.primitives.row_rules.joint import JOINT_FOLDS
from fused_losses.primitives.row_rules.ranks import (
    ranks_formula,
    ranks_forward,
    ranks_gradient,
)
from fused_losses.primitives.row_rules.semihard import semihard_formula, semihard_gradient
from fused_losses.primitives.row_rules.triplets import (
    row_sum,
    triplets_by,
    triplets_formula,
    triplets_forward,
    triplets_gradient,
)

ACOS_EDGE = 1e-6  # a cosine is kept this far from -1 and 1, where an angle has no slope


# ---- chosen: the columns of one positive and one negative, -1 where a row has none --------------
# params: indices in PICKS of the positive and the negative


def _pick(score: Tensor, mask: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The extreme score under the mask and its first column; (., -1) over nothing. [B] each"""
    if score.shape[1] == 0:
        none = torch.full(score.shape[:1], -1, device=score.device)
        return score.new_zeros(score.shape[:1]), none
    hidden = score.masked_fill(~mask, -torch.inf if largest else torch.inf)
    value, index = hidden.max(dim=1) if largest else hidden.min(dim=1)
    # an infinite score may tie with what the mask hides
    return value, torch.where(mask.gather(1, index[:, None])[:, 0], index, -1)


def _chosen(b: RowBlock) -> Tensor:
    kinds = [PICKS[int(k)] for k in b.params]
    masks = [b.positive, b.negative]
    # a positive is hard when it is far, a negative when it is near
    largest = [kinds[0] != "easiest", kinds[1] == "easiest"]
    order = (1, 0) if kinds[0] == "semihard" else (0, 1)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for side in order:
        mask = masks[side]
        if kinds[side] == "semihard":
            bound = found[1 - side][0][:, None]
            # written so that a NaN takes part
            mask = mask & ~(b.score >= bound if side == 0 else b.score <= bound)
        found[side] = _pick(b.score, mask, largest[side])
    index = torch.stack([found[0][1], found[1][1]], dim=1)
    return index.masked_fill((index < 0).any(dim=1, keepdim=True), -1).to(b.wide)


# ---- nearest: the columns of the k smallest scores, in order, -1 where there are fewer ----------
# params: k


def _nearest(b: RowBlock) -> Tensor:
    k, taken = int(b.params[0]), b.positive | b.negative
    have = min(k, b.score.shape[1])
    # NaN first: whatever depends on it is NaN
    hidden = b.score.masked_fill(~taken, torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    index = hidden.topk(have, dim=1, largest=False).indices
    index = torch.where(taken.gather(1, index), index, -1)
    return F.pad(index, (0, k - have), value=-1).to(b.wide)


# ---- histogram: triangular bins of the positives, then of the negatives -------------------------
# params: score of the first node, distance between nodes, nodes


def _places(b: RowBlock) -> tuple[Tensor, Tensor]:
    """The node below each score [B, M] int64, and how far above it in units of the distance."""
    low, step, nodes = b.params[0], b.params[1], int(b.params[2])
    place = ((b.score - low) / step).clamp(0, nodes - 1)
    below = place.detach().nan_to_num(0).floor().clamp_max(nodes - 2)
    return below.long(), place - below


def _histogram_formula(b: RowBlock) -> Tensor:
    nodes, (below, above) = int(b.params[2]), _places(b)
    rows = torch.arange(b.score.shape[0], device=b.score.device)[:, None] * nodes
    out = []
    for mask in (b.positive, b.negative):
        share = torch.where(mask, above, 0).to(b.wide).flatten()
        rest = torch.where(mask, 1 - above, 0).to(b.wide).flatten()
        flat = torch.zeros(b.score.shape[0] * nodes, dtype=b.wide, device=b.score.device)
        at = (rows + below).flatten()
        flat = flat.scatter_add(0, at + 1, share).scatter_add(0, at, rest)
        out.append(flat.view(b.score.shape[0], nodes))
    return torch.cat(out, dim=1)


def _histogram_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
    low, step, nodes = b.params[0], b.params[1], int(b.params[2])
    below, above = _places(b)
    # the place is clamped: beyond the first and last node it has no slope
    inside = ~((b.score < low) | (b.score > low + step * (nodes - 1)))
    slope = torch.zeros_like(b.score)
    for mask, part in ((b.positive, grad[:, :nodes]), (b.negative, grad[:, nodes:])):
        each = ((part[:, 1:] - part[:, :-1]) / step).gather(1, below)
        slope = slope + torch.where(mask & inside, each, 0)
    return slope.masked_fill_(above.isnan() & (b.positive | b.negative), torch.nan), None


# ---- hinges: sum and count of [r d - p]+^power over the positives, [n - r d]+^power over N ------
# params: power (1 or 2); values: r, p, n


def _hinges(b: RowBlock) -> tuple[Tensor, Tensor]:
    """The arguments above 0 of both classes, 0 elsewhere."""
    assert b.values is not None
    r, p, n = (v[:, None].to(b.score.dtype) for v in b.values.unbind(dim=1))
    scaled = r * b.score
    return (
        F.relu(torch.where(b.positive, scaled - p, 0)),
        F.relu(torch.where(b.negative, n - scaled, 0)),
    )


def _hinges_formula(b: RowBlock) -> Tensor:
    out = []
    for hinge in _hinges(b):
        value = hinge.square() if b.params[0] == 2 else hinge
        out += [row_sum(value, b.wide), (hinge.detach() > 0).sum(dim=1).to(b.wide)]
    return torch.stack(out, dim=1)


def _hinges_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, Tensor]:
    assert b.values is not None
    near, far = (
        g[:, None] * (2 * h if b.params[0] == 2 else torch.where(h.isnan(), h, (h > 0).to(h.dtype)))
        for g, h in zip((grad[:, 0], grad[:, 2]), _hinges(b), strict=True)
    )
    slope = near - far
    values = torch.stack(
        [row_sum(slope * b.score, b.wide), -row_sum(near, b.wide), row_sum(far, b.wide)], dim=1
    )
    return slope * b.values[:, :1].to(slope.dtype), values


# ---- ranked_list: sum of weights and of weight times hinge, for P, then for N -------------------
# params: weight's rate for P and for N, boundary of P, boundary of N


def _ranked_parts(b: RowBlock) -> list[tuple[Tensor, Tensor, float, float]]:
    """Of each class: the hinge, its weight (0 where the hinge is), the rate, the hinge's slope."""
    positive_rate, negative_rate, low, high = b.params
    out = []
    for mask, hinge, rate, sign in (
        (b.positive, b.score - low, positive_rate, 1.0),
        (b.negative, high - b.score, negative_rate, -1.0),
    ):
        taken = mask & ~(hinge <= 0)
        hinge = torch.where(taken, hinge, 0)
        out.append((hinge, torch.where(taken, (rate * hinge).exp(), 0), rate, sign))
    return out


def _ranked_formula(b: RowBlock) -> Tensor:
    sums = [row_sum(part, b.wide) for h, w, _, _ in _ranked_parts(b) for part in (w, w * h)]
    return torch.stack(sums, dim=1)


def _ranked_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
    slope = torch.zeros_like(b.score)
    for k, (hinge, weight, rate, sign) in enumerate(_ranked_parts(b)):
        mass, sum_ = grad[:, 2 * k, None], grad[:, 2 * k + 1, None]
        slope = slope + sign * weight * (rate * mass + sum_ * (1 + rate * hinge))
    return slope, None


# ---- tuplet: sum over P of softplus(lse_N(scale s) - scale cos(angle - margin)), and |P| --------
# params: margin in radians, scale; rows without a positive or a negative: 0


def _tuplet_lse(b: RowBlock) -> Tensor:
    """log of the sum over the negatives of e^(scale s), [B, 1]."""
    z = (b.params[1] * b.score).masked_fill(~b.negative, -torch.inf)
    return torch.logsumexp(z, dim=1, keepdim=True)


def _tuplet_terms(b: RowBlock, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The arguments of softplus (-inf off the positives), and the cosines clamped."""
    cosine = b.score.clamp(-1 + ACOS_EDGE, 1 - ACOS_EDGE)
    turned = math.cos(b.params[0]) * cosine + math.sin(b.params[0]) * (1 - cosine**2).sqrt()
    taken = b.positive & b.negative.any(dim=1, keepdim=True)
    return torch.where(taken, lse - b.params[1] * turned, -torch.inf), cosine


def _tuplet_formula(b: RowBlock) -> Tensor:
    some = b.negative.any(dim=1, keepdim=True)
    # no derivative through a logsumexp over nothing
    safe = b._replace(negative=b.negative | ~some)
    u, _ = _tuplet_terms(b, _tuplet_lse(safe))
    taken = b.positive & some
    loss = torch.where(taken, softplus(torch.where(taken, u, 0)), 0)
    return torch.stack([row_sum(loss, b.wide), taken.sum(dim=1).to(b.wide)], dim=1)


def _tuplet_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
    lse = _tuplet_lse(b)
    u, cosine = _tuplet_terms(b, lse)
    share = u.sigmoid() * grad[:, :1]
    turn = b.params[0]
    turned = math.cos(turn) - math.sin(turn) * cosine / (1 - cosine.square()).sqrt()
    turned = torch.where(cosine == b.score, turned, 0).masked_fill(b.score.isnan(), torch.nan)
    z = (b.params[1] * b.score - lse).masked_fill(~b.negative, -torch.inf)
    slope = z.exp() * share.sum(dim=1, keepdim=True)
    return b.params[1] * (slope - torch.where(b.positive, share * turned, 0)), None


ROW_FOLDS = {
    "triplets": RowRule(
        lambda p: 2,
        triplets_formula,
        triplets_forward,
        triplets_gradient,
        lambda p: 14 if p[2] else 22,
        ("cpu", "cuda"),
        triplets_by,
    ),
    "ranks": RowRule(lambda p: 2, ranks_formula, ranks_forward, ranks_gradient),
    "semihard": RowRule(
        lambda p: 2, semihard_formula, semihard_formula, semihard_gradient, lambda p: 22
    ),
    "chosen": RowRule(lambda p: 2, _chosen, _chosen, None, lambda p: 4),
    "nearest": RowRule(lambda p: int(p[0]), _nearest, _nearest, None, lambda p: 4),
    "histogram": RowRule(
        lambda p: 2 * int(p[2]), _histogram_formula, _histogram_formula, _histogram_gradient
    ),
    "hinges": RowRule(lambda p: 4, _hinges_formula, _hinges_formula, _hinges_gradient),
    "ranked_list": RowRule(lambda p: 4, _ranked_formula, _ranked_formula, _ranked_gradient),
    "tuplet": RowRule(lambda p: 2, _tuplet_formula, _tuplet_formula, _tuplet_gradient),
    **JOINT_FOLDS,
}
