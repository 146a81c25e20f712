"""MaxSim in pure PyTorch, a run of documents at a time: any device, float64 too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds

BLOCK_BYTES = 4 << 20  # of products alive at once
ROW_BYTES = 64  # of vectors of a token
LIVE_BLOCKS = 5  # how many such at the peak


def workspace(p: MaxsimInputs, needs: MaxsimNeeds | None) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward.

    Documents are taken to be of one length.
    """
    (tokens, d), found = p.queries.shape, p.documents.shape[0]
    size = accumulate_dtype(p.queries.dtype).itemsize
    around = 4 * tokens * d * size + ROW_BYTES * tokens
    if p.queries.dtype.itemsize == 2:
        around += 2 * (tokens + found) * d * size
    if needs is not None:
        return around
    longest = -(-found // max(1, p.document_offsets.shape[0] - 1))
    rows = min(tokens, BLOCK_BYTES // (256 * size))
    block = max(min(BLOCK_BYTES, tokens * found * size), rows * longest * size)
    return LIVE_BLOCKS * block + around


def _documents(offsets: Tensor, tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of documents [first, last) whose products fit in a block, one document at least."""
    ends = offsets.tolist()
    most = max(1, BLOCK_BYTES // (max(tokens, 1) * size))
    first = 0
    while first < len(ends) - 1:
        last = first + 1
        longest = ends[last] - ends[first]
        # padded to the longest of the run
        while last < len(ends) - 1:
            longest = max(longest, ends[last + 1] - ends[last])
            if longest * (last + 1 - first) > most:
                break
            last += 1
        yield first, last
        first = last


def _owners(offsets: Tensor) -> Tensor:
    """Which text each token belongs to."""
    return torch.repeat_interleave(
        torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets.diff()
    )


def forward(inputs: MaxsimInputs) -> tuple[Tensor, Tensor]:
    """scores [Q, B] and index [query tokens, B] of `fused_losses.primitives.maxsim`."""
    queries, documents, query_offsets, document_offsets, _ = inputs
    dtype = accumulate_dtype(queries.dtype)
    x, count = queries.to(dtype), document_offsets.shape[0] - 1
    index = torch.full((len(x), count), -1, dtype=torch.int32, device=x.device)
    scores = x.new_zeros(query_offsets.shape[0] - 1, count)
    owners = _owners(query_offsets)
    # rows at a time as well: one long document against many tokens is a matrix too
    rows = max(1, BLOCK_BYTES // (x.element_size() * 256))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        for first, last in _documents(document_offsets, len(part), x.element_size()):
            a, b = document_offsets[first], document_offsets[first + 1 : last + 1]
            lengths = document_offsets[first : last + 1].diff()
            longest = int(lengths.max())
            if longest == 0 or len(part) == 0:
                continue
            places = torch.arange(longest, device=x.device)
            real = places < lengths[:, None]
            tokens = documents[a : b[-1]].to(dtype)
            products = part @ tokens.T
            at = (document_offsets[first:last, None] - a + places).clamp_max(len(tokens) - 1)
            padded = products[:, at].masked_fill(~real, -torch.inf)
            best = padded.max(dim=2)
            some = lengths > 0
            index[start : start + rows, first:last] = torch.where(some, best.indices, -1).int()
            found = torch.where(some, best.values, 0)
            scores[:, first:last].index_add_(0, owners[start : start + rows], found)
    return scores, index


def backward(
    grad: Tensor, index: Tensor, inputs: MaxsimInputs, needs: MaxsimNeeds
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens, a document at a time."""
    queries, documents, query_offsets, document_offsets, _ = inputs
    dtype = accumulate_dtype(queries.dtype)
    x, y = queries.to(dtype), documents.to(dtype)
    dx = torch.zeros_like(x) if needs.queries else x.new_empty(0)
    dy = torch.zeros_like(y) if needs.documents else y.new_empty(0)
    owners = _owners(query_offsets)
    for b, start in enumerate(document_offsets[:-1].tolist()):
        some = index[:, b] >= 0
        at = (index[:, b].long() + start).clamp_min(0)
        if len(y) == 0:
            continue
        g = torch.where(some, grad[owners, b].to(dtype), 0)[:, None]
        if needs.queries:
            dx += g * y[at]
        if needs.documents:
            dy.index_add_(0, at, g * x)
    return dx.to(queries.dtype), dy.to(documents.dtype)
