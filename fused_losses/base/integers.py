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


def dense_pair(x: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The same for both sides of a comparison."""
    if x is None or y is None:
        return None, None
    if x.dtype != y.dtype:
        x, y = x.long(), y.long()
    both = dense(torch.cat([x, y]))
    return both[: x.shape[0]].contiguous(), both[x.shape[0] :].contiguous()


def count_up(n: int, like: Tensor, start: int = 0) -> Tensor:
    """start, start + 1, ...: labels of pairs that are positive on a diagonal."""
    return torch.arange(start, start + n, device=like.device, dtype=torch.int32)
