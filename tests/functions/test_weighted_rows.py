"""Weights of rows in every loss over classes, and what makes some."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from head_goldens import INDEX, golden
from torch import Tensor

from fused_losses import (
    adaptive_margin_softmax,
    linear_cross_entropy,
    margin_softmax,
    unpg_margin_softmax,
)
from fused_losses.class_losses import (
    LDR,
    BiasWeights,
    SFace,
    Softmax,
    class_loss,
    equity_weights,
)


@pytest.mark.parametrize("within", ["global", "local"])
def test_the_authors_bias_weights(within: str) -> None:
    data = golden(f"biasloss_{within}")
    x, weights = data["logits"].requires_grad_(), BiasWeights(0.3, 0.3, within)
    made = weights(data["features"].double())
    eye, y = torch.eye(x.shape[1], dtype=torch.float64), data["labels"]
    got = class_loss(x, eye, y, LDR(0.0), normalize=False, row_weight=made, reduction="sum")
    got = (got + made.sum() * math.log(x.shape[1])) / len(x)
    assert float(got.detach()) == pytest.approx(INDEX[f"biasloss_{within}"]["loss"], rel=1e-12)
    (grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(grad, data["grad_logits"], rtol=1e-12, atol=1e-15)


def test_bias_weights_keep_the_smallest_variance() -> None:
    scale = torch.tensor([1.0, 2.0, 3.0])
    features = scale[:, None] * torch.tensor([-1.0, 0.0, 1.0])
    weights = BiasWeights(0.5, 0.25)
    first = weights(features)
    torch.testing.assert_close(first, (0.5 * (scale**2 - 1) / 8).exp() - 0.25)
    assert weights.low == 1
    weights.eval()
    half = weights(features / 2)  # lower ones count, and are not kept
    torch.testing.assert_close(half, (0.5 * (scale**2 / 4 - 0.25) / 2).exp() - 0.25)
    again = BiasWeights(0.5, 0.25)
    again.load_state_dict(weights.state_dict())
    assert again.low == 1
    torch.testing.assert_close(again(features + 5), first, rtol=1e-5, atol=1e-6)
    lower = again(2 * features)  # its own smallest is 4, that of all 1
    torch.testing.assert_close(lower, (0.5 * (4 * scale**2 - 1) / 32).exp() - 0.25)
    # the authors' are NaN
    assert (BiasWeights()(torch.ones(4, 3)) == 1 - 0.3).all()
    assert (BiasWeights(within="local")(torch.ones(4, 3)) == 1 - 0.3).all()
    with pytest.raises(ValueError, match=r"features: expected \[N, ...\], two numbers a sample"):
        weights(torch.ones(4, 1))
    with pytest.raises(TypeError, match="features: expected a floating point tensor"):
        weights(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="beta: expected"):
        BiasWeights(beta=1.5)
    with pytest.raises(ValueError, match="within: expected"):
        BiasWeights(within="batch")


def test_equity_weights() -> None:
    p = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(equity_weights(p), (1 + (1 - p) ** 5) / 2)
    torch.testing.assert_close(equity_weights(p, gamma=2.0, eta=0.5), (0.5 + (1 - p) ** 2) / 1.5)
    for bad, kind, words in (
        (p + 0.5, ValueError, "likelihood: expected a value in"),
        (p[None], TypeError, r"likelihood: expected a floating point tensor \[N\]"),
        (torch.ones(3, dtype=torch.int64), TypeError, "likelihood: expected"),
    ):
        with pytest.raises(kind, match=words):
            equity_weights(bad)
    with pytest.raises(ValueError, match="gamma: expected"):
        equity_weights(p, gamma=-1.0)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row of weight 0 that is NaN, and one that is ignored."""
    x, w = torch.randn(7, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    x[2] = torch.nan
    return x, w, torch.tensor([3, 0, 8, 3, -100, 5, 1]), torch.tensor([1.0, 0.5, 0, 2, 3, 0.25, 1])


WEIGHED: dict[str, Callable[..., Any]] = {
    "SFace": lambda *a, **o: class_loss(*a, SFace(16.0), **o),
    "several labels": lambda x, w, y, **o: class_loss(
        x, w, torch.stack([y, torch.where(y < 0, -100, (y + 1) % 9)], -1),
        Softmax(None, 4.0), **o,
    ),
    "margin_softmax": lambda *a, **o: margin_softmax(*a, scale=8.0, **o),
    "smoothed": lambda *a, **o: margin_softmax(*a, scale=8.0, label_smoothing=0.2, **o),
    "capped": lambda *a, **o: margin_softmax(*a, margin=None, scale=8.0, softcap=3.0, **o),
    "linear_cross_entropy": linear_cross_entropy,
}  # fmt: skip


@pytest.mark.float64
@pytest.mark.parametrize("name", WEIGHED)
def test_weights_of_rows(name: str, rows: tuple, backend: str) -> None:
    """The mean's divisor has them, and what counts for nothing may be NaN."""
    x, w, y, counts = rows
    call = WEIGHED[name]
    x, w = x.clone().requires_grad_(), w.requires_grad_()
    each = call(torch.nan_to_num(x.detach()), w.detach(), y, reduction="none", backend=backend)
    counts = counts.double()
    want = torch.where(counts > 0, each, 0) * counts
    given = dict(row_weight=counts, backend=backend)
    torch.testing.assert_close(call(x, w, y, reduction="none", **given).detach(), want)
    torch.testing.assert_close(call(x, w, y, reduction="sum", **given).detach(), want.sum())
    found = call(x, w, y, **given)
    torch.testing.assert_close(found.detach(), want.sum() / counts[y >= 0].sum())
    for grad in torch.autograd.grad(found, (x, w)):
        assert grad.isfinite().all()
    shaped = call(x[None], w, y[None], row_weight=counts[None], backend=backend)
    torch.testing.assert_close(shaped, found)


@pytest.mark.parametrize("call", [unpg_margin_softmax, adaptive_margin_softmax])
def test_rows_of_no_weight_are_not_in_the_batch(call: Callable[..., Any], rows: tuple) -> None:
    """Nor among its pairs, nor in its median."""
    x, w, y, counts = rows
    kept = (counts > 0) & (y >= 0)
    each = call(x[kept], w, y[kept], reduction="none")
    want = (each * counts[kept]).sum() / counts[kept].sum()
    torch.testing.assert_close(call(x, w, y, row_weight=counts), want)


def test_weights_of_probabilities_and_classes() -> None:
    x, w = torch.randn(4, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    p, counts = torch.rand(4, 6, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    each = linear_cross_entropy(x, w, p, reduction="none")
    found = linear_cross_entropy(x, w, p, row_weight=counts, z_loss=0.5)
    square = (x @ w.T).logsumexp(1) ** 2
    torch.testing.assert_close(found, ((each + 0.5 * square) * counts).sum() / counts.sum())
    y, of_classes = torch.tensor([1, 5, 0, 1]), torch.rand(6, dtype=torch.float64)
    found = linear_cross_entropy(x, w, y, weight=of_classes, row_weight=counts)
    same = of_classes[y] * counts
    each = F.cross_entropy(x @ w.T, y, reduction="none")
    torch.testing.assert_close(found, (each * same).sum() / same.sum())


@pytest.mark.parametrize("call", [WEIGHED["SFace"], margin_softmax, linear_cross_entropy])
def test_bad_weights(call: Callable[..., Any]) -> None:
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    for given, kind, text in (
        (torch.ones(2), ValueError, r"row_weight: expected shape \(3,\)"),
        (torch.ones(3, dtype=torch.int64), TypeError, "row_weight: expected a floating point"),
        (-torch.ones(3), ValueError, "row_weight: expected values >= 0"),
        (torch.full((3,), torch.inf), ValueError, "row_weight: expected values >= 0, finite"),
        (torch.ones(3, requires_grad=True), TypeError, "row_weight: .* without gradient"),
    ):
        with pytest.raises(kind, match=text):
            call(x, w, y, row_weight=given)
