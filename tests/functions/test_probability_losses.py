"""Losses of the label's probability: the authors' numbers, one formula in p, kernels, the head.

Their hard data is drawn in tests/fuzz, over sub-centres and several labels.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from margin_draws import PROBABILITY
from places import GOLDEN
from torch import Tensor

from fused_losses import ClassCenters, margins
from fused_losses.class_losses import (
    AGCE,
    AUL,
    GCE,
    MAE,
    SCE,
    CompSum,
    Focal,
    OfProbability,
    Poly1,
    Softmax,
    class_loss,
)

FOLDER = GOLDEN / "heads"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]
AUTHORS: dict[str, tuple[OfProbability, float]] = {
    "ldr_TruncGCE": (GCE(0.7, 0.3), 1e-12),
    "ldr_AGCE": (AGCE(1.0, 2.0), 1e-12),
    "ldr_SCE": (SCE(0.5, 0.5, 4.0), 1e-12),
    # they hold every p within [1e-7, 1]: each of ten classes is 1e-7 log(1e4) off at most
    "ldr_RCE": (SCE(0.0, 1.0, math.log(1e4)), 10 * 1e-7 * math.log(1e4)),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_numbers(name: str, backend: str) -> None:
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    loss, within = AUTHORS[name]
    dtype = torch.float32 if backend == "cuda" else torch.float64
    within = max(within, 1e-5 if backend == "cuda" else 0)
    x = data["logits"].to(dtype).requires_grad_()
    table = torch.eye(x.shape[1], dtype=dtype)
    got = class_loss(x, table, data["labels"], loss, normalize=False, backend=backend)
    (grad,) = torch.autograd.grad(got, x)
    assert float(got.detach()) == pytest.approx(INDEX[name]["loss"], rel=within, abs=within)
    torch.testing.assert_close(grad.double(), data["grad_logits"], rtol=within, atol=within)


@pytest.mark.parametrize("name", PROBABILITY)
@pytest.mark.parametrize("several", [False, True], ids=["row statistics", "class rules"])
def test_the_formula(name: str, several: bool, backend: str) -> None:
    """A label alone goes by the compiled sweep, beside a second place by the rules'."""
    loss, end = PROBABILITY[name]
    dtype = torch.float32 if backend == "cuda" else torch.float64
    x, w = torch.randn(9, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    y = torch.randint(0, 11, (9,))
    y[4] = -100
    leaves = [x.requires_grad_(), w.requires_grad_()]
    labels = torch.stack([y, torch.full_like(y, -100)], dim=1) if several else y
    found = class_loss(*leaves, labels, loss, backend=backend)
    got = [found, *torch.autograd.grad(found, leaves)]

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    log_p = (16 * F.normalize(wide[0]) @ F.normalize(wide[1]).T).log_softmax(1)
    kept = y >= 0
    each = end(log_p.gather(1, y.clamp_min(0)[:, None])[:, 0])
    want = each[kept].mean()
    wanted = [want, *torch.autograd.grad(want, wide)]
    for a, b in zip(got, wanted, strict=True):
        # logits of 16 round by 16 u, which the steepest of these ends takes up to 8 times
        scale = max(1.0, float(b.detach().abs().max()))
        bound = (300 if dtype is torch.float32 else 3e4) * torch.finfo(dtype).eps * scale
        torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)


@pytest.mark.parametrize("name", PROBABILITY)
def test_gradcheck_on_the_reference(name: str) -> None:
    loss, _ = PROBABILITY[name]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    call = lambda x, w: class_loss(x, w, torch.tensor([0, 4, 2, 2]), loss, backend="reference")
    assert torch.autograd.gradcheck(call, (x, w))
    assert torch.autograd.gradgradcheck(call, (x, w))


