"""What LeanVec's projections keep, by singular values of whole products, for the draws.

Nothing has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from class_pair_draws import matrices
from metric_draws import none
from pair_cases import TOWERS, Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl

DIM = 1  # every drawn width has it


def kept(squares: Tensor) -> Tensor:
    """The share of what there is; of nothing, all. A NaN stays one."""
    total = squares.sum()
    return torch.where(total == 0, 1, squares[:DIM].sum() / torch.where(total == 0, 1, total))


def values(products: Tensor) -> Tensor:
    bad = products.sum().detach() * 0
    return torch.linalg.svdvals(products.detach().nan_to_num(0, 0, 0)).square() + bad


def of_rows(t: Inputs) -> Tensor:
    return kept(values(t.x).square()) + none(t)


def of_both(t: Inputs) -> Tensor:
    return kept(values(t.x @ t.y.T)) + none(t)


def rows(t: Inputs, **_: Any) -> Tensor:
    return 1 - fl.leanvec(t.x, DIM).error + none(t)


def both(t: Inputs, **_: Any) -> Tensor:
    return 1 - fl.leanvec(t.y, DIM, t.x, method="sphering").error + none(t)


DRAWN = [
    Case("leanvec_pca", matrices, rows, of_rows, TOWERS, function=fl.leanvec),
    Case("leanvec_sphering", matrices, both, of_both, TOWERS, function=fl.leanvec),
]
