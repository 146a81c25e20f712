"""`distance_matrix` in pure PyTorch, a block of pairs at a time: any device, float64 too.

The kinds made of products take blocks of |x|^2 + |y|^2 - 2<x, y>, of rows moved by y's mean, and
recompute from x - y the pairs that are near: d^2 < (|x|^2 + |y|^2) / 16. The others take
[rows, columns, D] blocks of x - y. Backward recomputes those blocks; memory beyond inputs, result
and their gradients O((N + M) D) plus a few blocks, where every pair is near too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype

BLOCK_BYTES = 4 << 20  # of products, or of terms [rows, columns, D], in a block
BLOCK_ROWS = 512
# how many such are alive at the peak, mostly of backward (tests/test_distances.py)
LIVE_BLOCKS = {
    "dot": 1,
    "sqeuclidean": 4,
    "euclidean": 4,
    "cityblock": 6,
    "minkowski": 8,
    "chebyshev": 6,
    "canberra": 12,
    "braycurtis": 10,
    "jensenshannon": 9,
    "kl": 7,
    "hamming": 3,
    "jaccard": 3,
    "scaled": 9,
}
NEAR = 1 / 16

Slopes = tuple[Tensor, Tensor, Tensor | None]


def extra_bytes(n: int, m: int, d: int, dtype: torch.dtype, kind: str) -> int:
    """Peak memory of forward and backward beyond inputs, result and their gradients."""
    size = 8 if dtype == torch.float64 else 4
    # a block has one pair at least
    block = max(BLOCK_BYTES, d * size)
    return LIVE_BLOCKS[kind] * block + 4 * (n + m) * (d + 1) * size


def forward(x: Tensor, y: Tensor, w: Tensor | None, kind: str, p: float, precision: str) -> Tensor:
    """out [N, M] of `fused_losses.distance_matrix`."""
    out = x.new_empty((x.shape[0], y.shape[0]), dtype=accumulate_dtype(x.dtype))
    if kind == "dot":
        x, y = x.to(out.dtype), y.to(out.dtype)
        return torch.mm(x, y.T, out=out)
    if kind in ("sqeuclidean", "euclidean"):
        s = _sides(x, y)
        for rows, cols in _blocks(x.shape[0], y.shape[0], out.element_size()):
            out[rows, cols] = _squared(s, rows, cols)
        return out.sqrt_() if kind == "euclidean" else out
    one = KINDS[kind]
    x, y, w = _wide(x, y, w)
    for rows, cols in _blocks(x.shape[0], y.shape[0], x.shape[1] * out.element_size()):
        out[rows, cols] = one.value(x[rows, None], y[cols], _of_columns(kind, w, cols), p)
    return out


def backward(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor | None,
    kind: str,
    p: float,
    precision: str,
    need_x: bool,
    need_y: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy, dw; what is not needed is empty."""
    like = ((x, need_x), (y, need_y), (w, need_w))
    dx, dy, dw = (
        t.new_zeros(t.shape, dtype=grad.dtype) if need and t is not None else None
        for t, need in like
    )
    if kind == "dot":
        dx = grad @ y.to(grad.dtype) if need_x else None
        dy = grad.T @ x.to(grad.dtype) if need_y else None
    elif kind in ("sqeuclidean", "euclidean"):
        _through_products(_sides(x, y), grad, out, kind, dx, dy)
    else:
        _through_terms(grad, out, x, y, w, kind, p, dx, dy, dw)
    return tuple(
        x.new_empty(0) if g is None else g.to(t.dtype)
        for g, (t, _) in zip((dx, dy, dw), like, strict=True)
    )


