"""The rotation of a bank before it is rounded to int8: signs and Hadamard matrices.

A row whose few entries hold most of its length loses to a step that these set. Rotated at random,
its length is spread over all entries. csrc/cpu/topk/rotation.h rotates the queries alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses.base.numerics import ROUNDOFF

ROUNDS = 3  # where D is no power of two: the first such entries and the last ones, in turn


def drawn(d: int, seed: int) -> Tensor:
    """Signs of a rotation of rows of D entries, one of a seed. [rounds, D] int8"""
    generator = torch.Generator().manual_seed(seed)
    rounds = 1 if d & (d - 1) == 0 else ROUNDS
    return (2 * torch.randint(0, 2, (rounds, d), generator=generator) - 1).to(torch.int8)


def rotated(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows [N, D], of a type that holds them, times the rotation; lengths and products stay."""
    for turn, sign in enumerate(signs if rows.shape[1] else ()):
        rows = _window(rows * sign, turn)
    return rows


def rotated_back(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows [N, D] times the rotation's inverse."""
    turns = list(enumerate(signs)) if rows.shape[1] else []
    for turn, sign in reversed(turns):
        rows = _window(rows, turn) * sign
    return rows


def rounding(d: int, rounds: int, dtype: torch.dtype) -> float:
    """The most that rounding moves a rotated row by, in its length (docs/topk.md)."""
    first, second = _sides(_size(d))
    return math.expm1(rounds * (first**1.5 + second**1.5 + 2) * ROUNDOFF[dtype])


def _size(d: int) -> int:
    return 1 << (max(d, 1).bit_length() - 1)


def _sides(size: int) -> tuple[int, int]:
    """A Hadamard matrix is the Kronecker product of two: their sizes."""
    first = 1 << ((size.bit_length() - 1) // 2)
    return first, size // first


def _window(rows: Tensor, turn: int) -> Tensor:
    """The first entries or, of an odd turn, the last ones times H / sqrt(size)."""
    n, d = rows.shape
    size = _size(d)
    first, second = _sides(size)
    rest = (d - size) * (turn % 2)
    part = rows[:, rest : rest + size].reshape(n, first, second) @ _hadamard(second, rows)
    part = (_hadamard(first, rows) @ part).reshape(n, size) * (1 / math.sqrt(size))
    return torch.cat([rows[:, :rest], part, rows[:, rest + size :]], dim=1)


def _hadamard(size: int, like: Tensor) -> Tensor:
    out = like.new_ones(1, 1)
    while len(out) < size:
        out = torch.cat([torch.cat([out, out], dim=1), torch.cat([out, -out], dim=1)])
    return out
