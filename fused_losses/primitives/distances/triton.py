"""`distance_matrix` on Triton: dot, sqeuclidean and euclidean, float32, bfloat16 and float16 rows.

Forward: one pass of product tiles, which marks the pairs that are near; a second kernel sums those
from differences, in the tiles that have some. Backward: G = grad, 2 grad or grad / out is made in
registers from the tiles of grad and out, which are read once a gradient (and a piece of D); a
second kernel adds the near pairs, from differences. Nothing of N x M is stored but the output.

Where every pair is near, for rows far from the origin, all is summed from differences, on the
float32 units instead of the tensor cores: right, and several times slower. Centered rows are fast.

Tiles by (kernel, products) as in `gpu.tiles`; `_uneven`: rows that are not whole vectors.
No time was measured: the choice is a wide tile that does not spill.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.product import Product
from fused_losses.backends.gpu.tiles import ALL, Tile, by_kernel, pick, same, wide, width
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.distances.inputs import PRODUCTS, DistanceInputs, DistanceNeeds

NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100")
PARTIAL_BYTES = 32 << 20  # of a gradient's parts, where few rows are split over many programs
# of d^2 / (|x|^2 + |y|^2), below which a distance is summed from differences: a product is off by
# 2^-22 / it
NEAR_SHARE = 1 / 16
# likewise, below which a gradient is summed from differences: where products are
# exact but for their sums x_i - y_j loses 4 bits there, where they are rounded 2
NEAR_EXACT, NEAR_ROUNDED = 2.0**-8, 2.0**-4
SQUARES = Tile(16, 0, 128, 4, 1)

# Registers a thread with Triton 3.6.0; nothing spills (test_gpu_static.py).
# Of a gradient: rows that own it, rows summed over, and D at a time (the last, at most)
TILES = {
    # sm_80: 137 to 254; sm_90: 98 to 246; sm_100: 93 to 254; half at 128 x 256 was not tried
    "sm_80": by_kernel(
        distances=wide(Tile(128, 128, 64), Tile(128, 128, 32), Tile(128, 64, 32)),
        distances_uneven=wide(Tile(128, 64, 64), Tile(64, 64, 32), Tile(64, 64, 32)),
        # sm_80: 80 to 255; sm_90: 66 to 238; sm_100: 76 to 192; 64 x 64 spills on sm_80 and sm_90
        gradient=wide(Tile(64, 32, 128), Tile(64, 32, 128), Tile(64, 32, 64)),
        gradient_uneven=wide(Tile(64, 32, 64), Tile(64, 32, 64), Tile(64, 32, 32)),
    ),
    # 68 to 151, gradients 99 to 192
    "gfx942": by_kernel(
        distances=same(Tile(128, 128, 32, 8, 2), *ALL),
        distances_uneven=same(Tile(128, 128, 32, 8, 2), *ALL),
        gradient=same(Tile(64, 64, 64, 8, 2), *ALL),
        gradient_uneven=same(Tile(64, 64, 64, 8, 2), *ALL),
    ),
    # small and unequal, so that a few dozen rows make several ragged tiles of each
    "interpret": by_kernel(
        distances=same(Tile(16, 32, 16), *ALL),
        distances_uneven=same(Tile(32, 16, 16), *ALL),
        gradient=same(Tile(16, 32, 16), *ALL),
        gradient_uneven=same(Tile(32, 16, 32), *ALL),
    ),
}
TILES["sm_90"] = TILES["sm_80"]
TILES["sm_100"] = TILES["sm_80"]
# sm_86, sm_89 and sm_120, where the wider one spills 11 bytes
TILES["sm_86"] = TILES["sm_80"] | by_kernel(gradient=same(Tile(64, 32, 32), "tf32x3"))
NEAR_DEPTH = 32  # of D at a time, of the gradients of near pairs
# a piece of a tile of distances, and how many differences make a slice
NEAR: dict[str, Tile] = dict.fromkeys((*NVIDIA, "gfx942"), Tile(64, 64, 64, 8, 1))
NEAR["interpret"] = Tile(16, 16, 16, 8, 1)


def workspace_bytes(n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32") -> int:
    """Peak memory of forward and backward beyond inputs, output and gradients, at most."""
    sums = max(PARTIAL_BYTES, 4 * max(n, m) * d)
    return sums + 4 * (n + m) + n * m // 32


def workspace(p: DistanceInputs, needs: DistanceNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer."""
    (n, d), m = p.x.shape, p.y.shape[0]
    return workspace_bytes(n, m, d, p.x.dtype, p.precision)


