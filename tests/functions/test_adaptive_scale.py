"""MadaCos: the authors' numbers, the materialised formula, and what the formula promises."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import widest
from places import GOLDEN
from torch import Tensor

from fused_losses.functions.adaptive_scale import (
    AdaptiveScale,
    adaptive_margin_softmax,
    lower_median,
)

FOLDER = GOLDEN / "negatives"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]


def problem(n: int, d: int, c: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Rows near their centres, some ignored."""
    torch.manual_seed(0)  # the same of every backend: m is to be inside its bounds
    w = torch.randn(c, d, dtype=torch.float64)
    labels = torch.randint(c, (n,))
    x = w[labels] + 0.4 * torch.randn(n, d, dtype=torch.float64)
    labels[::5] = -100
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), labels


def formula(
    x: Tensor, w: Tensor, labels: Tensor, margin: AdaptiveScale, training: bool = True
) -> tuple[Tensor, float, float]:
    """Row losses of the rows that are not ignored, s and m, from the formula, materialised."""
    x, labels = x[labels != -100], labels[labels != -100]
    cosine = F.normalize(x) @ F.normalize(w).T
    target = cosine.gather(1, labels[:, None])[:, 0]
    ratio = (1 - margin.alpha) / margin.alpha
    median = target.median().item()
    s = max(margin.smallest, math.log(margin.odds * ratio) / (1 - median))
    is_target = F.one_hot(labels, len(w)).bool()
    b = (s * cosine.detach()).exp().masked_fill(is_target, 0).sum(1)
    at = (target == median).nonzero()[0, 0]
    chosen = {"sample": b[at], "median": b.median(), "mean": b.mean()}[margin.background].item()
    m = max(0.0, median - math.log(chosen / ratio) / s) if training else 0.0
    return F.cross_entropy(s * (cosine - m * is_target.to(cosine)), labels, reduction="none"), s, m


@pytest.mark.float64
def test_value_and_gradients_are_the_authors(backend: str) -> None:
    (name,) = (name for name in INDEX if name.startswith("madacos"))
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    margin = AdaptiveScale(alpha=INDEX[name]["params"]["alpha"])
    x, w = data["x"].requires_grad_(), data["w"].requires_grad_()
    loss = adaptive_margin_softmax(x, w, data["labels"], margin=margin, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss, data["loss"], rtol=1e-11, atol=0)
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(w.grad, data["grad_w"], rtol=1e-9, atol=1e-12)

    cosine = F.normalize(data["x"]) @ F.normalize(data["w"]).T
    target = cosine.gather(1, data["labels"][:, None])[:, 0]
    scale = margin.scale_of(target)
    is_target = F.one_hot(data["labels"], len(w)).bool()
    lse = (scale * cosine).masked_fill(is_target, -torch.inf).logsumexp(1)
    torch.testing.assert_close(lower_median(target), data["median"][0], rtol=1e-13, atol=0)
    torch.testing.assert_close(scale, data["scale"][0], rtol=1e-13, atol=0)
    torch.testing.assert_close(
        margin.margin_of(target, lse, scale), data["margin"][0], rtol=1e-11, atol=0
    )


