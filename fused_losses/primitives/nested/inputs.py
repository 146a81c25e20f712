"""What a sweep over pairs at several widths is given (the maths: `op`).

Fields stand in the order of the ops' schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fused_losses.primitives.pairs.inputs import PairInputs


class NestedInputs(NamedTuple):
    """One call: the pairs of x and y, scored at each of W widths."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], of x's dtype
    scale: Tensor  # [], float64
    x_factor: Tensor | None  # [W, N] in the accumulation dtype; both sides have one or neither
    y_factor: Tensor | None  # [W, M]
    x_shrink: Tensor | None  # [W, N], without gradient; where there is a factor
    y_shrink: Tensor | None  # [W, M]
    widths: Sequence[int]  # increasing, the last one D
    x_labels: Tensor | None = None  # [N] int32, as in `PairInputs`
    y_labels: Tensor | None = None  # [M] int32
    x_ids: Tensor | None = None  # [N] int32
    y_ids: Tensor | None = None  # [M] int32
    x_groups: Tensor | None = None  # [N] int32
    y_groups: Tensor | None = None  # [M] int32
    exclude: Tensor | None = None  # [N, E] int32
    precision: str = "fp32"  # of the library's products on a GPU: "tf32" allows them

    def pairs(self) -> PairInputs:
        """The pairs without what a width says."""
        told = {f: getattr(self, f) for f in NUMBERS}
        return PairInputs(self.x, self.y, self.scale, **told)

    def parts(self) -> list[slice]:
        """The columns that each width adds."""
        starts = [0, *self.widths[:-1]]
        return [slice(a, b) for a, b in zip(starts, self.widths, strict=True)]


class NestedNeeds(NamedTuple):
    """The gradients that are asked for."""

    x: bool
    y: bool
    scale: bool
    x_factor: bool
    y_factor: bool


FIELDS = len(NestedInputs._fields)
NUMBERS = NestedInputs._fields[NestedInputs._fields.index("x_labels") : -1]
BEFORE = 4  # a backward's tensors that stand before its inputs

INPUTS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? x_factor, Tensor? y_factor, Tensor? x_shrink, "
    "Tensor? y_shrink, int[] widths, Tensor? x_labels, Tensor? y_labels, Tensor? x_ids, "
    "Tensor? y_ids, Tensor? x_groups, Tensor? y_groups, Tensor? exclude, str precision"
)

FORWARD = f"({INPUTS}, bool cols) -> (Tensor rows, Tensor columns)"

BACKWARD = (
    f"(Tensor grad_rows, Tensor grad_columns, Tensor rows, Tensor columns, {INPUTS}, bool cols, "
    "bool need_x, bool need_y, bool need_scale, bool need_x_factor, bool need_y_factor) -> "
    "(Tensor dx, Tensor dy, Tensor dscale, Tensor dx_factor, Tensor dy_factor)"
)
