"""The authors' own numbers: value and gradients of their heads on stored inputs, in float64.

`golden/index.json` names for each file the source and commit, the function, its parameters and
what the recording harness adapted. Those of losses whose negatives move too stand in
test_margin_bends.py, test_class_losses.py, test_adaptive_scale.py and test_batch_negatives.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import GOLDEN
from torch import Tensor

import fused_losses
from fused_losses import margins

FOLDER = GOLDEN
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]
EXACT = 1e-9

# The *_edge files put rows 0, 1 and 5 at theta = 0, pi and 1e-4. There theta = acos(t) makes 2e-8
# (row 5: 1e-12) of the last digit of t, 2e-16, so that the original's own digits end: the loss
# holds to 64 sin(m) 2e-8 / 32 of 15, and row 5's gradient, over sin(theta), to 2e-16 / theta^2.
ANGLE_VALUE, ANGLE_GRADIENT = 5e-9, 5e-8


@dataclass(frozen=True)
class Head:
    """How a golden is asked of `margin_softmax`, and how closely it must answer."""

    name: str
    margin: Callable[[dict[str, Tensor]], margins.Margin | None]
    scale: float | Callable[[Tensor], Tensor] = 64.0
    gradient: str = "exact"
    value_tolerance: float = EXACT
    gradient_tolerance: float = EXACT
    # rows at |t| = 1: the original divides by sin(theta) = 0 or 1e-8 (NaN, or rounding times 1e8)
    # where ours gives the gradient 0; their classes' rows of the weight are left out with them
    undefined: tuple[int, ...] = ()


def drawn(kind: type, plus: str | None) -> Callable[[dict[str, Tensor]], margins.Margin]:
    """An Elastic margin with the stored draws in place of its own."""

    def make(data: dict[str, Tensor]) -> margins.Margin:
        class Drawn(kind):
            def draw(self, cosine: Tensor) -> Tensor:
                return data["sampled_margin"]

        return Drawn(plus=plus)

    return make


def clamped_cosface(data: dict[str, Tensor]) -> margins.Margin:
    """AdaFace's own CosFace: the cosine clamped to +-(1 - 1e-4), gradient 0 outside."""
    return lambda t: t.clamp(-1 + 1e-4, 1 - 1e-4) - 0.4


def arc(margin: float, beyond_pi: str, eps: float = 1e-3) -> Callable:
    return lambda data: margins.ArcFace(margin, beyond_pi, eps)


EDGE = {"value_tolerance": ANGLE_VALUE, "gradient_tolerance": ANGLE_GRADIENT, "undefined": (0, 1)}
HEADS = [
    Head("insightface_arc", arc(0.5, "none"), gradient="straight_through"),
    # straight through: no division by sin(theta), so every row's gradient is defined
    Head(
        "insightface_arc_edge",
        arc(0.5, "none"),
        gradient="straight_through",
        value_tolerance=ANGLE_VALUE,
        gradient_tolerance=ANGLE_GRADIENT,
    ),
    Head("insightface_cos", lambda data: margins.CosFace(0.4)),
    Head("elastic_ArcFace", arc(0.5, "none")),
    Head("elastic_ArcFace_edge", arc(0.5, "none"), **EDGE),
    Head("elastic_CosFace", lambda data: margins.CosFace(0.35)),
    Head("elastic_ElasticArcFace", drawn(margins.ElasticArcFace, None)),
    Head("elastic_ElasticArcFace_edge", drawn(margins.ElasticArcFace, None), **EDGE),
    Head("elastic_ElasticArcFace_plus", drawn(margins.ElasticArcFace, "reference")),
    Head("elastic_ElasticCosFace", drawn(margins.ElasticCosFace, None)),
    Head("elastic_ElasticCosFace_plus_edge", drawn(margins.ElasticCosFace, "reference")),
    Head("curricular_ArcFace", arc(0.5, "linear")),
    Head("curricular_ArcFace_edge", arc(0.5, "linear"), **EDGE),
    Head("adaface_AdaFace", lambda data: stored_adaface(data)),
    Head("adaface_ArcFace", arc(0.5, "clip", 1e-4)),
    Head("adaface_CosFace", clamped_cosface),
    Head("adaface_CosFace_edge", clamped_cosface),
    Head("magface_easy", lambda data: margins.MagFace()),
    Head("magface_easy_edge", lambda data: margins.MagFace(), **EDGE),
    Head("pml_ArcFaceLoss", arc(math.radians(28.6), "linear")),
    Head("pml_CosFaceLoss", lambda data: margins.CosFace(0.35)),
    Head("pml_NormalizedSoftmaxLoss", lambda data: None, scale=1 / 0.05),
    Head(
        "pml_SphereFaceLoss",
        lambda data: margins.SphereFace(4.0),
        scale=lambda x: x.norm(dim=1),
    ),
]


