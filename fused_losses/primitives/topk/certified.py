"""From a screen's candidates to the exact k best: scored in float64, and certified.

A screen ranks the columns of each row by s_ij = m_j <x_i, y_j> + a_j in a narrow type and keeps
more than k. With e_i the most that s_ij may be wrong by, every column that it did not keep has
s <= last + e_i; where the k-th best exact score is beyond that, no such column can be among the k
best. The rows where this fails go through every column in float64: a row at a time, which asks
the device for their numbers, or by the CUDA C++ kernels, which do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.blocks import runs
from fused_losses.base.numerics import ZERO_NORM, accumulate_dtype, row_dtype
from fused_losses.primitives.topk import bounds
from fused_losses.primitives.topk.bounds import IEEE, TINY, Products
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.listed import listed_forward, scores_of
from fused_losses.primitives.topk.reference import allowed, best, wide_rows

BLOCK_BYTES = 4 << 20
DEVICE_BLOCK_BYTES = 16 << 20  # on a GPU, where a block is ten launches
LIVE_BLOCKS = 8  # how many such are alive at the peak


@dataclass(frozen=True)
class Screen:
    """s_ij = m_j <x_i - center, y_j - center> + a_j, larger is better, and its error bound."""

    x: Tensor  # [N, D] as it is multiplied, moved and turned so that larger is better
    center: Tensor | None  # [D] what rows are moved by; float64 for float64 rows of y
    multiplier: Tensor | None  # [M]
    offset: Tensor | None  # [M]
    squares: Tensor  # [N] float64, |x_i - center|^2 of the rows as they are stored
    error: Tensor  # [N] float64
    keep: int

    def rows_of(self, y: Tensor) -> Tensor:
        """A block of y as the screen multiplies it."""
        return moved(y, self.center, self.x.dtype)


Candidates = Callable[[TopkInputs, Screen], tuple[Tensor, Tensor]]


class Judge(NamedTuple):
    """Exact scores: of listed columns, and of every column of the rows that are not certain."""

    # (p, index [N, keep]) -> keys [N, k], indices [N, k]
    listed: Callable[[TopkInputs, Tensor], tuple[Tensor, Tensor]]
    # (p, unsure [N], keys, indices), in place
    rows: Callable[[TopkInputs, Tensor, Tensor, Tensor], None]


def kept(p: TopkInputs) -> int:
    """How many candidates of a row a screen keeps."""
    return min(p.y.shape[0], p.k + max(16, p.k // 2))


def block_bytes(p: TopkInputs) -> int:
    """Of a block of rows that are prepared in float64."""
    return DEVICE_BLOCK_BYTES if p.x.is_cuda else BLOCK_BYTES


def _by_kernels(p: TopkInputs) -> bool:
    """Whether the CUDA C++ kernels take part: in a GPU's screens, and as their judge."""
    dense = p.x.stride(1) == 1 and p.y.stride(1) == 1
    return p.x.is_cuda and dense and not backends.unavailable("cuda")


