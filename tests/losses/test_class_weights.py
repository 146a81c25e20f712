"""Class weights of zero, rows in several dimensions, and scalars that are not floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses import margin_softmax


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(6, 5, dtype=torch.float64)
    return x, torch.randn(9, 5, dtype=torch.float64), torch.tensor([3, 0, 8, 3, -100, 5])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["reference", "bounded", "cpu"])
def test_the_mean_over_classes_of_no_weight_is_zero(
    rows: tuple[Tensor, Tensor, Tensor], backend: str, smoothing: float
) -> None:
    x, w, labels = rows
    x.requires_grad_()
    weight = torch.ones(9, dtype=torch.float64)
    weight[[0, 3, 5, 8]] = 0  # smoothing has a loss in the classes of no row

    def loss(**options: Any) -> Any:
        return margin_softmax(
            x, w, labels, class_weight=weight, label_smoothing=smoothing, backend=backend, **options
        )

    assert (loss(reduction="sum") > 0) == (smoothing > 0)
    mean = loss()
    mean.backward()
    assert mean == 0 and (x.grad == 0).all()
