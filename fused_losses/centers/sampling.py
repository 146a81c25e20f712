"""Which classes take part in a step: every positive, and each other class with equal chance.

A class's draw is a hash of (seed, step, class), so a step's sample is the same whatever the number
of ranks, needs no state to resume, and every other class is in it with probability `rate`
independently of the others: what the logQ correction assumes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.rounding import hashed, rounding_key
from fused_losses.base.validation import NO_TARGET
from fused_losses.centers.shard import ClassGroup

BLOCK = 1 << 15  # classes hashed at a time
_MASK = (1 << 63) - 1


def sample(
    first: int,
    count: int,
    rate: float,
    *,
    seed: int,
    step: int,
    device: torch.device | None = None,
) -> Tensor:
    """The classes of [first, first + count) drawn in this step, counted from first. [K] increasing

    rate in [0, 1]: each class's chance. Time O(count), memory O(K) and a block.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a value in [0, 1], got {rate}")
    key = rounding_key(seed, step)
    bound = round(rate * (1 << 63))
    found = []
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        ids = torch.arange(first + start, first + stop, device=device)
        drawn = ids >= 0 if bound > _MASK else (hashed(key, ids) & _MASK) < bound
        found.append(ids[drawn] - first)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)


def groups(
    local: Tensor,  # rows of the shard, NO_TARGET: elsewhere
    first: int,
    count: int,
    rate: float,
    *,
    log_q: bool,
    seed: int,
    step: int,
) -> list[ClassGroup]:
    """The rows of the shard [first, first + count) that take part: the batch's and those drawn.

    log_q: those drawn are a group of their own, with their chance.
    """
    own = local[local != NO_TARGET].unique()
    drawn = sample(first, count, rate, seed=seed, step=step, device=local.device)
    if not log_q:
        return [ClassGroup(torch.cat([own, drawn]).unique())]
    others = drawn[~torch.isin(drawn, own, assume_unique=True)]
    return [ClassGroup(own), ClassGroup(others, rate)]
