"""MaxSim on the CUDA C++ kernels, as `fused_losses.primitives.maxsim` defines it.

Forward: a library product makes a tile of query tokens against document tokens that stays in L2;
kernels take each document's maxima from it and sum them over a query. Backward: each owner of a
gradient gathers it. Memory beyond the outputs: the tile, and 12 bytes a query token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu.library_products import low_dtype, product, scores_precision
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds

TILE_BYTES = 16 << 20  # with its operands it stays in L2 from sm_80 on
ROW_BLOCK = 4096
WIDTH = 64  # tiles are a multiple of it wide
HOST_ROWS, HOST_BYTES = 160, 64 << 10  # in the host execution: several ragged tiles
TILE_TOKENS = 32  # document tokens that a block owns in the backward: csrc/cuda/maxsim.cu


def workspace(p: MaxsimInputs, needs: MaxsimNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward."""
    (tokens, d), found = p.queries.shape, p.documents.shape[0]
    count = p.document_offsets.shape[0] - 1
    rows = 4 * (tokens + found) * d + 64 * (tokens + found + count)
    return rows + (max(TILE_BYTES, 4 * min(tokens, ROW_BLOCK) * WIDTH) if needs is None else 0)


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """scores [Q, B] and index [query tokens, B] of `fused_losses.primitives.maxsim`."""
    queries, documents, query_offsets, document_offsets, precision = inputs
    tokens, found = queries.shape[0], documents.shape[0]
    query_count, count = query_offsets.shape[0] - 1, document_offsets.shape[0] - 1
    new: dict[str, Any] = dict(dtype=torch.float32, device=queries.device)
    scores = torch.zeros((query_count, count), **new)
    index = torch.full((tokens, count), -1, dtype=torch.int32, device=queries.device)
    if tokens == 0 or found == 0:
        return scores, index
    precision = scores_precision(precision, gradient=False)
    low = low_dtype(queries.dtype, precision)
    x, y = queries.to(low), documents.to(low)
    most, tall = (HOST_BYTES, HOST_ROWS) if cuda_launch.on_host() else (TILE_BYTES, ROW_BLOCK)
    height = min(tokens, tall)
    width = min(max(1, most // (4 * height * WIDTH)), -(-found // WIDTH)) * WIDTH
    tile = torch.empty((height, width), **new)
    open_best = torch.empty(tokens, **new)
    # which query and which document a tile begins with: known on the device alone
    tops, firsts = range(0, tokens, height), range(0, found, width)
    first_queries, first_documents = (
        torch.searchsorted(
            offsets[1:], torch.arange(0, size, step, device=queries.device), right=True
        )
        for offsets, size, step in (
            (query_offsets, tokens, height),
            (document_offsets, found, width),
        )
    )
    for k, first in enumerate(firsts):
        end = min(first + width, found)
        for r, top in enumerate(tops):
            stop = min(top + height, tokens)
            product(x[top:stop], y[first:end].T, precision, out=tile[: stop - top, : end - first])
            cuda_launch.launch(
                "maxsim_maxima",
                tile=tile,
                stride=tile.stride(0),
                query_offsets=query_offsets,
                document_offsets=document_offsets,
                first_query=first_queries[r:],
                first_document=first_documents[k:],
                open_best=open_best,
                index=index,
                scores=scores,
                queries=query_count,
                documents=count,
                first_row=top,
                row_end=stop,
                first_column=first,
                column_end=end,
            )
    return scores, index


def backward(
    grad: Tensor, index: Tensor, inputs: MaxsimInputs, needs: MaxsimNeeds
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens: query tokens gather what they chose, document tokens who chose."""
    queries, documents, query_offsets, document_offsets, _ = inputs
    tokens, count = queries.shape[0], index.shape[1]
    dqueries = queries.new_empty(queries.shape if needs.queries else 0)
    ddocuments = documents.new_empty(documents.shape if needs.documents else 0)
    # no document, or only empty ones: no gradient either
    if min(tokens, count, queries.shape[1], documents.shape[0]) == 0:
        return dqueries.zero_(), ddocuments.zero_()
    places = torch.arange(tokens, device=queries.device)
    # as many tiles as there can be: how many there are, the device alone knows
    ends = ((document_offsets.diff() + TILE_TOKENS - 1) // TILE_TOKENS).cumsum(0)
    tiles = -(-documents.shape[0] // TILE_TOKENS) + count
    tile_documents = torch.searchsorted(
        ends, torch.arange(tiles, device=queries.device), right=True
    )
    shared = dict(
        grad=grad.to(torch.float32),
        index=index,
        owners=torch.searchsorted(query_offsets[1:], places, right=True),
        offsets=document_offsets,
        tile_documents=tile_documents,
        tile_ends=ends,
        tiles=tiles,
        query_tokens=tokens,
        documents=count,
        d=queries.shape[1],
        type=cuda_launch.ELEMENTS[queries.dtype],
    )
    if needs.queries:
        rows = _by_rows(documents)
        cuda_launch.launch(
            "maxsim_query_gradients", tokens=rows, stride=rows.stride(0), out=dqueries, **shared
        )
    if needs.documents:
        rows = _by_rows(queries)
        cuda_launch.launch(
            "maxsim_document_gradients",
            tokens=rows,
            stride=rows.stride(0),
            out=ddocuments,
            **shared,
        )
    return dqueries, ddocuments


def _by_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
