"""The sweep over pairs in pure PyTorch: any device, float64 too, and every second derivative.

The score matrix goes by in blocks; memory O((N + M) D) plus a few blocks. All arithmetic is out of
place, so that `differentiable_backward` is the same code under autograd, a checkpoint a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype, row_dtype
from fused_losses.primitives.pairs import apart
from fused_losses.primitives.pairs.inputs import (
    BEST,
    COUNT,
    NEGATIVE,
    POSITIVE,
    VALUE,
    PairInputs,
    PairNeeds,
    Rule,
    sorted_out,
)

BLOCK_BYTES = 2 << 20  # of scores in a block
PIECE_BYTES = 256 << 10  # of differences of near pairs
LIVE_PIECES = 6
LIVE_BLOCKS = 12  # how many such are alive at the peak (test_pair_memory.py)
BLOCK_ROWS = 512
VECTOR_BYTES = 200  # of a row or column


def extra_bytes(n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32") -> int:
    """Peak memory of forward and backward beyond inputs and gradients."""
    size = 8 if dtype == torch.float64 else 4
    return LIVE_BLOCKS * BLOCK_BYTES + 3 * (n + m) * d * size + 200 * (n + m)


def workspace(p: PairInputs, needs: PairNeeds | None, width: int = 0) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward.

    width: of an attention's values.
    """
    (n, d), m, size = p.x.shape, p.y.shape[0], accumulate_dtype(p.x.dtype).itemsize
    block = min(n, BLOCK_ROWS) * min(m, block_columns(n, size)) * size
    # near pairs: a flag and 8 bytes each, and their differences
    near = LIVE_PIECES * max(PIECE_BYTES, d * size) + 3 * block if p.apart else 0
    return LIVE_BLOCKS * block + near + (n + m) * (3 * (d + width) * size + VECTOR_BYTES)


