"""The rule of smooth ranks: of each positive how many columns stand before it, by a sigmoid.

    before_N = sum_N sigmoid((s_n - s_p) / temperature),  before_P the same over the other positives

params: 1 / temperature, index in RANKED, the parameter of what is made of the ranks
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import log_excess
from fused_losses.primitives.row_rules.inputs import RowBlock
from fused_losses.primitives.row_rules.triplets import padded_columns, row_sum

# what is summed over a row's positives
RANKED = ("precision", "O", "Ds", "Dq", "Iu", "Ib")


def _made(before_p: Tensor, before_n: Tensor, kind: str, parameter: float) -> Tensor:
    """What a positive adds, of how many positives and negatives stand before it."""
    if kind == "precision":
        # so written, both derivatives are exactly 0 where there is no negative
        return 1 - before_n / (1 + before_p + before_n)
    if kind == "O":
        return before_n
    if kind == "Ds":
        return before_n.log1p()
    if kind == "Dq":
        return (1 + before_n) ** -parameter
    if kind == "Iu":
        return (1 + before_n) * before_n.log1p()
    # b r - log(1 + b r) would cancel where r is small
    return log_excess(parameter * before_n) / parameter**2


def _slopes(
    before_p: Tensor, before_n: Tensor, kind: str, parameter: float
) -> tuple[Tensor, Tensor]:
    """The derivatives of `_made`."""
    zero = torch.zeros_like(before_n)
    if kind == "precision":
        every = 1 + before_p + before_n
        return before_n / every.square(), -(1 + before_p) / every.square()
    of_n = {
        "O": lambda r: torch.ones_like(r),
        "Ds": lambda r: 1 / (1 + r),
        "Dq": lambda r: -parameter * (1 + r) ** (-parameter - 1),
        "Iu": lambda r: 1 + r.log1p(),
        "Ib": lambda r: r / (1 + parameter * r),
    }[kind]
    return zero, of_n(before_n)


def ranks_formula(b: RowBlock) -> Tensor:
    """Every pair of columns at once, [B, M, M]."""
    inverse, kind, parameter = b.params[0], RANKED[int(b.params[1])], b.params[2]
    share = ((b.score[:, None, :] - b.score[:, :, None]) * inverse).sigmoid().to(b.wide)
    itself = torch.eye(share.shape[1], dtype=torch.bool, device=share.device)
    # a positive that is no number makes its row none, alone too
    before_p = torch.where(b.positive[:, None] & ~itself, share, 0).sum(dim=2) + 0 * b.score
    before_n = torch.where(b.negative[:, None], share, 0).sum(dim=2)
    each = torch.where(b.positive, _made(before_p, before_n, kind, parameter), 0)
    return torch.stack([each.sum(dim=1), b.positive.sum(dim=1).to(b.wide)], dim=1)


def _before(b: RowBlock, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shares of the columns against column `at` [B, M], of it 0, and their sums [B, 1]."""
    share = ((b.score - b.score.gather(1, at)) * b.params[0]).sigmoid()
    share = share.scatter(1, at, b.score.gather(1, at) * 0)
    before_p = row_sum(torch.where(b.positive, share, 0), b.wide)[:, None]
    return share, before_p, row_sum(torch.where(b.negative, share, 0), b.wide)[:, None]


def ranks_forward(b: RowBlock) -> Tensor:
    kind, parameter = RANKED[int(b.params[1])], b.params[2]
    total = torch.zeros(b.score.shape[0], dtype=b.wide, device=b.score.device)
    index, real = padded_columns(b.positive)
    for p in range(index.shape[1]):
        _, before_p, before_n = _before(b, index[:, p : p + 1])
        each = _made(before_p, before_n, kind, parameter)[:, 0]
        total += torch.where(real[:, p], each, 0)
    return torch.stack([total, b.positive.sum(dim=1).to(b.wide)], dim=1)


def ranks_gradient(b: RowBlock, grad: Tensor) -> tuple[Tensor, None]:
    kind, parameter = RANKED[int(b.params[1])], b.params[2]
    slope = torch.zeros_like(b.score)
    index, real = padded_columns(b.positive)
    for p in range(index.shape[1]):
        at = index[:, p : p + 1]
        share, before_p, before_n = _before(b, at)
        of_p, of_n = (g.to(slope.dtype) for g in _slopes(before_p, before_n, kind, parameter))
        share = share * (1 - share) * b.params[0]
        each = torch.where(b.positive, of_p * share, torch.where(b.negative, of_n * share, 0))
        each = torch.where(real[:, p : p + 1], each, 0)
        slope += each
        slope.scatter_add_(1, at, -each.sum(dim=1, keepdim=True))
    return slope.mul_(grad[:, :1]), None
