"""What a row of scores is folded into (`fused_losses.row_losses`): one rule, one entry of `RULES`.

A rule sees a block: the scores of some rows against every column, and which of these pairs are
positive and which negative. Sums come in `row_dtype`; scores are in the accumulation dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.backends import cpu_triplets, cuda_triplets
from fused_losses.base.numerics import row_dtype

TRIPLETS = ("all", "hard", "semihard", "easy")
PICKS = ("hardest", "easiest", "semihard")
FEW = 32  # positives a row up to which each is compared with every column; beyond, by sorting
ACOS_EDGE = 1e-6  # a cosine is kept this far from -1 and 1, where an angle has no slope


class Block(NamedTuple):
    """Some rows against every column."""

    score: Tensor  # [B, M]
    positive: Tensor  # [B, M] bool
    negative: Tensor  # [B, M] bool, disjoint
    values: Tensor | None  # [B, K] further numbers of each row
    params: list[float]

    @property
    def wide(self) -> torch.dtype:
        return row_dtype(self.score.device)


class Compiled(NamedTuple):
    """forward and gradient of a rule by a backend's kernels."""

    forward: Callable[[Block], Tensor]
    gradient: Callable[[Block, Tensor], tuple[Tensor, Tensor | None]]


class Rule(NamedTuple):
    """A row's statistics and their gradient.

    formula is plain differentiable PyTorch, any memory; forward gives the same in the memory of a
    few blocks; gradient(block, grad [B, S]) gives dL/dscore [B, M] and dL/dvalues [B, K] or None.
    gradient None: the statistics are indices and counts.
    """

    size: Callable[[list[float]], int]  # S
    formula: Callable[[Block], Tensor]  # [B, S]
    forward: Callable[[Block], Tensor]
    gradient: Callable[[Block, Tensor], tuple[Tensor, Tensor | None]] | None
    compiled: Mapping[str, Compiled] = MappingProxyType({})  # of a backend

    def on(self, backend: str) -> Rule | Compiled:
        """Whose forward and gradient run."""
        return self.compiled.get(backend, self)