def ends(loss: OfProbability, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its slope in the score, where exp(log_p) is the label's probability."""
    z = (log_p - torch.log(-torch.expm1(log_p))).requires_grad_()
    value = loss.end(F.logsigmoid(z), F.logsigmoid(-z))
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("name", PROBABILITY)
def test_both_ends_keep_their_digits(name: str) -> None:
    """p from 1 - 1e-12 to 1e-12 in float64, and float32 beside it."""
    loss, _ = PROBABILITY[name]
    small = torch.logspace(-12, -1, 45, dtype=torch.float64)
    for log_p in (torch.log1p(-small), small.log()):
        value, slope = ends(loss, log_p)
        z32 = (log_p - torch.log(-torch.expm1(log_p))).float().requires_grad_()
        narrow = loss.end(F.logsigmoid(z32), F.logsigmoid(-z32))
        (narrow_slope,) = torch.autograd.grad(narrow.sum(), z32)
        # the score itself rounds by u |z|, at most 28 u, in an exponent
        torch.testing.assert_close(narrow.detach().double(), value, rtol=4e-6, atol=0)
        torch.testing.assert_close(narrow_slope.double(), slope, rtol=4e-6, atol=0)


def test_limits_are_the_losses_that_they_are_named_after() -> None:
    x, w, y = torch.randn(7, 5).double(), torch.randn(9, 5).double(), torch.arange(7)
    options = dict(scale=8.0)
    of = lambda loss: class_loss(x, w, y, loss)
    entropy = of(Softmax(None, 8.0))
    for same in (CompSum(1.0, **options), GCE(1e-9, **options), Focal(0.0, **options)):
        torch.testing.assert_close(of(same), entropy, rtol=1e-7, atol=0)
    torch.testing.assert_close(of(CompSum(2.0, **options)) * 2, of(MAE(**options)))
    torch.testing.assert_close(of(CompSum(1.7, **options)), of(GCE(0.7, **options)))
    torch.testing.assert_close(of(AUL(2.0, 1.0, **options)) * 2, of(MAE(**options)))
    torch.testing.assert_close(of(Poly1(0.0, **options)), entropy)


def test_a_class_that_is_alone_has_p_one() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4)
    for loss, _ in PROBABILITY.values():
        found = class_loss(x, w, torch.zeros(3, dtype=torch.int64), loss)
        assert found == 0
        assert (torch.autograd.grad(found, x)[0] == 0).all()


@pytest.mark.parametrize("name", PROBABILITY)
def test_in_a_head(name: str) -> None:
    """With a margin, over all classes and over a sample, whose loss it is."""
    loss, _ = PROBABILITY[name]
    head = ClassCenters(20, 6, margin=loss, dtype=torch.float64)
    x, y = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.randint(0, 20, (9,))
    want = class_loss(x, head.weight, y, loss)
    torch.testing.assert_close(head(x, y), want, rtol=1e-11, atol=1e-12)
    for got, right in zip(
        torch.autograd.grad(head(x, y), (x, head.weight)),
        torch.autograd.grad(want, (x, head.weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_with_a_margin_and_with_bends() -> None:
    x, w, y = torch.randn(7, 5).double(), torch.randn(9, 5).double(), torch.arange(7)
    for margin in (margins.ArcFace(0.3), margins.MVSoftmax("am")):
        options = dict(margin=margin, scale=8.0)
        plain = class_loss(x, w, y, Softmax(margin, 8.0), reduction="none")
        found = class_loss(x, w, y, GCE(0.5, **options), reduction="none")
        torch.testing.assert_close(found, 2 * (1 - (-0.5 * plain).exp()), rtol=1e-9, atol=1e-12)
    assert repr(GCE(0.5)).endswith("gradient='exact', z_loss=0.0, softcap=None, q=0.5, k=0.0)")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CompSum(-0.1), "tau: expected"),
        (lambda: GCE(0.0), "q: expected"),
        (lambda: GCE(1.5), "q: expected"),
        (lambda: GCE(0.5, 1.0), r"k: expected a value in \[0, 1\)"),
        (lambda: AGCE(0.0), "a: expected"),
        (lambda: AGCE(1.0, -1.0), "q: expected"),
        (lambda: AUL(1.0), "a: expected a value > 1"),
        (lambda: SCE(-1.0), "alpha: expected"),
        (lambda: SCE(A=0.0), "A: expected"),
        (lambda: Focal(-1.0), "gamma: expected"),
        (lambda: Poly1(-2.0), "epsilon: expected"),
        (lambda: MAE(scale=0.0), "scale: expected"),
    ],
)
def test_bad_numbers(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
    with pytest.raises(TypeError, match="q: expected a float, got a tensor"):
        GCE(torch.tensor(0.5, requires_grad=True))  # pyright: ignore[reportArgumentType]
