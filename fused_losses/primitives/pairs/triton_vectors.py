"""Triton kernels on the vectors of rows after a sweep over pairs and before its backward.

What `gpu.finish`, `gpu.vectors` and `gpu.packed` do, in one launch a side each, in float64.
"""

import triton
import triton.language as tl

from fused_losses.primitives.pairs.triton_terms import BEST, COUNT, TOTAL, VALUE


@triton.jit(do_not_specialize=["total"])
def finish_vectors(
    state,  # [4, 2, N] float64
    total,
    LSE: tl.constexpr,
    BM: tl.constexpr,
):
    """A NaN among the sums shows in the best, and sum exp(z - best) becomes its lse."""
    step = 2 * total
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    real = at < step
    # the kernels' maximum passes over a NaN, the sum does not
    moment = tl.load(state + TOTAL * step + at, mask=real, other=0.0)
    best = tl.load(state + BEST * step + at, mask=real, other=0.0)
    best = tl.where(moment == moment, best, moment)
    tl.store(state + BEST * step + at, best, mask=real)
    if LSE:
        mass = tl.load(state + VALUE * step + at, mask=real, other=0.0)
        some = mass != 0.0
        lse = best + tl.log(tl.where(some, mass, 1.0))
        tl.store(state + VALUE * step + at, tl.where(some, lse, -float("inf")), mask=real)


@triton.jit(do_not_specialize=["total"])
def gradient_vectors(
    grad,  # [2, 2, N] of value and of total
    state,  # [4, 2, N] float64
    gain,  # [1], None: 1
    out,  # [2, 4, N] float32: base, mean, rest, share of each class
    total,
    LSE: tl.constexpr,
    BM: tl.constexpr,
):
    """What the gradient's kernel wants of a row, as `gpu.vectors` has it."""
    step = 2 * total
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    real = at < step
    rest = tl.load(grad + at, mask=real, other=0.0).to(tl.float64)
    share = tl.load(grad + step + at, mask=real, other=0.0).to(tl.float64)
    base, mean = tl.zeros([BM], tl.float64), tl.zeros([BM], tl.float64)
    if LSE:
        count = tl.load(state + COUNT * step + at, mask=real, other=0.0)
        some = count != 0.0
        base = tl.where(some, tl.load(state + BEST * step + at, mask=real, other=0.0), 0.0)
        value = tl.where(some, tl.load(state + VALUE * step + at, mask=real, other=0.0), 0.0)
        count = tl.where(count < 1.0, 1.0, count)
        share = -share * count
        inverse = tl.exp(base - value)
        mean = tl.exp(value - base) / count
        rest = (rest - share) * inverse
        share = share * inverse
    if gain is not None:
        factor = tl.load(gain).to(tl.float64)
        rest *= factor
        share *= factor
    to = out + tl.where(at < total, at, at + 3 * total)
    tl.store(to, base.to(tl.float32), mask=real)
    tl.store(to + total, mean.to(tl.float32), mask=real)
    tl.store(to + 2 * total, rest.to(tl.float32), mask=real)
    tl.store(to + 3 * total, share.to(tl.float32), mask=real)
