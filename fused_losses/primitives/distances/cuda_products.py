"""Distances that are made of products, on a library's and the CUDA C++ kernels.

The library multiplies a block of pairs into the output, which stays in L2 for our kernel after it:
that makes distances of products and sums near pairs from differences. Backward: our kernel makes a
block of G with zeros for near pairs, dx -= G y is the library's, and the last kernel adds x sum G
and the near pairs. Where every pair is near, for rows far from the origin, all is summed from
differences: right, and several times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.cuda.launch import ELEMENTS
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.library_products import ROUNDED, add_product, product
from fused_losses.primitives.distances.cuda_sums import TILE, blocks, gradient, zeros

# of |x|^2 + |y|^2, below which a distance is summed from differences
NEAR = 1 / 16


def squared_norms(rows: Tensor, rounded: bool = False) -> Tensor:
    """|row|^2 in float32, of rows as the products round them. [N]"""
    norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    cuda_launch.launch(
        "distance_norms",
        rows=rows,
        norms=norms,
        stride=rows.stride(0),
        n=rows.shape[0],
        d=rows.shape[1],
        type=ELEMENTS[rows.dtype],
        rounded=rounded,
    )
    return norms


def distances_of_products(
    x: Tensor,  # [n, D]
    y: Tensor,  # [m, D]
    x_norms: Tensor,  # [n] of rows as the products rounded them
    y_norms: Tensor,  # [m]
    out: Tensor,  # [n, m] products, which become distances
    rooted: bool,
    share: float = NEAR,
) -> None:
    """Distances in the place of products; near pairs are summed from differences."""
    cuda_launch.launch(
        "distance_products",
        x=x,
        y=y,
        x_norms=x_norms,
        y_norms=y_norms,
        out=out,
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        out_stride=out.stride(0),
        n=out.shape[0],
        m=out.shape[1],
        d=x.shape[1],
        type=ELEMENTS[x.dtype],
        rooted=rooted,
        share=share,
    )


def from_products(x: Tensor, y: Tensor, out: Tensor, kind: str, precision: str) -> None:
    # mixed rounds gradients alone
    precision = "fp32" if precision == "mixed" else precision
    if kind == "dot":
        product(x, y.T, precision, out=out)
        return
    rounded = precision == "bf16" and x.dtype == torch.float32
    x_norms, y_norms = squared_norms(x, rounded), squared_norms(y, rounded)
    for rows, cols in blocks(out.shape[0], out.shape[1], x.device):
        block = out[rows, cols]
        product(x[rows], y[cols].T, precision, out=block)
        norms = x_norms[rows], y_norms[cols]
        distances_of_products(x[rows], y[cols], *norms, block, kind == "euclidean")


def through_products(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    kind: str,
    precision: str,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = x sum G - G y (dot: G y), of G as `_factors` makes it, and near pairs."""
    n, m, device = *out.shape, x.device
    low = torch.bfloat16 if x.dtype == torch.bfloat16 or precision in ROUNDED else torch.float32
    dx, dy = zeros(x, need_x), zeros(y, need_y)
    differences = kind != "dot"
    norms = totals = near = None
    if differences:
        norms = squared_norms(x), squared_norms(y)
        totals = torch.zeros_like(norms[0]), torch.zeros_like(norms[1])
        near = torch.empty((ceil_div(n, TILE), ceil_div(m, TILE)), dtype=torch.int32, device=device)
    for rows, cols in blocks(n, m, device):
        u, v = x[rows], y[cols]
        if not differences and low == torch.float32:
            g = grad[rows, cols]
        else:
            of = out[rows, cols] if differences else None
            tiles = None if near is None else near[rows.start // TILE :, cols.start // TILE :]
            g, sums = _factors(grad[rows, cols], of, norms, rows, cols, tiles, kind, low)
            if totals is not None and sums is not None:
                totals[0][rows] += sums[0]
                totals[1][cols] += sums[1]
        if dx is not None:
            add_product(dx[rows], g, v.to(low), precision)
        if dy is not None:
            add_product(dy[cols], g.T, u.to(low), precision)
    if norms is not None and totals is not None and near is not None:
        term, turned = f"near_{kind}", (norms[1], norms[0])
        if need_x:
            gradient(term, x, y, grad, out, norms=norms, totals=totals[0], near=near, to=dx)
        if need_y:
            given = grad.T, out.T
            gradient(term, y, x, *given, norms=turned, totals=totals[1], near=near.T, to=dy)
    return dx, dy


def _factors(
    grad: Tensor,  # [n, m], of any strides: a block
    out: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    rows: slice,
    cols: slice,
    near: Tensor | None,  # from the block's first tile on
    kind: str,
    low: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A block of G, with zeros for near pairs, and its sums over columns and over rows."""
    n, m, device = *grad.shape, grad.device
    g = torch.empty((n, m), dtype=low, device=device)
    row_sums = column_sums = None
    if out is not None:
        row_sums = torch.empty((ceil_div(m, TILE), n), dtype=torch.float32, device=device)
        column_sums = torch.empty((ceil_div(n, TILE), m), dtype=torch.float32, device=device)
    cuda_launch.launch(
        "distance_factors",
        grad=grad,
        out=out,
        x_norms=None if norms is None else norms[0][rows],
        y_norms=None if norms is None else norms[1][cols],
        g=g,
        row_sums=row_sums,
        column_sums=column_sums,
        near=near,
        grad_row=grad.stride(0),
        grad_column=grad.stride(1),
        out_row=0 if out is None else out.stride(0),
        near_row=0 if near is None else near.stride(0),
        n=n,
        m=m,
        type=ELEMENTS[low],
        rooted=kind == "euclidean",
    )
    if row_sums is None or column_sums is None:
        return g, None
    return g, (row_sums.sum(0), column_sums.sum(0))
