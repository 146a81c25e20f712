"""Blocks of the sweep over pairs in PyTorch: their scores, classes and near pairs.

All arithmetic is such that autograd follows it, a checkpoint a block and a piece of near pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.pairs import apart
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs, Rule

BLOCK_BYTES = 2 << 20  # of scores in a block
COLUMN_BYTES = 8 << 20  # of its columns' rows, which are widened
PIECE_BYTES = 256 << 10  # of differences of near pairs
BLOCK_ROWS = 512


def block_columns(n: int, d: int, size: int) -> int:
    """How many columns a block of n rows has, of d elements of so many bytes."""
    scores = BLOCK_BYTES // (min(max(n, 1), BLOCK_ROWS) * size)
    return max(16, min(scores, COLUMN_BYTES // (max(d, 1) * size)))


class ScoreBlock:
    """Scores of a run of rows against a run of columns, with their classes."""

    def __init__(
        self,
        p: PairInputs,
        rows: slice,
        cols: slice,
        kept: Tensor | None = None,
        known: bool = False,
    ) -> None:
        # kept: [rows, cols] of products (apart |x - y|^2, near pairs as products have them), which
        # are written there, or with known read
        dtype = accumulate_dtype(p.x.dtype)
        self.p, self.rows, self.cols = p, rows, cols
        self.x, self.y = p.x[rows].to(dtype), p.y[cols].to(dtype)
        self.exact = self.inner = None
        # what the scale is multiplied with
        self.product = -self._squared(kept, known) if p.apart else self._raw(kept, known)
        if p.score == "power":
            self.exact = self.product == 0
            safe = torch.where(self.exact, 1, -self.product)
            # log |x - y| with its slope in -|x - y|^2
            self.product, self.inner = -safe.log() / 2, torch.where(self.exact, 0, 0.5 / safe)
        self._score()
        self.taking_part = self._taking_part()

    def of_product(self, product: Tensor) -> ScoreBlock:
        """The same pairs with another product."""
        other = copy.copy(self)
        other.product = product
        other._score()
        return other

    def _score(self) -> None:
        p, rows, cols = self.p, self.rows, self.cols
        u = self.product * p.scale.to(self.product.dtype)
        if p.x_bias is not None:
            u = u + p.x_bias[rows, None]
        if p.y_bias is not None:
            u = u + p.y_bias[cols]
        if p.score == "root":
            positive = u < 0
            root = torch.where(positive, -u, 1).sqrt()
            # a NaN must stay NaN
            self.score = torch.where(positive, -root, torch.where(u.isnan(), u, 0))
            self.slope = torch.where(positive, 0.5 / root, 0)
        else:
            self.score, self.slope = u, None
            if self.exact is not None:
                self.score = torch.where(self.exact, torch.inf, u)

    def _raw(self, kept: Tensor | None, known: bool, norms: Tensor | None = None) -> Tensor:
        if kept is not None and known:
            return kept
        y = self.y.T
        raw = self.x @ y if norms is None else torch.addmm(norms, self.x, y, alpha=-2)
        return raw if kept is None else kept.copy_(raw)

    def _squared(self, kept: Tensor | None, known: bool) -> Tensor:
        """|x - y|^2, near pairs from their differences."""
        norms = self.x.square().sum(1)[:, None] + self.y.square().sum(1)
        squared = self._raw(kept, known, norms)
        # near pairs are written in place
        squared = squared if kept is None else squared.clone()
        # `not >=`: NaN and what has overflowed as well
        self.near = ~(squared.detach() >= norms.detach() * apart.SHARE)
        del norms
        for i, j in self.near_pairs():
            found = run(squared.requires_grad, _of_differences, self.x, self.y, i, j)
            squared = squared.index_put_((i, j), found)
        return squared

    def near_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and columns of the near pairs, so many that [pairs, D] is a piece."""
        listed = self.near.flatten().nonzero()[:, 0]
        step = max(1, PIECE_BYTES // max(self.x.shape[1] * self.x.element_size(), 1))
        for start in range(0, len(listed), step):
            at = listed[start : start + step]
            i = at // self.near.shape[1]
            yield i, at - i * self.near.shape[1]

    def _taking_part(self) -> Tensor | None:
        """Which pairs are not left out, windows apart; None: all of them."""
        p, rows, cols = self.p, self.rows, self.cols
        i = torch.arange(rows.start, rows.stop, device=p.x.device)[:, None]
        j = torch.arange(cols.start, cols.stop, device=p.x.device)
        left_out = []
        if p.triangle and cols.start < rows.stop:
            left_out.append(j <= i)
        if p.skip_self:
            left_out.append(i == j)
        if p.x_ids is not None:
            assert p.y_ids is not None
            left_out.append(p.x_ids[rows, None] == p.y_ids[cols])
        if p.x_groups is not None:
            assert p.y_groups is not None
            left_out.append(p.x_groups[rows, None] != p.y_groups[cols])
        if p.exclude is not None:
            left_out.extend(column[:, None] == j for column in p.exclude[rows].T)
        if not left_out:
            return None
        out = left_out[0]
        for more in left_out[1:]:
            out = out | more
        return ~out

    def kinds(self) -> tuple[int, ...]:
        """The classes that pairs may have."""
        return (NEGATIVE,) if self.p.x_labels is None else (POSITIVE, NEGATIVE)

    def members(self, kind: int, window: Tensor | None) -> Tensor:
        """[rows, cols] which pairs are of this class; window: [4, rows, 1] or [4, 1, cols]."""
        p = self.p
        if p.x_labels is None:
            mask = torch.full_like(self.score, kind == NEGATIVE, dtype=torch.bool)
        else:
            assert p.y_labels is not None
            same = p.x_labels[self.rows, None] == p.y_labels[self.cols]
            mask = same if kind == POSITIVE else ~same
        if self.taking_part is not None:
            mask = mask & self.taking_part
        if window is not None:
            low, high = window[2 * kind], window[2 * kind + 1]
            # written so that a NaN score takes part
            mask = mask & ~((self.score <= low) | (self.score >= high))
        return mask

    def term(self, kind: int) -> tuple[Tensor, Tensor | float]:
        """z of a class and dz/ds."""
        rule: Rule = self.p.positive if kind == POSITIVE else self.p.negative
        z, slope = rule.factor * (self.score - rule.center), rule.factor
        if rule.reach != float("inf"):
            sign = 1.0 if rule.factor >= 0 else -1.0
            weight = (rule.reach + sign * self.score.detach()).clamp_min(0)
            z, slope = z * weight, slope * weight
        return z, slope

    def sides(self, cols: bool) -> Iterator[tuple[int, slice, Tensor | None]]:
        """The dimension that a side sums over, its vectors' slice and its window."""
        p = self.p
        yield 1, self.rows, None if p.x_window is None else p.x_window[:, self.rows, None]
        if cols:
            yield 0, self.cols, None if p.y_window is None else p.y_window[:, None, self.cols]


def _of_differences(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (x[i] - y[j]).square().sum(1)


def through_differences(
    x: Tensor, y: Tensor, g: Tensor, i: Tensor, j: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_j G (y_j - x_i) and sum_i G (x_i - y_j) over listed pairs."""
    each = g[i, j, None] * (y[j] - x[i])
    nothing = torch.zeros_like(x), torch.zeros_like(y)
    return nothing[0].index_add(0, i, each), nothing[1].index_add(0, j, each, alpha=-1)


def both_sides(p: PairInputs) -> PairInputs:
    """With triangle, the columns' tensors are the rows'."""
    if not p.triangle:
        return p
    return p._replace(
        y=p.x,
        y_bias=p.x_bias,
        y_labels=p.x_labels,
        y_ids=p.x_ids,
        y_groups=p.x_groups,
        y_window=p.x_window,
    )


def cuts(p: PairInputs) -> Iterator[tuple[slice, slice]]:
    n, m = p.x.shape[0], p.y.shape[0]
    wide = block_columns(n, p.x.shape[1], accumulate_dtype(p.x.dtype).itemsize)
    for rows in runs(n, BLOCK_ROWS):
        for cols in runs(m, wide):
            if not p.triangle or cols.stop - 1 > rows.start:
                yield rows, cols


def kept_cuts(p: PairInputs, room: int) -> Iterator[tuple[slice, slice, slice | None]]:
    """`cuts`, and where in a vector of so many scores a block is kept; None: it is not."""
    used = 0
    for rows, cols in cuts(p):
        end = used + (rows.stop - rows.start) * (cols.stop - cols.start)
        if end > room:
            yield rows, cols, None
            continue
        yield rows, cols, slice(used, end)
        used = end


def kept_block(kept: Tensor, at: slice, rows: slice) -> Tensor:
    """[rows, cols] of what is kept."""
    return kept[at].view(rows.stop - rows.start, -1)


def weights_of(z: Tensor, lse: Tensor) -> Tensor:
    """exp(z - lse), at most 1 even where another form's products made the lse; its slope itself."""
    above = z - lse
    return above.sub_(above.detach().clamp_min(0)).exp()


def shared_weights(z: Tensor, lse: Tensor, exact: Tensor | None) -> Tensor:
    """`weights_of`, with the rows of an infinite lse shared by so many infinite scores. [n, 1]"""
    if exact is None:
        return weights_of(z, lse)
    infinite = lse == torch.inf
    rest = weights_of(z.masked_fill(infinite, -torch.inf), lse.masked_fill(infinite, 0))
    share = 1 / exact.clamp_min(1).to(z.dtype)
    return torch.where(infinite & (z == torch.inf), share, rest)


def exact_pairs(p: PairInputs, kind: int, lse: Tensor) -> Tensor | None:
    """How many pairs of a row are at distance 0, [N, 1], where some are; None: nowhere any."""
    if p.score != "power" or not bool((lse == torch.inf).any()):
        return None
    count = torch.zeros(p.x.shape[0], 1, dtype=torch.int64, device=p.x.device)
    with torch.no_grad():
        for rows, cols in cuts(p):
            block = ScoreBlock(p, rows, cols)
            assert block.exact is not None
            _, _, window = next(block.sides(False))
            count[rows] += (block.exact & block.members(kind, window)).sum(1, keepdim=True)
    return count


def run(keep: bool, f: Any, *arguments: Any) -> Any:
    """f(*arguments); under autograd nothing of it is kept but its arguments."""
    return checkpoint(f, *arguments, use_reentrant=False) if keep else f(*arguments)
