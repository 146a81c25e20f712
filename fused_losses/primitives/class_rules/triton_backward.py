"""Triton kernel of `class_rules`, backward: G of a chunk of centres, from the merged statistics.

    dL/dc_ij = sum_s grad_si slope_s(c_ij) [exp(term_ij - lse_i)] ; the labels' own gradient there
    G_ijk = dL/dc_ij dpool/dz_k                     z_k = <x_i, w_jk>

The library products of `row_statistics.triton_chunks` follow.
"""

# Triton types what its functions return as nothing that can be unpacked, nor gone through
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import narrow, row_offsets
from fused_losses.primitives.class_rules.triton_forward import (
    BEST,
    ONE,
    cosines,
    pooled,
    row_values,
)
from fused_losses.primitives.class_rules.triton_rules import slopes, terms
from fused_losses.primitives.row_statistics.triton_backward import share


@triton.jit
def put(ds, g, of_class, rows, centre, stride_ds, n, real):
    """G of one centre a class, times `rest` of its 1/|w|."""
    if of_class.inverse is not None:
        # read again past the compiler's eyes, as in `gradient_tiles`
        g *= tl.load(of_class.rest + centre, mask=real, other=0.0, volatile=True)[None, :]
    at = ds + rows.to(tl.int64)[:, None] * stride_ds + centre[None, :]
    tl.store(at, narrow(g, ds.dtype.element_ty), mask=(rows < n)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["n", "first", "count", "row_tiles", "labels", "centers"])
def gradient_classes(
    x,  # [N, D]
    w,  # [C K, D]
    of_class,  # as in `forward_classes`
    of_row,
    ds,  # [N, chunk K] G_ijk times `rest` of 1/|w_jk|
    of_rule,
    stride_x,
    stride_w,
    stride_ds,
    n,
    first,
    count,
    d,
    row_tiles,
    labels,
    centers,
    sharpness,
    RULE: tl.constexpr,
    BENT: tl.constexpr,
    POOL: tl.constexpr,
    MANY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of G for the two library products."""
    row_tile = tl.program_id(0) % row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    local = (tl.program_id(0) // row_tiles) * BN + tl.arange(0, BN)
    columns = first + local
    real = columns < count
    x_rows = row_offsets(rows, n, None, stride_x)
    c, best, top, mass = pooled(
        x, w, of_class, x_rows, columns, first, count, centers, sharpness, stride_w, d, POOL, True,
        BK, EVEN, BF16, DOT,
    )  # fmt: skip
    v = row_values(of_row.numbers, rows, n, BENT)
    one, two = slopes(c, v, of_rule, RULE, BENT)
    g = tl.load(of_row.grad_first + rows, mask=rows < n, other=0.0)[:, None] * one
    if of_row.lse is not None:
        # a row without any score: exp(z - inf) = 0 where exp(z + inf) would be infinite
        lse = tl.load(of_row.lse + rows, mask=rows < n, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        term, _ = terms(c, v, of_rule, RULE, BENT)
        g *= share(term, lse[:, None], BENT)
    if of_row.grad_second is not None:
        g += tl.load(of_row.grad_second + rows, mask=rows < n, other=0.0)[:, None] * two
    if MANY:
        for label in range(labels):
            at = rows.to(tl.int64) * labels + label
            place = tl.load(of_row.places + at, mask=rows < n, other=-1)
            g = tl.where(columns[None, :] == place[:, None], 0.0, g)
        for label in range(labels):
            # a class that is named twice has both
            at = rows.to(tl.int64) * labels + label
            place = tl.load(of_row.places + at, mask=rows < n, other=-1)
            own = tl.load(of_row.grad_targets + at, mask=rows < n, other=0.0)
            g += tl.where(columns[None, :] == place[:, None], own[:, None], 0.0)
    else:
        place = tl.load(of_row.places + rows, mask=rows < n, other=-1)
        own = tl.load(of_row.grad_targets + rows, mask=rows < n, other=0.0)
        g = tl.where(columns[None, :] == place[:, None], own[:, None], g)
    if POOL == ONE:
        put(ds, g, of_class, rows, local, stride_ds, n, real)
    else:
        for k in range(centers):
            if POOL == BEST:
                g_k = tl.where(best == k, g, 0.0)
            else:
                z = cosines(
                    x, w, of_class, x_rows, columns, k, first, count, centers, stride_w, d, BK,
                    EVEN, BF16, DOT,
                )  # fmt: skip
                g_k = g * (tl.exp((z - top) * sharpness) / mass) * (1.0 + (z - c) * sharpness)
            put(ds, g_k, of_class, rows, local.to(tl.int64) * centers + k, stride_ds, n, real)
