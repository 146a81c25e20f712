"""Distillation at its ends: one class, no rows, NaN, equal and peaked scores, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import CUDA
from distillation_formulas import TEMPERATURE, of_scores
from head_goldens import exactness
from torch import Tensor

from fused_losses import backends, distillation
from fused_losses.functions.distillation_kinds import KINDS
from fused_losses.primitives.divergence import bounded

FORMS = tuple(f for f in ("reference", "bounded", "cpu") if backends.unavailable(f) is None)
EDGES = (*FORMS, *CUDA)
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TILE_BYTES", 1)


def rows(*shape: int, size: float = 1.0) -> Tensor:
    return (size * torch.randn(*shape, dtype=DOUBLE)).requires_grad_()


@pytest.mark.parametrize("form", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_class(kind: str, form: str) -> None:
    dtype, _ = exactness(form)
    x, w, y, wt = (torch.randn(*shape, dtype=dtype) for shape in ((3, 4), (1, 4), (3, 2), (1, 2)))
    x.requires_grad_()
    w.requires_grad_()
    loss = distillation(
        x, w, y, wt, kind=kind, labels=torch.tensor([0, -100, 0]), reduction="none", backend=form
    )
    if kind in ("bernoulli", "bernoulli_norm", "mse"):  # of each class alone
        assert (loss[[0, 2]] > 0).all()
    elif kind == "soft_ce":  # lse less a mean: as the score is rounded, and a sum of exponentials
        assert (loss.abs() <= 2 * torch.finfo(dtype).eps * (1 + (x @ w.T)[:, 0].abs())).all()
    else:
        assert (loss == 0).all()
    assert loss[1] == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), [x, w]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_none_that_take_part(kind: str, reduction: str) -> None:
    x, w, y, wt = rows(0, 4), rows(9, 4), rows(0, 2).detach(), rows(9, 2).detach()
    labels = torch.zeros(0, dtype=torch.long)
    loss = distillation(x, w, y, wt, kind=kind, labels=labels, reduction=reduction)
    assert not loss.any()
    x, y = rows(3, 4), torch.full((3, 2), torch.nan, dtype=DOUBLE)
    loss = distillation(x, w, y, wt, kind=kind, labels=torch.full((3,), -100), reduction=reduction)
    assert not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), [x, w]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_nan_leaves_the_others_alone(kind: str, dense: bool, form: str) -> None:
    x, w = rows(4, 3), rows(20, 3)
    y, wt = (rows(4, 20), None) if dense else (rows(4, 2), rows(20, 2).detach())
    y = y.detach()
    y[1] = torch.nan
    labels = torch.tensor([1, 2, 3, 4])

    def loss(labels: Tensor) -> Tensor:
        return distillation(x, w, y, wt, kind=kind, labels=labels, reduction="none", backend=form)

    found = loss(labels)
    assert found.isnan().tolist() == [False, True, False, False]
    labels[1] = -100
    found = loss(labels)
    assert found[1] == 0 and found.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), [x, w]))


@pytest.mark.parametrize("form", EDGES)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("soft_ce", "pskd", "ofa")])
def test_a_student_that_is_its_teacher(kind: str, form: str) -> None:
    """Exactly 0 in float32, and no gradient, whatever the temperature."""
    x, w = (torch.randn(k, 6, requires_grad=True) for k in (5, 70))
    labels = torch.randint(0, 70, (5,))
    loss = distillation(
        x, w, x.detach(), w.detach(), kind=kind, labels=labels, temperature=0.7, normalize=True,
        student_scale=9.0, teacher_scale=9.0, backend=form,
    )  # fmt: skip
    bound = 1e-5 if form == "reference" else 0.0
    assert loss.abs() <= bound
    of_x, of_w = torch.autograd.grad(loss, [x, w])
    assert of_x.abs().max() <= bound and of_w.abs().max() <= bound


@pytest.mark.parametrize("form", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_knows_nothing(kind: str, form: str) -> None:
    """All scores equal: finite, as the formula has it."""
    dtype, within = exactness(form)
    x, w, y = rows(4, 5), rows(30, 5), torch.zeros(4, 30, dtype=DOUBLE)
    labels, t = torch.tensor([0, 3, 29, 3]), TEMPERATURE.get(kind, 1.0)
    mine = [leaf.detach().to(dtype).requires_grad_() for leaf in (x, w)]
    got = distillation(*mine, y.to(dtype), kind=kind, labels=labels, backend=form)
    expected = of_scores(kind, x @ w.T / t, y, labels, t).mean()
    torch.testing.assert_close(got.double(), expected, rtol=10 * within, atol=0)
    slopes = zip(torch.autograd.grad(got, mine), torch.autograd.grad(expected, [x, w]), strict=True)
    for a, e in slopes:
        torch.testing.assert_close(a.double(), e, rtol=50 * within, atol=50 * within)


@pytest.mark.parametrize("form", [form for form in EDGES if form != "reference"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("bernoulli", "bernoulli_norm")])
@pytest.mark.parametrize("temperature", [0.05, 20.0])
def test_peaked_teachers_are_finite(kind: str, temperature: float, form: str) -> None:
    x, w = rows(4, 5, size=100.0), rows(30, 5)
    y = rows(4, 30, size=1e4).detach()
    labels = torch.tensor([0, 3, 29, 3])
    if form == "cuda":  # float32 has no digits to compare here: 1e4 / T is off by a hundredth
        single = [leaf.detach().float().requires_grad_() for leaf in (x, w)]
        loss = distillation(
            *single, y.float(), kind=kind, labels=labels, temperature=temperature, backend=form
        )
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, single))
        return
    loss = distillation(x, w, y, kind=kind, labels=labels, temperature=temperature, backend=form)
    again = distillation(
        x, w, y, kind=kind, labels=labels, temperature=temperature, backend="reference"
    )
    torch.testing.assert_close(loss, again, rtol=1e-9, atol=0)
    # lse of scores u is rounded to 2^-53 |u|, and with it each share of rows over T; dkd has 9 T^2
    largest = max((x @ w.T).abs().max().item(), y.abs().max().item()) / temperature
    times = 9 * temperature**2 if KINDS[kind].squared else 1.0
    rounding = 2.0**-50 * largest * times * x.abs().max().item() / temperature
    mine, theirs = (torch.autograd.grad(o, [x, w]) for o in (loss, again))
    for a, e in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e, rtol=1e-8, atol=rounding)
