"""`distance_matrix` on the CUDA C++ kernels: every kind, float32, bfloat16, float16 and bool rows.

Sums over coordinates are one kernel of 64 x 64 pairs; of bool rows without weights it runs on words
of 32 coordinates. Their gradients: a block owns 64 rows by 64 coordinates and the other rows go by;
dx and dy are that with the roles swapped. braycurtis and chebyshev want one more number a pair,
which a block of pairs (BLOCK) has at a time.

Kinds made of products: the library multiplies a block of pairs into the output, which stays in L2
for our kernel after it: that makes distances of products and sums near pairs from differences.
Backward: our kernel makes a block of G with zeros for near pairs, dx -= G y is the library's, and
the last kernel adds x sum G and the near pairs. Where every pair is near, for rows far from the
origin, all is summed from differences: right, and several times slower.

Nothing of N x M is stored but the output, and nothing of N x D but gradients in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.backends.cuda.launch import ELEMENTS, launch
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.library_products import ROUNDED, add_product, product
from fused_losses.primitives.distances.inputs import KINDS, PRODUCTS, DistanceInputs, DistanceNeeds

TILE = 64  # rows of a side that a kernel takes at once
# rows of a side in a block of pairs: 16 MiB of float32, which the L2 of sm_80 keeps
BLOCK = {"sm_80": 2048, "sm_86": 2048, "sm_90": 2048, "sm_100": 2048, "interpret": 128}
PARTIAL_BYTES = 32 << 20  # of a gradient's parts, where few rows are split over many blocks
# csrc/cuda/distances/sums.cu numbers the kinds as KINDS does, and these two after them
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


def extra_bytes(n: int, m: int, d: int, dtype: torch.dtype, kind: str) -> int:
    """Peak memory of forward and backward beyond inputs, output and gradients, at most."""
    rows = n + m
    if kind in ("hamming", "jaccard"):
        # of bools words of bits, or with weights a copy in bfloat16
        return 2 * rows * d + 16 * rows if dtype == torch.bool else 4
    block = max(BLOCK.values())
    block = 4 * min(n, block) * min(m, block)
    wide = 0 if dtype == torch.float32 else 4 * rows * d
    if kind in PRODUCTS:
        # G, rows of a block that are widened, norms and sums, near tiles
        return block + wide + 8 * max(BLOCK.values()) * d + 20 * rows + block // 16 + n * m // 1024
    if kind in WITH_PAIRS:
        return block + wide
    return wide + max(PARTIAL_BYTES, 4 * max(n, m) * d)


def workspace(p: DistanceInputs, needs: DistanceNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer."""
    (n, d), m = p.x.shape, p.y.shape[0]
    return extra_bytes(n, m, d, p.x.dtype, p.kind)


def forward(x: Tensor, y: Tensor, w: Tensor | None, kind: str, p: float, precision: str) -> Tensor:
    """out [N, M] float32 of `fused_losses.primitives.distances`."""
    kind = _simplified(kind, p)
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    if min(n, m, d) == 0:
        return torch.zeros((n, m), dtype=torch.float32, device=x.device)
    out = torch.empty((n, m), dtype=torch.float32, device=x.device)
    if x.dtype == torch.bool:
        if w is None:
            words = [_packed(_rows(t)) for t in (x, y)]
            launch(
                "distance_bits",
                x=words[0],
                y=words[1],
                out=out,
                n=n,
                m=m,
                d=d,
                width=words[0].shape[1],
                jaccard=kind == "jaccard",
            )
            return out
        # 0 and 1 are the same in any type
        x, y = x.to(torch.bfloat16), y.to(torch.bfloat16)
    x, y = _rows(x), _rows(y)
    if kind in PRODUCTS:
        _from_products(x, y, out, kind, precision)
    else:
        _sums(KINDS.index(kind), x, y, w, p, out)
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
    kind = _simplified(kind, p)
    need_w = need_w and w is not None
    needs = ((x, need_x), (y, need_y), (w, need_w))
    if min(x.shape[0], y.shape[0], x.shape[1]) == 0:
        return tuple(t.new_zeros(t.shape) if need else x.new_empty(0) for t, need in needs)
    own, other = _rows(x), _rows(y)
    if kind in PRODUCTS:
        dx, dy = _through_products(grad, out, own, other, kind, precision, need_x, need_y)
        dw = None
    elif kind in WITH_PAIRS:
        dx, dy = _through_pairs(grad, out, own, other, kind, need_x, need_y)
        dw = None
    else:
        dx, dy, dw = _through_terms(grad, out, own, other, w, kind, p, need_x, need_y, need_w)
    return tuple(
        x.new_empty(0) if g is None else g.to(t.dtype)
        for g, (t, _) in zip((dx, dy, dw), needs, strict=True)
    )


def _simplified(kind: str, p: float) -> str:
    """Minkowski's p = 1 and 2 have kernels of their own."""
    return {1.0: "cityblock", 2.0: "euclidean"}.get(p, kind) if kind == "minkowski" else kind


