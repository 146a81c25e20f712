"""From a screen's candidates to the exact k best: scored in float64, and certified.

A screen ranks the columns of each row by s_ij = m_j <x_i, y_j> + a_j in a narrow type and keeps
more than k. With e_i the most that s_ij may be wrong by, every column that it did not keep has
s <= last + e_i; where the k-th best exact score is beyond that, no such column can be among the k
best. The rows where this fails go through every column in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends.reference_topk import allowed, best, wide_rows
from fused_losses.rows import ZERO_NORM, accumulate_dtype, row_dtype
from fused_losses.selection import TopkInputs, listed_forward, scores_of

BLOCK_BYTES = 4 << 20
# unit roundoffs of what is multiplied and of what is added up
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}
EPSILON = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Screen:
    """s_ij = m_j <x_i, y_j - center> + a_j, larger is better, and its error bound."""

    x: Tensor  # [N, D] accumulation dtype, moved and turned so that larger is better
    center: Tensor | None  # [D] what y is moved by
    multiplier: Tensor  # [M]
    offset: Tensor  # [M]
    error: Tensor  # [N] float64
    keep: int

    def rows_of(self, y: Tensor) -> Tensor:
        """A block of y as the screen multiplies it."""
        y = y.to(self.x.dtype)
        return y if self.center is None else y - self.center


Candidates = Callable[[TopkInputs, Screen], tuple[Tensor, Tensor]]


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def prepared(p: TopkInputs, product: torch.dtype | None = None) -> Screen:
    """What a screen needs; `product`: the type that its factors are rounded to, if narrower."""
    m, d = p.y.shape
    narrow, wide = accumulate_dtype(p.x.dtype), row_dtype(p.x.device)
    center = None
    if p.kind == "sqeuclidean" and m and p.y_scale is None:
        sample = p.y[:: max(1, m // 256)].to(wide)
        center = sample.mean(dim=0).nan_to_num(0, 0, 0).to(narrow)
    x = p.x.to(narrow)
    if center is not None:
        x = x - center
    x = x if p.largest != (p.kind == "sqeuclidean") else -x
    multiplier, offset = x.new_ones(m), x.new_zeros(m)
    longest, furthest = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
    for block in _blocks(m, max(1, BLOCK_BYTES // (8 * max(d, 1)))):
        y = wide_rows(p, block)
        if center is not None:
            y = y - center.to(wide)
        norm = torch.linalg.vector_norm(y, dim=1)
        if p.kind == "cosine":
            alive = ~(norm <= ZERO_NORM)
            multiplier[block] = torch.where(alive, 1 / torch.where(alive, norm, 1), 0).to(narrow)
            norm = alive.to(wide)
        elif p.kind == "sqeuclidean":
            half = norm.square() / 2
            offset[block] = (half if p.largest else -half).to(narrow)
            furthest = torch.maximum(furthest, half.max())
        if p.y_scale is not None:
            multiplier[block] *= p.y_scale[block].to(narrow)
        longest = torch.maximum(longest, norm.max())
    unit = ROUNDOFF[narrow]
    each = (d + 8) * unit + 2 * EPSILON.get(product, 0.0) * 1.01
    size = torch.linalg.vector_norm(x.to(wide), dim=1)
    # the last term: products below the normal numbers
    tiny = torch.finfo(narrow).tiny * (d + 1) * (1 + size + longest)
    error = each * size * longest + 4 * unit * furthest + tiny
    return Screen(x, center, multiplier, offset, error, min(m, p.k + max(16, p.k // 2)))


def certified(p: TopkInputs, screen: Screen, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The k best, exactly; one host sync that asks whether every row is certain."""
    n, m = p.x.shape[0], p.y.shape[0]
    if n == 0 or m == 0 or p.k == 0:
        keys = p.x.new_full((n, p.k), torch.nan, dtype=row_dtype(p.x.device))
        return keys, torch.full_like(keys, -1, dtype=torch.int64)
    rank, index = candidates(p, screen)
    index = index.long()
    exact = listed_forward(p.x, p.y, p.y_scale, index, p.kind)
    keys, found = best(exact, index, p.k, p.largest)
    unsure = ~_certain(p, screen, rank[:, -1], index[:, -1], keys[:, -1])
    for i in unsure.nonzero().flatten().tolist():
        keys[i : i + 1], found[i : i + 1] = _whole_row(p, i)
    return keys, found


def _certain(p: TopkInputs, screen: Screen, last: Tensor, end: Tensor, kth: Tensor) -> Tensor:
    """Rows in which no column that was not kept can be among the k best, nor equal the k-th."""
    beyond = last.to(kth.dtype) + screen.error
    if p.kind == "cosine":
        norm = torch.linalg.vector_norm(screen.x.to(kth.dtype), dim=1)
        score = kth * norm * (1 if p.largest else -1)
    elif p.kind == "dot":
        score = kth if p.largest else -kth
    else:
        half = screen.x.to(kth.dtype).square().sum(dim=1) / 2
        score = kth / 2 - half if p.largest else half - kth / 2
        beyond = beyond + half * 1e-15
    # fewer candidates than were asked for: all were kept; a row with NaN has none
    return (score > beyond) | (end < 0) | p.x.isnan().any(dim=1)


def _whole_row(p: TopkInputs, i: int) -> tuple[Tensor, Tensor]:
    """One row against every column in float64, the k best carried from block to block."""
    m, d = p.y.shape
    rows = slice(i, i + 1)
    x = p.x[rows].to(row_dtype(p.x.device))
    keys = x.new_full((1, p.k), torch.nan)
    index = torch.full_like(keys, -1, dtype=torch.int64)
    for block in _blocks(m, max(p.k, BLOCK_BYTES // (8 * max(d, 1)))):
        fresh = scores_of(x, wide_rows(p, block)[None], p.kind)
        fresh = torch.where(allowed(p, rows, block), fresh, torch.nan)
        at = torch.arange(block.start, block.stop, device=x.device)[None]
        keys, index = best(torch.cat([keys, fresh], 1), torch.cat([index, at], 1), p.k, p.largest)
    return keys, index


def products_of_blocks(p: TopkInputs, screen: Screen) -> tuple[Tensor, Tensor]:
    """A screen in pure PyTorch: blocks of products, the best carried along."""
    n, m = p.x.shape[0], p.y.shape[0]
    size, wide = screen.x.element_size(), max(screen.keep, 4096)
    rows = max(1, BLOCK_BYTES // (wide * size))
    ranks, places = [], []
    for run in _blocks(n, rows):
        rank = screen.x.new_full((run.stop - run.start, 0), -torch.inf)
        place = torch.empty_like(rank, dtype=torch.int64)
        for block in _blocks(m, wide):
            y = screen.rows_of(p.y[block])
            fresh = screen.x[run] @ y.T * screen.multiplier[block] + screen.offset[block]
            # what is not a number is for float64 to decide
            fresh = fresh.nan_to_num(torch.inf, torch.inf, torch.finfo(fresh.dtype).min)
            fresh = torch.where(allowed(p, run, block), fresh, -torch.inf)
            at = torch.arange(block.start, block.stop, device=p.x.device).expand(fresh.shape)
            rank, place = torch.cat([rank, fresh], 1), torch.cat([place, at], 1)
            rank, chosen = rank.topk(min(screen.keep, rank.shape[1]), dim=1)
            place = place.gather(1, chosen)
        ranks.append(rank)
        places.append(torch.where(rank == -torch.inf, -1, place))
    return torch.cat(ranks), torch.cat(places)
