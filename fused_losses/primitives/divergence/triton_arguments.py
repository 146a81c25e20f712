"""What the Triton kernels take in groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.tiles import Tile
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.launch import kernel
from fused_losses.primitives.divergence import near
from fused_losses.primitives.divergence.inputs import DivergenceInputs
from fused_losses.primitives.row_statistics.gpu import Problem


class ScoreSide(NamedTuple):
    """One score matrix: a product of rows and classes, or dense scores where weight is None."""

    rows: Tensor  # [N, D], or scores [N, C]
    weight: Tensor | None  # [C, D]
    inverse: Tensor | None  # 1/|w_j| from the first column of the chunk
    bias: Tensor | None  # [C]
    scale: Tensor | None  # [N] of dense scores
    stride: int  # of rows
    stride_class: int  # of the rows of weight, or of the columns of scores
    width: int  # D, or C

    @classmethod
    def of(cls, p: Problem, inverse: Tensor | None) -> ScoreSide:
        return cls(p.x, p.weight, inverse, p.bias, None, p.x.stride(0), p.weight.stride(0), p.d)


class NearRows(NamedTuple):
    """What there is between two sides that may be near each other (`triton_near.py`)."""

    apart: Tensor  # [N, D] x - t
    rows: Tensor  # [N] float32: 1 of a row that is near, else 0
    shrink: (
        Tensor  # [K] float32: 1 - |w| / |wt|, 0 of rows as they are; NaN where they are not near
    )
    stride: int  # of apart

    def cut(self, part: slice) -> NearRows:
        """Those of some rows."""
        return self._replace(apart=self.apart[part], rows=self.rows[part])


class DivergenceRows(NamedTuple):
    """What the kernels read of the rows, [N] each; gradients: of the side that is written."""

    positions: Tensor  # int32: column of the target among the columns, -1 = none
    lse: Tensor | None = None
    teacher_lse: Tensor | None = None
    between: Tensor | None = None  # lse - teacher_lse, rounded once
    fold: Tensor | None = None
    fold_s: Tensor | None = None  # the second fold: slopes in log q_s, or of a power the mean
    fold_t: Tensor | None = None  # the third: slopes in log q_t
    grad_lse: Tensor | None = None
    grad_target: Tensor | None = None
    grad_fold: Tensor | None = None
    grad_mean: Tensor | None = None  # of a power's second fold

    def cut(self, part: slice) -> DivergenceRows:
        """Those of some rows."""
        positions, *rest = self
        return DivergenceRows(positions[part], *(None if r is None else r[part] for r in rest))


def near_rows(p: DivergenceInputs, student: Problem, teacher: Problem | None) -> NearRows | None:
    """What decides where both sides are near, where they stand: a GPU is not waited for.

    Of float32 alone: 16 bits round the differences of their numbers.
    """
    if teacher is None or not near.may_be_near(p):
        return None
    if student.weight.dtype != torch.float32 or teacher.weight.dtype != torch.float32:
        return None
    apart = student.x - teacher.x
    shrink = torch.empty(student.count, dtype=torch.float32, device=apart.device)
    tile = Tile(0, 16, 64 if student.even(64) else 32, 4, 1)
    if student.count:
        triton_launch.launch(
            kernel("divergence.triton_near.class_shrink"),
            ceil_div(student.count, tile.columns),
            (student.weight, teacher.weight, student.classes, shrink, near.SMALL**2)
            + (student.weight.stride(0), teacher.weight.stride(0), student.count, student.d),
            dict(
                NORMALIZE=p.normalize, BN=tile.columns, BK=tile.depth, EVEN=student.even(tile.depth)
            ),
            tile,
        )
    rows = near.rows_near(apart, student.x).to(torch.float32)
    return NearRows(apart, rows, shrink, apart.stride(0))
