"""The sweep over pairs in pure PyTorch: any device, float64 too, and every second derivative.

The score matrix goes by in blocks; memory O((N + M) D) plus a few blocks. All arithmetic is out of
place, so that `differentiable_backward` is the same code under autograd, a checkpoint a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.memory_budget import less_of
from fused_losses.base.numerics import accumulate_dtype, logistic, row_dtype
from fused_losses.primitives.pairs.blocks import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    PIECE_BYTES,
    ScoreBlock,
    block_columns,
    both_sides,
    cuts,
    exact_pairs,
    kept_block,
    kept_cuts,
    run,
    shared_weights,
    through_differences,
    weights_of,
)
from fused_losses.primitives.pairs.inputs import (
    BEST,
    COUNT,
    NEGATIVE,
    POSITIVE,
    VALUE,
    PairInputs,
    PairNeeds,
    sorted_out,
)

LIVE_BLOCKS = 12  # how many blocks are alive at the peak (test_pair_memory.py)
POWER_BLOCKS = 3  # further ones of powers of distances
LIVE_PIECES = 6
VECTOR_BYTES = 200  # of a row or column


def workspace_bytes(n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32") -> int:
    """Peak memory of forward and backward beyond inputs and gradients."""
    size = accumulate_dtype(dtype).itemsize
    return LIVE_BLOCKS * BLOCK_BYTES + 3 * (n + m) * d * size + 200 * (n + m)


def workspace(p: PairInputs, needs: PairNeeds | None, width: int = 0) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward.

    width: of an attention's values.
    """
    (n, d), m, size = p.x.shape, p.y.shape[0], accumulate_dtype(p.x.dtype).itemsize
    wide = min(m, block_columns(n, d, size))
    block = min(n, BLOCK_ROWS) * wide * size
    # near pairs: a flag and 8 bytes each, and their differences
    near = LIVE_PIECES * max(PIECE_BYTES, d * size) + 3 * block if p.apart else 0
    blocks = LIVE_BLOCKS + (POWER_BLOCKS if p.score == "power" else 0)
    # columns are widened a block at a time; their gradient has sums of their own
    columns = m if needs is not None and (needs.y or p.triangle) else wide
    return blocks * block + near + 3 * (n + columns) * (d + width) * size + (n + m) * VECTOR_BYTES


def kept_scores(p: PairInputs, most: int) -> int:
    """How many scores are kept of a room for `most`: of whole blocks."""
    if torch.compiler.is_compiling():
        # sizes may be symbols; what is no whole block stays empty
        return less_of(most, p.x.shape[0] * p.y.shape[0])
    return max((at.stop for *_, at in kept_cuts(p, most) if at is not None), default=0)


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


def nothing(like: Tensor, size: int, reduction: str) -> Tensor:
    """The statistics of no pairs. [4, 2, size]"""
    out = torch.zeros(4, 2, size, dtype=row_dtype(like.device), device=like.device)
    out[BEST] = -torch.inf
    if reduction == "lse":
        out[VALUE] = -torch.inf
    return out


