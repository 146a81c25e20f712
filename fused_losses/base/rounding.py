"""Stochastic rounding to 16 bits: up or down with the odds that make the mean exact.

A step smaller than half a unit in a 16-bit number's last place is lost to rounding to nearest;
here it is taken in its share of the steps. The random bits are a hash of a key and of where the
number stands: the result does not depend on blocks, threads or which shard holds the row.
csrc/cpu/row_update.h has the same hash and gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
TABLES = 4  # that a row has at most: its weight and its states


def _mixed(z: int) -> int:
    """splitmix64's finaliser of a 64-bit word."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _WORD
    return z ^ (z >> 31)


def _signed(word: int, bits: int = 64) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


def rounding_key(*numbers: int) -> int:
    """An int64 key of some integers, for example (seed, step)."""
    key = 0
    for number in numbers:
        key = _mixed((key + _GOLDEN + number) & _WORD)
    return _signed(key)


def hashed(key: int | Tensor, numbers: Tensor) -> Tensor:
    """64 random bits for each of some integers under a key, splitmix64. int64, same shape

    A key for each integer: a tensor, int64, that broadcasts with them.
    """
    z = numbers * _signed(_GOLDEN) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return z ^ (z >> 31 & (1 << 33) - 1)


def random_bits(key: int, rows: Tensor, table: int, width: int) -> Tensor:
    """[K, width] int32 of 32 random bits each for rows [K] int64 of a table; time O(K width)."""
    z = hashed(key, rows * TABLES + table)
    columns = torch.arange(width, device=rows.device) * 0x9E3779B9
    # the low words: int32 wraps around as C's uint32_t does
    h = _low_word(z)[:, None] + _low_word(columns)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> shift & (1 << 32 - shift) - 1)) * _signed(factor, 32)
    return h ^ (h >> 16 & 0xFFFF)


def _low_word(z: Tensor) -> Tensor:
    low = z & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)


def stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """x float32 as bfloat16 or float16, its mean over the bits (int32, shaped as x) exact.

    Values that dtype has stay as they are, so do inf and NaN; a float16 above 65504 goes to the
    nearest. Time and memory O(numel).
    """
    words = x.view(torch.int32)
    if dtype == torch.bfloat16:
        up = (words + (bits & 0xFFFF)) >> 16
        return torch.where(x.isnan(), torch.nan, up.to(torch.int16).view(dtype))
    # the unit in the last place of float16: subnormal numbers share one
    binade = (words & 0x7F800000).clamp(0x38800000, 0x47000000).view(torch.float32)
    unit = binade * 2.0**-10
    up = (x.abs() / unit + (bits & 0x1FFF) * 2.0**-13).floor() * unit
    return torch.where(x.abs() < 65504, up.copysign(x), x).to(dtype)
