"""What a fold over rows is given, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.numerics import row_dtype

TRIPLETS = ("all", "hard", "semihard", "easy")

PICKS = ("hardest", "easiest", "semihard")


class RowBlock(NamedTuple):
    """Some rows against every column."""

    score: Tensor  # [B, M]
    positive: Tensor  # [B, M] bool
    negative: Tensor  # [B, M] bool, disjoint
    values: Tensor | None  # [B, K] further numbers of each row
    params: list[float]
    second: Tensor | None = None  # [B, M] the second product of each pair

    @property
    def wide(self) -> torch.dtype:
        return row_dtype(self.score.device)


class Compiled(NamedTuple):
    """forward and gradient of a rule by a backend's kernels."""

    forward: Callable[[RowBlock], Tensor]
    gradient: Callable[[RowBlock, Tensor], tuple[Tensor, Tensor | None]]
    blocks: Callable[[list[float]], int]  # as a rule's


class RowRule(NamedTuple):
    """A row's statistics and their gradient.

    formula is plain differentiable PyTorch, any memory; forward gives the same in the memory of a
    few blocks; gradient(block, grad [B, S]) gives dL/dscore [B, M] and dL/dvalues [B, K] or None,
    of a rule of two products dL/dsecond [B, M] too.
    gradient None: the statistics are indices and counts.
    """

    size: Callable[[list[float]], int]  # S
    formula: Callable[[RowBlock], Tensor]  # [B, S]
    forward: Callable[[RowBlock], Tensor]
    gradient: Callable[[RowBlock, Tensor], tuple[Tensor | None, ...]] | None
    # how many of a block's scores are alive at the peak (test_workspace.py)
    blocks: Callable[[list[float]], int] = lambda params: 14
    compiled: tuple[str, ...] = ()  # backends whose form has kernels for it
    by: Callable[[ModuleType], Compiled] | None = None  # the rule by such kernels
    seconds: bool = False  # whether it is of two products

    def on(self, backend: str) -> RowRule | Compiled:
        """Whose forward and gradient run."""
        if self.by is None or backend not in self.compiled:
            return self
        return self.by(backends.module("row_rules", backend))


# a score's kind of distance matrix, and its sign
ROW_SCORES = {
    "euclidean": ("euclidean", 1),
    "sqeuclidean": ("sqeuclidean", 1),
    "dot": ("dot", 1),
    "minus_dot": ("dot", -1),
}

INPUTS = (
    "Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? x_groups, Tensor? y_groups, "
    "Tensor? values, str rule, float[] params, str score, bool skip_self, str precision, "
    "Tensor? x_second, Tensor? y_second"
)

FORWARD = f"({INPUTS}) -> Tensor statistics"

BACKWARD = (
    f"(Tensor grad, {INPUTS}, bool need_x, bool need_y, bool need_values, bool need_x_second, "
    "bool need_y_second) -> "
    "(Tensor dx, Tensor dy, Tensor dvalues, Tensor dx_second, Tensor dy_second)"
)


class RowInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], of x's dtype
    x_labels: Tensor  # [N] int32; equal labels: a positive pair, else a negative one
    y_labels: Tensor  # [M] int32
    x_groups: Tensor | None = None  # [N] int32; different groups: the pair is left out
    y_groups: Tensor | None = None  # [M] int32
    values: Tensor | None = None  # [N, K] in `row_dtype`, numbers of each row that the rule takes
    rule: str = "triplets"  # a name in `row_rules.rules.ROW_RULES`
    params: tuple[float, ...] | list[float] = ()
    score: str = "euclidean"  # a name in ROW_SCORES
    skip_self: bool = False  # leave out i == j
    precision: str = "fp32"
    x_second: Tensor | None = None  # [N, E] of a rule of two products: <x_second_i, y_second_j>
    y_second: Tensor | None = None  # [M, E], of x's dtype


class RowNeeds(NamedTuple):
    """The gradients that are asked for."""

    x: bool
    y: bool
    values: bool
    x_second: bool = False
    y_second: bool = False


def block(p: RowInputs, score: Tensor, rows: slice, second: Tensor | None = None) -> RowBlock:
    """The block of these rows: its classes of pairs beside its scores."""
    same = p.x_labels[rows, None] == p.y_labels
    other = ~same
    if p.x_groups is not None:
        together = p.x_groups[rows, None] == p.y_groups
        same, other = same & together, other & together
    if p.skip_self:
        i = torch.arange(rows.start, rows.stop, device=score.device)
        apart = i[:, None] != torch.arange(score.shape[1], device=score.device)
        same, other = same & apart, other & apart
    values = None if p.values is None else p.values[rows]
    return RowBlock(score, same, other, values, list(p.params), second)
