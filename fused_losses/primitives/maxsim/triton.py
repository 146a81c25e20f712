"""MaxSim on Triton, as `fused_losses.primitives.maxsim` defines it.

Forward: the maxima of every query token for a run of documents (at most BEST_BYTES at a time), then
their sums. Backward: each owner of a gradient adds it up. Memory beyond the outputs: those maxima,
and 8 bytes a query token and a tile of document tokens.

Tiles by (kernel, products) as in `gpu.tiles`. maxima: a token in pieces; maxima_whole: D up to
WHOLE; documents: of ddocuments; `_short`: few query tokens; `_uneven`: rows that are not whole
vectors. No time was measured: the choice is a wide tile that does not spill.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.product import Product
from fused_losses.backends.gpu.products import float16_scale
from fused_losses.backends.gpu.tiles import ALL, Tile, Tiles, by_kernel, same, wide, width
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds

BEST_BYTES = 32 << 20
WHOLE = 128  # of D: what ColBERT and its kin have; a query tile is then read once
SHORT = 64  # query tokens in all

PAIR, LONE = Tile(128, 64, 0, 8, 2), Tile(64, 64, 0, 4, 2)
SUMS = Tile(0, 8, 64, 4, 1)
GATHER = Tile(4, 0, 128, 1, 1)  # of dqueries: small, since what it waits for is memory
GATHER_UNEVEN = Tile(4, 0, 64, 1, 1)  # where the wider one spills 51 bytes on sm_90

# Registers a thread with Triton 3.6.0, half / rounded / tf32 / tf32x3; nothing spills
# (test_gpu_static.py). A thread holds three numbers a pair: product, maximum, place.
TILES = {
    "sm_80": by_kernel(
        # sm_80: 246 / 202 / 246 / 255; sm_90: 160 / 179 / 160 / 172; sm_100: 128 / 138 / 128 / 112
        maxima=wide(Tile(128, 64, 64), Tile(128, 64, 32), Tile(64, 64, 32)),
        maxima_short=wide(Tile(64, 64, 64, 4), Tile(64, 64, 32, 4), Tile(64, 32, 32, 4)),
        # where a wider one spills up to 1 KB on sm_80
        maxima_uneven=same(Tile(64, 32, 32, 4), *ALL),
        # sm_80: 172 / 176 / 176; sm_90: 119 / 168 / 127; sm_100: 109 / 126 / 112; tf32x3 spills
        maxima_whole=dict(half=Tile(128, 64, 0), rounded=PAIR, tf32=PAIR),
        maxima_whole_short=dict(half=Tile(64, 64, 0, 4), rounded=LONE, tf32=LONE),
        # no other products; sm_80: 168 / 253; sm_90: 160 / 148; sm_100: 156 / 128
        documents=dict(half=Tile(64, 64, 128, 4), tf32x3=Tile(32, 64, 64, 4, 2)),
        documents_uneven=same(Tile(32, 64, 64, 4, 2), *ALL),
    ),
}
TILES["sm_90"] = TILES["sm_100"] = TILES["sm_80"]
# sm_86, sm_89 and sm_120, where wider ones spill up to 116 bytes
TILES["sm_86"] = TILES["sm_80"] | by_kernel(
    maxima=same(Tile(64, 32, 32), "tf32x3"),
    maxima_uneven=same(Tile(32, 32, 32, 4), "tf32x3"),
)
TILES["gfx942"] = by_kernel(
    maxima=same(Tile(128, 64, 32, 8, 2), *ALL),
    maxima_short=same(Tile(64, 64, 32, 4, 2), *ALL),
    maxima_uneven=same(Tile(64, 64, 32, 4, 2), *ALL),
    maxima_whole=same(Tile(128, 64, 0, 8, 1), *ALL),
    maxima_whole_short=same(Tile(64, 64, 0, 4, 1), *ALL),
    documents=same(Tile(32, 64, 64, 4, 2), *ALL),
    documents_uneven=same(Tile(32, 64, 64, 4, 2), *ALL),
)
# small and unequal, so that a few dozen tokens make several ragged tiles of each
TILES["interpret"] = by_kernel(
    **{
        f"maxima{kind}": same(Tile(rows, 16, 16), *ALL)
        for kind, rows in (
            ("", 32),
            ("_short", 16),
            ("_uneven", 32),
            ("_whole", 32),
            ("_whole_short", 16),
        )
    },
    documents=same(Tile(16, 32, 32), *ALL),
    documents_uneven=same(Tile(32, 16, 32), *ALL),
)


def _table(p: Product) -> Tiles:
    return TILES[gpu_device.architecture(p.x.device)]


def workspace(p: MaxsimInputs, needs: MaxsimNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (tokens, d), found = p.queries.shape, p.documents.shape[0]
    count = p.document_offsets.shape[0] - 1
    rows = 4 * (tokens + found) * d + 64 * (tokens + found + count)
    rows += 4 * (p.query_offsets.shape[0] - 1) * count  # a gradient of float16 scores, scaled
    return rows + (max(4 * tokens, min(BEST_BYTES, 4 * tokens * count)) if needs is None else 0)


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """scores [Q, B] and index [query tokens, B] of `fused_losses.primitives.maxsim`."""
    queries, documents, query_offsets, document_offsets, precision = inputs
    p = Product.of(queries, documents, precision, gradient=False)
    tokens, count = p.n, document_offsets.shape[0] - 1
    query_count = query_offsets.shape[0] - 1
    new: dict[str, Any] = dict(dtype=torch.float32, device=queries.device)
    index = torch.empty((tokens, count), dtype=torch.int32, device=queries.device)
    if tokens == 0 or count == 0:
        return torch.zeros((query_count, count), **new), index
    scores = torch.empty((query_count, count), **new)
    whole = p.d <= WHOLE and ("maxima_whole", p.products) in _table(p)
    kind = "_whole" * whole + "_short" * (tokens <= SHORT)
    tile = _table(p)["maxima" + (kind if whole or p.aligned(p.d) else "_uneven"), p.products]
    depth = width(p.d) if whole else tile.depth
    row_tiles = ceil_div(tokens, tile.rows)
    most = min(count, max(1, BEST_BYTES // (4 * tokens)))
    best = torch.empty((most, tokens), **new)
    for first in range(0, count, most):
        chunk = min(most, count - first)
        triton_launch.launch(
            kernel("maxsim.triton_kernels.token_maxima"),
            row_tiles * chunk,
            (p.x, p.y, document_offsets, best, index)
            + (p.x.stride(0), p.y.stride(0), tokens, count, first, p.d, row_tiles),
            dict(
                WHOLE=whole,
                BM=tile.rows,
                BN=tile.columns,
                BK=depth,
                EVEN=0 < p.d == depth if whole else p.even(depth),
                BF16=p.bf16,
                DOT=p.dot,
            ),
            tile,
        )
        triton_launch.launch(
            kernel("maxsim.triton_kernels.token_sums"),
            query_count * ceil_div(chunk, SUMS.columns),
            (best, query_offsets, scores, query_count, tokens, count, first, chunk),
            dict(BN=SUMS.columns, BT=SUMS.depth, DOT=p.dot),
            SUMS,
        )
    return scores, index


def backward(
    grad: Tensor, index: Tensor, inputs: MaxsimInputs, needs: MaxsimNeeds
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens: those of queries gather, those of documents multiply."""
    queries, documents, query_offsets, document_offsets, _ = inputs
    p = Product.of(queries, documents, "fp32", gradient=False)
    tokens, count = p.n, document_offsets.shape[0] - 1
    dqueries = queries.new_empty(queries.shape if needs.queries else 0)
    ddocuments = documents.new_empty(documents.shape if needs.documents else 0)
    # no document, or only empty ones: no gradient either
    if min(tokens, count, p.d, documents.shape[0]) == 0:
        return dqueries.zero_(), ddocuments.zero_()
    # which query a token belongs to; repeat_interleave would wait for the GPU
    places = torch.arange(tokens, device=queries.device)
    owners = torch.searchsorted(query_offsets[1:], places, right=True)
    if needs.queries:
        _query_gradients(p, grad, index, owners, document_offsets, dqueries)
    if needs.documents:
        _document_gradients(p, grad, index, owners, document_offsets, ddocuments)
    return dqueries, ddocuments