CASES = {
    "of the median row": AdaptiveScale(),
    "mean": AdaptiveScale(0.1, background="mean"),
    "median of B": AdaptiveScale(0.3, background="median"),
    "smallest scale": AdaptiveScale(smallest=600.0),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_loss_is_the_formula(case: str, training: bool, backend: str) -> None:
    margin = CASES[case]
    x, w, labels = problem(41, 9, 130, widest(backend))
    wanted, s, m = formula(x.double(), w.double(), labels, margin, training)
    tight = 1e-11 if x.dtype == torch.float64 else 2e-5
    options = dict(margin=margin, training=training, backend=backend)
    got = adaptive_margin_softmax(x, w, labels, reduction="none", **options)
    assert (got[labels == -100] == 0).all()
    torch.testing.assert_close(got[labels != -100].double(), wanted, rtol=tight, atol=tight)
    assert s == 600 if case == "smallest scale" else s > 32
    assert 0 < m < 1 if training else m == 0

    upstream = torch.rand_like(got)
    found = torch.autograd.grad((got * upstream).sum(), (x, w))
    truth = torch.autograd.grad((wanted * upstream[labels != -100]).sum(), (x, w))
    for g, t in zip(found, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=100 * tight, atol=10 * tight)
    for reduction, value in (("mean", wanted.mean()), ("sum", wanted.sum())):
        got = adaptive_margin_softmax(x, w, labels, reduction=reduction, **options)
        torch.testing.assert_close(got.double(), value, rtol=tight, atol=tight)


def test_some_classes_take_part(backend: str) -> None:
    x, w, labels = problem(30, 8, 60, widest(backend))
    classes = torch.cat([labels[labels >= 0].unique(), torch.arange(0, 60, 7)]).unique()
    position = torch.full((60,), -100)
    position[classes] = torch.arange(len(classes))
    moved = torch.where(labels < 0, -100, position[labels.clamp_min(0)])
    wanted = formula(x.double(), w[classes].double(), moved, AdaptiveScale())[0].mean()
    shuffled = classes[torch.randperm(len(classes))]
    got = adaptive_margin_softmax(x, w, labels, classes=shuffled, backend=backend)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=0)
    for g, t in zip(
        torch.autograd.grad(got, (x, w)), torch.autograd.grad(wanted, (x, w)), strict=True
    ):
        torch.testing.assert_close(g, t, rtol=1e-3, atol=1e-4 * float(t.abs().max()))


def test_the_median_row_has_probability_alpha_and_an_aligned_one_the_odds() -> None:
    target = torch.tensor([0.61, 0.2, 0.7, 0.55, 0.9], dtype=torch.float64)
    lse = torch.tensor([30.0, 31.0, 29.0, 33.0, 35.0], dtype=torch.float64)
    margin = AdaptiveScale(alpha=0.02)
    scale = margin.scale_of(target)
    m = margin.margin_of(target, lse, scale)
    probability = torch.sigmoid(scale * (target - m) - lse)[0]
    assert abs(probability - 0.02).item() < 1e-14
    # a median row that is harder than that already is left alone
    assert margin.margin_of(target, lse + 100, scale) == 0
    log_odds = scale * (1 - m) - lse[0]
    assert abs(log_odds - math.log(9_999_999)).item() < 1e-12


def test_finite_where_the_exponential_overflows(streamed: str) -> None:
    # cosines of 0.9 and more: s is several hundred, and exp(s cos) beyond float32, even float64
    w = torch.eye(40)[:, :32] + 2.0
    labels = torch.arange(32)
    x = (w[labels] + 0.01 * torch.randn(32, 32)).requires_grad_()
    loss = adaptive_margin_softmax(x, w, labels, backend=streamed)
    loss.backward()
    cosine = F.normalize(x) @ F.normalize(w).T
    scale = AdaptiveScale().scale_of(cosine.diagonal())
    assert scale > 800 and torch.exp(scale.double() * cosine.max().double()).isinf()
    wide = [t.detach().double() for t in (x, w)]
    wanted = adaptive_margin_softmax(*wide, labels, backend="reference")
    assert abs(loss - wanted) < 1e-2 * wanted  # s / (1 - med) magnifies a float32 median
    assert x.grad.isfinite().all()


def test_a_perfect_median_is_bounded(backend: str) -> None:
    x = torch.eye(8, dtype=widest(backend), requires_grad=True)
    loss = adaptive_margin_softmax(x, x.detach(), torch.arange(8), backend=backend)
    loss.backward()
    margin = AdaptiveScale()
    for t in (1.0, 1 + 1e-7, 1 - 1e-7):  # rounding may carry a cosine beyond 1
        assert abs(margin.scale_of(torch.tensor([t])).item() - margin.largest) < 1
    # the margin leaves every row at probability alpha
    assert abs(loss.item() + math.log(margin.alpha)) < 1e-2
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 10])
def test_lower_median_with_and_without_rows_left_out(n: int) -> None:
    for _ in range(20):
        values = torch.randint(5, (n,)).double()  # ties
        valid = torch.rand(n) < 0.6
        kept = values[valid]
        wanted = kept.median() if len(kept) else torch.zeros(())
        assert lower_median(values, valid) == wanted
        assert lower_median(values) == (values.median() if n else 0)
    values = torch.tensor([1.0, torch.nan, 2.0])
    assert lower_median(values).isnan()
    assert lower_median(values, torch.tensor([True, True, False])).isnan()
    assert lower_median(values, torch.tensor([True, False, True])) == 1


