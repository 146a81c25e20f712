"""What a selection is given, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import row_dtype
from fused_losses.primitives.topk.rotation import rotated_back

TOPK_KINDS = ("dot", "cosine", "sqeuclidean")

MATCHES = ("any", "same", "different")

SCREENS = ("auto", "fp32", "bf16")

MOST = 2_048  # k of a GPU's kernels
STEP = 32  # coordinates of a level behind the first; Heads::kStep in csrc/topk.h


class QuantizedRows(NamedTuple):
    """Rows in int8: row j is scale[j] codes[j], and within error[j] of what it was made from.

    With signs, both are of rows times a rotation, which queries are multiplied by as well.
    """

    codes: Tensor  # [M, D] int8
    scale: Tensor  # [M] float32
    error: Tensor  # [M] float32, Euclidean
    signs: Tensor | None = None  # [rounds, D] int8, of the rotation; None: there is none

    def dequantize(self) -> Tensor:
        """[M, D] float32, rotated back."""
        if self.signs is None:
            return self.codes * self.scale[:, None]
        rows = self.codes.to(row_dtype(self.codes.device)) * self.scale[:, None]
        return rotated_back(rows, self.signs).float()


class PrincipalRows(NamedTuple):
    """Rows in coordinates along orthonormal axes, those of the most spread first.

    A row is within moved of its coordinates, in its length, and what it has beyond a level is at
    most as long as its tail there.
    """

    first: Tensor  # [M, W] float32
    rest: Tensor  # [M, levels, 32] float32, zeros beyond the axes
    tails: Tensor  # [levels + 2, M] float32: the length, then the tail beyond each level
    axes: Tensor  # [D, H] float64
    moved: float

    def to(self, device: torch.device | str) -> PrincipalRows:
        """The same on a device, of the types that they have."""
        first, rest, tails, axes = (t.to(device) for t in self[:4])
        return PrincipalRows(first, rest, tails, axes, self.moved)


HEADS = ("heads", "heads_rest", "heads_tails", "heads_axes", "heads_moved")  # of `TopkInputs`

Prepared = QuantizedRows | PrincipalRows


class TopkInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], any floating point type, or int8 with y_scale
    y_scale: Tensor | None = None  # [M] float32
    codes: Tensor | None = None  # [M, D] int8, read in the place of y by the screen
    codes_scale: Tensor | None = None  # [M] float32
    codes_error: Tensor | None = None  # [M] float32
    codes_signs: Tensor | None = None  # [rounds, D] int8, of the rotation that codes are of
    x_labels: Tensor | None = None  # [N] int32
    y_labels: Tensor | None = None  # [M] int32
    x_ids: Tensor | None = None  # [N] int32; equal ids: the pair is left out
    y_ids: Tensor | None = None  # [M] int32
    exclude: Tensor | None = None  # [N, E] int32 columns left out, -1: none
    kind: str = "dot"
    k: int = 1
    largest: bool = True
    match: str = "any"
    skip_self: bool = False  # leave out i == j
    symmetric: bool = False  # y is x
    screen: str = "fp32"
    heads: Tensor | None = None  # [M, W] float32, `PrincipalRows` of y: read in its place
    heads_rest: Tensor | None = None  # [M, levels, 32] float32
    heads_tails: Tensor | None = None  # [levels + 2, M] float32
    heads_axes: Tensor | None = None  # [D, H] float64
    heads_moved: float = 0.0


SCHEMA = (
    "(Tensor x, Tensor y, Tensor? y_scale, Tensor? codes, Tensor? codes_scale, "
    "Tensor? codes_error, Tensor? codes_signs, Tensor? x_labels, Tensor? y_labels, "
    "Tensor? x_ids, Tensor? y_ids, Tensor? exclude, str kind, int k, bool largest, str match, "
    "bool skip_self, bool symmetric, str screen, Tensor? heads, Tensor? heads_rest, "
    "Tensor? heads_tails, Tensor? heads_axes, float heads_moved) -> (Tensor keys, Tensor index)"
)