def _blocks(n: int, m: int, pair_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of pairs of at most BLOCK_BYTES, one pair at least."""
    pairs = max(1, BLOCK_BYTES // max(pair_bytes, 1))
    wide = min(max(m, 1), pairs)
    tall = min(max(1, pairs // wide), BLOCK_ROWS)
    for i in range(0, n, tall):
        for j in range(0, m, wide):
            yield slice(i, min(i + tall, n)), slice(j, min(j + wide, m))


# ---- kinds made of products ---------------------------------------------------------------------


class _Sides(NamedTuple):
    """Rows as they came, widened, and moved by y's mean with their squared norms."""

    x: Tensor
    y: Tensor
    x_moved: Tensor
    y_moved: Tensor
    x_norms: Tensor  # [N]
    y_norms: Tensor  # [M]


def _sides(x: Tensor, y: Tensor) -> _Sides:
    dtype = accumulate_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    mean = _mean(y)
    moved = x - mean, y - mean
    return _Sides(x, y, *moved, *(t.square().sum(dim=1) for t in moved))


def _mean(y: Tensor) -> Tensor:
    """Over the rows, [D]; a row with NaN or inf must not reach the others."""
    return (y.sum(dim=0) / max(y.shape[0], 1)).nan_to_num(0, 0, 0)


def _norms(s: _Sides, rows: slice, cols: slice) -> Tensor:
    return s.x_norms[rows, None] + s.y_norms[cols]


def _squared(s: _Sides, rows: slice, cols: slice) -> Tensor:
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


def _near(s: _Sides, out: Tensor, kind: str, rows: slice, cols: slice) -> Tensor:
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
    s: _Sides, grad: Tensor, out: Tensor, kind: str, dx: Tensor | None, dy: Tensor | None
) -> None:
    for rows, cols in _blocks(*out.shape, out.element_size()):
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
    mean = _mean(s.y)
    x_moved, y_moved = x - mean, y - mean
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
    return w[cols] if kind == "scaled" else w


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
    slopes = KINDS[kind].slopes
    x, y, w = _wide(x, y, w)
    for rows, cols in _blocks(*out.shape, x.shape[1] * out.element_size()):
        g, of = grad[rows, cols, None], out[rows, cols, None]
        to_x, to_y, to_w = slopes(x[rows, None], y[cols], _of_columns(kind, w, cols), p, of)
        if dx is not None:
            dx[rows] += (g * to_x).sum(1)
        if dy is not None:
            dy[cols] += (g * to_y).sum(0)
        if dw is not None:
            if kind == "scaled":
                dw[cols] += (g * to_w).sum(0)
            else:
                dw += (g * to_w).sum((0, 1))


class _Kind(NamedTuple):
    """x [rows, 1, D], y [columns, D], w [D] or [columns, D], out [rows, columns, 1].

    value(x, y, w, p) is the block's distances [rows, columns]; slopes(x, y, w, p, out) their
    derivatives by x_ik, y_jk and w_k, [rows, columns, D] each.
    """

    value: Callable[..., Tensor]
    slopes: Callable[..., Slopes] | None = None


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, 0/0 = 0."""
    return torch.where((top == 0) & (bottom == 0), 0, top / bottom)


def _over(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, 0 where bottom is."""
    zero = bottom == 0
    return torch.where(zero, 0, top / torch.where(zero, 1, bottom))


