"""The parameters of a module whose table is none of them."""

from __future__ import annotations

from torch import Tensor

WEIGHT = "weight"
PARAMETRIZED = (
    "weight: expected the table to stay the head's own; its rows are read in parts, which a "
    "parametrization (weight_norm, spectral_norm) does not know: margin_softmax takes such a weight"
)


class TablelessParameters(dict):
    """Of a head whose table is none of them: who takes it from here (torch.nn.utils) is told."""

    def __missing__(self, name: str) -> Tensor:
        raise RuntimeError(PARAMETRIZED) if name == WEIGHT else KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name == WEIGHT:
            raise RuntimeError(PARAMETRIZED)
        super().__delitem__(name)
