"""What a walk asks of all ranks, or of this one alone."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def local(tensor: Any) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def of_all(world: int, value: Any) -> list[Any]:
    """Every rank's value; this one's where it is alone."""
    parts: list[Any] = [value]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, value)
    return parts


_ALONE: list[dist.ProcessGroup] = []


def alone() -> dist.ProcessGroup:
    """A group of this rank only."""
    if not _ALONE:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        _ALONE.append(groups[dist.get_rank()])
    return _ALONE[0]
