"""A tensor [C] in a head's margin is one value a class: that of the row's label."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from class_center_cases import C, batch, data, gradients, head, same
from torch import Tensor, nn

from fused_losses import class_losses
from fused_losses.centers import ClassCenters, carry_over
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticCosFace,
    InterclassFilter,
    MagFace,
    MVSoftmax,
    SphereFace,
)


def values(low: float, high: float) -> Tensor:
    """In an order that is not that of the classes."""
    return torch.linspace(low, high, C, dtype=torch.float64)[torch.arange(C) * 10 % C]


MARGINS: dict[str, Any] = {
    "arcface": ArcFace(values(0.1, 0.7)),
    "cosface": CosFace(values(0, 0.5)),
    "float32, of a shape that a scalar has": CombinedMargin(
        torch.tensor([1.0]), values(0.1, 0.5).float(), values(0, 0.2)
    ),
    "sphereface": SphereFace(values(1, 2.5)),
    "adaface": AdaFace(values(0.2, 0.5)),
    "magface": MagFace(0.5, 4.0, values(0.2, 0.4), values(0.5, 0.8)),
    "curricular": CurricularFace(values(0.2, 0.6)),
    "mv-softmax": MVSoftmax(margin=values(0.2, 0.5)),
    "inside a filter": InterclassFilter(ArcFace(values(0.1, 0.7)), 0.3),
    "drawn": ElasticCosFace(values(0.2, 0.5), 0.0),
}


def of_labels(margin: Any, y: Tensor) -> Any:
    """The same margin with the labels' values, put together by hand."""

    def picked(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.shape == (C,)
        return value.detach()[y.clamp_min(0)] if whole else value

    made = copy.deepcopy(margin)
    inner = made.margin if isinstance(made, InterclassFilter) else made
    for name, value in list(vars(inner).items()):
        object.__setattr__(inner, name, picked(value))
    return made


@pytest.mark.parametrize("name", MARGINS)
def test_each_row_has_its_classs(name: str) -> None:
    margin, (x, y) = copy.deepcopy(MARGINS[name]), data()
    expected_margin = of_labels(margin, y)
    found = head(margin=margin)
    weight = found.weight.detach().clone().requires_grad_()
    for _ in range(2):  # averages go on in both
        expected = margin_softmax(
            x, weight, y, margin=expected_margin, scale=16.0, backend="reference"
        )
        same(gradients(3 * found(x, y), x, found.weight), gradients(3 * expected, x, weight))
    assert found.margin is margin


def test_a_callable_of_ones_own() -> None:
    class Own:
        def __init__(self) -> None:
            self.shift, self.table = values(0, 0.5), torch.ones(3)

        def __call__(self, cosine: Tensor) -> Tensor:
            return cosine - self.shift

    x, y = data()
    same([head(margin=Own())(x, y)], [head(margin=CosFace(values(0, 0.5)))(x, y)])


@pytest.mark.parametrize("centers", [1, 2])
def test_of_several_labels(centers: int) -> None:
    margin = class_losses.Softmax(CosFace(values(0, 0.5)), scale=16.0)
    x, y = data(labels=3)
    found = head(margin=margin, sub_centers=centers)
    weight = found.weight.detach().clone().requires_grad_()
    by_hand = CosFace(values(0, 0.5)[y.flatten().clamp_min(0)])
    expected = class_loss(
        x, weight, y, loss=class_losses.Softmax(by_hand, scale=16.0), backend="reference"
    )
    same(gradients(found(x, y), x, found.weight), gradients(expected, x, weight))


def test_margins_that_learn() -> None:
    learned = nn.Parameter(values(0, 0.5))
    x, y = data()
    found = head(margin=CosFace(learned))
    assert [name for name, _ in found.named_parameters()] == ["weight", "margin_parts.margin"]
    weight, own = found.weight.detach().clone(), learned.detach().clone().requires_grad_()
    expected = margin_softmax(
        x, weight, y, margin=CosFace(own[y.clamp_min(0)]), scale=16.0, backend="reference"
    )
    same(gradients(found(x, y), x, learned), gradients(expected, x, own))
    more = ClassCenters(C + 2, x.shape[1], dtype=torch.float64, margin=CosFace(new_margins(C + 2)))
    carry_over(found, more)
    kept = more.margin_parts.margin
    assert torch.equal(kept[:C], learned) and bool((kept[C:] == 0.1).all())


def new_margins(classes: int) -> nn.Parameter:
    return nn.Parameter(torch.full((classes,), 0.1, dtype=torch.float64))


def test_a_table_that_steps_and_another_margin_later() -> None:
    """LDAM's delta C / n^(1/4), and from the second step on, as its deferred schedule has it."""
    options = dict(optimizer="sgd", optimizer_options=dict(lr=0.5))
    found = head(**options)
    weight = found.weight.clone()
    for step in range(3):
        x, y = batch(step)
        delta = values(0, 0.5) * (step > 0)
        found.margin = CosFace(delta)
        found(x, y).backward()
        weight.requires_grad_()
        loss = margin_softmax(
            x, weight, y, margin=CosFace(delta[y]), scale=16.0, backend="reference"
        )
        weight = (weight - 0.5 * torch.autograd.grad(loss, weight)[0]).detach()
        same([found.weight], [weight])


def test_another_number_of_values_is_refused_at_construction() -> None:
    for margin in (CosFace(torch.zeros(C - 1)), InterclassFilter(ArcFace(torch.zeros(C, 1)))):
        with pytest.raises(ValueError, match=rf"margin.margin: expected .* shape \({C},\), got"):
            head(margin=margin)
