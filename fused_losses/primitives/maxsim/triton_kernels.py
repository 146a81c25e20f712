"""Triton kernels of MaxSim: token maxima of a document, their sums, and the two gradients.

Every program owns what it writes: no atomics, no locks, a fixed order of sums. Tokens past the end
of a document are its last token again: equal, and later, so never chosen. Offsets of rows are
64-bit.
"""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import (
    NOWHERE,
    bound,
    load,
    multiply,
    narrow,
    operand,
    products,
    row_offsets,
)


@triton.jit
def span(offsets, which):
    """Where text `which` begins, and how many tokens it has."""
    start = tl.load(offsets + which)
    return start, (tl.load(offsets + which + 1) - start).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "count", "first", "row_tiles"])
def token_maxima(
    queries,  # [tokens, D]
    documents,  # [T, D]
    offsets,  # [B + 1] int64: of the documents
    best_out,  # [documents of this chunk, tokens] float32
    index,  # [tokens, B] int32: the token within its document, -1 = none
    stride_x,
    stride_y,
    tokens,
    count,
    first,
    d,
    row_tiles,
    WHOLE: tl.constexpr,  # a token fits in BK: the query tile stays
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """The largest product of BM query tokens with one document's tokens, and where."""
    # the row tile runs fastest, so that all row tiles of a document find it in L2
    row_tile = tl.program_id(0) % row_tiles
    local = tl.program_id(0) // row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    x_rows = row_offsets(rows, tokens, None, stride_x)
    start, length = span(offsets, first + local)
    document = documents + start * stride_y
    column = tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # a running maximum a column, merged once at the end: no reduction in the loop
    best = tl.full([BM, BN], float("-inf"), tl.float32)
    at = tl.zeros([BM, BN], tl.int32)
    if WHOLE:
        a = load(queries + x_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
        a = operand(a, BF16, DOT)
    for begin in range(0, bound(length, DOT == "interpret"), BN):
        y_rows = row_offsets(begin + column, length, None, stride_y)
        if WHOLE:
            b = load(document + y_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
            b = tl.trans(operand(b, BF16, DOT))
            z = multiply(a, b, tl.zeros([BM, BN], tl.float32), DOT)
        else:
            z = products(queries, document, x_rows, y_rows, d, BK, EVEN, BF16, DOT)
        # the first of equals; a NaN stays
        better = (z > best) | (z != z)
        best = tl.where(better, z, best)
        at = tl.where(better, begin, at)
    bad = best != best
    broken = tl.max(bad.to(tl.int32), 1)
    high = tl.max(tl.where(bad, float("-inf"), best), 1)
    chosen = bad | ((best == high[:, None]) & (broken == 0)[:, None])
    where = tl.min(tl.where(chosen, at + column[None, :], NOWHERE), 1)
    high = tl.where(broken > 0, float("nan"), high)
    real = rows < tokens
    out = local.to(tl.int64) * tokens + rows
    tl.store(best_out + out, tl.where(length > 0, high, 0.0), mask=real)
    to = rows.to(tl.int64) * count + first + local
    # a document without tokens: -1
    tl.store(index + to, tl.minimum(where, length - 1), mask=real)


@triton.jit(do_not_specialize=["query_count", "tokens", "count", "first", "chunk"])
def token_sums(
    best,  # [chunk, tokens] float32
    offsets,  # [Q + 1] int64: of the queries
    scores,  # [Q, B] float32
    query_count,
    tokens,
    count,
    first,
    chunk,
    BN: tl.constexpr,
    BT: tl.constexpr,
    DOT: tl.constexpr,
):
    """The sum over a query's tokens for BN documents of a chunk."""
    query = tl.program_id(0) % query_count
    local = (tl.program_id(0) // query_count) * BN + tl.arange(0, BN)
    start, length = span(offsets, query)
    there = (local < chunk)[:, None]
    from_rows = best + local.to(tl.int64)[:, None] * tokens + start
    total = tl.zeros([BN, BT], tl.float32)
    for begin in range(0, bound(length, DOT == "interpret"), BT):
        token = (begin + tl.arange(0, BT))[None, :]
        total += tl.load(from_rows + token, mask=there & (token < length), other=0.0)
    to = scores + query.to(tl.int64) * count + first + local
    tl.store(to, tl.sum(total, 1), mask=local < chunk)


@triton.jit
def choices(grad, index, owners, rows, tokens, which, count):
    """The token that each query token chose in document `which` (-1: none) and its gradient."""
    real = rows < tokens
    at = tl.load(index + rows.to(tl.int64) * count + which, mask=real, other=-1)
    owner = tl.load(owners + rows, mask=real, other=0)
    g = tl.load(grad + owner * count + which, mask=at >= 0, other=0.0)
    return at, g.to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "count", "depth_tiles"])
def query_gradients(
    grad,  # [Q, B]
    index,  # [tokens, B] int32
    owners,  # [tokens] int64: the query of each token
    documents,  # [T, D]
    offsets,  # [B + 1] int64: of the documents
    dqueries,  # [tokens, D]
    stride_y,
    stride_out,
    tokens,
    count,
    d,
    depth_tiles,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """dqueries of a tile: the rows that its tokens chose, document after document."""
    rows = (tl.program_id(0) // depth_tiles) * BM + tl.arange(0, BM)
    depth = (tl.program_id(0) % depth_tiles) * BK + tl.arange(0, BK)
    inside = (depth < d)[None, :]
    total = tl.zeros([BM, BK], tl.float32)
    # four documents in flight: one after the other would wait for every row
    for which in tl.range(0, count, loop_unroll_factor=4):
        at, g = choices(grad, index, owners, rows, tokens, which, count)
        chosen = (tl.load(offsets + which) + at) * stride_y
        there = (at >= 0)[:, None] & inside
        row = tl.load(documents + chosen[:, None] + depth[None, :], mask=there, other=0.0)
        total += g[:, None] * row.to(tl.float32)
    to = dqueries + row_offsets(rows, tokens, None, stride_out)[:, None] + depth[None, :]
    tl.store(to, total, mask=(rows < tokens)[:, None] & inside)


@triton.jit(do_not_specialize=["tokens", "count", "depth_tiles"])
def document_gradients(
    grad,  # [Q, B]
    index,  # [tokens, B] int32
    owners,  # [tokens] int64
    queries,  # [tokens, D]
    offsets,  # [B + 1] int64: of the documents
    tile_documents,  # [tiles] int64: the document of a tile of tokens, B where there is none
    tile_ends,  # [B] int64: tiles up to and with those of a document
    unscale,  # [1] or None: grad is that many times too small
    ddocuments,  # [T, D]
    stride_x,
    stride_out,
    tokens,
    count,
    d,
    depth_tiles,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """ddocuments of a tile of one document's tokens: a product of who chose whom with queries.

    A NaN or an infinity in a query token reaches every document, as it does in a dense product.
    """
    tile = tl.program_id(0) // depth_tiles
    which = tl.load(tile_documents + tile)
    if which >= count:
        return
    start, length = span(offsets, which)
    # tiles are counted from a document's last: its end is what is stored
    behind = (tl.load(tile_ends + which) - 1 - tile).to(tl.int32)
    place = (tl.cdiv(length, BN) - 1 - behind) * BN + tl.arange(0, BN)
    depth = (tl.program_id(0) % depth_tiles) * BK + tl.arange(0, BK)
    total = tl.zeros([BN, BK], tl.float32)
    for begin in range(0, tokens, BM):
        rows = begin + tl.arange(0, BM)
        at, g = choices(grad, index, owners, rows, tokens, which, count)
        g = tl.where(place[:, None] == at[None, :], g[None, :], 0.0)
        x_rows = row_offsets(rows, tokens, None, stride_x)
        x = load(queries + x_rows[:, None] + depth[None, :], depth[None, :], d, EVEN)
        g = operand(narrow(g, queries.dtype.element_ty), False, DOT)
        total = multiply(g, operand(x, False, DOT), total, DOT)
    if unscale is not None:
        total *= tl.load(unscale)
    to = (start + place) * stride_out
    there = (place < length)[:, None] & (depth < d)[None, :]
    tl.store(ddocuments + to[:, None] + depth[None, :], total, mask=there)
