"""Triton kernel of `divergence`, backward: both scores again, and G of one side.

G_ij = grad_lse_i q_ij + (the folds' slope in that score) ; grad_target_i at the target
"""

# Triton types what its functions return as nothing that can be unpacked
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import narrow
from fused_losses.primitives.divergence.triton_forward import both_scores, row_values
from fused_losses.primitives.divergence.triton_rules import slope


@triton.jit
def given(values, rows, n):
    """A vector of the rows [BM, 1], 0 where there is none."""
    out = tl.zeros_like(rows).to(tl.float32)
    if values is not None:
        out = tl.load(values + rows, mask=rows < n, other=0.0)
    return out[:, None]


@triton.jit(do_not_specialize=["n", "first_tile", "count", "row_tiles"])
def side_gradient(
    student,  # `ScoreSide`; 1/|w_j| from `first_tile`
    teacher,
    near,  # `NearRows` or None
    ids,  # [K] int64 or None
    of_row,  # `DivergenceRows`
    rest,  # [chunk] of the side that is written: what of 1/|w_j| G is stored times, or None
    ds,  # [N, chunk] G_ij times `rest`, in the dtype of the products that follow
    bias_sum,  # [row tiles, chunk] sum of G_ij, or None
    param,
    stride_ds,
    n,
    first_tile,
    count,
    row_tiles,
    KIND: tl.constexpr,
    TEACHER: tl.constexpr,  # which side's
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    TEACHER_EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of G, with its column sums for the bias."""
    row_tile = tl.program_id(0) % row_tiles
    rows = row_tile * BM + tl.arange(0, BM)
    tile = tl.program_id(0) // row_tiles
    local = tile * BN + tl.arange(0, BN)
    # of tiles, that the compiler sees whole vectors of dense scores
    columns = (first_tile + tile) * BN + tl.arange(0, BN)
    u, v, d = both_scores(
        student, teacher, near, ids, rows, local, columns, n, count,
        BK, EVEN, TEACHER_EVEN, BF16, DOT,
    )  # fmt: skip
    lse, teacher_lse, between = row_values(of_row, rows, n)
    gap = d - between[:, None]
    q_s = tl.exp(u - lse[:, None])
    q_t = tl.exp(v - teacher_lse[:, None])
    fold = given(of_row.fold, rows, n)
    of_s, of_t = given(of_row.fold_s, rows, n), given(of_row.fold_t, rows, n)
    to_fold, to_mean = given(of_row.grad_fold, rows, n), given(of_row.grad_mean, rows, n)
    g = slope(
        u, v, d, q_s, q_t, gap, fold, of_s, of_t, to_fold, to_mean, param, KIND, TEACHER
    )  # fmt: skip
    to_lse = given(of_row.grad_lse, rows, n)
    # a row of which nothing is asked has no gradient, whatever its scores are
    asked = (to_lse != 0) | (to_fold != 0) | (to_mean != 0)
    g = tl.where(asked, g + to_lse * (q_t if TEACHER else q_s), 0.0)
    position = tl.load(of_row.positions + rows, mask=rows < n, other=-1)
    is_target = columns[None, :] == position[:, None]
    real = columns < count
    g = tl.where(is_target, given(of_row.grad_target, rows, n), g)
    if bias_sum is not None:
        sums = row_tile.to(tl.int64) * stride_ds + local
        # rows past the end are the last one again
        tl.store(bias_sum + sums, tl.sum(tl.where((rows < n)[:, None], g, 0.0), 0), mask=real)
    if rest is not None:
        g *= tl.load(rest + local, mask=real, other=0.0)[None, :]
    at = ds + rows.to(tl.int64)[:, None] * stride_ds + local[None, :]
    tl.store(at, narrow(g, ds.dtype.element_ty), mask=(rows < n)[:, None] & real[None, :])
