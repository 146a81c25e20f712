"""A scale that learns with the head: its gradient is that of `margin_softmax` in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from class_center_cases import C, D, batch, data, gradients, head, same
from torch import Tensor, nn

from fused_losses import class_losses
from fused_losses.centers import ClassCenters, carry_over
from fused_losses.centers.checkpoint import Checkpoints
from fused_losses.centers.sampling import sample
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.unpg import UNPG
from fused_losses.margins import AdaFace, ArcFace, CosFace, CurricularFace, InterclassFilter


def learned(value: float = 16.0, *shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value, dtype=dtype))


CASES: dict[str, dict[str, Any]] = {
    "arcface": {},
    "no margin, not normalised": dict(margin=None, normalize=False),
    "straight through": dict(margin=CosFace(0.3), gradient="straight_through"),
    "adaface": dict(margin=AdaFace()),
    "sub-centres": dict(sub_centers=3),
    "a sample": dict(sample_rate=0.4, seed=3),
    "a sample that stands for all": dict(sample_rate=0.4, seed=3, log_q=True, margin=None),
}


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("case", CASES)
def test_the_scales_gradient_is_that_of_one_whole_table(case: str, shape: tuple[int, ...]) -> None:
    options, (x, y) = CASES[case], data()
    scale = learned(7.0, *shape)
    found = head(**copy.deepcopy(options), scale=scale)
    assert any(p is scale for p in found.parameters())
    weight = found.weight.detach().clone().requires_grad_()
    own = scale.detach().clone().requires_grad_()
    if "sample_rate" in options:
        drawn = sample(0, C, 0.4, seed=3, step=0)
        part = torch.cat([drawn, y[y >= 0]]).unique()
        bias = torch.zeros(C, dtype=torch.float64)
        if options.get("log_q"):  # the batch's own classes are there anyway
            bias[torch.isin(torch.arange(C), y, invert=True)] = -math.log(0.4)
        margin = options.get("margin", ArcFace(0.5))
        expected = margin_softmax(
            x, weight, y, margin=margin, scale=own, classes=part, bias=bias, backend="reference"
        )
    elif "sub_centers" in options:  # the best centre of a class, picked by hand
        cosine = (
            torch.nn.functional.normalize(x, dim=1)
            @ torch.nn.functional.normalize(weight.flatten(0, 1), dim=1).T
        )
        whole = cosine.view(len(x), C, -1).amax(dim=2)
        valid = y >= 0
        target = whole.gather(1, y.clamp_min(0)[:, None])
        moved = torch.cos(target.acos() + 0.5)
        logits = own.reshape(()) * whole.scatter(1, y.clamp_min(0)[:, None], moved)
        expected = torch.nn.functional.cross_entropy(logits[valid], y[valid])
    else:
        defaults = dict(margin=ArcFace(0.5))
        expected = margin_softmax(
            x, weight, y, scale=own, backend="reference",
            **{**defaults, **copy.deepcopy(options)},
        )  # fmt: skip
    same(
        gradients(3 * found(x, y), x, found.weight, scale),
        gradients(3 * expected, x, weight, own),
    )


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("update", ["backward", "step"])
def test_it_learns_beside_rows_that_step_themselves(update: str, rate: float) -> None:
    """Frozen embeddings, too: the scale's own steps are those of autograd's table."""
    told = []
    for optimizer in (None, "sgd"):
        scale = learned(16.0)
        options: dict[str, Any] = dict(sample_rate=rate, seed=2, log_q=rate < 1)
        if optimizer is not None:
            options |= dict(optimizer="sgd", optimizer_options=dict(lr=0.5), update=update)
        found = head(scale=scale, **options)
        mine: list[torch.optim.Optimizer] = [torch.optim.SGD([scale], lr=2.0)]
        mine += [found.optimizer or torch.optim.SGD([found.weight], lr=0.5)]
        for step in range(4):
            x, y = batch(step)
            for each in mine:
                each.zero_grad()
            found(x.detach() if step == 2 else x, y).backward()
            for each in mine:
                each.step()
        told.append((scale.detach(), found.weight.detach()))
    same(list(told[0]), list(told[1]))
    assert abs(told[0][0] - 16) > 0.01


def test_it_is_saved_loaded_and_copied_with_the_head(tmp_path: Any) -> None:
    x, y = data()
    found = head(scale=learned(9.0), optimizer="sgd")
    assert found.state_dict()["scale"] == 9 and found.state()["scale"] == 9
    other = head(scale=learned(5.0), optimizer="sgd", seed=4)
    other.load_state_dict(found.state_dict())
    assert other.scale == 9
    for twin in (copy.deepcopy(found), other):
        assert twin.scale is not found.scale
        assert torch.equal(twin(x, y), found(x, y))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"head": found.state()}, 1)
        third = head(scale=learned(5.0), optimizer="sgd", seed=4)
        assert checkpoints.load({"head": third.state()}) == 1
    third.load()
    assert third.scale == 9
    grown = ClassCenters(C + 3, D, dtype=torch.float64, scale=learned(5.0), optimizer="sgd")
    carry_over(found, grown)
    assert grown.scale == 9
    found.scale.requires_grad_(False)
    found(x, y).backward()
    assert found.scale.grad is None


@pytest.mark.parametrize("margin", [
    CurricularFace(), InterclassFilter(ArcFace()), class_losses.SFace(), AdaptiveScale(),
], ids=lambda m: type(m).__name__)  # fmt: skip
def test_what_it_cannot_stand_beside(margin: Any) -> None:
    with pytest.raises(ValueError, match=f"scale: .*parameter beside {type(margin).__name__}"):
        head(margin=margin, scale=learned())
    found = head(scale=learned())
    with pytest.raises(ValueError, match="scale: expected a number beside"):
        found.margin = margin


def test_a_parameter_that_is_no_scale() -> None:
    wrong: list[tuple[Tensor, str]] = [
        (learned(16.0, 2), "one floating point value"),
        (learned(-1.0), "a finite value > 0"),
        (learned(float("nan")), "a number, got nan"),
        (nn.Parameter(torch.tensor(16), requires_grad=False), "one floating point value"),
    ]
    for scale, told in wrong:
        with pytest.raises(ValueError, match=f"scale: expected {told}"):
            head(scale=scale)
    with pytest.raises(ValueError, match="batch_negatives: expected .* a fixed scale"):
        head(scale=learned(), batch_negatives=UNPG(1.0))
    found = head(scale=learned())
    with torch.no_grad():
        found.scale.neg_()
    with pytest.raises(ValueError, match="scale: expected a finite value > 0"):
        found(*data())
