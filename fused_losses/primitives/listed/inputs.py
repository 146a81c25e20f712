"""What listed pairs are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

INPUTS = "Tensor x, Tensor? y, Tensor rows, Tensor columns, bool apart"

FORWARD = f"({INPUTS}) -> Tensor scores"

BACKWARD = f"(Tensor grad, {INPUTS}, bool need_x, bool need_y) -> (Tensor dx, Tensor dy)"


class ListedInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D]
    y: Tensor | None  # [M, D], of x's dtype; None: x, whose gradient is then that of both
    rows: Tensor  # [P] int64
    columns: Tensor  # [P] int64
    apart: bool  # |x - y|^2, of differences; else <x, y>

    @property
    def others(self) -> Tensor:
        """The rows that columns name, [M, D]."""
        return self.x if self.y is None else self.y
