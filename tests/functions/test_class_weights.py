"""Class weights of zero, rows in several dimensions, and scalars that are not floats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchs_own import torch_lce

from fused_losses import (
    adaptive_margin_softmax,
    class_loss,
    class_losses,
    linear_cross_entropy,
    margin_softmax,
    unpg_margin_softmax,
)


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


SFACE = class_losses.SFace(16.0)
POSITIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "margin_softmax": (margin_softmax, dict(scale=8.0)),
    "a scale a row": (margin_softmax, dict(scale=torch.tensor([[1.0, 4, 9], [2, 5, 7]]))),
    "stats": (margin_softmax, dict(return_stats=True)),
    "a class loss": (margin_softmax, dict(margin=SFACE)),
    "class_loss": (class_loss, dict(loss=SFACE)),
    "unpg_margin_softmax": (unpg_margin_softmax, dict(scale=8.0)),
    "adaptive_margin_softmax": (adaptive_margin_softmax, {}),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", POSITIONS)
def test_rows_in_several_dimensions_are_rows(
    rows: tuple[Tensor, Tensor, Tensor], case: str, reduction: str
) -> None:
    (x, w, labels), (function, options) = rows, POSITIONS[case]
    options = dict(options, reduction=reduction)
    got = function(x.view(2, 3, 5), w, labels.view(2, 3), **options)
    if isinstance(options.get("scale"), Tensor):
        options["scale"] = options["scale"].flatten()
    want = function(embeddings=x, weight=w, labels=labels, **options)
    parts = ((found[0], *found[1]) if case == "stats" else (found,) for found in (got, want))
    for a, b in zip(*parts, strict=True):
        assert a.shape == (() if b.dim() == 0 else (2, 3))
        assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize("kind", ["ids", "several labels", "probabilities"])
def test_labels_of_positions(rows: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    x, w, labels = rows
    if kind == "several labels":
        both = torch.stack([labels, torch.full_like(labels, -100)], dim=1)
        got: Any = margin_softmax(x.view(2, 3, 5), w, both.view(2, 3, 2), reduction="none")
        want: Any = margin_softmax(x, w, both, reduction="none")
    else:
        target = labels if kind == "ids" else torch.rand(6, 9, dtype=torch.float64)
        shaped = target.view(2, 3, *target.shape[1:])
        got = linear_cross_entropy(x.view(2, 3, 5), w, shaped, reduction="none")
        want = F.cross_entropy(F.linear(x, w), target, reduction="none")
    torch.testing.assert_close(got, want.view(2, 3), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r": expected shape \(2, 3\) .*, got shape \(6,\)"):
        margin_softmax(x.view(2, 3, 5), w, labels)
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 3\)"):
        linear_cross_entropy(x.view(2, 3, 5), w, labels)


@pytest.mark.parametrize("backend", ["reference", "bounded", "cpu"])
@pytest.mark.parametrize("n", [1, 6])
def test_a_scale_of_one_value_is_a_scalar(
    rows: tuple[Tensor, Tensor, Tensor], n: int, backend: str
) -> None:
    x, w, labels = rows
    found = []
    for shape in ((), (1,)):
        scale = torch.full(shape, 8.0, dtype=torch.float64, requires_grad=True)
        loss: Any = margin_softmax(x[:n], w, labels[:n], scale=scale, backend=backend)
        (slope,) = torch.autograd.grad(loss, scale)
        assert slope.shape == shape
        found.append((loss.detach(), slope.reshape(())))
    assert found[0] == found[1]


def test_numbers_of_numpy(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w, labels = rows
    plain = dict(scale=16, ignore_index=-100, label_smoothing=0.125, memory_budget=1 << 20)
    of_numpy = {
        name: np.float32(value) if isinstance(value, float) else np.int64(value)
        for name, value in plain.items()
    }
    options: Any
    for function in (margin_softmax, linear_cross_entropy):
        common = {k: v for k, v in plain.items() if k != "scale" or function is margin_softmax}
        for backend in ("reference", "bounded", "cpu"):
            options = {k: of_numpy[k] for k in common}
            got = function(x, w, labels, backend=backend, **options)
            options = common
            want = function(x, w, labels, backend=backend, **options)
            torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("input_dtype", "weight_dtype"),
    [(a, b) for a in (torch.float32, torch.bfloat16) for b in (torch.float32, torch.bfloat16)]
    + [(torch.float64, torch.float64)],
)
@pytest.mark.parametrize("kind", ["ids", "probabilities"])
def test_linear_cross_entropy_has_the_dtype_of_torch_under_autocast(
    rows: tuple[Tensor, Tensor, Tensor],
    kind: str,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> None:
    x, w, labels = rows
    x, w = x.to(input_dtype), w.to(weight_dtype)
    target = labels if kind == "ids" else torch.rand(6, 9).to(input_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (f(x, w, target) for f in (linear_cross_entropy, torch_lce))
    assert got.dtype == want.dtype
    # both round the rows to bfloat16, torch the logits, too
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
