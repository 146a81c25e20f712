"""Triton kernels with one fault each, which `make gpu-static` must see in their machine code."""

import triton
import triton.language as tl


@triton.jit
def product(
    a,
    b,
    out,
    stride,
    d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):
    """A product of rows: faulty where its precision has no tensor cores, or its tiles are wrong."""
    rows, columns, depth = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        a_at = a + rows[:, None] * stride + (start + depth)[None, :]
        b_at = b + columns[:, None] * stride + (start + depth)[None, :]
        if MASK:
            x = tl.load(a_at, mask=(start + depth)[None, :] < d, other=0.0)
            y = tl.load(b_at, mask=(start + depth)[None, :] < d, other=0.0)
        else:
            x, y = tl.load(a_at), tl.load(b_at)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    tl.store(out + rows[:, None] * BN + columns[None, :], total)


@triton.jit
def wide(a, out, BM: tl.constexpr, BN: tl.constexpr):
    """Holds a whole tile, which does not fit the registers of a few threads."""
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    x = tl.load(a + at)
    tl.store(out + at, x * tl.sum(tl.sum(x * x, 1), 0))


@triton.jit
def accumulators(a, b, c, out, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """More accumulators at once than tensor memory has columns."""
    rows, columns, depth = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    one, two = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    three = tl.zeros([BM, BN], tl.float32)
    for start in range(0, d, BK):
        x = tl.load(a + rows[:, None] * d + (start + depth)[None, :])
        y = tl.trans(tl.load(b + columns[:, None] * d + (start + depth)[None, :]))
        z = tl.trans(tl.load(c + columns[:, None] * d + (start + depth)[None, :]))
        one = tl.dot(x, y, one)
        two = tl.dot(x, z, two)
        three = tl.dot(x, y + z, three)
    at = rows[:, None] * BN + columns[None, :]
    tl.store(out + at, one)
    tl.store(out + at + BM * BN, two)
    tl.store(out + at + 2 * BM * BN, three)


@triton.jit
def added(a, out, BN: tl.constexpr):
    """Floats summed in whichever order."""
    at = tl.arange(0, BN)
    tl.atomic_add(out + at % 4, tl.load(a + at))


@triton.jit
def locked(a, out, lock, BN: tl.constexpr):
    """A sum under a spin lock."""
    at = tl.arange(0, BN)
    x = tl.load(a + at)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(out + at, tl.load(out + at) + x)
    tl.atomic_xchg(lock, 0)
