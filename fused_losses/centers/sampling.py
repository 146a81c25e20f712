"""Which classes take part in a step: every positive, and each other class with equal chance.

A class's draw is a hash of (seed, step, class), so a step's sample is the same whatever the number
of ranks, needs no state to resume, and every other class is in it with probability `rate`
independently of the others: what the logQ correction assumes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.rounding import _signed as signed
from fused_losses.rounding import rounding_key

BLOCK = 1 << 15  # classes hashed at a time
_MASK = (1 << 63) - 1


def _shift_(x: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64, which torch shifts arithmetically."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def hashed(ids: Tensor, key: int) -> Tensor:
    """63 even bits of each id under a key, splitmix64. [K] int64 -> [K] int64 >= 0"""
    x = (ids * signed(0x9E3779B97F4A7C15)).add_(key)
    x ^= _shift_(x, 30)
    x *= signed(0xBF58476D1CE4E5B9)
    x ^= _shift_(x, 27)
    x *= signed(0x94D049BB133111EB)
    x ^= _shift_(x, 31)
    return x.bitwise_and_(_MASK)


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
        drawn = hashed(ids, key) < bound if bound <= _MASK else torch.ones_like(ids, dtype=bool)
        found.append(ids[drawn] - first)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)
