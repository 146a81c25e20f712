"""Distillation of what a batch's rows are to one another, and of features row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import recomputed, row_dtype, unit_rows
from fused_losses.base.products import product

BLOCK_BYTES = 1 << 20  # of differences that are alive at once, more where one row has more


# ---- distances and angles -----------------------------------------------------------------------


def relational_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber of all pairs' distances, each over its side's mean of those above 0. sum / N^2, []

    student [N, Ds], teacher [N, Dt]. By blocks of rows, computed again in the backward: time
    O(N^2 D), memory O(N D) and a block.
    """
    means = [_mean_distance(x) for x in (student, teacher)]

    def block(rows: Tensor, x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
        u, v = _distances(x[rows], x) / of_x, _distances(y[rows], y) / of_y
        return F.smooth_l1_loss(u, v, reduction="sum")

    total = _over_blocks(block, (student, teacher), student.shape[1] + teacher.shape[1], *means)
    return total / max(1, len(student)) ** 2


def relational_angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber of the cosines of all triplets' angles. sum / N^3, []

    The angle at j between i and k: <unit(x_i - x_j), unit(x_k - x_j)>. By blocks of anchors,
    computed again in the backward: time O(N^3 D), memory O(N (N + D)).
    """

    def block(rows: Tensor, x: Tensor, y: Tensor) -> Tensor:
        u, v = (unit_rows(t - t[rows][:, None]) for t in (x, y))
        return F.smooth_l1_loss(product(u, u), product(v, v), reduction="sum")

    n = len(student)
    total = _over_blocks(block, (student, teacher), n + student.shape[1] + teacher.shape[1])
    return total / max(1, n) ** 3


def _mean_distance(x: Tensor) -> Tensor:
    """Over the pairs that are apart; 1 where there are none. []"""

    def block(rows: Tensor, x: Tensor) -> Tensor:
        found = _distances(x[rows], x)
        return torch.stack([found.sum(), (found > 0).sum().to(found)])

    total, count = _over_blocks(block, (x,), x.shape[1])
    return torch.where(count > 0, total / count.clamp_min(1), 1)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """By differences, so that near rows keep their digits; gradient 0 at 0."""
    square = (x[:, None] - y).square().sum(dim=2)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def _over_blocks(
    block: Callable[..., Tensor], sides: tuple[Tensor, ...], width: int, *more: Tensor
) -> Tensor:
    """The sum of block(rows, *sides, *more) over runs of rows; width: numbers a pair."""
    n = len(sides[0])
    height = max(1, BLOCK_BYTES // max(1, n * width * sides[0].element_size()))
    every = torch.arange(n, device=sides[0].device)
    parts = [recomputed(block, every[rows], *sides, *more) for rows in runs(n, height)]
    return torch.stack(parts).sum(dim=0) if parts else block(every, *sides, *more)


# ---- Gram matrices ------------------------------------------------------------------------------


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|S S^T - T T^T|_F^2 / N^2, by D x D products in float64 where the device has it. []

    Of one width it is made of S - T and S + T: near agreement nothing cancels. Time O(N D^2),
    memory O(N D + D^2).
    """
    s, t = (x.to(row_dtype(x.device)) for x in (student, teacher))
    if s.shape == t.shape:
        u, v = s - t, s + t
        across = product(v.T, u.T)
        own = product(u.T, u.T) * product(v.T, v.T)
        square = (own.sum() + (across * across.T).sum()) / 2
    else:
        square = product(s.T, s.T).square().sum() + product(t.T, t.T).square().sum()
        square = square - 2 * product(s.T, t.T).square().sum()
    # never below 0 but by rounding
    return torch.where(square < 0, 0 * square, square) / max(1, len(s)) ** 2


def similarity_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """|g_i / |g_i| - h_i / |h_i||^2 / N of the rows g = S S^T, h = T T^T, each over its length. [N]

    By D x D products in float64 where the device has it: time O(N D^2), memory O(N D + D^2).
    """
    s, t = (x.to(row_dtype(x.device)) for x in (student, teacher))
    across = (product(s, product(t.T, s.T)) * t).sum(dim=1)
    squares = [(product(x, product(x.T, x.T)) * x).sum(dim=1) for x in (s, t)]
    alive = [q > 0 for q in squares]
    norms = [torch.where(a, q, 1).sqrt() for a, q in zip(alive, squares, strict=True)]
    both = alive[0].to(s) + alive[1].to(s)
    return (both - 2 * across / (norms[0] * norms[1])) / max(1, len(s))


# ---- rows ---------------------------------------------------------------------------------------


def norm_and_direction(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """1 - <s, e> / max(|s|, |t|) of each row, e its unit direction; 1 where both are 0. [N]

    A row longer than its teacher's has the gradient of its length, too. O(N D).
    """
    along = (student * unit_rows(directions)).sum(dim=1)
    mine, theirs = (torch.linalg.vector_norm(x, dim=1) for x in (student, teacher))
    longest = torch.where(mine > theirs, mine, theirs)
    alive = ~(longest <= 0)
    return 1 - torch.where(alive, along / torch.where(alive, longest, 1), 0)


def cosine_distances(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """1 - <x, y> / (|x| |y| + eps) of each row. [N], O(N D)"""
    lengths = [torch.linalg.vector_norm(t, dim=1) for t in (x, y)]
    return 1 - (x * y).sum(dim=1) / (lengths[0] * lengths[1] + eps)
