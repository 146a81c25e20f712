"""Margins that bend other classes: the losses of it. The primitive is in test_bent_statistics.py.

The losses stand here once more as their papers' logits on the matrix of cosines, in float64, with
autograd through them; nothing of them is said by (t, p, q, r).
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from margin_bends import (
    BF16,
    F32,
    F64,
    FP16,
    LOSSES,
    Case,
    Data,
    ask,
    curricular,
    stored_curricular,
)
from oracles import relative_error
from places import GOLDEN
from torch import Tensor

import fused_losses
from fused_losses import margins
from fused_losses.margins import ArcFace, CurricularFace, InterclassFilter
from fused_losses.primitives.row_statistics import reference

EXACT = 1e-9
CASES = [
    *(Case(name, name) for name in LOSSES),
    Case("everything", "curricular", scale="rows", bias=True, shares=True, part=True,
         options={"label_smoothing": 0.2}),
    Case("mv-everything", "mv-arc", scale="rows", bias=True, shares=True, part=True,
         options={"label_smoothing": 0.1}),
    Case("filter-bias", "filter-arc", bias=True, options={"label_smoothing": 0.1}),
    Case("blocks-of-rows", "curricular", n=301, c=97, d=7, part=True),
    Case("one-row", "mv-am-fixed", n=1, c=2, d=3, scale=2.0),
    Case("kept", "curricular", n=65, c=130, d=9, options={"memory_budget": 100 * 128 * 8}),
    Case("products", "filter-arc", normalize=False, scale=8.0),
]  # fmt: skip


def truth(case: Case, data: Data) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients from the formula on the matrix."""
    leaves = data.leaves()
    x, w = leaves[:2]
    ids = data.options.get("classes", torch.arange(case.c))
    valid = data.labels != -100
    x, labels, w = x[valid], data.labels[valid], w[ids]
    is_target = labels[:, None] == ids
    cosine = F.normalize(x) @ F.normalize(w).T if case.normalize else x @ w.T
    # rounding past 1 has no angle
    cosine = cosine.clamp(-1 + 1e-15, 1 - 1e-15) if case.normalize else cosine
    logits = LOSSES[case.loss][1](cosine, is_target)
    scale = data.scale[valid][:, None] if isinstance(data.scale, Tensor) else data.scale
    logits = logits * scale
    if case.bias:
        logits = logits + leaves[2][ids]
    shares = data.options.get("class_weight")
    loss = F.cross_entropy(
        logits,
        is_target.int().argmax(1),
        weight=None if shares is None else shares[ids],
        label_smoothing=data.options.get("label_smoothing", 0.0),
    )
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


@pytest.mark.float64
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_gradients_are_the_papers(case: Case, backend: str) -> None:
    data = Data(case)
    loss, gradients = ask(case, data, backend)
    wanted, wanted_gradients = truth(case, data)
    assert abs(loss - wanted) <= EXACT * (wanted + 1e-3)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        got = torch.where(torch.isnan(data.x), 0, got) if got.shape == data.x.shape else got
        want = torch.nan_to_num(want)
        assert relative_error(got.numpy(), want.numpy()) <= EXACT


def test_every_loss_bends_some_class_and_leaves_some() -> None:
    # or the cases above would prove nothing
    for name, (make, _) in LOSSES.items():
        data = Data(Case(name, name))
        valid = data.labels >= 0
        cosine = F.normalize(data.x[valid]) @ F.normalize(data.w).T
        target = cosine.gather(1, data.labels[valid][:, None])
        above = cosine > make().bend(target[:, 0])[0][:, None]
        others = above.scatter(1, data.labels[valid][:, None], False)
        assert 5 < others.sum() < others.numel() - 5, name


@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
@pytest.mark.parametrize("loss", ["curricular", "mv-arc", "filter-arc"])
def test_narrow_dtypes(loss: str, dtype: torch.dtype, streamed: str) -> None:
    # the same rounded inputs in float64; thresholds kept clear of every cosine
    n, c, d = 40, 70, 16
    w = torch.randn(c, d).to(dtype)
    labels = torch.arange(n) % c
    x = (w[labels].float() + 0.3 * torch.randn(n, d)).to(dtype)
    cosine = F.normalize(x.double()) @ F.normalize(w.double()).T
    target = cosine[torch.arange(n), labels]
    gap = (cosine - LOSSES[loss][0]().bend(target)[0][:, None]).abs().min(1).values
    clear = gap > 1e-4
    assert clear.sum() > n // 2
    x, labels = x[clear], labels[clear]

    def run(x: Tensor, w: Tensor, backend: str) -> tuple[Tensor, ...]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss_value = fused_losses.margin_softmax(
            x, w, labels, margin=LOSSES[loss][0](), scale=16.0, backend=backend
        )
        return (loss_value.detach(), *torch.autograd.grad(loss_value, (x, w)))

    got, wanted = run(x, w, streamed), run(x.double(), w.double(), "reference")
    assert got[0].dtype == F32
    room = {F32: 1e-5, BF16: 5e-3, FP16: 6e-4}[dtype]  # a gradient is rounded to the input's dtype
    near = 1e-5
    if streamed in ("triton", "cuda") and dtype != F32:  # tensor cores take the unit rows rounded
        near, room = {BF16: (2e-2, 5e-2), FP16: (1e-3, 1e-2)}[dtype]
    assert abs(got[0] - wanted[0]) <= near * wanted[0]
    for a, b in zip(got[1:], wanted[1:], strict=True):
        assert a.dtype == dtype
        assert relative_error(a.double().numpy(), b.numpy()) <= room


