"""Sums of G as the products of a GPU's kernels have it: narrowed, in gradients that are no product.

A product's factors are narrowed in the judge's movements, a sum's terms are not. So what such a sum
may be off is added: each of its terms by the rounding of that term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from pair_rows import Inputs, others, unit
from torch import Tensor

from fused_losses.base.disturbance import LOWERED
from fused_losses.base.numerics import ROUNDOFF


class NarrowSum(NamedTuple):
    """Of which leaf, and the norm of the gradient that terms of one sign may make, at most."""

    leaf: str
    most: Callable[[Inputs, float], float]  # of the exact inputs and the loss
    backends: tuple[str, ...] = ("cuda", "triton")


def _of_angles(degrees: float) -> Callable[[Inputs, float], float]:
    """Each positive pair's scores have -2 (1 + t) <a, p>; its sum of G is at most 1 / pairs."""

    def most(t: Inputs, _: float) -> float:
        positive, unit_rows = others(t.labels)[0], unit(t.x)
        sine = (1 - (unit_rows @ unit_rows.T).square()).clamp_min(0).sqrt()
        # the slope of a cosine at either row, once for (a, p) and once for (p, a)
        over = torch.where(positive, sine, 0).sum(1) / t.x.norm(dim=1)
        slope = 4 * (1 + math.tan(math.radians(degrees)) ** 2)
        return slope * float(over.nan_to_num(0, 0, 0).norm()) / max(int(positive.sum()), 1)

    return most


# a sigmoid is at most its softplus, so that sum |G| is at most the loss
_SIGMOIDS = NarrowSum("bias", lambda _, loss: loss, ("cuda",))
SUMS = {
    "sigmoid_contrastive": _SIGMOIDS,
    "sigmoid_contrastive_labels": _SIGMOIDS,
    # G s / t: weights less targets, at most 2 a row, of unit rows' s <= 1 / t, a mean of t / 0.07
    "supervised_contrastive_out": NarrowSum(
        "temperature", lambda t, _: 2 / (0.07 * float(t.temperature))
    ),
    # of negatives of norm 1 the products are as large and are rounded, too
    "angular_plain_negatives": NarrowSum("x", _of_angles(40.0)),
}


def spare(
    name: str, backend: str, precision: str, dtype: torch.dtype, exact: Inputs, loss: Tensor
) -> tuple[str, float]:
    """The leaf whose gradient may be further off, and by how much."""
    found = SUMS.get(name)
    if found is None or backend not in found.backends:
        return "", 0.0
    rough = max(LOWERED[precision], ROUNDOFF[dtype])
    return found.leaf, rough * found.most(exact, float(loss))
