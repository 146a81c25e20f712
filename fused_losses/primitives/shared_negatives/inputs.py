"""What the batch's shared negatives are given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

INPUTS = "Tensor x, Tensor labels, Tensor valid, Tensor scale, float whisker"

FORWARD = f"({INPUTS}) -> (Tensor lse, Tensor low, Tensor high)"

BACKWARD = (
    "(Tensor grad, Tensor x, Tensor labels, Tensor valid, Tensor scale, Tensor lse, Tensor low, "
    "Tensor high, bool need_x, bool need_scale) -> (Tensor dx, Tensor dscale)"
)


class SharedInputs(NamedTuple):
    """A batch whose pairs of different labels are meant."""

    x: Tensor  # [N, D] in the accumulation dtype
    labels: Tensor  # [N] integers
    valid: Tensor  # [N] bool: the others are in no pair


def whiskers(quartiles: Tensor, whisker: float) -> tuple[Tensor, Tensor]:
    """The closed interval that is kept."""
    q1, q3 = quartiles
    reach = whisker * (q3 - q1)
    return q1 - reach, q3 + reach
