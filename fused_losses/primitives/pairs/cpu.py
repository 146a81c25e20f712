"""What the compiled kernels over pairs need, told by the plan that they allocate by."""

from __future__ import annotations

import torch

from fused_losses.backends.cpu.capability import extension
from fused_losses.base.memory_budget import less_of
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds


def workspace_bytes(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    precision: str = "fp32",
    width: int = 0,
    apart: bool = False,
) -> int:
    """Peak memory of forward and backward beyond inputs and the gradients of both sides.

    width: of the values, in an attention. With everything asked for.
    """
    return extension().pair_workspace(n, m, d, dtype.itemsize, precision, width, apart)


def workspace(p: PairInputs, needs: PairNeeds | None, width: int = 0) -> int:
    """Bytes beyond inputs and outputs, at most; needs None: of the forward, which has fewer.

    width: of an attention's values.
    """
    (n, d), m = p.x.shape, p.y.shape[0]
    return workspace_bytes(n, m, d, p.x.dtype, p.precision, width, p.apart)


def kept_scores(p: PairInputs, most: int) -> int:
    """How many scores are kept of a room for `most`: of whole strips of rows, a tile high."""
    (n, d), m = p.x.shape, p.y.shape[0]
    if torch.compiler.is_compiling():
        # sizes may be symbols; what is no whole strip stays empty. Rows are padded to 64 scores;
        # of a triangle's strips, at most 192 high, a row begins at most 447 before its first pair
        whole = n * ((m + 63) // 64 * 64)
        return less_of(most, n * (m // 2 + 512) if p.triangle else whole)
    item = p.x.dtype.itemsize
    return extension().pair_kept(n, m, d, item, p.precision, p.triangle, most)
