"""Label smoothing in the head is that of `margin_softmax`'s reference in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from class_center_cases import C, batch, data, gradients, head, same
from dense_head import MARGIN, SCALE, DenseHead
from torch import nn

from fused_losses import class_losses
from fused_losses.centers.sampling import sample
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.unpg import UNPG
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


SAMPLES: dict[str, dict[str, Any]] = {
    "a sample": dict(sample_rate=0.3),
    "a corrected sample": dict(sample_rate=0.3, log_q=True),
    "sub-centres": dict(sub_centers=3),
    "sub-centres, a sample": dict(sub_centers=2, sample_rate=0.4),
    "sub-centres, a corrected sample": dict(sub_centers=2, sample_rate=0.4, log_q=True),
}


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("case", SAMPLES)
def test_over_a_sample_and_sub_centres(case: str, update: str, smoothing: float) -> None:
    settings, options = dict(lr=0.5, momentum=0.9, weight_decay=0.01), SAMPLES[case]
    found = head(
        optimizer="sgd", optimizer_options=settings, update=update, label_smoothing=smoothing,
        margin=CosFace(MARGIN), scale=SCALE, seed=3, **options,
    )  # fmt: skip
    dense, rate = DenseHead(found.weight, "sgd", settings), found.sample_rate
    for step in range(4):
        x, y = batch(step)
        y[step] = -100
        drawn = sample(0, C, rate, seed=3, step=step) if rate < 1 else None
        part = dense.taking_part(y, drawn)
        twin = x.detach().clone().requires_grad_()
        chance = rate if found.log_q else 1.0
        loss, expected = found(x, y), dense.loss(twin, y, part, smoothing=smoothing, chance=chance)
        same([loss.detach()], [expected.detach()])
        loss.backward()
        found.optimizer.step()
        (d_twin,) = torch.autograd.grad(expected, twin, retain_graph=True)
        assert x.grad is not None
        same([x.grad], [d_twin])
        dense.backward(expected, part)
        dense.step()
        same([found.weight], [dense.weight.detach()])
    x, y = batch(9)  # all classes count where nothing trains
    same([found.eval()(x, y).detach()], [dense.loss(x, y, smoothing=smoothing).detach()])


def test_what_smoothing_cannot_stand_beside() -> None:
    refused: list[dict[str, Any]] = [
        dict(batch_negatives=UNPG(1.0)), dict(margin=class_losses.SFace()),
        dict(margin=AdaptiveScale()),
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
