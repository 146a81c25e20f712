"""Modules of distillation: the authors' numbers, near agreement, what state they keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from catalogue_table import CASES
from places import GOLDEN
from torch import Tensor, nn

from fused_losses import losses
from fused_losses.functions import relations

DOUBLE = torch.float64


def stored(name: str) -> dict[str, Tensor]:
    (path,) = GOLDEN.rglob(f"{name}.npz")
    with np.load(path) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def agree(got: Tensor, want: Tensor, within: float = 1e-9) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= within * float(want.norm())


SCORES: dict[str, Callable[[], nn.Module]] = {
    "dkd": lambda: losses.DKDLoss(removed=-1000.0),
    "ofakd_eps1.5": lambda: losses.OFALoss(1.5),
    "pskd": lambda: losses.PSKDLoss(0.3),
    "dhkd_BinaryKL": lambda: losses.DHKDLoss(eps=1e-8),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_authors_numbers_of_scores(name: str) -> None:
    """Scores as products with the identity; the teacher's as they are."""
    data = stored(name)
    student = data["student"].requires_grad_()
    teacher = data["teacher" if "teacher" in data else "past_logits"]
    eye = torch.eye(student.shape[1], dtype=DOUBLE)
    labels = data.get("labels")
    loss = SCORES[name]()(student, eye, teacher, labels=labels)
    agree(loss.detach(), data["loss"])
    agree(torch.autograd.grad(loss, student)[0], data["grad_student"])


def test_norm_and_direction_is_the_authors() -> None:
    data = stored("ndloss")
    student = data["student"].requires_grad_()
    loss = losses.NDLoss()(student, data["teacher"], data["centers"], data["labels"].long())
    agree(loss.detach(), data["loss"])
    agree(torch.autograd.grad(loss, student)[0], data["grad_student"])


def test_gradient_matching_is_the_authors() -> None:
    data = stored("dcc_distance_wb")
    synthetic = data["gws"].requires_grad_()
    loss = losses.DCCLoss()(data["gwr"], synthetic)
    agree(loss.detach(), data["loss"])
    agree(torch.autograd.grad(loss, synthetic)[0], data["grad_gws"])
    # of several layers the sum, biases apart
    bias = torch.ones(10, dtype=DOUBLE)
    both = losses.DCCLoss()([data["gwr"], bias], [synthetic, bias])
    assert torch.equal(both, loss)


def test_every_golden_of_modules_is_asked_for() -> None:
    folder = GOLDEN / "modules"
    known = set(json.loads((folder / "index.json").read_text())["entries"])
    of_classes = {"pml_P2SGradLoss", "pml_SubCenterArcFaceLoss"}  # test_class_modules.py
    asked = {"ndloss", "dcc_distance_wb", *of_classes}
    assert known == asked == {path.stem for path in folder.glob("*.npz")}


def test_every_golden_of_the_catalogue_is_there() -> None:
    named = {golden for e in losses.catalogue() for golden in e.golden}
    assert named <= {path.stem for path in GOLDEN.rglob("*.npz")}


