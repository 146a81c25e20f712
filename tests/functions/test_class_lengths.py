"""Rows and classes of any length in what normalises them: no square leaves a float's range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import margin_draws
import pytest
import torch
from conftest import require
from draws import Call, Draw, judge
from pair_cases import Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import margins

# of two, so that a row times its length is exact; down to where G / |w| is still a float
POWERS = (0, -100, 90, -60, 60, -116, 110, -21, 21)
OF_NORMS = ("margin_AdaFace", "margin_MagFace")  # the length of an embedding says something there
CASES = {
    case.name: case
    for case in margin_draws.DRAWN
    if "w" in case.leaves and case.function is not fl.distillation  # of lengths, unless it is told
}


def lengths(count: int, of: Tensor) -> Tensor:
    powers = torch.tensor([POWERS[i % len(POWERS)] for i in range(count)], dtype=of.dtype)
    return torch.exp2(powers).view(-1, *[1] * (of.dim() - 1))


def lengthened(case: Case) -> Case:
    """The case with rows times lengths inside: a gradient is then of one size for all."""

    def given(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: Inputs, **options: Any) -> Tensor:
            rows = {"w": t.w * lengths(len(t.w), t.w)}
            if case.name not in OF_NORMS:
                rows["x"] = t.x * lengths(len(t.x), t.x).flip(0)
            return f(Inputs(**(vars(t) | rows)), **options)

        return call

    return replace(case, call=given(case.call), formula=given(case.formula))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_rows_and_classes_of_any_length(name: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference" and dtype == torch.bfloat16:
        pytest.skip("materialised in the dtype of its rows")
    draw = Draw((13, 19, 16), "plain", "as they are", dtype, 7)
    for verdict in judge(lengthened(CASES[name]), draw, [Call(backend)]):
        assert verdict.share <= 1, verdict


@pytest.mark.parametrize("power", [-900, 900])
def test_float64(power: int) -> None:
    x, w, labels = torch.randn(9, 5).double(), torch.randn(11, 5).double(), torch.arange(9)
    for backend in ("reference", "bounded", "cpu"):
        found = []
        for factor in (1.0, 2.0**power):
            leaf = (w * factor).requires_grad_()
            loss = fl.margin_softmax(
                x, leaf, labels, margin=margins.ArcFace(0.5), backend=require(backend)
            )
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0] * factor))
        torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


# of numbers below the smallest normal one; on a GPU's backends they count as zero
@pytest.mark.parametrize("length", [1e-42, 1e-39])
def test_classes_of_denormals(length: float, backend: str) -> None:
    x, labels = torch.randn(7, 6), torch.arange(7)
    w = torch.randn(9, 6)
    w[::2] *= length
    leaf, start = w.clone().requires_grad_(), x.clone().requires_grad_()
    loss = fl.margin_softmax(start, leaf, labels, margin=None, scale=8.0, backend=backend)
    wide = w.double()
    if backend == "cuda":
        wide[::2] = 0
    norm = wide.norm(dim=1, keepdim=True)
    exact = x.double().requires_grad_()
    unit = torch.where(norm > 0, wide / torch.where(norm > 0, norm, 1), 0)
    cosine = exact / exact.norm(dim=1, keepdim=True) @ unit.T
    right = torch.nn.functional.cross_entropy(8.0 * cosine, labels)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    dx, dw = torch.autograd.grad(loss, (start, leaf))
    wanted = torch.autograd.grad(right, exact)[0]
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-5, atol=1e-7)
    # 1 / |w| is none of a float's numbers
    short = dw[::2].abs()
    assert (short == 0).all() if backend == "cuda" else (short > 1e30).all()
    assert dw[1::2].isfinite().all()
