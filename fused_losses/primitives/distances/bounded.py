"""`distance_matrix` in pure PyTorch, a block of pairs at a time: any device, float64 too.

The kinds made of products take blocks of |x|^2 + |y|^2 - 2<x, y>, of rows moved towards 0 without
a rounding, so that equal distances stay equal, and recompute from x - y the pairs that are near:
d^2 < (|x|^2 + |y|^2) / 16. The others take
[rows, columns, D] blocks of x - y. Backward recomputes those blocks; memory beyond inputs, result
and their gradients O((N + M) D) plus a few blocks, where every pair is near too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype, exactly_centered
from fused_losses.primitives.distances.inputs import FLAT, PRODUCTS, DistanceInputs, DistanceNeeds
from fused_losses.primitives.distances.kinds import FORMULAS

BLOCK_BYTES = 4 << 20  # of products, or of terms [rows, columns, D], in a block
BLOCK_ROWS = 512
# how many such are alive at the peak, mostly of backward (test_distance_ops.py)
LIVE_BLOCKS = {
    "dot": 1,
    "sqeuclidean": 4,
    "euclidean": 4,
    "cityblock": 6,
    "minkowski": 8,
    "chebyshev": 6,
    "canberra": 12,
    "braycurtis": 10,
    "jensenshannon": 11,
    "kl": 8,
    "hamming": 3,
    "jaccard": 3,
    "scaled": 9,
}
AS_MANY_FORWARD = ("jensenshannon", "kl", *FLAT)  # of the others half as many are alive
NEAR = 1 / 16


def workspace_bytes(n: int, m: int, d: int, dtype: torch.dtype, kind: str) -> int:
    """Peak memory of forward and backward beyond inputs, result and their gradients."""
    size = accumulate_dtype(dtype).itemsize
    # a block has one pair at least
    block = max(BLOCK_BYTES, d * size)
    return LIVE_BLOCKS[kind] * block + 4 * (n + m) * (d + 1) * size


def workspace(p: DistanceInputs, needs: DistanceNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (n, d), m, size = p.x.shape, p.y.shape[0], accumulate_dtype(p.x.dtype).itemsize
    if p.kind == "dot":
        # plain products, of rows that may have to be widened
        widened = (n + m) * d * size if p.x.dtype.itemsize == 2 else 0
        return widened if needs is None else 2 * widened + max(n, m) * d * size
    pairs = n * m * (1 if p.kind in PRODUCTS else d)
    block = max(min(BLOCK_BYTES, pairs * size), d * size)
    found = LIVE_BLOCKS[p.kind] * block + 4 * (n + m) * (d + 1) * size
    return found if needs is not None or p.kind in AS_MANY_FORWARD else found // 2


def forward(inputs: DistanceInputs) -> Tensor:
    """out [N, M] of `fused_losses.primitives.distances`."""
    x, y, w, kind, p, _ = inputs
    out = x.new_empty((x.shape[0], y.shape[0]), dtype=accumulate_dtype(x.dtype))
    if kind == "dot":
        x, y = x.to(out.dtype), y.to(out.dtype)
        return torch.mm(x, y.T, out=out)
    if kind in ("sqeuclidean", "euclidean"):
        s = _sides(x, y)
        for rows, cols in _blocks(x.shape[0], y.shape[0], out.element_size()):
            out[rows, cols] = _squared(s, rows, cols)
        return out.sqrt_() if kind == "euclidean" else out
    one = FORMULAS[kind]
    x, y, w = _wide(x, y, w)
    for rows, cols in _blocks(x.shape[0], y.shape[0], x.shape[1] * out.element_size()):
        out[rows, cols] = one.value(x[rows, None], y[cols], _of_columns(kind, w, cols), p)
    return out


def backward(
    grad: Tensor, out: Tensor, inputs: DistanceInputs, needs: DistanceNeeds
) -> tuple[Tensor, ...]:
    """dx, dy, dw; what is not needed is empty."""
    x, y, w, kind, p, _ = inputs
    like = ((x, needs.x), (y, needs.y), (w, needs.w))
    dx, dy, dw = (
        t.new_zeros(t.shape, dtype=grad.dtype) if need and t is not None else None
        for t, need in like
    )
    if kind == "dot":
        dx = grad @ y.to(grad.dtype) if needs.x else None
        dy = grad.T @ x.to(grad.dtype) if needs.y else None
    elif kind in ("sqeuclidean", "euclidean"):
        _through_products(_sides(x, y), grad, out, kind, dx, dy)
    else:
        _through_terms(grad, out, x, y, w, kind, p, dx, dy, dw)
    return tuple(
        x.new_empty(0) if g is None or t is None else g.to(t.dtype)
        for g, (t, _) in zip((dx, dy, dw), like, strict=True)
    )


def tangent(
    dx: Tensor | None, dy: Tensor | None, dw: Tensor | None, out: Tensor, inputs: DistanceInputs
) -> Tensor:
    """What out moves by where the rows and weights do. [N, M]"""
    x, y, w, kind, p, _ = inputs
    dx, dy, dw = (
        None if t is None else torch.zeros_like(t) if d is None else d
        for t, d in ((x, dx), (y, dy), (w, dw))
    )
    assert dx is not None and dy is not None
    (x, y, w), (dx, dy, dw) = _wide(x, y, w), _wide(dx, dy, dw)
    if kind == "dot":
        return dx @ y.T + x @ dy.T
    if kind in PRODUCTS:
        return _to_difference(_products_of_differences(dx, dy, x, y, kind, out), out, kind)
    slopes, found = FORMULAS[kind].slopes, torch.empty_like(out)
    assert slopes is not None
    for rows, cols in _blocks(x.shape[0], y.shape[0], x.shape[1] * out.element_size()):
        given = x[rows, None], y[cols], _of_columns(kind, w, cols), p, out[rows, cols, None]
        to_x, to_y, to_w = slopes(*given)
        moved = (to_x * dx[rows, None] + to_y * dy[cols]).sum(dim=2)
        if to_w is not None and dw is not None:
            moved += (to_w * (dw[cols] if kind == "scaled" else dw)).sum(dim=2)
        found[rows, cols] = moved
    return found


def _blocks(n: int, m: int, pair_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of pairs of at most BLOCK_BYTES, one pair at least."""
    pairs = max(1, BLOCK_BYTES // max(pair_bytes, 1))
    wide = min(max(m, 1), pairs)
    tall = min(max(1, pairs // wide), BLOCK_ROWS)
    for rows in runs(n, tall):
        for cols in runs(m, wide):
            yield rows, cols


# ---- kinds made of products ---------------------------------------------------------------------


class _MovedRows(NamedTuple):
    """Rows as they came, widened, and moved by `exact_center` with their squared norms."""

    x: Tensor
    y: Tensor
    x_moved: Tensor
    y_moved: Tensor
    x_norms: Tensor  # [N]
    y_norms: Tensor  # [M]


def _sides(x: Tensor, y: Tensor) -> _MovedRows:
    dtype = accumulate_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    moved = exactly_centered(x, y)
    return _MovedRows(x, y, *moved, *(t.square().sum(dim=1) for t in moved))


def _norms(s: _MovedRows, rows: slice, cols: slice) -> Tensor:
    return s.x_norms[rows, None] + s.y_norms[cols]


def _squared(s: _MovedRows, rows: slice, cols: slice) -> Tensor:
    """|x - y|^2 of a block."""
    norms = _norms(s, rows, cols)
    squared = torch.addmm(norms, s.x_moved[rows], s.y_moved[cols].T, alpha=-2)
    # `not >=`: NaN and what has overflowed as well
    near = ~(squared >= norms.mul_(NEAR))
    for i, j in _listed(near, s.x):
        squared[i, j] = (s.x[rows][i] - s.y[cols][j]).square().sum(dim=1)
    return squared


def _listed(pairs: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the pairs that are True, so many that [pairs, D] is a block."""
    i, j = pairs.nonzero(as_tuple=True)
    step = max(1, BLOCK_BYTES // max(x.shape[1] * x.element_size(), 1))
    for start in range(0, len(i), step):
        yield i[start : start + step], j[start : start + step]


def _near(s: _MovedRows, out: Tensor, kind: str, rows: slice, cols: slice) -> Tensor:
    """The pairs whose gradient must not be taken from products."""
    squared = out[rows, cols] if kind == "sqeuclidean" else out[rows, cols].square()
    return ~(squared >= _norms(s, rows, cols).mul_(NEAR))


def _to_difference(grad: Tensor, out: Tensor, kind: str) -> Tensor:
    """G with dx_i = sum_j G_ij (x_i - y_j)."""
    if kind == "sqeuclidean":
        return 2 * grad
    zero = out == 0
    return torch.where(zero, 0, grad / torch.where(zero, 1, out))


def _through_products(
    s: _MovedRows, grad: Tensor, out: Tensor, kind: str, dx: Tensor | None, dy: Tensor | None
) -> None:
    for rows, cols in _blocks(out.shape[0], out.shape[1], out.element_size()):
        g = _to_difference(grad[rows, cols], out[rows, cols], kind)
        near = _near(s, out, kind, rows, cols)
        far = g.masked_fill(near, 0)
        if dx is not None:
            dx[rows] += far.sum(1)[:, None] * s.x_moved[rows] - far @ s.y_moved[cols]
        if dy is not None:
            dy[cols] += far.sum(0)[:, None] * s.y_moved[cols] - far.T @ s.x_moved[rows]
        for i, j in _listed(near, s.x):
            each = g[i, j, None] * (s.x[rows][i] - s.y[cols][j])
            if dx is not None:
                dx[rows].index_add_(0, i, each)
            if dy is not None:
                dy[cols].index_add_(0, j, each, alpha=-1)


def second(
    ddx: Tensor | None,  # [N, D], None: dx was not asked for
    ddy: Tensor | None,  # [M, D]
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of grad, out, x, y through `backward`, of operations that autograd can follow.

    A few [N, M] matrices; out is a variable of its own, whose gradient autograd leads on.
    """
    dtype = grad.dtype
    u = torch.zeros_like(x, dtype=dtype) if ddx is None else ddx.to(dtype)
    v = torch.zeros_like(y, dtype=dtype) if ddy is None else ddy.to(dtype)
    narrow, x, y = x.dtype, x.to(dtype), y.to(dtype)
    if kind == "dot":
        # dx = G y, dy = G^T x
        to_grad = u @ y.T + x @ v.T
        return to_grad, None, (grad @ v).to(narrow), (grad.T @ u).to(narrow)
    # dx_i = sum_j G_ij (x_i - y_j), dy_j = sum_i G_ij (y_j - x_i)
    g = _to_difference(grad, out, kind)
    to_x = g.sum(1)[:, None] * u - g @ v
    to_y = g.sum(0)[:, None] * v - g.T @ u
    to_g = _products_of_differences(u, v, x, y, kind, out)
    to_grad = _to_difference(to_g, out, kind)
    to_out = None if kind == "sqeuclidean" else -to_grad * g
    return to_grad, to_out, to_x.to(narrow), to_y.to(narrow)


def _products_of_differences(
    u: Tensor, v: Tensor, x: Tensor, y: Tensor, kind: str, out: Tensor
) -> Tensor:
    """<u_i - v_j, x_i - y_j>, [N, M], near pairs from the differences."""
    s = _sides(x.detach(), y.detach())
    x_moved, y_moved = exactly_centered(x, y)
    products = (u * x_moved).sum(1)[:, None] + (v * y_moved).sum(1)
    products = products - u @ y_moved.T - x_moved @ v.T
    everything = slice(None)
    for i, j in _listed(_near(s, out.detach(), kind, everything, everything), s.x):
        each = ((u[i] - v[j]) * (x[i] - y[j])).sum(1)
        products = products.index_put((i, j), each)
    return products


# ---- kinds made of terms ------------------------------------------------------------------------


def _wide(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = accumulate_dtype(x.dtype)
    if x.dtype != torch.bool:
        x, y = x.to(dtype), y.to(dtype)
    return x, y, None if w is None else w.to(dtype)


def _of_columns(kind: str, w: Tensor | None, cols: slice) -> Tensor | None:
    """The weights of a block: of its columns, or of all coordinates."""
    return w[cols] if kind == "scaled" and w is not None else w


def _through_terms(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor | None,
    kind: str,
    p: float,
    dx: Tensor | None,
    dy: Tensor | None,
    dw: Tensor | None,
) -> None:
    slopes = FORMULAS[kind].slopes
    x, y, w = _wide(x, y, w)
    assert slopes is not None
    for rows, cols in _blocks(out.shape[0], out.shape[1], x.shape[1] * out.element_size()):
        g, of = grad[rows, cols, None], out[rows, cols, None]
        to_x, to_y, to_w = slopes(x[rows, None], y[cols], _of_columns(kind, w, cols), p, of)
        if dx is not None:
            dx[rows] += (g * to_x).sum(1)
        if dy is not None:
            dy[cols] += (g * to_y).sum(0)
        if dw is not None and to_w is not None:
            if kind == "scaled":
                dw[cols] += (g * to_w).sum(0)
            else:
                dw += (g * to_w).sum((0, 1))
