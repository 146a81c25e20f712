"""The k best in whole numbers, and rows that make them hard to find."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# names, so that rows of float64 reach the CUDA kernels, too: here they take them
PAIRS = [("f64", "f64"), ("f32", "f32"), ("bf16", "bf16"), ("f16", "f16")]
PAIRS += [("f32", "f64"), ("f64", "f32"), ("bf16", "f32"), ("f16", "bf16")]


Rows = list[list[int] | None]
COSINES = 240  # bits of a cosine's square


def exactly(x: Tensor, y: Tensor) -> tuple[Rows, Rows, int]:
    """Rows in integers, None for one with NaN or inf; 1 is 2^bits."""
    every = [t.double().tolist() for t in (x, y)]
    finite = [v for rows in every for row in rows for v in row if math.isfinite(v)]
    one = max(v.as_integer_ratio()[1] for v in finite)
    left, right = (
        [
            [int(Fraction(v) * one) for v in row] if all(map(math.isfinite, row)) else None
            for row in t
        ]
        for t in every
    )
    return left, right, one.bit_length() - 1


def score(u: list[int], v: list[int], kind: str, bits: int) -> tuple[int, int]:
    """An exact score, of a cosine the square with its sign; and the rounding of one in float64."""
    unit = 2 * len(u) + 8
    if kind == "sqeuclidean":
        key = sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
        return key, (unit * key >> 52) + 1
    product = sum(a * b for a, b in zip(u, v, strict=True))
    if kind == "dot":
        return product, (unit * sum(abs(a * b) for a, b in zip(u, v, strict=True)) >> 52) + 1
    sizes = sum(a * a for a in u), sum(b * b for b in v)
    if min(sizes) * 10**24 <= 1 << 2 * bits:
        return 0, 0
    key = (product * abs(product) << COSINES) // (sizes[0] * sizes[1])
    return key, 2 * unit << COSINES - 52


@lru_cache(maxsize=1)  # many searches of the same rows follow one another; a tensor is its object
def scored(x: Tensor, y: Tensor, kind: str) -> tuple[list[dict | None], Rows]:
    """Each row's exact scores by column, and the columns; None of what is not finite."""
    left, right, bits = exactly(x, y)
    of = lambda u: {j: score(u, v, kind, bits) for j, v in enumerate(right) if v is not None}
    return [None if u is None else of(u) for u in left], right


def check(
    found: Tensor,
    x: Tensor,
    y: Tensor,
    kind: str,
    k: int,
    largest: bool,
    own: bool,
    of: tuple[str, ...] = (),
) -> None:
    """The k best by exact scores, but for the rounding of a score in float64; copies in order.

    of: whose answer it is, for the message.
    """
    every, right = scored(x, y, kind)
    sign = 1 if largest else -1
    for i, row in enumerate(every):
        if row is None:
            continue
        scores = {j: pair for j, pair in row.items() if not (own and i == j)}
        best = sorted(scores, key=lambda j: (-sign * scores[j][0], j))[:k]
        mine = found[i].tolist()
        assert len(set(mine)) == len(mine) == k, (of, i)
        for place, (got, want) in enumerate(zip(mine, best, strict=True)):
            loss = abs(scores[want][0] - scores[got][0])
            assert loss <= scores[want][1] + scores[got][1], (of, i, place, got, want)
        for a, b in itertools.pairwise(mine):
            assert right[a] != right[b] or a < b, (of, i, a, b)
        # of equal rows, none is passed over
        copies = [j for j in scores if right[j] == right[mine[-1]]]
        taken = [j for j in mine if right[j] == right[mine[-1]]]
        assert taken == copies[: len(taken)], (of, i, taken, copies)


Draw = Callable[[int], Tensor]


def clusters(n: int, d: int = 4, at: float = 1e3, spread: float = 1e-3) -> Tensor:
    centers = torch.where(torch.rand(3, d).double() < 0.5, -at, at)
    return centers[torch.arange(n) % 3] + spread * torch.randn(n, d).double()


def near_duplicates(n: int) -> Tensor:
    base = torch.randn(5, 6).double()
    return base[torch.arange(n) % 5] * (1 + 1e-7 * torch.randn(n, 1).double())


def duplicates(n: int) -> Tensor:
    return torch.randn(4, 5).double()[torch.randint(0, 4, (n,))]


def constant_rows(n: int) -> Tensor:
    return (1 + 1e-6 * torch.randn(n, 1).double()).expand(n, 7).clone()


def near_constant(n: int) -> Tensor:
    return 1.00389 + 2e-5 * torch.rand(n, 24).double() - 1e-5


def relu_sparse(n: int) -> Tensor:
    return (torch.randn(n, 8).double() - 1.2).relu()


def one_outlier(n: int) -> Tensor:
    x = torch.randn(n, 6).double()
    x[:, 2] += 1e4
    x[n // 2, 4] = 3e4
    return x


def scales(n: int) -> Tensor:
    return torch.randn(n, 5).double() * 10.0 ** (60 * torch.rand(n, 1).double() - 30)


def denormals(n: int) -> Tensor:
    return torch.randint(-9, 10, (n, 4)).double() * 2.0**-149


def one_dimension(n: int) -> Tensor:
    return torch.randn(n, 1).double() + 300


def integers(n: int) -> Tensor:
    return torch.randint(-2, 3, (n, 3)).double()


def seconds(n: int) -> Tensor:
    return 1.7e9 + torch.arange(n).double()[:, None]


def milliseconds(n: int) -> Tensor:
    return torch.stack([1.7e12 + 7 * torch.arange(n), torch.arange(n) % 5], 1).double()


def maps(n: int) -> Tensor:
    return torch.tensor([5e5, 5.4e6, 200.0]) + 2 * torch.rand(n, 3).double()


HARD: dict[str, Draw] = {
    f.__name__: f
    for f in (
        clusters, near_duplicates, duplicates, constant_rows, near_constant, relu_sparse,
        one_outlier, scales, denormals, one_dimension, integers, seconds, milliseconds, maps,
    )
}  # fmt: skip


def inverse(rows: np.ndarray) -> np.ndarray:
    """1 / length, 0 for rows that count as zeros."""
    norm = np.sqrt((rows * rows).sum(-1))
    return np.where(norm <= 1e-12, 0, 1 / np.where(norm == 0, 1, norm))