def certified_bytes(p: TopkInputs) -> int:
    """Of a screen in blocks and its judge in PyTorch, beyond inputs and outputs, at most."""
    (n, d), m, keep = p.x.shape, p.y.shape[0], p.k + max(16, p.k // 2)
    size = accumulate_dtype(p.x.dtype).itemsize
    # moved in float64 where y is
    rows = 3 * n * d * max(size, accumulate_dtype(p.y.dtype).itemsize if p.y_scale is None else 0)
    return LIVE_BLOCKS * block_bytes(p) + rows + 16 * keep * d + 2 * m * size + 96 * n * keep


def center_of(p: TopkInputs) -> Tensor | None:
    """What moves both sides near the origin, where a squared distance loses the least. [D]"""
    m = p.y.shape[0]
    if p.kind != "sqeuclidean" or m == 0 or p.y_scale is not None:
        return None
    sample = p.y[:: max(1, m // 256)].to(row_dtype(p.x.device))
    sample = torch.where(sample.isfinite().all(dim=1, keepdim=True), sample, torch.nan)
    # kernels move float32 rows by a float32
    return sample.nanmean(dim=0).nan_to_num(0, 0, 0).to(accumulate_dtype(p.y.dtype))


def moved(rows: Tensor, center: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows about the center: in float64 where rows, center or dtype are, and only then rounded."""
    if center is not None:
        rows = rows - center.to(torch.promote_types(center.dtype, dtype))
    return rows.to(dtype)


def turned(p: TopkInputs, x: Tensor) -> Tensor:
    """x with the sign that makes larger keys better."""
    return x if p.largest != (p.kind == "sqeuclidean") else -x


def prepared(p: TopkInputs, products: Products = IEEE, narrow: torch.dtype | None = None) -> Screen:
    """What a screen needs; narrow: the type that it adds up in, if not that of x."""
    (n, d), m = p.x.shape, p.y.shape[0]
    narrow, wide = narrow or accumulate_dtype(p.x.dtype), row_dtype(p.x.device)
    center = center_of(p)
    multiplier, offset = (f(m, dtype=narrow, device=p.x.device) for f in (torch.ones, torch.zeros))
    longest = torch.zeros((), dtype=wide, device=p.x.device)
    step = max(1, block_bytes(p) // (8 * max(d, 1)))
    in_kernels = narrow == torch.float32 and _by_kernels(p)
    if in_kernels:
        longest = backends.module("topk", "cuda").lengths(p, center, multiplier, offset)
    for block in runs(0 if in_kernels else m, step):
        y = moved(wide_rows(p, block), center, wide)
        norm = torch.linalg.vector_norm(y, dim=1)
        if p.kind == "cosine":
            alive = ~(norm <= ZERO_NORM)
            multiplier[block] = torch.where(alive, 1 / torch.where(alive, norm, 1), 0).to(narrow)
        elif p.kind == "sqeuclidean":
            half = norm.square() / 2
            offset[block] = (half if p.largest else -half).to(narrow)
        if p.y_scale is not None:
            multiplier[block] *= p.y_scale[block].to(narrow)
        # the products of a row with NaN or inf are right, or NaN
        longest = torch.maximum(longest, torch.where(y.isfinite().all(dim=1), norm, 0).max())
    squares = torch.empty(n, dtype=wide, device=p.x.device)
    if in_kernels:
        backends.module("topk", "cuda").squared_lengths(p.x, center, squares)
    for run in runs(0 if in_kernels else n, step):
        squares[run] = moved(p.x[run].to(wide), center, wide).square().sum(dim=1)
    error = bounds.of_scores(p, squares.sqrt(), longest, narrow, products)
    x = turned(p, moved(p.x, center, narrow))
    return Screen(x, center, multiplier, offset, squares, error, kept(p))


def nothing(p: TopkInputs) -> tuple[Tensor, Tensor]:
    """What a call without rows, columns or k returns."""
    keys = p.x.new_full((p.x.shape[0], p.k), torch.nan, dtype=row_dtype(p.x.device))
    return keys, torch.full_like(keys, -1, dtype=torch.int64)


def certified(p: TopkInputs, screen: Screen, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The k best, exactly."""
    if 0 in (*p.x.shape[:1], *p.y.shape[:1], p.k):
        return nothing(p)
    on_device = p.x.is_cuda and not backends.unavailable("cuda")
    judge = backends.module("topk", "cuda").judge(p) if on_device else IN_TORCH
    return judged(p, screen, *candidates(p, screen), judge)


def judged(
    p: TopkInputs, screen: Screen, rank: Tensor, index: Tensor, judge: Judge
) -> tuple[Tensor, Tensor]:
    """The k best, exactly, from candidates in the order of their keys."""
    keys, found = judge.listed(p, index)
    unsure = ~_certain(p, screen, rank[:, -1], index[:, -1], keys[:, -1])
    judge.rows(p, unsure, keys, found)
    return keys, found


def _certain(p: TopkInputs, screen: Screen, last: Tensor, end: Tensor, kth: Tensor) -> Tensor:
    """Rows in which no column that was not kept can be among the k best, nor equal the k-th."""
    beyond = last.to(kth.dtype) + screen.error
    if p.kind == "cosine":
        score = kth * screen.squares.sqrt() * (1 if p.largest else -1)
    elif p.kind == "dot":
        score = kth if p.largest else -kth
    else:
        half, key = screen.squares / 2, kth / 2
        score = key - half if p.largest else half - key
        d = p.x.shape[1]
        beyond = beyond + bounds.of_distances(d, kth.dtype) * (half + key) + d * TINY[kth.dtype]
    # fewer candidates than were asked for: all were kept; a row with NaN has none
    return (score > beyond) | (end < 0) | p.x.isnan().any(dim=1)


def _listed(p: TopkInputs, index: Tensor) -> tuple[Tensor, Tensor]:
    index = index.long()
    exact = listed_forward(p.x, p.y, p.y_scale, index, p.kind)
    return best(exact, index, p.k, p.largest)


def _unsure_rows(p: TopkInputs, unsure: Tensor, keys: Tensor, found: Tensor) -> None:
    """One host sync that asks whether every row is certain, and which are not."""
    rows = unsure.nonzero().flatten()
    if len(rows) == 0:
        return
    m, d = p.y.shape
    columns = min(m, max(p.k, BLOCK_BYTES // (8 * max(d, 1))))
    for run in runs(len(rows), max(1, BLOCK_BYTES // (8 * columns * max(d, 1)))):
        keys[rows[run]], found[rows[run]] = _whole_rows(p, rows[run], columns)


IN_TORCH = Judge(_listed, _unsure_rows)


def _whole_rows(p: TopkInputs, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Rows against every column in float64, the k best carried from block to block."""
    x = p.x[rows].to(row_dtype(p.x.device))
    keys = x.new_full((len(rows), p.k), torch.nan)
    index = torch.full_like(keys, -1, dtype=torch.int64)
    for block in runs(p.y.shape[0], columns):
        fresh = scores_of(x, wide_rows(p, block)[None], p.kind)
        fresh = torch.where(allowed(p, rows, block), fresh, torch.nan)
        at = torch.arange(block.start, block.stop, device=x.device).expand(fresh.shape)
        keys, index = best(torch.cat([keys, fresh], 1), torch.cat([index, at], 1), p.k, p.largest)
    return keys, index


def unpacked(packed: Tensor) -> tuple[Tensor, Tensor]:
    """float32 keys and int32 columns of the kernels' int64, -inf and -1 where there is none."""
    bits = (packed >> 32).int()
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return keys, torch.where(keys == -torch.inf, -1, 0xFFFFFFFF - (packed & 0xFFFFFFFF)).int()


def products_of_blocks(p: TopkInputs, screen: Screen) -> tuple[Tensor, Tensor]:
    """A screen in pure PyTorch: blocks of products, the best carried along."""
    (n, d), m, size = p.x.shape, p.y.shape[0], screen.x.element_size()
    wide = max(screen.keep, min(4096, BLOCK_BYTES // (8 * max(d, 1))))
    rows = max(1, BLOCK_BYTES // (wide * size))
    ranks, places = [], []
    for run in runs(n, rows):
        rank = screen.x.new_full((run.stop - run.start, 0), -torch.inf)
        place = torch.empty_like(rank, dtype=torch.int64)
        for block in runs(m, wide):
            assert screen.multiplier is not None and screen.offset is not None
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
