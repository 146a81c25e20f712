"""The numbers of margins and of losses over classes: their ranges, and tensors in their place."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import class_losses, margins
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.unpg import UNPG

# name -> how it is made, beside the argument in question
MAKERS: dict[str, Any] = {
    name: kind
    for module in (margins, class_losses)
    for name, kind in vars(module).items()
    if inspect.isclass(kind)
    and kind.__module__ in ("fused_losses.margins", "fused_losses.functions.class_values")
    and name not in ("_Elastic", "ClassLoss", "MergedRows")
} | {"AdaptiveScale": AdaptiveScale, "UNPG": UNPG}
GIVEN: dict[str, dict[str, Any]] = {
    "CombinedMargin": dict(m1=1.2),  # inside its range
    "SphereFace2": dict(bias=0.3),
    "InterclassFilter": dict(margin=None),
    "MagFace": dict(l_a=0.5, u_a=9.0),
    "AdaptiveScale": dict(smallest=8.0),
}


def _signature(name: str) -> dict[str, float]:
    """The float arguments and a value of each."""
    found = {}
    for p in inspect.signature(MAKERS[name]).parameters.values():
        if "float" in str(p.annotation):
            given = GIVEN.get(name, {}).get(p.name, p.default)
            found[p.name] = 2.0 if given is None else float(given)
    return found


PARAMETERS = {f"{n}, {p}": (n, p, v) for n in MAKERS for p, v in _signature(n).items()}


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    return x, w, torch.tensor([0, 3, 10, 2, -100, 6, 7])


def loss_with(name: str, parameter: str, value: Any, backend: str, gradient: str) -> Tensor:
    x, w, labels = _rows()
    made: Any = MAKERS[name](**{**GIVEN.get(name, {}), parameter: value})
    if hasattr(made, "double"):
        made.double()
    torch.manual_seed(5)  # of the margins that draw
    options: dict[str, Any] = dict(backend=backend, reduction="none")
    if name == "UNPG":
        loss = fused_losses.unpg_margin_softmax(x, w, labels, negatives=made, scale=8.0, **options)
    elif isinstance(made, class_losses.ClassLoss):
        loss = fused_losses.class_loss(x, w, labels, made, **options)
    else:
        options |= {} if name == "AdaptiveScale" else dict(scale=8.0, gradient=gradient)
        loss = fused_losses.margin_softmax(x, w, labels, margin=made, **options)
    assert isinstance(loss, Tensor)
    return (loss * torch.linspace(0.5, 1.5, 7, dtype=loss.dtype)).sum()


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("backend", ["reference", "bounded"])
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_tensor_carries_its_gradient_or_is_refused(
    case: str, backend: str, gradient: str
) -> None:
    name, parameter, value = PARAMETERS[case]
    leaf = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    try:
        MAKERS[name](**{**GIVEN.get(name, {}), parameter: leaf})
    except TypeError as refusal:
        assert str(refusal).startswith(f"{parameter}: ") and "gradient" in str(refusal)
        with torch.no_grad(), pytest.raises(TypeError, match=f"{parameter}: .*gradient"):
            MAKERS[name](**{**GIVEN.get(name, {}), parameter: leaf})  # the call comes later
        return
    found = torch.autograd.grad(loss_with(name, parameter, leaf, backend, gradient), leaf)[0]
    step = 1e-5
    ends = [
        loss_with(name, parameter, leaf.detach() + sign * step, backend, gradient)
        for sign in (1, -1)
    ]
    want = (ends[0] - ends[1]) / (2 * step)
    assert found.abs() > 0
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


REFUSED = [
    (
        lambda: margins.ArcFace(28.6),
        r"margin: expected radians in \[0, pi\] \(28.6 degrees are 0.4992",
    ),
    (lambda: margins.ArcFace(-1), r"margin: expected radians in \[0, pi\], got -1"),
    (lambda: margins.ArcFace(math.nan), "margin: expected a number, got nan"),
    (lambda: margins.ArcFace(torch.tensor(28.6)), r"margin: expected radians .*, got 28.6"),
    (lambda: margins.ArcFace(eps=-0.1), r"eps: expected a value in \[0, 1\]"),
    (lambda: margins.CosFace(35), r"margin: expected a value in \[0, 2\], got 35"),
    (lambda: margins.CosFace(-0.1), r"margin: expected a value in \[0, 2\], got -0.1"),
    (lambda: margins.SphereFace(0.5), "margin: expected a finite value >= 1, got 0.5"),
    (lambda: margins.SphereFace(math.inf), "margin: expected a finite value >= 1, got inf"),
    (lambda: margins.CombinedMargin(m1=0.9), "m1: expected a finite value >= 1"),
    (lambda: margins.CombinedMargin(m2=17.2), r"m2: .*17.2 degrees are 0.3002"),
    (lambda: margins.CombinedMargin(m3=35), r"m3: expected a value in \[0, 2\]"),
    (lambda: margins.ElasticArcFace(28.6), "margin: expected radians"),
    (lambda: margins.ElasticArcFace(std=math.inf), "std: expected a finite value >= 0"),
    (lambda: margins.ElasticCosFace(35), r"margin: expected a value in \[0, 2\]"),
    (lambda: margins.AdaFace(28.6), r"margin: expected a value in \[0, 1\]"),
    (lambda: margins.AdaFace(h=-1), "h: expected a finite value >= 0"),
    (lambda: margins.AdaFace(momentum=1.5), r"momentum: expected a value in \[0, 1\]"),
    (lambda: margins.AdaFace(eps=0), "eps: expected a finite value > 0"),
    (lambda: margins.MagFace(l_a=0), "l_a: expected a finite value > 0"),
    (lambda: margins.MagFace(l_a=10, u_a=10), "u_a: expected a finite value > 10"),
    (lambda: margins.MagFace(u_margin=45), "u_margin: expected radians"),
    (lambda: margins.MagFace(penalty_weight=-1), "penalty_weight: expected a finite value >= 0"),
    (lambda: margins.CurricularFace(28.6), "margin: expected radians"),
    (lambda: margins.MVSoftmax("arc", 28.6), "margin: expected radians"),
    (lambda: margins.MVSoftmax("am", 35), r"margin: expected a value in \[0, 2\]"),
    (lambda: margins.InterclassFilter(None, -1.5), "threshold: expected a finite value >= -1"),
    (lambda: class_losses.Softmax(scale=math.inf), "scale: expected a finite value > 0"),
    (lambda: class_losses.SFace(a=math.nan), "a: expected a number, got nan"),
    (lambda: class_losses.SoftTriple(margin=math.inf), "margin: expected a finite value"),
    (lambda: class_losses.SphereFace2(0.0, t=0.5), "t: expected a finite value >= 1"),
    (lambda: class_losses.SphereFace2(math.inf), "bias: expected a finite value"),
    (lambda: UNPG(-1.0), "whisker: expected a finite value >= 0"),
    (lambda: AdaptiveScale(odds=math.inf), "odds: expected a finite value"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[m for _, m in REFUSED])
def test_a_number_out_of_its_range_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_of_numpy_are_numbers(name: str) -> None:
    for parameter, value in _signature(name).items():
        for number in (np.float32(value), np.float64(value)):
            got = loss_with(name, parameter, number, "bounded", "exact")
            want = loss_with(name, parameter, float(number), "bounded", "exact")
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


WRONG = {
    "a number": (0.5, r"got 0.5; write ArcFace\(0.5\) or CosFace\(0.5\)"),
    "a class": (margins.ArcFace, r"got the class ArcFace; write ArcFace\(\)"),
    "a loss's class": (class_losses.SFace, r"got the class SFace; write SFace\(\)"),
    "a name": ("arcface", "got 'arcface'; write the object"),
    "a tensor": (torch.tensor(0.5), "got tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_margin_is_refused(case: str) -> None:
    (x, w, labels), (wrong, message) = _rows(), WRONG[case]
    message = "margin: expected None, a margin .*" + message
    for call in (
        lambda: fused_losses.margin_softmax(x, w, labels, margin=wrong),
        lambda: fused_losses.unpg_margin_softmax(x, w, labels, margin=wrong),
        lambda: class_losses.Softmax(wrong),
        lambda: margins.InterclassFilter(wrong),
    ):
        with pytest.raises(TypeError, match=message):
            call()
