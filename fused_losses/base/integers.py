"""Labels and ids as small dense integers."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(labels: Tensor) -> Tensor:
    """int32 numbers that are equal where the labels are; no host sync, static shapes."""
    if labels.dtype == torch.int32 or labels.numel() == 0:
        return labels.int()
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
    parts = iter(dense(torch.cat(some)).split([side.shape[0] for side in some]))
    return tuple(None if side is None else next(parts) for side in given)


def count_up(n: int, like: Tensor, start: int = 0) -> Tensor:
    """start, start + 1, ...: labels of pairs that are positive on a diagonal."""
    return torch.arange(start, start + n, device=like.device, dtype=torch.int32)
