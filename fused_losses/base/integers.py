"""Labels and ids as small dense integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.compiled import helpers

FEW = 4096  # labels that one thread sorts sooner than torch's dispatch takes


def dense(labels: Tensor) -> Tensor:
    """int32 numbers that are equal where the labels are; no host sync, static shapes."""
    if labels.dtype == torch.int32 or labels.numel() == 0:
        return labels.int()
    compiled = helpers(labels) if labels.numel() <= FEW and labels.dim() == 1 else None
    if compiled is not None:
        return compiled.dense_numbers(labels)
    values, order = labels.sort()
    rank = torch.cat([values.new_zeros(1), (values[1:] != values[:-1]).long().cumsum(0)])
    return torch.empty_like(rank).scatter(0, order, rank).int()


def dense_together(*given: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same across several sides; None where nothing is given."""
    some = [side for side in given if side is not None]
    if not some:
        return given
    if len({side.dtype for side in some}) > 1:
        some = [side.long() for side in some]
    if len(some) == 1:
        numbers = dense(some[0])
        # the caller may write to what is his
        numbers = numbers.clone() if numbers is some[0] else numbers
        return tuple(None if side is None else numbers for side in given)
    parts = iter(dense(torch.cat(some)).split([side.shape[0] for side in some]))
    return tuple(None if side is None else next(parts) for side in given)


def count_up(n: int, like: Tensor, start: int = 0) -> Tensor:
    """start, start + 1, ...: labels of pairs that are positive on a diagonal."""
    compiled = helpers(like)
    if compiled is not None:
        return compiled.counted_up(n, start)
    return torch.arange(start, start + n, device=like.device, dtype=torch.int32)