def load(name: str) -> dict[str, Tensor]:
    """The arrays of a file, the weight always [C, D] and called w (pml stores it as W [D, C])."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    if "param_W" in data:
        data["w"], data["grad_w"] = data["param_W"].T, data["gradparam_W"].T
    return data


def stored_adaface(data: dict[str, Tensor]) -> margins.AdaFace:
    margin = margins.AdaFace(momentum=INDEX["adaface_AdaFace"]["params"]["t_alpha"])
    margin.double()  # the original's state is float64 here, and 1e-9 needs it
    margin.mean.fill_(data["batch_mean_before"])
    margin.std.fill_(data["batch_std_before"])
    return margin


def leaves(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return data["x"].clone().requires_grad_(), data["w"].clone().requires_grad_()


def assert_rows_agree(got: Tensor, wanted: Tensor, tolerance: float, rows: Tensor) -> None:
    """Row by row, so that a large row does not hide a small one."""
    assert torch.isfinite(got).all()
    error = (got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-3)
    assert error[rows].max() <= tolerance, error


def assert_exact(loss: Tensor, x: Tensor, w: Tensor, data: dict[str, Tensor]) -> None:
    loss.backward()
    assert abs(loss - data["loss"]).item() <= EXACT * data["loss"].item()
    everything = torch.ones(50, dtype=torch.bool)
    assert_rows_agree(x.grad, data["grad_x"], EXACT, everything[:32])
    assert_rows_agree(w.grad, data["grad_w"], EXACT, everything)


@pytest.mark.float64
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_value_and_gradients_are_the_authors(head: Head, backend: str) -> None:
    data = load(head.name)
    x, w = leaves(data)
    loss = fused_losses.margin_softmax(
        x,
        w,
        data["labels"],
        margin=head.margin(data),
        scale=head.scale(x) if callable(head.scale) else head.scale,
        gradient=head.gradient,
        backend=backend,
    )
    loss.backward()
    wanted = data["loss"].item()
    assert abs(loss.item() - wanted) <= head.value_tolerance * wanted
    rows = torch.ones(len(x), dtype=torch.bool)
    rows[list(head.undefined)] = False
    classes = torch.ones(len(w), dtype=torch.bool)
    classes[data["labels"][~rows]] = False
    assert_rows_agree(x.grad, data["grad_x"], head.gradient_tolerance, rows)
    assert_rows_agree(w.grad, data["grad_w"], head.gradient_tolerance, classes)


@pytest.mark.float64
def test_adaface_moves_its_state_as_the_authors(backend: str) -> None:
    data = load("adaface_AdaFace")
    margin = stored_adaface(data)
    fused_losses.margin_softmax(
        data["x"], data["w"], data["labels"], margin=margin, backend=backend
    )
    assert abs(margin.mean - data["batch_mean_after"]).item() <= EXACT * 20
    assert abs(margin.std - data["batch_std_after"]).item() <= EXACT * 100


@pytest.mark.float64
def test_opensphere_cosface(backend: str) -> None:
    # its gradient of the (unit) weight lacks the projection, so the cosines are given as products
    data = load("opensphere_CosFace")
    x, w = leaves(data)
    loss = fused_losses.margin_softmax(
        F.normalize(x),
        w,
        data["labels"],
        margin=margins.CosFace(0.35),
        normalize=False,
        backend=backend,
    )
    assert_exact(loss, x, w, data)


@pytest.mark.float64
def test_pml_large_margin_softmax(backend: str) -> None:
    # |x| |w_y| psi(theta) on the target, plain products elsewhere: a callable on the product
    data = load("pml_LargeMarginSoftmaxLoss")
    x, w = leaves(data)
    size = x.norm(dim=1) * w[data["labels"]].norm(dim=1)
    sphere = margins.SphereFace(4.0)
    loss = fused_losses.margin_softmax(
        x,
        w,
        data["labels"],
        margin=lambda product: size * sphere(product / size),
        scale=1.0,
        normalize=False,
        backend=backend,
    )
    assert_exact(loss, x, w, data)


@pytest.mark.float64
def test_insightface_distributed_cross_entropy(streamed: str) -> None:
    # Logits as products with the identity. A label -1 has its positive on another shard: its loss
    # is insightface's floor -log 1e-30, its gradient the softmax, which is the primitive's lse.
    data = load("insightface_dist_ce")
    logits = data["logits"].clone().requires_grad_()
    identity, labels = torch.eye(50, dtype=torch.float64), data["labels"]
    here = labels >= 0
    assert 0 < here.sum() < len(labels)
    options = {"margin": None, "scale": 1.0, "normalize": False, "ignore_index": -1}
    loss = fused_losses.margin_softmax(
        logits, identity, labels, reduction="sum", backend=streamed, **options
    )
    elsewhere = fused_losses.row_statistics(logits, identity, labels, backend=streamed).lse[~here]
    ((loss + elsewhere.sum()) / len(labels)).backward()
    floored = (loss + int((~here).sum()) * -math.log(1e-30)) / len(labels)
    assert abs(floored - data["loss"]).item() <= EXACT * data["loss"].item()
    assert_rows_agree(logits.grad, data["grad_logits"], EXACT, torch.ones_like(here))


def test_every_golden_is_asked() -> None:
    asked = {head.name for head in HEADS}
    alone = {"opensphere_CosFace", "pml_LargeMarginSoftmaxLoss", "insightface_dist_ce"}
    # test_margin_bends.py and test_class_losses.py ask these
    alone |= {"curricular_CurricularFace", "insightface_arc_filter"}
    alone |= {"sface", "opensphere_SphereFace2", "pml_SoftTripleLoss"}
    assert asked | alone == {path.stem for path in FOLDER.glob("*.npz")} == set(INDEX)
