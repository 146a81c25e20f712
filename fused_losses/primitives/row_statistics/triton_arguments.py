"""What the Triton kernels take in groups."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_losses.primitives.row_statistics.gpu import Problem


class ClassVectors(NamedTuple):
    """What the kernels read of the classes that take part, beside their rows of W."""

    ids: Tensor | None  # [K] int64
    inverse: Tensor | None  # [chunk] 1/|w_j|
    rest: Tensor | None  # [chunk] what of it G is stored times
    bias: Tensor | None  # [C]
    weight: Tensor | None  # [C] v of the weighted sum

    @classmethod
    def of(
        cls, p: Problem, inverse: Tensor | None = None, rest: Tensor | None = None
    ) -> ClassVectors:
        rest = inverse if rest is None else rest
        return cls(p.classes, inverse, rest, p.bias, p.column_weight)


class RowVectors(NamedTuple):
    """What the kernels read of the rows, beside those of x; the last four in the backward."""

    positions: Tensor  # [N] int32: column of the target among the columns, -1 = none
    bend: Tensor | None  # [N, 4]
    lse: Tensor | None = None  # [N]
    grad_lse: Tensor | None = None  # [N]
    grad_target: Tensor | None = None  # [N]
    grad_weighted: Tensor | None = None  # [N]

    def cut(self, part: slice) -> RowVectors:
        """Those of some rows."""
        positions, *rest = self
        return RowVectors(positions[part], *(None if r is None else r[part] for r in rest))


class Partials(NamedTuple):
    """Statistics of rows over a part of the classes; [T, N] of T parts."""

    peak: Tensor  # maximum
    total: Tensor  # sum exp(z - peak)
    best: Tensor  # int32 column of the maximum
    moment: Tensor | None  # sum v z

    @classmethod
    def of(cls, values: Tensor, best: Tensor) -> Partials:
        """values [2 or 3, T, N]"""
        return cls(values[0], values[1], best, values[2] if len(values) > 2 else None)
