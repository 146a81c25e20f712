"""`margin_softmax` with sub-centres, several labels a row, class losses and an adaptive scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import class_losses, margins
from fused_losses.functions import class_loss
from fused_losses.functions.adaptive_scale import AdaptiveScale, adaptive_margin_softmax
from fused_losses.functions.margin_softmax import margin_softmax

N, C, D = 7, 11, 5


def inputs(centers: int = 1, labels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    shape = (C, D) if centers == 1 else (C, centers, D)
    y = torch.randint(0, C, (N,) if labels == 1 else (N, labels))
    y[2] = -100
    return x, torch.randn(shape, dtype=torch.float64, requires_grad=True), y


FORMS: dict[str, tuple[Any, class_losses.ClassLoss, int, int]] = {
    "sub-centres": (
        margins.ArcFace(0.3), class_losses.Softmax(margins.ArcFace(0.3), 16.0), 3, 1,
    ),
    "several labels": (
        margins.CosFace(0.2), class_losses.Softmax(margins.CosFace(0.2), 16.0), 1, 2,
    ),
    "sface": (class_losses.SFace(), class_losses.SFace(), 1, 1),
    "mlcd": (class_losses.MLCD(8.0), class_losses.MLCD(8.0), 1, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("backend", ["reference", None])
def test_is_the_class_loss(name: str, backend: str | None) -> None:
    margin, loss, centers, labels = FORMS[name]
    x, w, y = inputs(centers, labels)
    found = margin_softmax(x, w, y, margin=margin, scale=16.0, backend=backend)
    expected = class_loss.class_loss(x, w, y, loss, backend="reference")
    for a, b in zip(
        (found, *torch.autograd.grad(found, (x, w))),
        (expected, *torch.autograd.grad(expected, (x, w))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_is_the_adaptive_one() -> None:
    x, w, y = inputs()
    margin = AdaptiveScale(smallest=2.0)
    found = margin_softmax(x, w, y, margin=margin)
    torch.testing.assert_close(found, adaptive_margin_softmax(x, w, y, margin=margin))


@pytest.mark.parametrize(
    "option",
    [
        dict(bias=torch.zeros(C, dtype=torch.float64)),
        dict(label_smoothing=0.1),
        dict(class_weight=torch.ones(C, dtype=torch.float64)),
        dict(return_stats=True),
        dict(gradient="straight_through"),
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_these_do_not_have(option: dict[str, Any]) -> None:
    x, w, y = inputs()
    with pytest.raises(ValueError, match=next(iter(option))):
        margin_softmax(x, w, y, margin=class_losses.SFace(), **option)
    x, w, y = inputs(centers=2)
    if not option.keys() & {"gradient", "label_smoothing"}:  # which sub-centres have
        with pytest.raises(ValueError, match=next(iter(option))):
            margin_softmax(x, w, y, **option)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [N, 300])  # of one block of the kernels, and of two
@pytest.mark.parametrize("name", ["reference", "bounded", "cpu"])
def test_a_zero_class_has_gradient_zero_beside_a_row_of_nan(
    name: str, rows: int, dtype: torch.dtype
) -> None:
    require(name)
    x, w = torch.randn(rows, D).to(dtype), torch.randn(C, D).to(dtype)
    x[3], w[2] = torch.nan, 0
    w.requires_grad_()
    losses = margin_softmax(x, w, torch.arange(rows) % C, reduction="none", backend=name)
    assert isinstance(losses, Tensor)
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    (dw,) = torch.autograd.grad(losses.sum(), w)
    assert torch.equal(dw[2], torch.zeros_like(dw[2])) and dw[[0, 1]].isnan().all()
