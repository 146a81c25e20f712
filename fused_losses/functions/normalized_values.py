"""Losses of the label's probability that ask a second number of the other classes.

Active-passive losses, whose divisor is the same logarithm of every class, and the squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.base.numerics import against, joined
from fused_losses.base.parameters import check_parameter
from fused_losses.functions.class_values import MergedRows, Softmax, check_floats, label_ends
from fused_losses.functions.probability_values import OfProbability


@dataclass(frozen=True)
class _OfOthers(OfProbability):
    """Whose rule has no other form of the scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softcap is not None:
            raise ValueError(f"softcap: expected None of {type(self).__name__}, got {self.softcap}")


@dataclass(frozen=True)
class NCE(_OfOthers):
    """log p_y / sum_j log p_j, in [0, 1]: normalised cross entropy (Ma et al., 2020).

    The label is in the sum, too. Of a class that is alone it is 0.
    """

    counts = True

    @property
    def rule(self) -> str:
        return "summed_softmax"

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        lse, total = rows.statistics[:, :, None]
        assert rows.negatives is not None  # counted
        others = rows.negatives[:, None]
        own = against(z, lse)
        # -log p of the others: each is the denominator's logarithm less a score
        rest = torch.where(others > 0, others * joined(z, lse) - total, 0)
        whole = own + rest
        return torch.where(others > 0, own / torch.where(others > 0, whole, 1), 0)


@dataclass(frozen=True)
class ActivePassive(NCE):
    """alpha NCE + beta passive: an active loss and a passive one (Ma et al., 2020).

    passive: a loss of the label's probability alone, such as `MAE()`, `SCE(0.0, 1.0, A)` (reverse
    cross entropy), `AGCE()` or `AUL()`, with the margin and scale of this one or none of its own.
    alpha, beta >= 0.
    """

    passive: OfProbability
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_floats(check_parameter, alpha=self.alpha, beta=self.beta)
        for name in ("alpha", "beta"):
            check_parameter(name, getattr(self, name), 0)
        passive = self.passive
        if not isinstance(passive, OfProbability) or (
            type(passive).of_labels is not Softmax.of_labels
        ):
            raise TypeError(
                "passive: expected a loss of the label's probability alone, such as MAE(), got "
                f"{passive!r}"
            )
        for name in ("margin", "scale", "gradient", "z_loss", "softcap"):
            default = getattr(OfProbability(), name)
            if getattr(passive, name) not in (default, getattr(self, name)):
                raise ValueError(
                    f"passive: expected a {name} of {getattr(self, name)}, as this loss has, got "
                    f"{getattr(passive, name)}"
                )

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        passive = label_ends(z, rows.statistics[0], self.passive.end)
        return self.alpha * super().of_labels(z, rows) + self.beta * passive


@dataclass(frozen=True)
class MSE(_OfOthers):
    """sum_j (p_j - [j = y])^2: the squared error of the probabilities, Brier's score."""

    @property
    def rule(self) -> str:
        return "squared_softmax"

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        lse, squares = rows.statistics[:, :, None]
        own = label_ends(z, rows.statistics[0], lambda _, log_rest: (2 * log_rest).exp())
        some = squares != -torch.inf
        rest = (torch.where(some, squares, 0) - 2 * joined(z, lse)).exp()
        return own + torch.where(some, rest, 0)
