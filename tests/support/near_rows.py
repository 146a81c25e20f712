"""Rows that nearly meet, and what a formula of their distances is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conftest import CUDA
from torch import Tensor

BACKENDS = ("reference", "bounded", "cpu", *CUDA)
N, D = 32, 24
SHARE = 1 / 16


def clusters() -> Tensor:
    x = 0.01 * torch.randn(N, D)
    x[: N // 2] += 100
    x[N // 2 :] -= 100
    return x


def partners(apart: float) -> Tensor:
    x = torch.nn.functional.normalize(torch.randn(N // 2, D).double(), dim=1)
    away = torch.nn.functional.normalize(torch.randn(N // 2, D).double(), dim=1)
    y = torch.nn.functional.normalize(x + apart * away, dim=1)
    return torch.stack([x, y], dim=1).flatten(0, 1)


def duplicates() -> Tensor:
    return torch.randn(N // 4, D).repeat_interleave(4, dim=0)


def constant() -> Tensor:
    return torch.full((N, D), 1.00389)


def far_away() -> Tensor:
    return 1e4 + torch.randn(N, D)


def alone_in_the_middle() -> Tensor:
    # the zero row keeps every coordinate where it is
    x = 50 + 0.1 * torch.randn(N, D)
    x[5] = 0
    return x


DATA: dict[str, Callable[[], Tensor]] = {
    "clusters": clusters,
    "partners 1e-3": lambda: partners(1e-3),
    "partners 3e-4": lambda: partners(3e-4),
    "duplicates": duplicates,
    "constant": constant,
    "far away": far_away,
    "zero row": alone_in_the_middle,
}
# float64 rows, as near as float32 cannot be
WIDE: dict[str, Callable[[], Tensor]] = {"partners 1e-9": lambda: partners(1e-9)}


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(2)


def root(square: Tensor) -> Tensor:
    alive = square > 0
    return torch.where(alive, torch.where(alive, square, 1).sqrt(), 0)


@dataclass(frozen=True)
class Problem:
    """Rows, the width of what is near among them, and labels."""

    x: Tensor
    width: float
    labels: Tensor
    # scores and their logsumexp, as the formula takes them
    logsums: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def problem(rows: Callable[[], Tensor], dtype: torch.dtype) -> Problem:
    x = rows().to(dtype)
    square = squares(x.double(), x.double())
    other = square[square > 0]
    # a bandwidth that knows the near pairs
    width = float(other.quantile(0.2).sqrt()) if len(other) else 0.5
    return Problem(x, width, torch.arange(N) // 4)
