"""The rule over triplets: the sum of their hinges (or softplus), and how many are not 0 by formula.

params: margin, index in TRIPLETS, smooth
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.numerics import softplus
from fused_losses.primitives.row_rules.inputs import TRIPLETS, Compiled, RowBlock

FEW = 32  # positives a row up to which each is compared with every column; beyond, by sorting


def row_sum(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.sum(dim=1, dtype=dtype)


def triplets_formula(b: RowBlock) -> Tensor:
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
    loss = softplus(gap + margin) if smooth else F.relu(gap + margin)
    loss = torch.where(chosen, loss, 0).to(b.wide)
    # a softplus is above 0, also where float32 has none so small
    counted = chosen if smooth else loss > 0
    return torch.stack([loss.sum(dim=(1, 2)), counted.sum(dim=(1, 2)).to(b.wide)], dim=1)


def padded_columns(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of each row's True entries, padded [B, P], and which are real."""
    count = mask.sum(dim=1)
    most = int(count.max()) if mask.numel() else 0
    rows, columns = mask.nonzero(as_tuple=True)
    rank = torch.arange(rows.shape[0], device=rows.device) - (count.cumsum(0) - count)[rows]
    index = rows.new_zeros((mask.shape[0], most))
    index[rows, rank] = columns
    return index, torch.arange(most, device=rows.device) < count[:, None]


def _each_positive(b: RowBlock) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """For each positive in turn: its column [B, 1], its violations [B, M], those left out."""
    margin, kind = b.params[0], TRIPLETS[int(b.params[1])]
    index, real = padded_columns(b.positive)
    far = b.score.masked_fill(~b.negative, torch.inf)
    for p in range(index.shape[1]):
        at = index[:, p : p + 1]
        near = b.score.gather(1, at).masked_fill(~real[:, p : p + 1], -torch.inf)
        # no NaN where there is no triplet: without such a positive, or with what is no negative
        none = ~(real[:, p : p + 1] & b.negative)
        violation = (near + margin - far).masked_fill_(none, -torch.inf)
        if kind == "all":
            yield at, violation, None
        elif kind == "hard":
            yield at, violation, far > near
        elif kind == "semihard":
            yield at, violation, (far <= near) | (violation < 0)
        else:
            yield at, violation, violation >= 0


def _broken(b: RowBlock) -> Tensor:
    """Which rows with triplets have a NaN among their pairs, [B]."""
    both = b.positive.any(dim=1) & b.negative.any(dim=1)
    return both & (b.score.isnan() & (b.positive | b.negative)).any(dim=1)


def _by_sorting(b: RowBlock) -> bool:
    """Whether counting pays: a hinge, and many positives in some row."""
    if b.params[2] or not b.positive.numel():
        return False
    return int(b.positive.sum(dim=1).max()) > FEW


def _sorted(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores under the mask, increasing, then inf. [B, count of the fullest row]"""
    most = int(mask.sum(dim=1).max())
    values = scores.masked_fill(~mask, torch.inf).sort(dim=1).values[:, :most]
    return values.contiguous()


def triplets_forward(b: RowBlock) -> Tensor:
    if _by_sorting(b):
        total, count = _count_negatives(b)
    else:
        total = torch.zeros(b.score.shape[0], dtype=b.wide, device=b.score.device)
        count = torch.zeros_like(total)
        for _, violation, left_out in _each_positive(b):
            counted = violation > (-torch.inf if b.params[2] else 0)
            loss = -F.logsigmoid(-violation) if b.params[2] else violation.clamp_min_(0)
            if left_out is not None:
                loss.masked_fill_(left_out, 0)
                counted &= ~left_out
            total += row_sum(loss, b.wide)
            count += counted.sum(dim=1)
    return torch.stack([torch.where(_broken(b), torch.nan, total), count], dim=1)


def _count_negatives(b: RowBlock) -> tuple[Tensor, Tensor]:
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
    return row_sum(torch.where(count > 0, loss, 0), b.wide), row_sum(count, b.wide)


def triplets_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
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


def smooth(params: list[float]) -> bool:
    """Whether nothing is counted: a softplus, which "easy" triplets always have."""
    return bool(params[2]) or TRIPLETS[int(params[1])] == "easy"


def triplets_by(kernels: ModuleType) -> Compiled:
    """The rule by a backend's counting."""

    def forward(b: RowBlock) -> Tensor:
        margin, kind = b.params[0], TRIPLETS[int(b.params[1])]
        if smooth(b.params):
            return triplets_forward(b)
        return kernels.forward(b.score, b.positive, b.negative, margin, kind)

    def gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
        margin, kind = b.params[0], TRIPLETS[int(b.params[1])]
        if smooth(b.params):
            return triplets_gradient(b, grad)
        return kernels.slope(grad[:, 0], b.score, b.positive, b.negative, margin, kind), None

    return Compiled(forward, gradient, lambda p: 14 if smooth(p) else 8)


def _count_both(b: RowBlock) -> Tensor:
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
