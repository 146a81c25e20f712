"""What the tiles of every Triton kernel share: offsets, loads, products, norms."""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2147483647)

# a row of W at or below norm 1e-12 counts as zero, as the reference says
TINY_SQUARE = tl.constexpr(1e-24)


@triton.jit
def bound(length, INTERPRET: tl.constexpr):
    """A loaded number as the end of a loop."""
    if INTERPRET:
        # the interpreter of Triton 3.6 holds it as an array of one, which numpy 2.4 refuses there
        return length.handle.data.item()
    else:
        return length


@triton.jit
def row_offsets(index, count, ids, stride):
    """64-bit offsets of rows `index` (clamped below `count`), through `ids` where given."""
    index = tl.minimum(index, count - 1)
    if ids is not None:
        index = tl.load(ids + index)
    return index.to(tl.int64) * stride


@triton.jit
def inverse_norm(square):
    """1 / sqrt(square), or 0 for a row that counts as zero."""
    root = tl.sqrt_rn(tl.maximum(square, TINY_SQUARE))
    # a NaN must stay one: the comparison is written so that NaN takes the division
    return tl.where(square <= TINY_SQUARE, 0.0, tl.div_rn(1.0, root + (square - square)))


@triton.jit
def load(pointers, depth, d, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=depth < d, other=0.0)


@triton.jit
def operand(a, BF16: tl.constexpr, DOT: tl.constexpr):
    """A factor of a product: float32 rounded to bfloat16 where asked."""
    if BF16:
        a = a.to(tl.bfloat16)
    if DOT == "interpret":
        # the interpreter multiplies the bit patterns of bfloat16; the product in float32 is exact
        a = a.to(tl.float32)
    return a


@triton.jit
def rounded(a, BF16: tl.constexpr):
    return operand(a, BF16, "ieee").to(tl.float32)


@triton.jit
def multiply(a, b, total, DOT: tl.constexpr):
    """total + a b, summed in float32."""
    if DOT == "interpret":
        return tl.dot(a, b, total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=DOT)


@triton.jit
def products(
    x,  # [N, D]
    w,  # [C, D]
    x_rows,  # [BM] offsets
    w_rows,  # [BN] offsets
    d,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """<x_i, w_j> [BM, BN], accumulated in float32."""
    depth = tl.arange(0, BK)
    x_tile = x + x_rows[:, None] + depth[None, :]
    w_tile = w + w_rows[:, None] + depth[None, :]
    product = tl.zeros([x_rows.shape[0], w_rows.shape[0]], tl.float32)
    for start in range(0, d, BK):
        a = load(x_tile, depth[None, :], d - start, EVEN)
        b = load(w_tile, depth[None, :], d - start, EVEN)
        b = tl.trans(operand(b, BF16, DOT))
        product = multiply(operand(a, BF16, DOT), b, product, DOT)
        x_tile += BK
        w_tile += BK
    return product


@triton.jit
def narrow(g, DTYPE: tl.constexpr):
    """Rounds G to the dtype of its products; float16 saturates instead of overflowing to inf."""
    if DTYPE == tl.float16:
        g = tl.where(g > 65504.0, 65504.0, tl.where(g < -65504.0, -65504.0, g))
    return g.to(DTYPE)


@triton.jit
def equal(x_vector, y_vector, rows, columns, row_end, column_end):
    """Where the integers of row and column are equal. [BM, BN]"""
    # not volatile: that loads each column's integer by an address of its own, and spills
    left = tl.load(x_vector + rows, mask=rows < row_end, other=0)
    right = tl.load(y_vector + columns, mask=columns < column_end, other=0)
    return left[:, None] == right[None, :]