def test_equal_medians_take_the_first_rows_background() -> None:
    target = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.5])
    lse = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    margin = AdaptiveScale(0.5)
    first = torch.tensor([True, True, True, True, True])
    later = torch.tensor([True, False, True, True, True])
    assert abs(margin.margin_of(target, lse, 40.0, first) - (0.5 - 2 / 40)) < 1e-6
    assert abs(margin.margin_of(target, lse, 40.0, later) - (0.5 - 3 / 40)) < 1e-6


def test_edges(backend: str) -> None:
    x, w, labels = problem(6, 4, 3, widest(backend))
    none = torch.full_like(labels, -100)
    loss = adaptive_margin_softmax(x, w, none, backend=backend)
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()
    empty = adaptive_margin_softmax(x[:0], w, labels[:0], reduction="none", backend=backend)
    assert empty.shape == (0,)
    alone = adaptive_margin_softmax(x, w[:1], torch.zeros_like(labels), backend=backend)
    assert alone == 0  # one class: nothing to tell it from
    with torch.no_grad():
        x[1, 0] = torch.nan
    bad = adaptive_margin_softmax(x, w, labels.clamp_min(0), backend=backend)
    assert bad.isnan()
    labels[1] = -100
    loss = adaptive_margin_softmax(x, w, labels, backend=backend)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert loss.isfinite() and dx.isfinite().all() and dw.isfinite().all() and dw.any()


def test_half_precision_and_compile(streamed: str) -> None:
    x, w, labels = problem(24, 16, 50, torch.bfloat16)
    loss = adaptive_margin_softmax(x, w, labels, backend=streamed)
    wanted = formula(x.double(), w.double(), labels, AdaptiveScale())[0].mean()
    assert loss.dtype == torch.float32
    assert abs(loss - wanted) < 0.02 * wanted

    x, w, labels = problem(24, 16, 50, torch.float32)

    def inside(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return adaptive_margin_softmax(x, w, labels, margin=AdaptiveScale(0.02), backend=streamed)

    compiled = torch.compile(inside, fullgraph=True, backend="eager")(x, w, labels)
    torch.testing.assert_close(compiled, adaptive_margin_softmax(x, w, labels, backend=streamed))


def test_second_derivatives_on_the_reference() -> None:
    x, w, labels = problem(5, 3, 4)
    labels[0] = 2

    def loss(x: Tensor, w: Tensor) -> Tensor:
        # in eval: the median's row, and with it s, does not move under gradcheck's steps
        fixed = AdaptiveScale(smallest=64.0, largest=64.0)
        return adaptive_margin_softmax(
            x, w, labels, margin=fixed, training=False, backend="reference"
        )

    assert torch.autograd.gradgradcheck(loss, (x, w))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "margin: expected an AdaptiveScale, got float", {"margin": 0.5}),
        (ValueError, "weight: expected", {"weight": torch.ones(3, 5)}),
        (ValueError, "labels: expected shape", {"labels": torch.zeros(3, dtype=torch.int64)}),
        (IndexError, "labels: expected class ids in", {"labels": torch.full((2,), 3)}),
        (ValueError, "classes: expected at least one", {"classes": torch.zeros(0).long()}),
        (ValueError, "among the classes that take part", {"classes": torch.tensor([1, 2])}),
        (ValueError, "reduction: expected", {"reduction": "max"}),
        (ValueError, "precision: expected", {"precision": "fp8"}),
        (TypeError, "dtype of embeddings", {"weight": torch.ones(3, 4).double()}),
    ],
)
def test_bad_input(error: type[Exception], message: str, change: dict) -> None:
    given = {
        "embeddings": torch.ones(2, 4),
        "weight": torch.ones(3, 4),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        adaptive_margin_softmax(**(given | change))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("alpha: expected", {"alpha": 0.0}),
        ("alpha: expected", {"alpha": 1.0}),
        ("odds: expected", {"odds": 0.01}),
        ("smallest, largest: expected", {"smallest": 0.0}),
        ("largest: expected a finite value", {"largest": math.inf}),
        ("background: expected", {"background": "max"}),
    ],
)
def test_bad_settings(message: str, options: dict) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveScale(**options)
