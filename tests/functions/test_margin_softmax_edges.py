"""Rows, classes and values at the edge: none, one, zeros, NaN, lengths far from one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from oracles import relative_error
from small_softmax import C, D, N, call, good
from torch import Tensor

import fused_losses
from fused_losses import margins


def gradients(
    backend: str, inputs: dict[str, Any], **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs["embeddings"].clone().requires_grad_()
    w = inputs["weight"].clone().requires_grad_()
    loss = fused_losses.margin_softmax(x, w, inputs["labels"], backend=backend, **options)
    return (loss, *torch.autograd.grad(loss.sum(), (x, w)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_empty_batch(reduction: str, smoothing: float, backend: str) -> None:
    inputs = {**good(), "embeddings": torch.zeros(0, D), "labels": torch.zeros(0).long()}
    loss, dx, dw = gradients(backend, inputs, reduction=reduction, label_smoothing=smoothing)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert dx.shape == (0, D) and dw.shape == (C, D) and (dw == 0).all()


def test_empty_batch_of_every_margin(backend: str) -> None:
    for margin in (
        margins.AdaFace(),
        margins.MagFace(),
        margins.ElasticArcFace(plus="rank"),
        margins.SphereFace(),
    ):
        inputs = {**good(), "embeddings": torch.zeros(0, D), "labels": torch.zeros(0).long()}
        loss, _, dw = gradients(backend, inputs, margin=margin)
        assert loss.item() == 0 and (dw == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_ignored(reduction: str, weighted: bool, backend: str) -> None:
    inputs = {**good(), "labels": torch.full((N,), -100)}
    options = {"class_weight": torch.rand(C)} if weighted else {}
    loss, dx, dw = gradients(backend, inputs, reduction=reduction, **options)
    assert (loss == 0).all() and (dx == 0).all() and (dw == 0).all()


def test_classes_of_weight_zero_count_for_nothing(backend: str) -> None:
    inputs = {**good(), "labels": torch.zeros(N).long()}
    shares = torch.ones(C)
    shares[0] = 0
    loss, dx, dw = gradients(backend, inputs, class_weight=shares)
    assert loss.item() == 0 and (dx == 0).all() and (dw == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_zero_rows_have_cosine_and_gradient_zero(dtype: torch.dtype, backend: str) -> None:
    inputs = good()
    x, w = inputs["embeddings"].to(dtype), inputs["weight"].to(dtype)
    x[1] = 0
    w[4] = 0  # nobody's class
    w[3] = 0  # the class of rows 1 and 3
    inputs |= {"embeddings": x, "weight": w}
    loss, dx, dw = gradients(backend, inputs, reduction="none", margin=margins.CosFace(0.2))
    assert torch.isfinite(loss).all() and torch.isfinite(dx).all() and torch.isfinite(dw).all()
    assert (dx[1] == 0).all() and (dw[3] == 0).all() and (dw[4] == 0).all()
    # every cosine of row 1 is 0: the target's score is -64 * 0.2, all others 0
    wanted = np.log(C - 1 + np.exp(-12.8)) + 12.8
    assert loss[1].item() == pytest.approx(wanted, rel=1e-2 if dtype == torch.float16 else 1e-5)


def test_nan_row_stays_in_its_own_loss(backend: str) -> None:
    inputs = good()
    clean = call(backend, **inputs, reduction="none")
    inputs["embeddings"][2] = float("nan")
    loss = call(backend, **inputs, reduction="none")
    others = [0, 1, 3, 4, 5]
    assert torch.isnan(loss[2])
    torch.testing.assert_close(loss[others], clean[others])
    assert torch.isnan(call(backend, **inputs))


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_score_shows_in_what_is_made_of_scores(value: float, backend: str) -> None:
    inputs = good()
    inputs["embeddings"][2, 0] = value
    given = [inputs[name] for name in ("embeddings", "weight", "labels")]
    loss = fused_losses.functional.unpg_margin_softmax(*given, normalize=False, backend=backend)
    assert loss.isnan()
    loss = fused_losses.functional.softmax_outputs(*given, backend=backend).logsumexp
    assert loss.isnan().tolist() == [i == 2 for i in range(N)]


def test_a_zero_class_beside_a_nan_row_has_gradient_zero(backend: str) -> None:
    inputs = good()
    inputs["embeddings"][2] = float("nan")
    inputs["weight"][4] = 0
    _, _, dw = gradients(backend, inputs)
    assert (dw[4] == 0).all() and dw[5].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_that_is_ignored_reaches_nothing(value: float, backend: str) -> None:
    inputs = good()
    inputs["labels"][2] = -100
    _, clean_x, clean_w = gradients(backend, inputs)
    inputs["embeddings"][2] = value
    loss, dx, dw = gradients(backend, inputs)
    assert torch.isfinite(loss)
    assert torch.isfinite(dx).all() and (dx[2] == 0).all()
    torch.testing.assert_close(dx, clean_x)
    torch.testing.assert_close(dw, clean_w)


def test_nan_and_inf_do_not_hang_or_pass_unnoticed(backend: str) -> None:
    for name in ("embeddings", "weight"):
        for value in (float("nan"), float("inf"), -float("inf")):
            for normalize in (True, False):
                inputs = good()
                inputs[name][3, 1] = value  # row 3, or the class of rows 1 and 3
                loss, dx, dw = gradients(
                    backend, inputs, reduction="none", normalize=normalize, scale=2.0,
                    margin=margins.CosFace(0.1),
                )  # fmt: skip
                assert loss.shape == (N,) and dx.shape == (N, D) and dw.shape == (C, D)
                assert not torch.isfinite(loss[3])


def test_nan_bias_reaches_every_loss(backend: str) -> None:
    bias = torch.zeros(C)
    bias[7] = float("nan")  # nobody's class, in everybody's denominator
    assert torch.isnan(call(backend, bias=bias, reduction="none")).all()


def test_class_without_a_sample_is_pushed_away_only(backend: str) -> None:
    inputs = good()
    answer = oracles.margin_softmax(
        inputs["embeddings"].numpy(),
        inputs["weight"].numpy(),
        inputs["labels"].numpy(),
        margin=oracles.cosface(0.35),
        scale=4.0,
    )
    _, dx, dw = gradients(backend, inputs, margin=margins.CosFace(0.35), scale=4.0)
    assert relative_error(dw[2], answer.dw[2]) < 1e-5
    assert relative_error(dx, answer.dx) < 1e-5
    assert dw[2].abs().max() > 0


def test_one_class_one_row(backend: str) -> None:
    # alone in the denominator, whatever the margin: loss 0, no gradient, nothing to compare with
    inputs = {
        "embeddings": torch.randn(1, D),
        "weight": torch.randn(1, D),
        "labels": torch.tensor([0]),
    }
    loss, dx, dw = gradients(backend, inputs)
    assert loss.item() == 0 and (dx == 0).all() and (dw == 0).all()
    _, stats = call(backend, **inputs, return_stats=True)
    assert stats.hardest_class.tolist() == [-1]
    assert stats.hardest_cosine.tolist() == [-float("inf")]
    assert stats.hit.tolist() == [True]


def test_no_dimensions(backend: str) -> None:
    # D = 0: all cosines are the empty sum
    inputs = {**good(), "embeddings": torch.zeros(N, 0), "weight": torch.zeros(C, 0)}
    loss, dx, dw = gradients(backend, inputs, margin=None)
    assert loss.item() == pytest.approx(np.log(C), rel=1e-6)
    assert dx.shape == (N, 0) and dw.shape == (C, 0)


def test_tensor_scale_of_zero_is_uniform(backend: str) -> None:
    # a learnt scale may pass 0; it is not read back to be refused
    scale = torch.zeros(N, requires_grad=True)
    loss = call(backend, scale=scale, margin=None, reduction="none")
    torch.testing.assert_close(loss, torch.full((N,), float(np.log(C))))


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: {"embeddings": torch.randn(N, D) * 1e-18},
        lambda: {"embeddings": torch.randn(N, D) * 1e18},
        lambda: {"weight": torch.randn(C, D) * 1e-11},
        lambda: {"weight": torch.randn(C, D) * 1e18},
    ],
    ids=["tiny-rows", "huge-rows", "small-centres", "huge-centres"],
)
def test_lengths_far_from_one(inputs: Callable[[], dict], backend: str) -> None:
    loss, dx, dw = gradients(backend, {**good(), **inputs()})
    assert torch.isfinite(loss) and torch.isfinite(dx).all() and torch.isfinite(dw).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_faulty_row_beside_a_class_of_zeros(value: float, backend: str) -> None:
    """Whose cosine is 0 with every other row, and of which no other class tells."""
    x = torch.ones(3, D)
    x[1, 0] = value
    given = dict(labels=torch.zeros(3).long(), reduction="none", backend=backend)
    loss = fused_losses.margin_softmax(x, torch.zeros(1, D), **given)
    assert loss.isnan().tolist() == [False, True, False] and (loss[::2] == 0).all()