def statistics(
    p: PairInputs, reduction: str, cols: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """rows and columns of `fused_losses.primitives.pairs`, [4, 2, N] and [4, 2, M or 0].

    kept: room for the scores of blocks, which are written there.
    """
    p = both_sides(p)
    both = cols or p.triangle
    sides = [nothing(p.x, p.x.shape[0], reduction)]
    sides.append(nothing(p.x, p.y.shape[0] if both else 0, reduction))
    for rows, columns, at in kept_cuts(p, 0 if kept is None else kept.numel()):
        room = None if kept is None or at is None else kept_block(kept, at, rows)
        add_block(ScoreBlock(p, rows, columns, room), sides, reduction, both)
    if p.triangle:
        return _merge(sides[0], sides[1], reduction), sides[1][..., :0].clone()
    return sides[0], sides[1]


def add_block(block: ScoreBlock, sides: Sequence[Tensor], reduction: str, both: bool) -> None:
    """A block's statistics, merged into those of rows and (both) columns, [4, 2, N], [4, 2, M]."""
    for dim, at, window in block.sides(both):
        out = sides[1 - dim]
        for kind in block.kinds():
            mask = block.members(kind, window)
            new = _reduce(block.term(kind)[0], mask, dim, reduction, out.dtype)
            out[:, kind, at] = _merge(out[:, kind, at], new, reduction)


# ---- gradients ----------------------------------------------------------------------------------


def _to_score(
    z: Tensor, mask: Tensor, grad: Tensor, stats: Tensor, dim: int, reduction: str
) -> Tensor:
    """dL/dz of one class through one side's value and total; off the mask anything finite."""
    spread = (lambda v: v[:, None]) if dim == 1 else (lambda v: v[None, :])
    narrow = z.dtype
    g_value, g_total = grad[0], grad[1]
    if reduction != "lse":
        slope = logistic(z) if reduction == "softplus" else (z > 0).to(narrow)
        return spread(g_value.to(narrow)) * slope + spread(g_total.to(narrow))
    lse, count = stats[VALUE], stats[COUNT].detach()
    lse = torch.where(lse == -torch.inf, 0, lse)
    # a NaN off the mask would be one in the derivative
    q = weights_of(z.masked_fill(~mask, -torch.inf), spread(lse.to(narrow)))
    # g q + t, in a form whose large parts cancel in float64: near zero loss g -> -t count
    share = (-g_total * count).to(narrow)
    rest = (g_value + g_total * count).to(narrow)
    return spread(rest) * q + spread(share) * (q - spread(1 / count.clamp_min(1).to(narrow)))


def _block_gradient(
    p: PairInputs,
    rows: slice,
    cols: slice,
    known: Tensor | None,
    grads: tuple,
    stats: tuple,
    reduction: str,
    both: bool,
) -> tuple[Tensor, ...]:
    """G y, G^T x (before the scale), sum G product, row sums and column sums of G = dL/du."""
    block = ScoreBlock(p, rows, cols, known, known is not None)
    return _products(block, to_scores(block, grads, stats, reduction, both))


def to_scores(
    block: ScoreBlock, grads: Sequence[Tensor], stats: Sequence[Tensor], reduction: str, both: bool
) -> Tensor:
    """dL/ds of a block through the statistics of rows and (both) columns."""
    g = torch.zeros_like(block.score)
    for dim, at, window in block.sides(both):
        for kind in block.kinds():
            grad, known = grads[1 - dim][:, kind, at], stats[1 - dim][:, kind, at]
            (z, slope), mask = block.term(kind), block.members(kind, window)
            if block.exact is not None:
                # an infinite score has no slope
                mask = mask & ~block.exact
            part = _to_score(z, mask, grad, known, dim, reduction) * slope
            g = g + torch.where(mask, part, 0)
    return g


def _products(block: ScoreBlock, g: Tensor) -> tuple[Tensor, ...]:
    if block.slope is not None:
        g = g * block.slope
    wide = block.p.scale.dtype
    dscale = (g * block.product).sum(dtype=wide)
    if block.inner is not None:
        g = g * block.inner
    if not block.p.apart:
        return g @ block.y, g.T @ block.x, dscale, g.sum(1), g.sum(0)
    # of u / 2 scale, which is sum_j G (y_j - x_i)
    far = g.masked_fill(block.near, 0)
    of_rows, of_columns = far.sum(1), far.sum(0)
    gx = far @ block.y - of_rows[:, None] * block.x
    gy = far.T @ block.x - of_columns[:, None] * block.y
    for i, j in block.near_pairs():
        more = run(gx.requires_grad, through_differences, block.x, block.y, g, i, j)
        gx, gy = gx + more[0], gy + more[1]
    return gx, gy, dscale, of_rows, of_columns


def _collect(
    p: PairInputs, needs: PairNeeds, parts: Iterator[tuple[slice, slice, tuple[Tensor, ...]]]
) -> tuple[Tensor | None, ...]:
    """Sums of the blocks' products, as gradients of x, y, scale and the biases."""
    dtype = accumulate_dtype(p.x.dtype)
    (n, d), m = p.x.shape, p.y.shape[0]
    # a bank without a gradient has no sums of one
    of_y = needs.y or p.triangle
    dx, dy = p.x.new_zeros((n, d), dtype=dtype), p.y.new_zeros((m if of_y else 0, d), dtype=dtype)
    dx_bias, dy_bias = dx.new_zeros(n), dx.new_zeros(m)
    dscale = torch.zeros_like(p.scale)
    for rows, cols, (gx, gy, gs, gr, gc) in parts:
        dx[rows] += gx
        if of_y:
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
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, scale, x_bias and y_bias, each None where it is not needed.

    kept: what the forward kept of its scores.
    """
    p = both_sides(p)
    grads = (grad_rows, grad_rows if p.triangle else grad_columns)
    stats = (rows, rows if p.triangle else columns)
    both = cols or p.triangle

    def parts() -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
        for i, j, at in kept_cuts(p, 0 if kept is None else kept.numel()):
            known = None if kept is None or at is None else kept_block(kept, at, i)
            given = p, i, j, known, grads, stats, reduction, both
            yield i, j, run(differentiable, _block_gradient, *given)

    return _collect(p, needs, parts())


# ---- attention ----------------------------------------------------------------------------------


def attention(values: Tensor, p: PairInputs, positives: bool) -> tuple[Tensor, Tensor]:
    """out [N, Dv] and lse [N] of `fused_losses.primitives.pairs.op.pair_attention`."""
    dtype = accumulate_dtype(p.x.dtype)
    n, kind = p.x.shape[0], POSITIVE if positives else NEGATIVE
    out = values.new_zeros((n, values.shape[1]), dtype=dtype)
    best, mass = out.new_full((n,), -torch.inf), out.new_zeros(n)
    for rows, cols in cuts(p):
        block = ScoreBlock(p, rows, cols)
        _, _, window = next(block.sides(False))
        z = block.term(kind)[0].masked_fill(~block.members(kind, window), -torch.inf)
        top = torch.maximum(best[rows], z.amax(1))
        safe = torch.where(top == -torch.inf, 0, top)
        weights = (z - safe[:, None]).exp()
        shrink = (best[rows] - safe).exp()
        if p.score == "power":
            # infinite scores share all of their row
            weights = torch.where(z == safe[:, None], 1, weights)
            shrink = torch.where(best[rows] == safe, 1, shrink)
        out[rows] = out[rows] * shrink[:, None] + weights @ values[cols].to(dtype)
        mass[rows] = mass[rows] * shrink + weights.sum(1)
        best[rows] = top
    wide = nothing(p.x, 0, "lse").dtype
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
    exact: Tensor | None,
) -> tuple[Tensor, ...]:
    block = ScoreBlock(p, rows, cols)
    _, _, window = next(block.sides(False))
    z, slope = block.term(kind)
    v = values[cols].to(z.dtype)
    z = z.masked_fill(~block.members(kind, window), -torch.inf)
    exact = None if exact is None else exact[rows]
    weights = shared_weights(z, lse[rows, None].to(z.dtype), exact)
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
    exact = exact_pairs(p, kind, lse)
    dvalues = out.new_zeros(values.shape if need_values else 0)

    def parts() -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
        for i, j in cuts(p):
            given = grad_out, shift, lse, values, kind, exact
            found = run(differentiable, _block_attention, p, i, j, *given)
            if need_values:
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
        # kept scores know no derivatives
        grad_rows, grad_columns, rows, columns, _ = before
        found = statistics_backward(
            grad_rows, grad_columns, rows, columns, p, reduction, cols, PairNeeds(*needs), True
        )
    else:
        positives, need_values, *needs = after
        grad_out, grad_lse, out, lse, values = before
        given = positives, need_values, PairNeeds(*needs)
        found = attention_backward(grad_out, grad_lse, out, lse, values, p, *given, True)
    return tuple(p.x.new_empty(0) if g is None else g for g in found)
