"""What the tiles of every Triton kernel share: offsets, loads, products, norms."""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2147483647)

# 1/|w| of the shortest row of W that does not count as zero: times a gradient it has to be a float
MOST_INVERSE = tl.constexpr(2.0**120)
# squares that have lost nothing at either end of the range
LEAST_SQUARE = tl.constexpr(2.0**-40)
MOST_SQUARE = tl.constexpr(2.0**40)


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
def load(pointers, depth, d, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=depth < d, other=0.0)


@triton.jit
def power_of_two(top):
    """What brings a row's largest magnitude near 1; finite whatever that is."""
    bits = (254 << 23) - (top.to(tl.int32, bitcast=True) & 0x7F800000)
    return tl.maximum(bits, 1 << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(square, factor):
    """1/|w| from |factor w|^2, 0 for a row that counts as zero; a NaN stays one."""
    inverse = tl.div_rn(factor, tl.sqrt_rn(square))
    return tl.where(inverse > MOST_INVERSE, 0.0, inverse)


@triton.jit
def inverse_norms_of(square, w, w_rows, d, BK: tl.constexpr, EVEN: tl.constexpr):
    """1/|w| of rows at offsets `w_rows` from their sums of squares. [BN]

    Where some may have left the range the rows are read again, and multiplied by powers of two.
    """
    unusual = ((square >= LEAST_SQUARE) & (square <= MOST_SQUARE)) == 0
    factor = tl.full(square.shape, 1.0, tl.float32)
    if tl.max(unusual.to(tl.int32), 0) > 0:
        depth = tl.arange(0, BK)
        w_tile = w + w_rows[:, None] + depth[None, :]
        top = tl.zeros([square.shape[0], BK], tl.float32)
        for start in range(0, d, BK):
            a = load(w_tile + start, depth[None, :], d - start, EVEN).to(tl.float32)
            top = tl.maximum(top, tl.abs(a))
        factor = tl.where(unusual, power_of_two(tl.max(top, 1)), 1.0)
        total = tl.zeros([square.shape[0], BK], tl.float32)
        for start in range(0, d, BK):
            a = load(w_tile + start, depth[None, :], d - start, EVEN).to(tl.float32)
            a *= factor[:, None]
            total += a * a
        square = tl.where(unusual, tl.sum(total, 1), square)
    return inverse_of(square, factor)


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
