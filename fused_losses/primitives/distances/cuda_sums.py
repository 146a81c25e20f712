"""Distances that are sums over coordinates, on the CUDA C++ kernels, and every gradient of sums.

One kernel of 64 x 64 pairs; of bool rows without weights it runs on words of 32 coordinates. The
gradients: a block owns 64 rows by 64 coordinates and the other rows go by; dx and dy are that with
the roles swapped. braycurtis and chebyshev want one more number a pair, which a block of pairs
(BLOCK) has at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.cuda.launch import ELEMENTS
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.primitives.distances.inputs import KINDS

TILE = 64  # rows of a side that a kernel takes at once
# rows of a side in a block of pairs: 16 MiB of float32, which the L2 of sm_80 keeps
BLOCK = {"sm_80": 2048, "sm_86": 2048, "sm_90": 2048, "sm_100": 2048, "interpret": 128}
PARTIAL_BYTES = 32 << 20  # of a gradient's parts, where few rows are split over many blocks
# csrc/cuda/distances.cu numbers the kinds as KINDS does, and these two after them
SUM_OF_SIZES, LARGEST = len(KINDS), len(KINDS) + 1
TERMS = (
    "sign",
    "minkowski",
    "chebyshev",
    "canberra",
    "canberra_share",
    "braycurtis",
    "jensenshannon",
    "kl_of_x",
    "kl_of_y",
    "scaled_of_x",
    "scaled_of_y",
    "scaled_of_w",
    "near_sqeuclidean",
    "near_euclidean",
    "near_pair",
)
# by kind the terms of dx and dy
TERMS_OF = {
    "cityblock": ("sign", "sign"),
    "minkowski": ("minkowski", "minkowski"),
    "chebyshev": ("chebyshev", "chebyshev"),
    "canberra": ("canberra", "canberra"),
    "braycurtis": ("braycurtis", "braycurtis"),
    "jensenshannon": ("jensenshannon", "jensenshannon"),
    "kl": ("kl_of_x", "kl_of_y"),
    "scaled": ("scaled_of_x", "scaled_of_y"),
}
WITH_PAIRS = {"braycurtis": SUM_OF_SIZES, "chebyshev": LARGEST}


def blocks(n: int, m: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    size = BLOCK[gpu_device.architecture(device)]
    for i in range(0, n, size):
        for j in range(0, m, size):
            yield slice(i, min(i + size, n)), slice(j, min(j + size, m))


def zeros(rows: Tensor, need: bool) -> Tensor | None:
    """Where a gradient's sums begin, float32."""
    return torch.zeros(rows.shape, dtype=torch.float32, device=rows.device) if need else None


def bits(rows: Tensor) -> Tensor:
    """Words of 32 coordinates, int32, a multiple of four a row."""
    width = 4 * ceil_div(rows.shape[1], 128)
    words = torch.empty((rows.shape[0], width), dtype=torch.int32, device=rows.device)
    cuda_launch.launch(
        "distance_pack",
        rows=rows,
        words=words,
        stride=rows.stride(0),
        n=rows.shape[0],
        d=rows.shape[1],
        width=width,
    )
    return words


def sums(kind: int, x: Tensor, y: Tensor, w: Tensor | None, p: float, out: Tensor) -> None:
    """out = the kind's sums: distances, or what a gradient wants of a pair."""
    w = None if w is None else w.contiguous()
    cuda_launch.launch(
        "distance_sums",
        x=x,
        y=y,
        w=w,
        total=w.sum() if w is not None and kind == KINDS.index("hamming") else None,
        out=out,
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        w_stride=0 if w is None else w.stride(0),
        out_stride=out.stride(0),
        n=x.shape[0],
        m=y.shape[0],
        d=x.shape[1],
        type=ELEMENTS[x.dtype],
        kind=kind,
        p=p,
    )