def gradient_product(x: Tensor, y: Tensor, precision: str) -> Product:
    """Of G, which is rounded as the rows are, and the rows of the other side."""
    low = Product.of(x, y, precision, gradient=True).low
    p = replace(Product.of(x, y, precision, gradient=False), low=low)
    if low == torch.bfloat16:
        return replace(p, bf16=True, products="half" if x.dtype == low else "rounded")
    if low == torch.float16:
        # as tf32, which holds a float16: G has no bounds that a float16 could be scaled to
        dot = "tf32" if gpu_device.architecture(x.device) in NVIDIA else p.dot
        return replace(p, products="tf32", dot=dot)
    return p


def _check(kind: str) -> None:
    if kind not in PRODUCTS:
        raise ValueError(f"kind: expected one of {PRODUCTS} on triton, got {kind!r}")


def squares(p: Product, rows: Tensor, bf16: bool) -> Tensor:
    """|row|^2 in float32, of rows rounded as products round them. [N]"""
    out = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    triton_launch.launch(
        kernel("distances.triton_kernels.row_squares"),
        ceil_div(rows.shape[0], SQUARES.rows),
        (rows, out, rows.stride(0), rows.shape[0], p.d),
        dict(BM=SQUARES.rows, BK=SQUARES.depth, EVEN=p.even(SQUARES.depth), BF16=bf16),
        SQUARES,
    )
    return out


def forward(inputs: DistanceInputs) -> Tensor:
    """out [N, M] float32 of `fused_losses.primitives.distances`; w and p belong to other kinds."""
    x, y, _, kind, _, precision = inputs
    _check(kind)
    a = Product.of(x, y, precision, gradient=False)
    n, m = a.n, a.m
    if min(n, m, a.d) == 0:
        return torch.zeros((n, m), dtype=torch.float32, device=x.device)
    out = torch.empty((n, m), dtype=torch.float32, device=x.device)
    norms: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if kind != "dot":
        norms = squares(a, a.x, a.bf16), squares(a, a.y, a.bf16)
    tiles(a, norms, out, kind == "euclidean")
    return out


def tiles(
    a: Product,
    norms: tuple[Tensor, Tensor] | tuple[None, None],  # of `squares`; None: products alone
    out: Tensor,  # [n, m] float32
    root: bool,
    share: float = NEAR_SHARE,
) -> None:
    """Every tile of the distances, and their near pairs from differences."""
    n, m = a.n, a.m
    tile = pick(TILES, a, "distances")
    row_tiles = ceil_div(n, tile.rows)
    count = row_tiles * ceil_div(m, tile.columns)
    near_rows = None
    if norms[0] is not None:
        near_rows = torch.empty((count, tile.rows), dtype=torch.int8, device=out.device)
    sizes = (a.x.stride(0), a.y.stride(0), n, m, a.d, row_tiles)
    triton_launch.launch(
        kernel("distances.triton_kernels.distance_tiles"),
        count,
        (a.x, a.y, *norms, out, near_rows, *sizes),
        dict(
            ROOT=root,
            SHARE=share,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            EVEN=a.even(tile.depth),
            BF16=a.bf16,
            DOT=a.dot,
        ),
        tile,
    )
    if near_rows is not None:
        piece = NEAR[gpu_device.architecture(out.device)]
        down, across = tile.rows // piece.rows, tile.columns // piece.columns
        triton_launch.launch(
            kernel("distances.triton_kernels.near_distances"),
            count * down * across,
            (a.x, a.y, out, near_rows, *sizes),
            dict(
                DOWN=down,
                ACROSS=across,
                ROOT=root,
                BM=piece.rows,
                BN=piece.columns,
                BK=piece.depth,
            ),
            piece,
        )


