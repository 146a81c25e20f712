"""Label smoothing in the head is that of `margin_softmax`'s reference in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from class_center_cases import batch, data, gradients, head, same
from torch import nn

from fused_losses import class_losses
from fused_losses.losses.adaptive_scale import AdaptiveScale
from fused_losses.losses.margin_softmax import margin_softmax
from fused_losses.losses.unpg import UNPG
from fused_losses.margins import AdaFace, ArcFace, CosFace, CurricularFace, MagFace

CASES: dict[str, dict[str, Any]] = {
    "arcface": dict(margin=ArcFace(0.5)),
    "no margin, not normalised": dict(margin=None, normalize=False),
    "straight through": dict(margin=CosFace(0.3), gradient="straight_through"),
    "adaface": dict(margin=AdaFace()),
    "magface": dict(margin=MagFace(l_a=0.5, u_a=4.0)),
    "curricular": dict(margin=CurricularFace()),
}


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_smoothing_is_that_of_one_whole_table(case: str, smoothing: float) -> None:
    options, (x, y) = CASES[case], data()
    found = head(**copy.deepcopy(options), label_smoothing=smoothing)
    weight = found.weight.detach().clone().requires_grad_()
    expected = margin_softmax(
        x, weight, y, scale=16.0, label_smoothing=smoothing, backend="reference",
        **copy.deepcopy(options),
    )  # fmt: skip
    same(gradients(3 * found(x, y), x, found.weight), gradients(3 * expected, x, weight))


def test_beside_a_scale_that_learns_without_a_bend() -> None:
    x, y = data()
    scale = nn.Parameter(torch.tensor(7.0, dtype=torch.float64))
    found = head(scale=scale, label_smoothing=0.2)
    own, weight = scale.detach().clone().requires_grad_(), found.weight.detach().clone()
    expected = margin_softmax(
        x, weight, y, margin=ArcFace(0.5), scale=own, label_smoothing=0.2, backend="reference"
    )
    same(gradients(found(x, y), x, scale), gradients(expected, x, own))


@pytest.mark.parametrize("update", ["backward", "step"])
def test_rows_step_by_the_smoothed_gradient(update: str) -> None:
    settings = dict(lr=0.5, momentum=0.9)
    found = head(optimizer="sgd", optimizer_options=settings, update=update, label_smoothing=0.1)
    weight = found.weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], **settings)
    for step in range(4):
        x, y = batch(step)
        found(x, y).backward()
        found.optimizer.step()
        optimizer.zero_grad()
        margin_softmax(
            x, weight, y, margin=ArcFace(0.5), scale=16.0, label_smoothing=0.1, backend="reference"
        ).backward()
        optimizer.step()
    same([found.weight], [weight.detach()])


def test_what_smoothing_cannot_stand_beside() -> None:
    refused: list[dict[str, Any]] = [
        dict(sample_rate=0.5), dict(sub_centers=2), dict(batch_negatives=UNPG(1.0)),
        dict(margin=class_losses.SFace()), dict(margin=AdaptiveScale()),
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(ValueError, match="label_smoothing: expected 0 beside"):
            head(**options, label_smoothing=0.1)
        head(**options, label_smoothing=0.0)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing: expected a value in \[0, 1\]"):
            head(label_smoothing=wrong)
    found = head(label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 beside .* SFace"):
        found.margin = class_losses.SFace()
    x, y = data(labels=2)
    with pytest.raises(ValueError, match="labels: expected one a row with label_smoothing"):
        found(x, y)
