"""Class losses over tiles of classes: formulas, edges, dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from class_loss_formulas import (  # noqa: F401
    BIAS,
    FILTER,
    LOSSES,
    C,
    D,
    K,
    N,
    _small_tiles,
    inputs,
    rows_of,
)
from conftest import widest

from fused_losses import margins
from fused_losses.class_losses import SFace, Softmax
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import (
    class_statistics,
)


@pytest.mark.parametrize("sampled", [False, True], ids=["all", "classes"])
@pytest.mark.parametrize(("several", "centers"), [(False, 1), (False, K), (True, K), (True, 1)])
@pytest.mark.parametrize("name", LOSSES)
def test_literal(name: str, several: bool, centers: int, sampled: bool, backend: str) -> None:
    named, dtype = LOSSES[name], widest(backend)
    x, w, labels = inputs(several, centers, dtype)
    bias = torch.tensor(BIAS, dtype=torch.float64, requires_grad=True)
    taking_part = list(range(C))
    if sampled:
        taking_part = sorted({int(y) for y in labels.flatten() if y >= 0} | {2, 7, 13})
    ids = torch.tensor(taking_part).flip(0) if sampled else None
    each = [
        None if row is None else named.formula(row, bias)
        for row in rows_of(x.double(), w.double(), labels, taking_part, named.pool)
    ]
    present = [row for row in each if row is not None]
    leaves = [x, w, bias]
    wanted = torch.stack(present).mean()
    slopes = torch.autograd.grad(wanted, leaves, allow_unused=True)
    loss = named.loss(bias)
    options = {"classes": ids, "backend": backend}
    got = class_loss(x, w, labels, loss, **options)
    assert got.dtype == dtype
    tolerance = 2e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(got, leaves, allow_unused=True), slopes, strict=True):
        if b is None:  # the loss has no bias
            assert a is None
            continue
        # the row of NaN, whose gradient in the formula is NaN times nothing
        a, b = a.double(), b.double().nan_to_num(0)
        assert (a - b).norm() <= tolerance * b.norm() + 1e-14
    rows = class_loss(x, w, labels, loss, reduction="none", **options)
    total = class_loss(x, w, labels, loss, reduction="sum", **options)
    zeros = [torch.zeros((), dtype=torch.float64) if row is None else row for row in each]
    torch.testing.assert_close(rows.double(), torch.stack(zeros), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.double(), sum(present), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "margin",
    [
        None,
        margins.SphereFace(2.0),
        margins.AdaFace().eval(),
        margins.MagFace(1, 9),
        margins.CurricularFace().eval(),
        margins.MVSoftmax(),
        FILTER,
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_softmax_is_margin_softmax(margin: Any, gradient: str, backend: str) -> None:
    x, w, labels = inputs(False, 1, widest(backend))
    x = torch.where(x.isnan(), 1, 4 * x).detach().requires_grad_()
    losses = (
        margin_softmax(x, w, labels, margin=margin, gradient=gradient, backend="reference"),
        class_loss(x, w, labels, Softmax(margin, gradient=gradient), backend=backend),
    )
    answers = [
        [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (x, w)))] for loss in losses
    ]
    for a, b in zip(*answers, strict=True):
        tolerance = 1e-5 if backend == "cuda" else 1e-11
        assert (a - b).norm() <= tolerance * a.norm()


def test_hardest_is_the_highest_cosine(backend: str) -> None:
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    x = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([[0, -1], [0, 3], [-1, -1]])
    p = ClassInputs(x, w, labels, params=(1.0,))
    found = class_statistics(p, backend=backend)
    assert found.hardest.tolist() == [1, 1, 1]  # of equal ones the first
    torch.testing.assert_close(found.hardest_score, torch.tensor([0.8, 0.0, 1.0]))
    only = p._replace(x=x[:1], labels=labels[:1], classes=torch.tensor([0]))
    alone = class_statistics(only, backend=backend)
    assert alone.hardest.tolist() == [-1] and alone.hardest_score.tolist() == [-math.inf]
    assert alone.statistics.tolist() == [[-math.inf]]


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [64.0, 1500.0])
def test_rows_opposite_to_every_class(scale: float, backend: str) -> None:
    """All scores are far below 0: a sum begun at 0 has nothing that could grow past the range."""
    dtype = widest(backend)
    row = F.normalize(torch.randn(1, 8, dtype=torch.float64), dim=1)
    x = (-row.repeat(5, 1)).to(dtype).requires_grad_()
    w = (row + 0.01 * torch.randn(40, 8, dtype=torch.float64)).to(dtype)
    labels = torch.tensor([[1, 3]] * 5)
    loss = Softmax(margin=None, scale=scale)
    got = class_loss(x, w, labels, loss, backend=backend)
    (grad,) = torch.autograd.grad(got, x)
    exact = x.detach().double().requires_grad_()
    z = scale * F.normalize(exact, dim=1) @ F.normalize(w.double(), dim=1).T
    rest = [j for j in range(40) if j not in (1, 3)]
    want = sum(z[:, [p, *rest]].logsumexp(dim=1) - z[:, p] for p in (1, 3)).mean() / 2
    (right,) = torch.autograd.grad(want, exact)
    # a cosine is off by (D / 8 + 16) u, its score by so much times the scale, twice in a loss
    off = 2 * (8 / 8 + 16) * torch.finfo(dtype).eps * scale
    assert float((got.detach().double() - want.detach()).abs()) <= off
    assert float((grad.double() - right).norm()) <= 4 * off * float(right.norm())


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_alone_with_its_class(name: str, backend: str) -> None:
    named = LOSSES[name]
    x = torch.randn(3, D, requires_grad=True)
    w = torch.randn(1, 2, D, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    loss = class_loss(x, w, labels, named.loss(torch.tensor(BIAS)), backend=backend)
    bias = torch.tensor(BIAS, dtype=torch.float64)
    rows = rows_of(x.double(), w.double(), labels[:, None], [0], named.pool)
    wanted = torch.stack([named.formula(row, bias) for row in rows]).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    for slope in torch.autograd.grad(loss, (x, w)):
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_and_only_ignored_rows(name: str, backend: str) -> None:
    loss = LOSSES[name].loss(torch.tensor(BIAS))
    for x, labels in (
        (torch.randn(0, D), torch.zeros(0, 2, dtype=torch.int64)),
        (torch.full((4, D), torch.nan), torch.full((4, 2), -100)),
    ):
        x, w = x.requires_grad_(), torch.randn(C, K, D, requires_grad=True)
        for reduction in ("mean", "sum"):
            value = class_loss(x, w, labels, loss, reduction=reduction, backend=backend)
            assert value.item() == 0
        for slope in torch.autograd.grad(value, (x, w)):
            assert torch.equal(slope, torch.zeros_like(slope))


def test_sface_where_rounding_takes_a_cosine_beyond_one(backend: str) -> None:
    # the authors' code has acos of 1.0000001 here, NaN
    x = torch.tensor([[1.0000002, 0.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [1.0, 1e-9], [-1.0000002, 0.0]], requires_grad=True)
    loss = class_loss(x, w, torch.tensor([0]), SFace(), normalize=False, backend=backend)
    assert abs(loss.item() - 64.0) <= 1e-4  # the second class pushes with weight 1
    for slope in torch.autograd.grad(loss, (x, w)):
        assert slope.isfinite().all()


def test_nan_stays_in_its_row_and_a_zero_centre_has_no_gradient(backend: str) -> None:
    for name, named in LOSSES.items():
        x, w, labels = inputs(False, K, torch.float32)
        w = w.detach().clone()
        w[2, 1] = 0
        w.requires_grad_()
        loss = named.loss(torch.tensor(BIAS))
        rows = class_loss(
            x, w, labels + (labels < 0) * 101, loss, reduction="none", backend=backend
        )
        assert rows.isnan().tolist() == [i == 3 for i in range(N)], name
        dw = torch.autograd.grad(rows[[0, 1, 2, 4, 5, 6]].sum(), w)[0]
        assert torch.equal(dw[2, 1], torch.zeros(D))


def test_equal_centres_send_the_gradient_to_the_first(backend: str) -> None:
    x = torch.tensor([[0.6, 0.8]], dtype=widest(backend), requires_grad=True)
    w = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]], dtype=x.dtype, requires_grad=True)
    loss = class_loss(x, w, torch.tensor([0]), Softmax(None, 2.0), backend=backend)
    dw = torch.autograd.grad(loss, w)[0]
    assert torch.equal(dw[:, 1], torch.zeros_like(dw[:, 1])) and (dw[:, 0] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_each_dtype_against_its_own_values_in_float64(
    name: str, dtype: torch.dtype, streamed: str
) -> None:
    x, w, labels = inputs(True, K, torch.float32)
    x, w = (t.detach().to(dtype).requires_grad_() for t in (x, w))
    bias = torch.tensor(BIAS)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = class_loss(*wide, labels, LOSSES[name].loss(bias.double()), backend="reference")
    loss = class_loss(x, w, labels, LOSSES[name].loss(bias), backend=streamed)
    assert loss.dtype == torch.float32
    # a scale of 64 and a weight by sigmoids of 80 times an angle enlarge float32's rounding
    assert abs(loss.item() - exact.item()) <= 1e-4 * abs(exact.item())
    rounding = torch.finfo(dtype).eps
    for got, want in zip(
        torch.autograd.grad(loss, (x, w)), torch.autograd.grad(exact, wide), strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= (2e-4 + rounding) * want.norm()