def _query_gradients(
    p: Product, grad: Tensor, index: Tensor, owners: Tensor, offsets: Tensor, out: Tensor
) -> None:
    tile, count = GATHER if p.aligned(p.d) else GATHER_UNEVEN, index.shape[1]
    depth_tiles = ceil_div(p.d, tile.depth)
    triton_launch.launch(
        kernel("maxsim.triton_kernels.query_gradients"),
        ceil_div(p.n, tile.rows) * depth_tiles,
        (grad, index, owners, p.y, offsets, out)
        + (p.y.stride(0), out.stride(0), p.n, count, p.d, depth_tiles),
        dict(BM=tile.rows, BK=tile.depth),
        tile,
    )


def _document_gradients(
    p: Product, grad: Tensor, index: Tensor, owners: Tensor, offsets: Tensor, out: Tensor
) -> None:
    tile = _table(p)["documents" if p.aligned(p.d) else "documents_uneven", p.products]
    count = index.shape[1]
    unscale = None
    if p.x.dtype == torch.float16:
        scale = float16_scale([grad], None)
        grad, unscale = grad * scale, (1 / scale).reshape(1)
    # as many programs as there can be tiles: how many there are, the GPU alone knows
    ends = ((offsets.diff() + tile.columns - 1) // tile.columns).cumsum(0)
    tiles = ceil_div(p.y.shape[0], tile.columns) + count
    places = torch.arange(tiles, device=p.x.device)
    tile_documents = torch.searchsorted(ends, places, right=True)
    depth_tiles = ceil_div(p.d, tile.depth)
    triton_launch.launch(
        kernel("maxsim.triton_kernels.document_gradients"),
        tiles * depth_tiles,
        (grad, index, owners, p.x, offsets, tile_documents, ends, unscale, out)
        + (p.x.stride(0), out.stride(0), p.n, count, p.d, depth_tiles),
        dict(
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            EVEN=p.even(tile.depth),
            DOT=p.dot,
        ),
        tile,
    )
