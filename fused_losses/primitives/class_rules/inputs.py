"""What a fold over classes is given and gives, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype

INPUTS = (
    "Tensor x, Tensor weight, Tensor labels, Tensor? classes, Tensor? values, "
    "str rule, float[] params, int centers, float softness, bool normalize, str precision"
)

FORWARD = f"({INPUTS}) -> (Tensor statistics, Tensor targets, Tensor hardest, Tensor hardest_score)"

BACKWARD = (
    f"(Tensor grad_statistics, Tensor grad_targets, Tensor statistics, {INPUTS}, bool compact, "
    "bool need_x, bool need_weight) -> (Tensor dx, Tensor dweight)"
)


class ClassInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D], unit rows where products are to be cosines
    weight: Tensor  # [C K, D], the K centres of a class one after the other
    labels: Tensor  # [N, L] int64, -1: nothing there, or a class that is not in this weight
    classes: Tensor | None = None  # [M] int64, increasing: the classes that take part
    values: Tensor | None = None  # [R, N], numbers of each row that the rule takes; no gradient
    rule: str = "softmax"  # a name in RULES
    params: tuple[float, ...] | list[float] = ()
    centers: int = 1  # K
    softness: float = 0.0  # how a class pools its centres (`pool`), 0: the best one
    normalize: bool = True  # rows of weight by their norm
    precision: str = "fp32"

    @property
    def taking_part(self) -> int:
        rows = self.weight.shape[0] // self.centers
        return rows if self.classes is None else self.classes.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)


class ClassNeeds(NamedTuple):
    """The gradients that are asked for."""

    compact: bool  # the weight's has the rows of `classes` only
    x: bool
    weight: bool


class ClassStatistics(NamedTuple):
    """What the op knows of each row."""

    statistics: Tensor  # [S, N] in `row_dtype`, over the negatives that take part
    targets: Tensor  # [N, L] in `row_dtype`; 0 where the label is -1
    hardest: Tensor  # [N] int64, the negative class of highest cosine, -1: there is none
    hardest_score: Tensor  # [N] its cosine (before any bend), -inf: there is none