@pytest.mark.parametrize("height", [1, 3])
def test_relations_by_blocks(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last of them shorter, give what one does."""
    x, y = torch.randn(11, 4, dtype=DOUBLE), torch.randn(11, 6, dtype=DOUBLE)
    x[5], y[7] = x[2], y[1]  # no distance, and no slope of one
    leaves = x.requires_grad_(), y.requires_grad_()
    # of the distances' 10 numbers a pair; of the angles' 21 one row fits, of one side's 4 many
    monkeypatch.setattr(relations, "BLOCK_BYTES", height * 11 * 10 * 8)
    got = losses.RKDLoss()(*leaves)
    want = rkd_apart(*leaves)
    agree(got.detach(), want.detach(), 1e-12)
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        agree(a, b, 1e-10)


def rkd_apart(x: Tensor, y: Tensor) -> Tensor:
    """The formula where rows may be equal: means over pairs that are apart, no slope of 0."""

    def distances(t: Tensor) -> Tensor:
        square = (t[:, None] - t).square().sum(dim=2)
        found = torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)
        return found / found[square > 0].mean()

    def cosines(t: Tensor) -> Tensor:
        apart = t[None] - t[:, None]
        square = apart.square().sum(dim=2, keepdim=True)
        unit = torch.where(square > 0, apart / torch.where(square > 0, square, 1).sqrt(), 0)
        return unit @ unit.mT

    huber = nn.functional.smooth_l1_loss
    return huber(distances(x), distances(y)) + 2 * huber(cosines(x), cosines(y))


def test_one_formula_of_relations() -> None:
    x, y = torch.randn(7, 3, dtype=DOUBLE), torch.randn(7, 5, dtype=DOUBLE)
    agree(rkd_apart(x, y), CASES["RKDLoss"].formula(None, x, y), 1e-12)


@pytest.mark.parametrize("step", [1e-3, 1e-6])
def test_gram_matrices_near_agreement(step: float) -> None:
    """In float32: what is left of two Gram matrices is not what their squares round to."""
    x = torch.randn(33, 8)
    y = x + step * torch.randn(33, 8)
    leaf = x.clone().requires_grad_()
    module = losses.CCLoss(normalize=False)
    got = module(leaf, y)
    wide = x.double().requires_grad_()
    want = (wide @ wide.T - y.double() @ y.double().T).square().mean()
    agree(got.detach().double(), want.detach(), 1e-6)
    (slope,), (right,) = torch.autograd.grad(got, leaf), torch.autograd.grad(want, wide)
    agree(slope.double(), right, 1e-5)
    assert module(x, x) == 0


def test_the_queue_moves_in_training() -> None:
    module = losses.FeatureQueueKDLoss(4, 6).double()
    before = module.queue.clone()
    x = torch.randn(4, 4, dtype=DOUBLE, requires_grad=True)
    y = torch.randn(4, 4, dtype=DOUBLE)
    module.eval()(x, y)
    assert torch.equal(module.queue, before)
    module.train()(x, y).backward()
    unit = nn.functional.normalize(y, dim=1)
    torch.testing.assert_close(module.queue[:4], unit)
    assert torch.equal(module.queue[4:], before[4:])
    module(x, 2 * y)  # two at the end, and two from the start
    torch.testing.assert_close(module.queue, torch.cat([unit[2:], unit[2:], unit[:2]]))
    many = torch.randn(9, 4, dtype=DOUBLE)
    module(many, many)
    rows = nn.functional.normalize(many[-6:], dim=1)
    assert {tuple(r) for r in module.queue.tolist()} == {tuple(r) for r in rows.tolist()}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no mean": (lambda: losses.RKDLoss(reduction="none"), "reduction: expected 'mean' of RKDLoss"),
    "rows": (
        lambda: losses.CCLoss()(torch.ones(3, 2), torch.ones(4, 2)),
        "teacher: expected 3 rows as student has",
    ),
    "widths": (
        lambda: losses.NDLoss()(
            torch.ones(3, 2), torch.ones(3, 4), torch.ones(5, 2), torch.zeros(3, dtype=torch.int64)
        ),
        r"teacher: expected \(3, 2\)",
    ),
    "layers": (
        lambda: losses.DCCLoss()([torch.ones(3, 2)], []),
        "synthetic: expected 1 layers as real has, got 0",
    ),
    "layer": (
        lambda: losses.DCCLoss()(torch.ones(3, 2), torch.ones(2, 3)),
        r"synthetic: expected \(3, 2\)",
    ),
    "answers": (
        lambda: losses.MultiAspectKDLoss()(
            torch.ones(3, 2), torch.ones(5, 2), torch.ones(4, 2),
            torch.zeros(3, dtype=torch.int64), torch.ones(3, 5),
        ),
        r"answers: expected \(3, 4\)",
    ),
    "beta": (lambda: losses.JSDLoss(beta=2.0), r"beta: expected a value in \[0, 1\]"),
    "temperature": (lambda: losses.KDLoss(0.0), "temperature: expected a finite value > 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    call, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        call()
