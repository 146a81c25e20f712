"""What a fold over classes is given and gives, passed whole between the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.validation import NO_TARGET
from fused_losses.primitives.row_statistics.inputs import kept_row

INPUTS = (
    "Tensor x, Tensor weight, Tensor labels, Tensor? classes, Tensor? values, "
    "str rule, float[] params, int centers, float softness, bool normalize, str precision"
)

FORWARD = (
    f"({INPUTS}, SymInt kept_centers) -> (Tensor statistics, Tensor targets, Tensor hardest, "
    "Tensor hardest_score, Tensor kept)"
)

BACKWARD = (
    f"(Tensor grad_statistics, Tensor grad_targets, Tensor statistics, Tensor kept, {INPUTS}, "
    "bool compact, bool need_x, bool need_weight, bool need_values) "
    "-> (Tensor dx, Tensor dweight, Tensor dvalues)"
)


class ClassInputs(NamedTuple):
    """One call, in the order of the op's schema."""

    x: Tensor  # [N, D], unit rows where products are to be cosines
    weight: Tensor  # [C K, D], the K centres of a class one after the other
    labels: Tensor  # [N, L] int64, -1: nothing there, or a class that is not in this weight
    classes: Tensor | None = None  # [M] int64, increasing: the classes that take part
    values: Tensor | None = None  # [R, N], numbers of each row that the rule takes
    rule: str = "softmax"  # a name in CLASS_FOLDS
    params: tuple[float, ...] | list[float] = ()
    centers: int = 1  # K
    softness: float = 0.0  # how a class pools its centres (`pool`), 0: the best one
    normalize: bool = True  # rows of weight by their norm
    precision: str = "fp32"

    @property
    def taking_part(self) -> int:
        rows = self.weight.shape[0] // self.centers
        return rows if self.classes is None else self.classes.shape[0]

    def kept(self, centers: int) -> Tensor:
        """Room for the products of so many centres, in the dtype of products."""
        return self.x.new_empty((centers, kept_row(self.x.shape[0])), dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype)


class ClassNeeds(NamedTuple):
    """The gradients that are asked for."""

    compact: bool  # the weight's has the rows of `classes` only
    x: bool
    weight: bool
    values: bool


class ClassStatistics(NamedTuple):
    """What the op knows of each row."""

    statistics: Tensor  # [S, N] in `row_dtype`, over the negatives that take part
    targets: Tensor  # [N, L] in `row_dtype`; 0 where the label is -1
    hardest: Tensor  # [N] int64, the negative class of highest cosine, -1: there is none
    hardest_score: Tensor  # [N] its cosine (before any bend), -inf: there is none


def places(p: ClassInputs) -> Tensor:
    """[N, L]: where each label stands among the classes that take part; -1: nowhere."""
    if p.classes is None:
        return p.labels
    if p.classes.numel() == 0:
        return torch.full_like(p.labels, NO_TARGET)
    place = torch.searchsorted(p.classes, p.labels).clamp_max(p.classes.numel() - 1)
    return torch.where(p.classes[place] == p.labels, place, NO_TARGET)


def weight_rows(p: ClassInputs, part: slice) -> slice | Tensor:
    k = p.centers
    if p.classes is None:
        return slice(part.start * k, part.stop * k)
    ids = p.classes[part]
    return ids if k == 1 else (ids[:, None] * k + torch.arange(k, device=ids.device)).flatten()


def rule_values(p: ClassInputs, dtype: torch.dtype) -> Tensor | None:
    return None if p.values is None else p.values.to(dtype)[:, :, None]


def check_ids(p: ClassInputs) -> None:
    """Labels and classes in range, before anything is read by them."""
    count = p.weight.shape[0] // p.centers
    validation.check_labels(p.labels, count if p.taking_part else 0)
    if p.classes is not None and p.taking_part and not p.labels.is_cuda:
        validation.check_classes(p.classes, count)
        validation.check_labels_in_classes(p.labels.flatten(), p.classes)