def _sum(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.sum(dim=1, dtype=dtype)


# ---- triplets: sum of the hinges (or softplus), and how many are not 0 --------------------------
# params: margin, index in TRIPLETS, smooth


def _triplets_formula(b: Block) -> Tensor:
    """Every triplet of a row at once, [B, M, M]."""
    margin, kind, smooth = b.params[0], TRIPLETS[int(b.params[1])], b.params[2]
    gap = b.score[:, :, None] - b.score[:, None, :]
    # written so that a NaN takes part
    chosen = {
        "all": torch.ones_like(gap, dtype=torch.bool),
        "hard": ~(gap < 0),
        "semihard": ~((gap >= 0) | (gap < -margin)),
        "easy": ~(gap >= -margin),
    }[kind]
    chosen = chosen & b.positive[:, :, None] & b.negative[:, None, :]
    loss = -F.logsigmoid(-gap - margin) if smooth else F.relu(gap + margin)
    loss = torch.where(chosen, loss, 0).to(b.wide)
    return torch.stack([loss.sum(dim=(1, 2)), (loss > 0).sum(dim=(1, 2)).to(b.wide)], dim=1)


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of each row's True entries, padded [B, P], and which are real."""
    count = mask.sum(dim=1)
    most = int(count.max()) if mask.numel() else 0
    rows, columns = mask.nonzero(as_tuple=True)
    rank = torch.arange(rows.shape[0], device=rows.device) - (count.cumsum(0) - count)[rows]
    index = rows.new_zeros((mask.shape[0], most))
    index[rows, rank] = columns
    return index, torch.arange(most, device=rows.device) < count[:, None]


def _each_positive(b: Block) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """For each positive in turn: its column [B, 1], its violations [B, M], those left out."""
    margin, kind = b.params[0], TRIPLETS[int(b.params[1])]
    index, real = _listed(b.positive)
    far = b.score.masked_fill(~b.negative, torch.inf)
    for p in range(index.shape[1]):
        at = index[:, p : p + 1]
        near = b.score.gather(1, at).masked_fill(~real[:, p : p + 1], -torch.inf)
        violation = near + margin - far
        if kind == "all":
            yield at, violation, None
        elif kind == "hard":
            yield at, violation, far > near
        elif kind == "semihard":
            yield at, violation, (far <= near) | (violation < 0)
        else:
            yield at, violation, violation >= 0


def _broken(b: Block) -> Tensor:
    """Which rows with triplets have a NaN among their pairs, [B]."""
    both = b.positive.any(dim=1) & b.negative.any(dim=1)
    return both & (b.score.isnan() & (b.positive | b.negative)).any(dim=1)


def _by_sorting(b: Block) -> bool:
    """Whether counting pays: a hinge, and many positives in some row."""
    if b.params[2] or not b.positive.numel():
        return False
    return int(b.positive.sum(dim=1).max()) > FEW


def _sorted(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores under the mask, increasing, then inf. [B, count of the fullest row]"""
    most = int(mask.sum(dim=1).max())
    values = scores.masked_fill(~mask, torch.inf).sort(dim=1).values[:, :most]
    return values.contiguous()


def _triplets_forward(b: Block) -> Tensor:
    if _by_sorting(b):
        total, count = _count_negatives(b)
    else:
        total = torch.zeros(b.score.shape[0], dtype=b.wide, device=b.score.device)
        count = torch.zeros_like(total)
        for _, violation, left_out in _each_positive(b):
            loss = -F.logsigmoid(-violation) if b.params[2] else violation.clamp_min_(0)
            if left_out is not None:
                loss.masked_fill_(left_out, 0)
            total += _sum(loss, b.wide)
            count += (loss > 0).sum(dim=1)
    return torch.stack([torch.where(_broken(b), torch.nan, total), count], dim=1)


def _count_negatives(b: Block) -> tuple[Tensor, Tensor]:
    """The hinges' sum and count by sorting: a positive meets a run of the sorted negatives."""
    margin, kind = b.params[0], TRIPLETS[int(b.params[1])]
    near, far = _sorted(b.score, b.positive), _sorted(b.score, b.negative)
    reach = near + margin
    first, last = torch.zeros_like(near, dtype=torch.int64), torch.searchsorted(far, reach)
    if kind != "all":
        not_farther = torch.searchsorted(far, near, right=True)
        if kind == "hard":
            last = torch.minimum(last, not_farther)
        else:
            first, last = not_farther, torch.maximum(last, not_farther)
    before = F.pad(far.to(b.wide).cumsum(dim=1), (1, 0))
    loss = (last - first) * reach.to(b.wide) - (before.gather(1, last) - before.gather(1, first))
    real = torch.arange(near.shape[1], device=near.device) < b.positive.sum(dim=1, keepdim=True)
    count = torch.where(real, last - first, 0)
    # a run without members would add inf - inf
    return _sum(torch.where(count > 0, loss, 0), b.wide), _sum(count, b.wide)


def _triplets_gradient(b: Block, grad: Tensor) -> tuple[Tensor, None]:
    if _by_sorting(b):
        slope = _count_both(b)
    else:
        slope = torch.zeros_like(b.score)
        for at, violation, left_out in _each_positive(b):
            each = violation.sigmoid_() if b.params[2] else (violation > 0).to(slope.dtype)
            if left_out is not None:
                each.masked_fill_(left_out, 0)
            slope.sub_(each)
            slope.scatter_add_(1, at, each.sum(dim=1, keepdim=True))
    broken = _broken(b)[:, None] & (b.positive | b.negative)
    return slope.masked_fill_(broken, torch.nan).mul_(grad[:, :1]), None


def _triplets_by(kernels: ModuleType) -> Compiled:
    """The rule by a backend's counting; a softplus, and so "easy", counts nothing."""

    def forward(b: Block) -> Tensor:
        margin, kind, smooth = b.params[0], TRIPLETS[int(b.params[1])], b.params[2]
        if smooth or kind == "easy":
            return _triplets_forward(b)
        return kernels.forward(b.score, b.positive, b.negative, margin, kind)

    def gradient(b: Block, grad: Tensor) -> tuple[Tensor, None]:
        margin, kind, smooth = b.params[0], TRIPLETS[int(b.params[1])], b.params[2]
        if smooth or kind == "easy":
            return _triplets_gradient(b, grad)
        return kernels.slope(grad[:, 0], b.score, b.positive, b.negative, margin, kind), None

    return Compiled(forward, gradient)


def _count_both(b: Block) -> Tensor:
    """The triplets of each positive, and minus those of each negative. [B, M]"""
    margin, kind = b.params[0], TRIPLETS[int(b.params[1])]
    near, far = _sorted(b.score, b.positive), _sorted(b.score, b.negative)
    score = b.score.contiguous()
    positives = b.positive.sum(dim=1, keepdim=True)
    # pairs in order of score: what violates a positive is a first run of the negatives, and what a
    # negative violates a last run of the positives
    of_positive = torch.searchsorted(far, score + margin)
    of_negative = positives - torch.searchsorted(near + margin, score, right=True)
    if kind != "all":
        harder = torch.searchsorted(far, score, right=True)
        hurt = positives - torch.searchsorted(near, score)
        if kind == "hard":
            of_positive = torch.minimum(of_positive, harder)
            of_negative = torch.minimum(of_negative, hurt)
        else:
            of_positive = (of_positive - harder).clamp_min_(0)
            of_negative = (of_negative - hurt).clamp_min_(0)
    counts = torch.where(b.positive, of_positive, -of_negative)
    return counts.masked_fill_(~(b.positive | b.negative), 0).to(b.score.dtype)


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


def _chosen(b: Block) -> Tensor:
    kinds = [PICKS[int(k)] for k in b.params]
    masks = [b.positive, b.negative]
    # a positive is hard when it is far, a negative when it is near
    largest = [kinds[0] != "easiest", kinds[1] == "easiest"]
    order = (1, 0) if kinds[0] == "semihard" else (0, 1)
    found: list[tuple[Tensor, Tensor]] = [None, None]  # type: ignore[list-item]
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


def _nearest(b: Block) -> Tensor:
    k, taken = int(b.params[0]), b.positive | b.negative
    have = min(k, b.score.shape[1])
    # NaN first: whatever depends on it is NaN
    hidden = b.score.masked_fill(~taken, torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    index = hidden.topk(have, dim=1, largest=False).indices
    index = torch.where(taken.gather(1, index), index, -1)
    return F.pad(index, (0, k - have), value=-1).to(b.wide)


# ---- histogram: triangular bins of the positives, then of the negatives -------------------------
# params: score of the first node, distance between nodes, nodes


def _places(b: Block) -> tuple[Tensor, Tensor]:
    """The node below each score [B, M] int64, and how far above it in units of the distance."""
    low, step, nodes = b.params[0], b.params[1], int(b.params[2])
    place = ((b.score - low) / step).clamp(0, nodes - 1)
    below = place.detach().nan_to_num(0).floor().clamp_max(nodes - 2)
    return below.long(), place - below


def _histogram_formula(b: Block) -> Tensor:
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


def _histogram_gradient(b: Block, grad: Tensor) -> tuple[Tensor, None]:
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


def _hinges(b: Block) -> tuple[Tensor, Tensor]:
    """The arguments above 0 of both classes, 0 elsewhere."""
    r, p, n = (v[:, None].to(b.score.dtype) for v in b.values.unbind(dim=1))
    scaled = r * b.score
    return (
        F.relu(torch.where(b.positive, scaled - p, 0)),
        F.relu(torch.where(b.negative, n - scaled, 0)),
    )


def _hinges_formula(b: Block) -> Tensor:
    out = []
    for hinge in _hinges(b):
        value = hinge.square() if b.params[0] == 2 else hinge
        out += [_sum(value, b.wide), (hinge.detach() > 0).sum(dim=1).to(b.wide)]
    return torch.stack(out, dim=1)


def _hinges_gradient(b: Block, grad: Tensor) -> tuple[Tensor, Tensor]:
    near, far = (
        g[:, None] * (2 * h if b.params[0] == 2 else torch.where(h.isnan(), h, (h > 0).to(h.dtype)))
        for g, h in zip((grad[:, 0], grad[:, 2]), _hinges(b), strict=True)
    )
    slope = near - far
    values = torch.stack(
        [_sum(slope * b.score, b.wide), -_sum(near, b.wide), _sum(far, b.wide)], dim=1
    )
    return slope * b.values[:, :1].to(slope.dtype), values


# ---- ranked_list: sum of weights and of weight times hinge, for P, then for N -------------------
# params: weight's rate for P and for N, boundary of P, boundary of N


def _ranked_parts(b: Block) -> list[tuple[Tensor, Tensor, float, float]]:
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


def _ranked_formula(b: Block) -> Tensor:
    sums = [_sum(part, b.wide) for h, w, _, _ in _ranked_parts(b) for part in (w, w * h)]
    return torch.stack(sums, dim=1)


def _ranked_gradient(b: Block, grad: Tensor) -> tuple[Tensor, None]:
    slope = torch.zeros_like(b.score)
    for k, (hinge, weight, rate, sign) in enumerate(_ranked_parts(b)):
        mass, sum_ = grad[:, 2 * k, None], grad[:, 2 * k + 1, None]
        slope = slope + sign * weight * (rate * mass + sum_ * (1 + rate * hinge))
    return slope, None


# ---- tuplet: sum over P of softplus(lse_N(scale s) - scale cos(angle - margin)), and |P| --------
# params: margin in radians, scale; rows without a positive or a negative: 0


def _tuplet_lse(b: Block) -> Tensor:
    """log of the sum over the negatives of e^(scale s), [B, 1]."""
    z = (b.params[1] * b.score).masked_fill(~b.negative, -torch.inf)
    return torch.logsumexp(z, dim=1, keepdim=True)


def _tuplet_terms(b: Block, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The arguments of softplus (-inf off the positives), and the cosines clamped."""
    cosine = b.score.clamp(-1 + ACOS_EDGE, 1 - ACOS_EDGE)
    turned = math.cos(b.params[0]) * cosine + math.sin(b.params[0]) * (1 - cosine**2).sqrt()
    taken = b.positive & b.negative.any(dim=1, keepdim=True)
    return torch.where(taken, lse - b.params[1] * turned, -torch.inf), cosine


def _tuplet_formula(b: Block) -> Tensor:
    some = b.negative.any(dim=1, keepdim=True)
    # no derivative through a logsumexp over nothing
    safe = b._replace(negative=b.negative | ~some)
    u, _ = _tuplet_terms(b, _tuplet_lse(safe))
    taken = b.positive & some
    loss = torch.where(taken, -F.logsigmoid(-torch.where(taken, u, 0)), 0)
    return torch.stack([_sum(loss, b.wide), taken.sum(dim=1).to(b.wide)], dim=1)


def _tuplet_gradient(b: Block, grad: Tensor) -> tuple[Tensor, None]:
    lse = _tuplet_lse(b)
    u, cosine = _tuplet_terms(b, lse)
    share = u.sigmoid() * grad[:, :1]
    turn = b.params[0]
    turned = math.cos(turn) - math.sin(turn) * cosine / (1 - cosine.square()).sqrt()
    turned = torch.where(cosine == b.score, turned, 0).masked_fill(b.score.isnan(), torch.nan)
    z = (b.params[1] * b.score - lse).masked_fill(~b.negative, -torch.inf)
    slope = z.exp() * share.sum(dim=1, keepdim=True)
    return b.params[1] * (slope - torch.where(b.positive, share * turned, 0)), None


RULES = {
    "triplets": Rule(
        lambda p: 2,
        _triplets_formula,
        _triplets_forward,
        _triplets_gradient,
        {"cpu": _triplets_by(cpu_triplets), "cuda": _triplets_by(cuda_triplets)},
    ),
    "chosen": Rule(lambda p: 2, _chosen, _chosen, None),
    "nearest": Rule(lambda p: int(p[0]), _nearest, _nearest, None),
    "histogram": Rule(
        lambda p: 2 * int(p[2]), _histogram_formula, _histogram_formula, _histogram_gradient
    ),
    "hinges": Rule(lambda p: 4, _hinges_formula, _hinges_formula, _hinges_gradient),
    "ranked_list": Rule(lambda p: 4, _ranked_formula, _ranked_formula, _ranked_gradient),
    "tuplet": Rule(lambda p: 2, _tuplet_formula, _tuplet_formula, _tuplet_gradient),
}