@pytest.mark.float64
def test_straight_through_leaves_the_bends_alone(backend: str) -> None:
    case = Case("straight", "curricular")
    data = Data(case)
    x, w = data.leaves()
    value, found = ask(case, data, backend, gradient="straight_through")
    valid = data.labels != -100
    is_target = data.labels[valid][:, None] == torch.arange(case.c)
    cosine = F.normalize(x[valid]) @ F.normalize(w).T
    moved = curricular(cosine, is_target)
    moved = torch.where(is_target, cosine + (moved - cosine).detach(), moved)
    wanted = F.cross_entropy(16.0 * moved, data.labels[valid])
    assert abs(value - wanted) <= EXACT * wanted
    for a, b in zip(found, torch.autograd.grad(wanted, (x, w)), strict=True):
        there = ~a.isnan()
        assert relative_error(a[there].numpy(), b[there].numpy()) <= EXACT


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def assert_golden(data: dict[str, Tensor], margin: margins.Margin, backend: str, **options) -> None:
    x, w = data["x"].clone().requires_grad_(), data["w"].clone().requires_grad_()
    loss = fused_losses.margin_softmax(
        x, w, data["labels"], margin=margin, scale=64.0, backend=backend, **options
    )
    loss.backward()
    assert abs(loss - data["loss"]).item() <= EXACT * data["loss"].item()
    for got, wanted in ((x.grad, data["grad_x"]), (w.grad, data["grad_w"])):
        error = (got - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-3)
        assert error.max() <= EXACT


@pytest.mark.float64
def test_golden_curricular_face(backend: str) -> None:
    data = golden("curricular_CurricularFace")
    margin = CurricularFace(0.5).double()
    margin.t.fill_(data["t_before"])
    assert_golden(data, margin, backend)
    assert abs(margin.t - data["t_after"].item()) <= 1e-12
    # and its logits, from those before: every class, not what a sum leaves of them
    bend = margin.eval().bend(data["origin_logits"].gather(1, data["labels"][:, None])[:, 0] / 64)
    bent = 64 * reference.bent(data["origin_logits"] / 64, bend)
    others = torch.ones_like(bent).scatter(1, data["labels"][:, None], 0).bool()
    torch.testing.assert_close(bent[others], data["logits"][others], rtol=1e-12, atol=1e-12)


@pytest.mark.float64
def test_golden_insightface_filter(backend: str) -> None:
    data = golden("insightface_arc_filter")
    params = json.loads((GOLDEN / "index.json").read_text())["entries"]["insightface_arc_filter"]
    threshold = params["params"]["interclass_filtering_threshold"]
    assert (data["cos"] > threshold).sum() > 10
    margin = InterclassFilter(ArcFace(0.5, "none"), threshold)
    assert_golden(data, margin, backend, gradient="straight_through")


@pytest.mark.float64
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str, backend: str) -> None:
    labels = torch.tensor([0, 3, 12, 3, -100, 5, 7])
    x, w = (torch.randn(n, 5, dtype=F64, requires_grad=True) for n in (7, 13))
    margin = LOSSES[loss][0]()
    assert torch.autograd.gradcheck(
        lambda x, w: fused_losses.margin_softmax(
            x, w, labels, margin=margin, scale=4.0, backend=backend
        ),
        (x, w),
        fast_mode=True,
    )


def test_second_derivatives_on_the_reference() -> None:
    labels = torch.tensor([0, 3, 5, 3])
    x, w = (torch.randn(n, 3, dtype=F64, requires_grad=True) for n in (4, 7))
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    margin = stored_curricular()
    assert torch.autograd.gradgradcheck(
        lambda x, w, s: fused_losses.margin_softmax(
            x, w, labels, margin=margin, scale=s, backend="reference"
        ),
        (x, w, scale),
    )


def test_a_learned_scale_is_refused_where_its_gradient_would_be_wrong(streamed: str) -> None:
    x, w = torch.randn(4, 3), torch.randn(7, 3)
    labels = torch.tensor([0, 3, 5, 3])
    scale = torch.tensor(8.0, requires_grad=True)
    given = {"margin": stored_curricular(0.3, F32), "backend": streamed}
    with pytest.raises(NotImplementedError, match="scale: its gradient through a margin"):
        fused_losses.margin_softmax(x, w, labels, scale=scale, **given)
    with torch.no_grad():
        value = fused_losses.margin_softmax(x, w, labels, scale=scale, **given)
    torch.testing.assert_close(value, fused_losses.margin_softmax(x, w, labels, scale=8.0, **given))
