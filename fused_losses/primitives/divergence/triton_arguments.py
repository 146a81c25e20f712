"""What the Triton kernels take in groups."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
