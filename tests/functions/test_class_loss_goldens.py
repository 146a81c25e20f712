"""Class losses give the authors' numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from class_loss_formulas import (  # noqa: F401
    FILTER,
    Row,
    _small_tiles,
    curricular,
    sphereface2_formula,
    unit,
)
from places import GOLDEN
from torch import Tensor

from fused_losses.class_losses import SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.functions.class_loss import class_loss

FOLDER = GOLDEN


def golden(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def assert_golden(
    loss: Tensor, leaves: list[Tensor], data: dict[str, Tensor], wanted: list[Tensor]
) -> None:
    assert abs(loss.item() - data["loss"].item()) <= 1e-9 * data["loss"].item()
    for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert (got - want).norm() <= 1e-9 * want.norm()


def leaf(data: Tensor) -> Tensor:
    return data.clone().requires_grad_()


@pytest.mark.float64
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("sface", lambda data: SFace()),
        ("curricular_CurricularFace", lambda data: Softmax(curricular(float(data["t_before"])))),
        ("insightface_arc_filter", lambda data: Softmax(FILTER, gradient="straight_through")),
    ],
)
def test_golden(name: str, loss: Callable, backend: str) -> None:
    data = golden(name)
    x, w = leaf(data["x"]), leaf(data["w"])
    found = class_loss(x, w, data["labels"], loss(data), backend=backend)
    assert_golden(found, [x, w], data, [data["grad_x"], data["grad_w"]])


@pytest.mark.float64
def test_golden_sphereface2(backend: str) -> None:
    # its gradient of the (unit) weight lacks the projection, so the cosines are given as products
    data = golden("opensphere_SphereFace2")
    x, bias = leaf(data["x"]), leaf(data["bias"])
    w = leaf(unit(data["w"]))
    loss = SphereFace2(bias, gradient="straight_through")
    found = class_loss(F.normalize(x), w, data["labels"], loss, normalize=False, backend=backend)
    wanted = [data["grad_x"], data["grad_w"], data["grad_bias"]]
    assert_golden(found, [x, w, bias], data, wanted)
    assert abs(SphereFace2.balanced(50).bias - data["bias"].item()) <= 1e-9


@pytest.mark.float64
def test_golden_soft_triple(backend: str) -> None:
    data = golden("pml_SoftTripleLoss")
    x = leaf(data["x"])
    w = leaf(data["param_fc"].T.reshape(50, 10, 16))
    found = class_loss(x, w, data["labels"], SoftTriple(), backend=backend)
    wanted = data["gradparam_fc"].T.reshape(50, 10, 16)
    assert_golden(found, [x, w], data, [data["grad_x"], wanted])


def test_balanced_bias_is_the_minimum() -> None:
    start = SphereFace2.balanced(1000)
    bias = torch.tensor(start.bias, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1000, dtype=torch.float64)
    loss = sphereface2_formula(Row(zero[:1], zero[1:]), bias, True)
    assert abs(torch.autograd.grad(loss, bias)[0].item()) <= 1e-9 * loss.item()
