"""linear_cross_entropy against torch.nn.functional.linear_cross_entropy, argument by argument."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import STREAMED, require, widest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchs_own import torch_lce

import fused_losses


def both(
    x: Tensor, w: Tensor, target: Tensor, backend: str, bias: Tensor | None = None, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(loss, gradients) of ours and of torch's; "none" is summed with fixed weights."""
    answers = []
    for function, extra in (
        (fused_losses.linear_cross_entropy, {"backend": backend}),
        (torch_lce, {}),
    ):
        leaves = [a.clone().requires_grad_() for a in (x, w, bias) if a is not None]
        own = leaves[2] if bias is not None else None
        loss = function(leaves[0], leaves[1], target, linear_bias=own, **options, **extra)
        weights = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        answers.append((loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)))
    return answers[0], answers[1]


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    room = {torch.float64: 1e-10, torch.float32: 2e-5}[theirs[0].dtype]
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=room, atol=room, equal_nan=True)


def inputs(n: int = 23, d: int = 9, c: int = 31, dtype: torch.dtype = torch.float64) -> tuple:
    x, w = torch.randn(n, d, dtype=dtype), torch.randn(c, d, dtype=dtype)
    return x, w, torch.randint(0, c, (n,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "bias, weight, ignored, smoothing",
    [
        (False, False, None, 0.0),
        (True, False, None, 0.0),
        (False, True, None, 0.0),
        (False, False, 5, 0.0),
        (False, False, -100, 0.3),
        (False, False, -1, 0.0),
        (True, True, 5, 0.3),
        (True, True, None, 1.0),
    ],
    ids=[
        "plain", "bias", "weight", "class-5-ignored", "smoothing", "minus-one-ignored",
        "everything", "smoothing-one",
    ],
)  # fmt: skip
def test_class_ids(
    bias: bool,
    weight: bool,
    ignored: int | None,
    smoothing: float,
    reduction: str,
    backend: str,
) -> None:
    x, w, target = inputs(dtype=widest(backend))
    if ignored is not None:
        target[::4] = ignored
    own = torch.randn(31, dtype=x.dtype) if bias else None
    shares = torch.rand(31, dtype=x.dtype) + 0.1 if weight else None
    options = {"weight": shares, "label_smoothing": smoothing, "reduction": reduction}
    assert_same(*both(x, w, target, backend, own, ignore_index=ignored, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "bias-weight-smoothing"])
def test_probabilities(everything: bool, reduction: str, backend: str) -> None:
    x, w, _ = inputs(dtype=widest(backend))
    target = torch.softmax(3 * torch.randn(23, 31, dtype=x.dtype), 1)
    options: dict[str, Any] = {"reduction": reduction}
    bias = None
    if everything:
        bias = torch.randn(31, dtype=x.dtype)
        options |= {"weight": torch.rand(31, dtype=x.dtype), "label_smoothing": 0.2}
    assert_same(*both(x, w, target, backend, bias, **options))


def test_probabilities_that_do_not_sum_to_one(backend: str) -> None:
    x, w, _ = inputs(dtype=widest(backend))
    assert_same(*both(x, w, torch.rand(23, 31, dtype=x.dtype), backend))


def test_probabilities_get_torchs_gradient(backend: str) -> None:
    x, w, _ = inputs(dtype=widest(backend))
    grads = []
    for function, extra in (
        (fused_losses.linear_cross_entropy, {"backend": backend}),
        (torch_lce, {}),
    ):
        target = torch.full((23, 31), 1 / 31, dtype=x.dtype, requires_grad=True)
        try:
            grads.append(torch.autograd.grad(function(x, w, target, **extra), target)[0])
        except RuntimeError:
            grads.append(None)
    if grads[1] is not None:
        # sum_j p_j (lse - z_j): the gradient lse - z_j is N x C by nature
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_dimensional_input(reduction: str, backend: str) -> None:
    x, w, target = inputs(dtype=widest(backend))
    assert_same(*both(x[0], w, target[0], backend, reduction=reduction))
    soft = torch.softmax(torch.randn(31, dtype=x.dtype), 0)
    assert_same(*both(x[0], w, soft, backend, reduction=reduction))


def test_one_dimensional_input_takes_no_batch_of_targets(backend: str) -> None:
    x, w, target = inputs(dtype=widest(backend))
    with pytest.raises(ValueError, match="target|labels"):
        fused_losses.linear_cross_entropy(x[0], w, target[:2], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_result_is_the_inputs(dtype: torch.dtype, backend: str) -> None:
    x, w, target = inputs()
    x, w = (x / 3).to(dtype), w.to(dtype)
    ours = fused_losses.linear_cross_entropy(x, w, target, backend=backend)
    theirs = torch_lce(x, w, target)
    assert ours.dtype == theirs.dtype == dtype
    exact = torch_lce(x.double(), w.double(), target).item()
    # no worse than torch's own, plus the rounding of the result
    room = abs(theirs.item() - exact) + 2 * torch.finfo(dtype).eps * exact
    assert abs(ours.item() - exact) <= room


def test_all_ignored(backend: str) -> None:
    x, w, target = inputs(dtype=widest(backend))
    target[:] = -100
    for reduction in ("mean", "sum", "none"):
        ours, theirs = both(x, w, target, backend, reduction=reduction)
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
        assert torch.isnan(ours[0]).item() if reduction == "mean" else (ours[0] == 0).all()
        if reduction != "mean":
            assert all((g == 0).all() for g in ours[1:])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(reduction: str, backend: str) -> None:
    x, w, target = inputs(n=0, dtype=widest(backend))
    ours, theirs = both(x, w, target, backend, reduction=reduction)
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    assert ours[1].shape == (0, 9)


def test_options_are_accepted(backend: str) -> None:
    x, w, target = inputs(dtype=widest(backend))
    made = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if made is None:
        pytest.skip("this torch has no LinearCrossEntropyOptions")
    plain = fused_losses.linear_cross_entropy(x, w, target, backend=backend)
    chunked = fused_losses.linear_cross_entropy(x, w, target, options=made(), backend=backend)
    assert torch.equal(plain, chunked)


def test_several_weights_a_class_are_refused(backend: str) -> None:
    x, w, target = inputs(dtype=widest(backend))
    with pytest.raises(
        ValueError, match=r"linear_weight: expected \[C, D\], got shape \(31, 2, 9\)"
    ):
        fused_losses.linear_cross_entropy(x, w[:, None].expand(31, 2, 9), target, backend=backend)


def test_probabilities_of_another_shape_are_refused(backend: str) -> None:
    x, w, _ = inputs(dtype=widest(backend))
    with pytest.raises(ValueError, match=r"target: expected class ids \[23\] or probabilities"):
        fused_losses.linear_cross_entropy(x, w, torch.rand(23, 30, dtype=x.dtype), backend=backend)
    with pytest.raises(ValueError, match="ignore_index: expected None with probabilities"):
        fused_losses.linear_cross_entropy(
            x, w, torch.rand(23, 31, dtype=x.dtype), ignore_index=3, backend=backend
        )


def test_large_logits_stay_finite(backend: str) -> None:
    x = torch.full((2, 4), 100.0, requires_grad=True)
    w = torch.tensor([[100.0] * 4, [-100.0] * 4])
    loss = fused_losses.linear_cross_entropy(x, w, torch.tensor([0, 1]), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(40000.0, rel=1e-6)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", STREAMED)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 70),
    c=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    ignored=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape(
    name: str,
    n: int,
    d: int,
    c: int,
    seed: int,
    ignored: bool,
    smoothing: float,
    bias: bool,
    reduction: str,
    dtype: torch.dtype,
) -> None:
    require(name)
    torch.manual_seed(seed)
    dtype = min(dtype, widest(name), key=lambda d: d.itemsize)
    x, w, target = inputs(n, d, c, dtype)
    x = x / d**0.5
    if ignored:
        target[::2] = -100
    own = torch.randn(c, dtype=dtype) if bias else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = both(x, w, target, name, own, label_smoothing=smoothing, reduction=reduction)
    if ignored and n == 1 and reduction == "mean":  # torch's mean over nothing
        assert torch.isnan(ours[0]) and torch.isnan(theirs[0])
        return
    assert_same(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("side", ["row", "class", "bias"])
def test_numbers_that_are_none(side: str, value: float, smoothing: float, backend: str) -> None:
    """The score counts, as in torch: the same rows are NaN or infinite, in losses and gradients."""
    x, w, target = inputs(6, 5, 9, torch.float32)
    bias = torch.randn(9)
    target = torch.arange(6)
    at = (bias[:, None] if side == "bias" else x if side == "row" else w)[3]
    at[min(2, len(at) - 1)] = value
    ours, theirs = both(x, w, target, backend, bias, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-5, equal_nan=True)
    broken = [~t.isfinite().all(1) for t in (ours[1], theirs[1])]
    assert torch.equal(*broken)