def _cityblock(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    return (x - y).abs_().sum(dim=2)


def _cityblock_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> Slopes:
    sign = _sign(x - y)
    return sign, -sign, None


def _sign(v: Tensor) -> Tensor:
    """torch.sign, with NaN for NaN."""
    return torch.where(v.isnan(), v, v.sign())


def _minkowski(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    apart = (x - y).abs_()
    # as shares of the largest, whose powers stay in range
    top = apart.amax(dim=2, keepdim=True)
    found = apart.div_(torch.where(top == 0, 1, top)).pow_(p).sum(dim=2).pow_(1 / p)
    top = top.squeeze(2)
    return torch.where(top.isinf(), top, found.mul_(top))


def _minkowski_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> Slopes:
    apart = x - y
    # (|x - y| / out)^(p - 1): no power of a small number alone
    share = _over(apart.abs(), out)
    slope = torch.where(share == 0, 0, share ** (p - 1)) * _sign(apart)
    return slope, -slope, None


def _chebyshev(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    return (x - y).abs_().amax(dim=2)


def _chebyshev_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> Slopes:
    apart = x - y
    # argmax takes the first of equals, and a NaN before all
    first = apart.abs().argmax(dim=2, keepdim=True)
    places = torch.arange(apart.shape[2], device=apart.device)
    slope = torch.where(places == first, _sign(apart), 0)
    return slope, -slope, None


def _canberra(x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    terms = _over((x - y).abs_(), x.abs() + y.abs())
    return (terms if w is None else terms * w).sum(dim=2)


def _canberra_slopes(x: Tensor, y: Tensor, w: Tensor | None, p: float, out: Tensor) -> Slopes:
    sizes, apart = x.abs() + y.abs(), x - y
    terms, sign = _over(apart.abs(), sizes), _sign(apart)
    to_x = _over(sign - terms * x.sign(), sizes)
    to_y = _over(-sign - terms * y.sign(), sizes)
    return (to_x, to_y, terms) if w is None else (to_x * w, to_y * w, terms)


def _braycurtis(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    return _ratio((x - y).abs_().sum(dim=2), (x + y).abs_().sum(dim=2))


def _braycurtis_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> Slopes:
    sums = x + y
    whole = sums.abs().sum(dim=2, keepdim=True)
    sign, toward = _sign(x - y), out * sums.sign()
    return _over(sign - toward, whole), _over(-sign - toward, whole), None


def _jensenshannon(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    """m [(1 + t) log(1 + t) + (1 - t) log(1 - t)] with t = (x - y)/(x + y)."""
    sums = torch.where((x < 0) | (y < 0), torch.nan, x + y)
    t = _over(x - y, sums)
    # 2t atanh t + log(1 - t^2) is the same without its cancellation near 0
    small = t.abs() < 0.5
    inner = torch.where(small, t, 0)
    inner = 2 * inner * inner.atanh() + (-inner.square()).log1p_()
    outer = torch.special.xlog1py(1 + t, t) + torch.special.xlog1py(1 - t, -t)
    return torch.where(small, inner, outer).mul_(sums).sum(dim=2).div_(4).sqrt_()


def _jensenshannon_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> Slopes:
    t = _over(x - y, x + y)
    to_x = torch.where(x == 0, 0, t.log1p())
    to_y = torch.where(y == 0, 0, (-t).log1p())
    return _over(to_x, 4 * out), _over(to_y, 4 * out), None


def _log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """log(x / y) for x, y > 0, accurate where they are near."""
    apart = x - y
    near = apart.abs() < 0.5 * y
    return torch.where(near, (torch.where(near, apart, 0) / y).log1p(), x.log() - y.log())


def _kl(x: Tensor, y: Tensor, w: None, p: float) -> Tensor:
    negative = (x < 0) | (y < 0)
    terms = torch.where(x == 0, 0, x * _log_ratio(x, y))
    terms = torch.where((y == 0) & (x > 0), torch.inf, terms)
    # a NaN of y counts where x = 0 too
    return torch.where(negative | y.isnan(), torch.nan, terms).sum(dim=2)


def _kl_slopes(x: Tensor, y: Tensor, w: None, p: float, out: Tensor) -> Slopes:
    constant = (x == 0) | (y == 0)
    to_x = torch.where(constant, 0, _log_ratio(x, y) + 1)
    to_y = torch.where(constant, 0, -x / y)
    return to_x, to_y, None


def _weighted_count(found: Tensor, w: Tensor | None, dtype: torch.dtype) -> Tensor:
    return found.sum(dim=2, dtype=dtype) if w is None else (found * w).sum(dim=2)


def _unequal(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, torch.dtype]:
    dtype = accumulate_dtype(x.dtype)
    found = _weighted_count(x != y, w, dtype)
    if x.dtype != torch.bool:
        lost = x.isnan().any(dim=2) | y.isnan().any(dim=1)
        found = torch.where(lost, torch.nan, found)
    return found, dtype


def _hamming(x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    found, _ = _unequal(x, y, w)
    return found / (x.shape[2] if w is None else w.sum())


def _jaccard(x: Tensor, y: Tensor, w: Tensor | None, p: float) -> Tensor:
    found, dtype = _unequal(x, y, w)
    return _ratio(found, _weighted_count((x != 0) | (y != 0), w, dtype))


def _scaled(x: Tensor, y: Tensor, w: Tensor, p: float) -> Tensor:
    return (x - y).square_().mul_(w).sum(dim=2).sqrt_()


def _scaled_slopes(x: Tensor, y: Tensor, w: Tensor, p: float, out: Tensor) -> Slopes:
    apart = x - y
    slope = _over(apart * w, out)
    return slope, -slope, _over(apart.square_(), 2 * out)


KINDS = {
    "cityblock": _Kind(_cityblock, _cityblock_slopes),
    "minkowski": _Kind(_minkowski, _minkowski_slopes),
    "chebyshev": _Kind(_chebyshev, _chebyshev_slopes),
    "canberra": _Kind(_canberra, _canberra_slopes),
    "braycurtis": _Kind(_braycurtis, _braycurtis_slopes),
    "jensenshannon": _Kind(_jensenshannon, _jensenshannon_slopes),
    "kl": _Kind(_kl, _kl_slopes),
    "hamming": _Kind(_hamming),
    "jaccard": _Kind(_jaccard),
    "scaled": _Kind(_scaled, _scaled_slopes),
}
