"""Triton kernels of rows of norm 1, as `base.unit_norm` has them in PyTorch.

A program owns its rows and reads them again in each pass: they stay in its L1. Sums in float32.
"""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import load, power_of_two


@triton.jit
def tile_rows(program, n, stride, BM: tl.constexpr):
    """A program's rows, and where they begin; those past the last one are the last one."""
    rows = program * BM + tl.arange(0, BM)
    return rows, tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride


@triton.jit
def lengths(x, begin, d, BM: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """A power of two a row, 1 over the norm of the row times it, and whether that is not 0."""
    depth = tl.arange(0, BK)[None, :]
    top = tl.zeros([BM, BK], tl.float32)
    for start in range(0, d, BK):
        a = load(x + begin + start + depth, depth, d - start, EVEN).to(tl.float32)
        top = tl.maximum(top, tl.abs(a))
    factor = power_of_two(tl.max(top, 1))
    square = tl.zeros([BM, BK], tl.float32)
    for start in range(0, d, BK):
        a = load(x + begin + start + depth, depth, d - start, EVEN).to(tl.float32)
        a *= factor[:, None]
        square += a * a
    norm = tl.sqrt_rn(tl.sum(square, 1))
    # so written, a NaN norm stays one
    alive = (norm <= 0) == 0
    one = tl.full([BM], 1.0, tl.float32)
    return factor, tl.div_rn(one, tl.where(alive, norm, one)), alive


@triton.jit(do_not_specialize=["n"])
def unit_forward(
    x,  # [N, D]
    out,  # [N, D], dense
    stride_x,
    n,
    d,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out = x / |x|."""
    rows, begin = tile_rows(tl.program_id(0), n, stride_x, BM)
    factor, inverse, alive = lengths(x, begin, d, BM, BK, EVEN)
    inverse = tl.where(alive, inverse, 0.0)
    depth = tl.arange(0, BK)[None, :]
    to = out + rows.to(tl.int64)[:, None] * d + depth
    for start in range(0, d, BK):
        a = load(x + begin + start + depth, depth, d - start, EVEN).to(tl.float32)
        u = a * factor[:, None] * inverse[:, None]
        kept = (rows < n)[:, None] & (depth < d - start)
        tl.store(to + start, u.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["n"])
def unit_backward(
    x,  # [N, D]
    grad,  # [N, D] dL/du
    out,  # [N, D] dL/dx, dense
    stride_x,
    stride_grad,
    n,
    d,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """out = (grad - u <u, grad>) / |x| with u = x / |x|."""
    rows, begin = tile_rows(tl.program_id(0), n, stride_x, BM)
    factor, inverse, alive = lengths(x, begin, d, BM, BK, EVEN)
    grad += tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_grad
    depth = tl.arange(0, BK)[None, :]
    along = tl.zeros([BM, BK], tl.float32)
    for start in range(0, d, BK):
        a = load(x + begin + start + depth, depth, d - start, EVEN).to(tl.float32)
        g = load(grad + start + depth, depth, d - start, EVEN).to(tl.float32)
        along += a * factor[:, None] * inverse[:, None] * g
    total = tl.sum(along, 1)[:, None]
    to = out + rows.to(tl.int64)[:, None] * d + depth
    for start in range(0, d, BK):
        a = load(x + begin + start + depth, depth, d - start, EVEN).to(tl.float32)
        g = load(grad + start + depth, depth, d - start, EVEN).to(tl.float32)
        u = a * factor[:, None] * inverse[:, None]
        # their product may overflow where each does not
        found = (g - u * total) * inverse[:, None] * factor[:, None]
        found = tl.where(alive[:, None], found, 0.0)
        kept = (rows < n)[:, None] & (depth < d - start)
        tl.store(to + start, found.to(out.dtype.element_ty), mask=kept)