def _rows(t: Tensor) -> Tensor:
    """Rows whose elements are neighbours; the rows themselves may be any distance apart."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _blocks(n: int, m: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    size = BLOCK[gpu_device.architecture(device)]
    for i in range(0, n, size):
        for j in range(0, m, size):
            yield slice(i, min(i + size, n)), slice(j, min(j + size, m))


# ---- sums over coordinates ----------------------------------------------------------------------


def _packed(rows: Tensor) -> Tensor:
    """Words of 32 coordinates, int32, a multiple of four a row."""
    width = 4 * ceil_div(rows.shape[1], 128)
    words = torch.empty((rows.shape[0], width), dtype=torch.int32, device=rows.device)
    launch(
        "distance_pack",
        rows=rows,
        words=words,
        stride=rows.stride(0),
        n=rows.shape[0],
        d=rows.shape[1],
        width=width,
    )
    return words


def _sums(kind: int, x: Tensor, y: Tensor, w: Tensor | None, p: float, out: Tensor) -> None:
    """out = the kind's sums: distances, or what a gradient wants of a pair."""
    w = None if w is None else w.contiguous()
    launch(
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


def _through_terms(
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
        dx = _gradient(to_x, x, y, grad, out, p, own_w=own_w, other_w=w if scaled else None)
    if need_y:
        dy = _gradient(to_y, y, x, grad.T, out.T, p, own_w=w if scaled else own_w)
    if need_w and scaled:
        dw = _gradient("scaled_of_w", y, x, grad.T, out.T, p)
    elif need_w:
        dw = _gradient("canberra_share", x, y, grad, out, p).sum(0)
    return dx, dy, dw


def _through_pairs(
    grad: Tensor, out: Tensor, x: Tensor, y: Tensor, kind: str, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of kinds whose gradient wants one more number a pair, a block of pairs at a time."""
    term = TERMS_OF[kind][0]
    dx, dy = (
        torch.zeros(t.shape, dtype=torch.float32, device=t.device) if need else None
        for t, need in ((x, need_x), (y, need_y))
    )
    for rows, cols in _blocks(*out.shape, x.device):
        of, g = out[rows, cols], grad[rows, cols]
        pairs = torch.empty(of.shape, dtype=torch.float32, device=x.device)
        _sums(WITH_PAIRS[kind], x[rows], y[cols], None, 0.0, pairs)
        if need_x:
            _gradient(term, x[rows], y[cols], g, of, pairs=pairs, to=dx[rows])
        if need_y:
            _gradient(term, y[cols], x[rows], g.T, of.T, pairs=pairs.T, to=dy[cols])
    return dx, dy


def _gradient(
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
    launch(
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


# ---- products -----------------------------------------------------------------------------------


def _norms(rows: Tensor, rounded: bool) -> Tensor:
    """|row|^2 in float32, of rows as the products round them. [N]"""
    norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    launch(
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


def _from_products(x: Tensor, y: Tensor, out: Tensor, kind: str, precision: str) -> None:
    # mixed rounds gradients alone
    precision = "fp32" if precision == "mixed" else precision
    if kind == "dot":
        product(x, y.T, precision, out=out)
        return
    rounded = precision == "bf16" and x.dtype == torch.float32
    x_norms, y_norms = _norms(x, rounded), _norms(y, rounded)
    for rows, cols in _blocks(*out.shape, x.device):
        block = out[rows, cols]
        product(x[rows], y[cols].T, precision, out=block)
        launch(
            "distance_products",
            x=x[rows],
            y=y[cols],
            x_norms=x_norms[rows],
            y_norms=y_norms[cols],
            out=block,
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            out_stride=out.stride(0),
            n=block.shape[0],
            m=block.shape[1],
            d=x.shape[1],
            type=ELEMENTS[x.dtype],
            rooted=kind == "euclidean",
        )


def _through_products(
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
    dx, dy = (
        torch.zeros(t.shape, dtype=torch.float32, device=device) if need else None
        for t, need in ((x, need_x), (y, need_y))
    )
    differences = kind != "dot"
    norms = totals = near = None
    if differences:
        norms = _norms(x, False), _norms(y, False)
        totals = tuple(torch.zeros_like(t) for t in norms)
        near = torch.empty((ceil_div(n, TILE), ceil_div(m, TILE)), dtype=torch.int32, device=device)
    for rows, cols in _blocks(n, m, device):
        u, v = x[rows], y[cols]
        if not differences and low == torch.float32:
            g = grad[rows, cols]
        else:
            of = out[rows, cols] if differences else None
            tiles = near[rows.start // TILE :, cols.start // TILE :] if differences else None
            g, sums = _factors(grad[rows, cols], of, norms, rows, cols, tiles, kind, low)
            if differences:
                totals[0][rows] += sums[0]
                totals[1][cols] += sums[1]
        if need_x:
            add_product(dx[rows], g, v.to(low), precision)
        if need_y:
            add_product(dy[cols], g.T, u.to(low), precision)
    if differences:
        term = f"near_{kind}"
        if need_x:
            given = dict(norms=norms, totals=totals[0], near=near, to=dx)
            _gradient(term, x, y, grad, out, **given)
        if need_y:
            given = dict(norms=norms[::-1], totals=totals[1], near=near.T, to=dy)
            _gradient(term, y, x, grad.T, out.T, **given)
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
    launch(
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
    return g, None if out is None else (row_sums.sum(0), column_sums.sum(0))