def backward(
    grad: Tensor, out: Tensor, inputs: DistanceInputs, needs: DistanceNeeds
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y, each empty where it is not needed; that of w always is."""
    x, y, _, kind, _, precision = inputs
    _check(kind)
    a = gradient_product(x, y, precision)
    dx, dy = x.new_empty(0), y.new_empty(0)
    if min(a.n, a.m, a.d) == 0:
        dx, dy = x.new_zeros(x.shape if needs.x else 0), y.new_zeros(y.shape if needs.y else 0)
        return dx, dy, x.new_empty(0)
    of_x = of_y = distances = None
    if kind != "dot":
        of_x, of_y, distances = squares(a, a.x, False), squares(a, a.y, False), out
    if needs.x:
        dx = _gradient(a, a.x, a.y, of_x, of_y, grad, distances, kind, 1)
    if needs.y:
        dy = _gradient(a, a.y, a.x, of_y, of_x, grad, distances, kind, -1)
    return dx, dy, x.new_empty(0)


def _gradient(
    p: Product,
    own: Tensor,
    other: Tensor,
    own_squares: Tensor | None,
    other_squares: Tensor | None,
    grad: Tensor,  # [N, M], of any strides
    distances: Tensor | None,
    kind: str,
    order: int,  # -1: own are the columns
) -> Tensor:
    n, m, d = own.shape[0], other.shape[0], p.d
    # a transpose is the same memory, read by the other strides
    out_strides = (0, 0) if distances is None else distances.stride()
    strides = (*grad.stride()[::order], *out_strides[::order])
    tile = pick(TILES, p, "gradient", (n, m, *(s for s in strides if s != 1)))
    depth = min(tile.depth, width(d))
    depth_tiles, row_tiles = ceil_div(d, depth), ceil_div(n, tile.rows)
    # few rows are split over as many programs as fill the GPU; their sums are added at last
    splits = 2 * gpu_device.processors(own.device) // (depth_tiles * row_tiles)
    splits = min(splits, PARTIAL_BYTES // (4 * n * d), ceil_div(m, tile.columns))
    span = ceil_div(ceil_div(m, max(splits, 1)), tile.columns) * tile.columns
    splits = ceil_div(m, span)
    to = torch.empty((splits, n, d), dtype=torch.float32, device=own.device)
    near_range = None
    if distances is not None:
        near_range = torch.empty((2, splits, row_tiles), dtype=torch.int32, device=own.device)
    exact = own.dtype != torch.float32 or p.products == "tf32x3"
    arguments = (own, other, own_squares, other_squares, grad, distances, to, near_range)
    arguments += (NEAR_EXACT if exact else NEAR_ROUNDED, own.stride(0), other.stride(0), *strides)
    arguments += (n, m, d, span)
    sizes = dict(ROOT=kind == "euclidean", BM=tile.rows, BN=tile.columns)
    triton_launch.launch(
        kernel("distances.triton_kernels.product_gradients"),
        depth_tiles * row_tiles * splits,
        (*arguments, depth_tiles, row_tiles),
        sizes | dict(BK=depth, EVEN=d % depth == 0, BF16=p.bf16, DOT=p.dot),
        tile,
    )
    if distances is not None:
        depth = min(depth, NEAR_DEPTH if d % NEAR_DEPTH == 0 else 16)
        depth_tiles = ceil_div(d, depth)
        triton_launch.launch(
            kernel("distances.triton_kernels.near_gradients"),
            depth_tiles * row_tiles * splits,
            (*arguments, depth_tiles, row_tiles),
            sizes | dict(BK=depth, EVEN=d % depth == 0, INTERPRET=p.dot == "interpret"),
            replace(tile, stages=1),
        )
    return (to[0] if splits == 1 else to.sum(0)).to(own.dtype)