def block_columns(n: int, size: int) -> int:
    """How many columns a block of n rows has, of elements of so many bytes."""
    return max(16, BLOCK_BYTES // (min(max(n, 1), BLOCK_ROWS) * size))


class Block:
    """Scores of a run of rows against a run of columns, with their classes."""

    def __init__(self, p: PairInputs, rows: slice, cols: slice) -> None:
        dtype = accumulate_dtype(p.x.dtype)
        self.p, self.rows, self.cols = p, rows, cols
        self.x, self.y = p.x[rows].to(dtype), p.y[cols].to(dtype)
        # what the scale is multiplied with
        self.product = -self._squared() if p.apart else self.x @ self.y.T
        u = self.product * p.scale.to(dtype)
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
        self.taking_part = self._taking_part()

    def _squared(self) -> Tensor:
        """|x - y|^2, near pairs from their differences."""
        norms = self.x.square().sum(1)[:, None] + self.y.square().sum(1)
        squared = torch.addmm(norms, self.x, self.y.T, alpha=-2)
        # `not >=`: NaN and what has overflowed as well
        self.near = ~(squared.detach() >= norms.detach() * apart.SHARE)
        del norms
        for i, j in self.near_pairs():
            found = _run(squared.requires_grad, _of_differences, self.x, self.y, i, j)
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


def _through_differences(
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
    wide = block_columns(n, accumulate_dtype(p.x.dtype).itemsize)
    for rows in runs(n, BLOCK_ROWS):
        for cols in runs(m, wide):
            if not p.triangle or cols.stop - 1 > rows.start:
                yield rows, cols


# ---- statistics ---------------------------------------------------------------------------------


def _reduce(z: Tensor, mask: Tensor, dim: int, reduction: str, wide: torch.dtype) -> Tensor:
    """value, total, count, best of one side of a block. [4, side]"""
    none = z.masked_fill(~mask, -torch.inf)
    if reduction == "lse":
        value = torch.logsumexp(none, dim).to(wide)
    else:
        zero = torch.zeros_like(z)
        # F.softplus is linear past 20, wrong by 2e-9
        f = torch.logaddexp(z, zero) if reduction == "softplus" else torch.maximum(z, zero)
        value = f.masked_fill(~mask, 0).sum(dim, dtype=wide)
    total = z.masked_fill(~mask, 0).sum(dim, dtype=wide)
    return torch.stack([value, total, mask.sum(dim).to(wide), none.amax(dim).to(wide)])


def _merge(old: Tensor, new: Tensor, reduction: str) -> Tensor:
    add = torch.logaddexp if reduction == "lse" else torch.add
    return torch.stack(
        [add(old[VALUE], new[VALUE]), *(old[1:3] + new[1:3]), torch.maximum(old[BEST], new[BEST])]
    )


def _nothing(p: PairInputs, size: int, reduction: str) -> Tensor:
    out = torch.zeros(4, 2, size, dtype=row_dtype(p.x.device), device=p.x.device)
    out[BEST] = -torch.inf
    if reduction == "lse":
        out[VALUE] = -torch.inf
    return out


def statistics(p: PairInputs, reduction: str, cols: bool) -> tuple[Tensor, Tensor]:
    """rows and columns of `fused_losses.primitives.pairs`, [4, 2, N] and [4, 2, M or 0]."""
    p = both_sides(p)
    both = cols or p.triangle
    sides = [_nothing(p, p.x.shape[0], reduction)]
    sides.append(_nothing(p, p.y.shape[0] if both else 0, reduction))
    for rows, columns in cuts(p):
        block = Block(p, rows, columns)
        for dim, at, window in block.sides(both):
            out = sides[1 - dim]
            for kind in (POSITIVE, NEGATIVE) if p.x_labels is not None else (NEGATIVE,):
                mask = block.members(kind, window)
                new = _reduce(block.term(kind)[0], mask, dim, reduction, out.dtype)
                out[:, kind, at] = _merge(out[:, kind, at], new, reduction)
    if p.triangle:
        return _merge(sides[0], sides[1], reduction), sides[1][..., :0].clone()
    return sides[0], sides[1]


# ---- gradients ----------------------------------------------------------------------------------


def _to_score(
    z: Tensor, mask: Tensor, grad: Tensor, stats: Tensor, dim: int, reduction: str
) -> Tensor:
    """dL/dz of one class through one side's value and total; off the mask anything finite."""
    spread = (lambda v: v[:, None]) if dim == 1 else (lambda v: v[None, :])
    narrow = z.dtype
    g_value, g_total = grad[0], grad[1]
    if reduction != "lse":
        slope = torch.sigmoid(z) if reduction == "softplus" else (z > 0).to(narrow)
        return spread(g_value.to(narrow)) * slope + spread(g_total.to(narrow))
    lse, count = stats[VALUE], stats[COUNT].detach()
    lse = torch.where(lse == -torch.inf, 0, lse)
    # masked before the exponential: off the mask it may overflow, and inf * 0 be the derivative
    q = (z - spread(lse.to(narrow))).masked_fill(~mask, -torch.inf).exp()
    # g q + t, in a form whose large parts cancel in float64: near zero loss g -> -t count
    share = (-g_total * count).to(narrow)
    rest = (g_value + g_total * count).to(narrow)
    return spread(rest) * q + spread(share) * (q - spread(1 / count.clamp_min(1).to(narrow)))


def _block_gradient(
    p: PairInputs, rows: slice, cols: slice, grads: tuple, stats: tuple, reduction: str, both: bool
) -> tuple[Tensor, ...]:
    """G y, G^T x (before the scale), sum G product, row sums and column sums of G = dL/du."""
    block = Block(p, rows, cols)
    g = torch.zeros_like(block.score)
    for dim, at, window in block.sides(both):
        for kind in (POSITIVE, NEGATIVE) if p.x_labels is not None else (NEGATIVE,):
            grad, known = grads[1 - dim][:, kind, at], stats[1 - dim][:, kind, at]
            (z, slope), mask = block.term(kind), block.members(kind, window)
            part = _to_score(z, mask, grad, known, dim, reduction) * slope
            g = g + torch.where(mask, part, 0)
    return _products(block, g)


def _products(block: Block, g: Tensor) -> tuple[Tensor, ...]:
    if block.slope is not None:
        g = g * block.slope
    wide = block.p.scale.dtype
    dscale = (g * block.product).sum(dtype=wide)
    if not block.p.apart:
        return g @ block.y, g.T @ block.x, dscale, g.sum(1), g.sum(0)
    # of u / 2 scale, which is sum_j G (y_j - x_i)
    far = g.masked_fill(block.near, 0)
    of_rows, of_columns = far.sum(1), far.sum(0)
    gx = far @ block.y - of_rows[:, None] * block.x
    gy = far.T @ block.x - of_columns[:, None] * block.y
    for i, j in block.near_pairs():
        more = _run(gx.requires_grad, _through_differences, block.x, block.y, g, i, j)
        gx, gy = gx + more[0], gy + more[1]
    return gx, gy, dscale, of_rows, of_columns


def _collect(
    p: PairInputs, needs: PairNeeds, parts: Iterator[tuple[slice, slice, tuple[Tensor, ...]]]
) -> tuple[Tensor | None, ...]:
    """Sums of the blocks' products, as gradients of x, y, scale and the biases."""
    dtype = accumulate_dtype(p.x.dtype)
    (n, d), m = p.x.shape, p.y.shape[0]
    dx, dy = p.x.new_zeros((n, d), dtype=dtype), p.y.new_zeros((m, d), dtype=dtype)
    dx_bias, dy_bias = dx.new_zeros(n), dx.new_zeros(m)
    dscale = torch.zeros_like(p.scale)
    for rows, cols, (gx, gy, gs, gr, gc) in parts:
        dx[rows] += gx
        dy[cols] += gy
        dx_bias[rows] += gr
        dy_bias[cols] += gc
        dscale = dscale + gs
    if p.triangle:
        dx, dx_bias = dx + dy, dx_bias + dy_bias
    scale = p.scale.to(dtype) * (2 if p.apart else 1)
    return (
        (dx * scale).to(p.x.dtype) if needs.x else None,
        (dy * scale).to(p.y.dtype) if needs.y else None,
        dscale if needs.scale else None,
        dx_bias.to(p.x_bias.dtype) if needs.x_bias and p.x_bias is not None else None,
        dy_bias.to(p.y_bias.dtype) if needs.y_bias and p.y_bias is not None else None,
    )


def _run(keep: bool, f: Any, *arguments: Any) -> Any:
    """f(*arguments); under autograd nothing of it is kept but its arguments."""
    return checkpoint(f, *arguments, use_reentrant=False) if keep else f(*arguments)


def statistics_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    rows: Tensor,
    columns: Tensor,
    p: PairInputs,
    reduction: str,
    cols: bool,
    needs: PairNeeds,
    differentiable: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, scale, x_bias and y_bias, each None where it is not needed."""
    p = both_sides(p)
    grads = (grad_rows, grad_rows if p.triangle else grad_columns)
    stats = (rows, rows if p.triangle else columns)
    both = cols or p.triangle
    parts = (
        (i, j, _run(differentiable, _block_gradient, p, i, j, grads, stats, reduction, both))
        for i, j in cuts(p)
    )
    return _collect(p, needs, parts)


# ---- attention ----------------------------------------------------------------------------------


def attention(values: Tensor, p: PairInputs, positives: bool) -> tuple[Tensor, Tensor]:
    """out [N, Dv] and lse [N] of `fused_losses.primitives.pairs.op.pair_attention`."""
    dtype = accumulate_dtype(p.x.dtype)
    n, kind = p.x.shape[0], POSITIVE if positives else NEGATIVE
    out = values.new_zeros((n, values.shape[1]), dtype=dtype)
    best, mass = out.new_full((n,), -torch.inf), out.new_zeros(n)
    for rows, cols in cuts(p):
        block = Block(p, rows, cols)
        _, _, window = next(block.sides(False))
        z = block.term(kind)[0].masked_fill(~block.members(kind, window), -torch.inf)
        top = torch.maximum(best[rows], z.amax(1))
        safe = torch.where(top == -torch.inf, 0, top)
        weights = (z - safe[:, None]).exp()
        shrink = (best[rows] - safe).exp()
        out[rows] = out[rows] * shrink[:, None] + weights @ values[cols].to(dtype)
        mass[rows] = mass[rows] * shrink + weights.sum(1)
        best[rows] = top
    wide = _nothing(p, 0, "lse").dtype
    lse = torch.where(best == -torch.inf, 0, best).to(wide) + mass.to(wide).log()
    return out / torch.where(mass == 0, 1, mass)[:, None], lse


def _block_attention(
    p: PairInputs,
    rows: slice,
    cols: slice,
    grad_out: Tensor,
    shift: Tensor,
    lse: Tensor,
    values: Tensor,
    kind: int,
) -> tuple[Tensor, ...]:
    block = Block(p, rows, cols)
    _, _, window = next(block.sides(False))
    z, slope = block.term(kind)
    v = values[cols].to(z.dtype)
    z = z.masked_fill(~block.members(kind, window), -torch.inf)
    weights = (z - lse[rows, None].to(z.dtype)).exp()
    g = weights * (grad_out[rows] @ v.T - shift[rows, None]) * slope
    return weights.T @ grad_out[rows], *_products(block, g)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    values: Tensor,
    p: PairInputs,
    positives: bool,
    need_values: bool,
    needs: PairNeeds,
    differentiable: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of values, x, y, scale, x_bias and y_bias, each None where not needed."""
    kind = POSITIVE if positives else NEGATIVE
    shift = (grad_out * out).sum(1) - grad_lse.to(out.dtype)
    lse = torch.where(lse == -torch.inf, 0, lse)
    dvalues = out.new_zeros(values.shape)

    def parts() -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
        for i, j in cuts(p):
            found = _run(
                differentiable, _block_attention, p, i, j, grad_out, shift, lse, values, kind
            )
            dvalues[j] += found[0]
            yield i, j, found[1:]

    rest = _collect(p, needs, parts())
    return (dvalues.to(values.dtype) if need_values else None, *rest)


# ---- second derivatives -------------------------------------------------------------------------


def differentiable_backward(kind: str, arguments: list[Any]) -> tuple[Tensor, ...]:
    """A backward op's outputs from its flat arguments, themselves differentiable."""
    before, p, after = sorted_out(f"{kind}_backward", arguments)
    if kind == "pair_statistics":
        reduction, cols, *needs = after
        grad_rows, grad_columns, rows, columns = before
        found = statistics_backward(
            grad_rows, grad_columns, rows, columns, p, reduction, cols, PairNeeds(*needs), True
        )
    else:
        positives, need_values, *needs = after
        grad_out, grad_lse, out, lse, values = before
        given = positives, need_values, PairNeeds(*needs)
        found = attention_backward(grad_out, grad_lse, out, lse, values, p, *given, True)
    return tuple(p.x.new_empty(0) if g is None else g for g in found)