def through_terms(
    grad: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    w: Tensor | None,
    kind: str,
    p: float,
    need_x: bool,
    need_y: bool,
    need_w: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    w = None if w is None else w.contiguous()
    scaled = kind == "scaled"
    own_w = w[None] if kind == "canberra" and w is not None else None
    to_x, to_y = TERMS_OF[kind]
    dx = dy = dw = None
    if need_x:
        dx = gradient(to_x, x, y, grad, out, p, own_w=own_w, other_w=w if scaled else None)
    if need_y:
        dy = gradient(to_y, y, x, grad.T, out.T, p, own_w=w if scaled else own_w)
    if need_w and scaled:
        dw = gradient("scaled_of_w", y, x, grad.T, out.T, p)
    elif need_w:
        dw = gradient("canberra_share", x, y, grad, out, p).sum(0)
    return dx, dy, dw


def through_pairs(
    grad: Tensor, out: Tensor, x: Tensor, y: Tensor, kind: str, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of kinds whose gradient wants one more number a pair, a block of pairs at a time."""
    term = TERMS_OF[kind][0]
    dx, dy = zeros(x, need_x), zeros(y, need_y)
    for rows, cols in blocks(out.shape[0], out.shape[1], x.device):
        of, g = out[rows, cols], grad[rows, cols]
        pairs = torch.empty(of.shape, dtype=torch.float32, device=x.device)
        sums(WITH_PAIRS[kind], x[rows], y[cols], None, 0.0, pairs)
        if dx is not None:
            gradient(term, x[rows], y[cols], g, of, pairs=pairs, to=dx[rows])
        if dy is not None:
            gradient(term, y[cols], x[rows], g.T, of.T, pairs=pairs.T, to=dy[cols])
    return dx, dy


def gradient(
    term: str,
    own: Tensor,  # [n, d]
    other: Tensor,  # [m, d]
    grad: Tensor,  # [n, m], of any strides
    out: Tensor,  # [n, m], neighbours along one side
    p: float = 0.0,
    *,
    own_w: Tensor | None = None,  # [n, d] or [1, d]
    other_w: Tensor | None = None,
    pairs: Tensor | None = None,  # [n, m]
    norms: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    totals: Tensor | None = None,  # [n]
    near: Tensor | None = None,  # [tiles of n, tiles of m]
    to: Tensor | None = None,  # added to; with totals: own totals - to
) -> Tensor:
    """The term summed over the other rows, [n, d] float32."""
    n, m, d = own.shape[0], other.shape[0], own.shape[1]
    add, splits = to is not None, 1
    if to is None:
        # few rows are split over as many blocks as fill the GPU; their sums are added at last
        splits = 4 * gpu_device.processors(own.device) // (ceil_div(n, TILE) * ceil_div(d, TILE))
        splits = max(1, min(splits, PARTIAL_BYTES // (4 * n * d), ceil_div(m, TILE)))
    span = ceil_div(ceil_div(m, splits), TILE) * TILE
    splits = ceil_div(m, span)
    if to is None:
        to = torch.empty((splits, n, d), dtype=torch.float32, device=own.device)
    strides = {
        name: (0, 0) if t is None else t.stride()
        for name, t in dict(grad=grad, out=out, pairs=pairs, near=near).items()
    }
    cuda_launch.launch(
        "distance_gradient",
        own=own,
        other=other,
        own_w=own_w,
        other_w=other_w,
        grad=grad,
        out=out,
        pairs=pairs,
        own_norms=norms[0],
        other_norms=norms[1],
        totals=totals,
        near=near,
        to=to,
        own_stride=own.stride(0),
        other_stride=other.stride(0),
        own_w_stride=0 if own_w is None or own_w.shape[0] == 1 else own_w.stride(0),
        other_w_stride=0 if other_w is None else other_w.stride(0),
        **{f"{name}_own": s[0] for name, s in strides.items()},
        **{f"{name}_other": s[1] for name, s in strides.items()},
        n=n,
        m=m,
        d=d,
        span=span,
        type=ELEMENTS[own.dtype],
        term=TERMS.index(term),
        add=add,
        p=p,
    )
    if add:
        return to
    return to[0] if splits == 1 else to.sum(0)
