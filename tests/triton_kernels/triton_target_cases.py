"""Ends of margin softmaxes by the kernels, in Triton's interpreter: `test_interpreted.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from target_ends import MARGINS, check_losses, check_what_is_no_number, given, losses
from torch import Tensor

from fused_losses import functional as F
from fused_losses.backends.triton import target_loss as kernels
from fused_losses.base import target_loss as ends
from fused_losses.base.checked_labels import no_target
from fused_losses.base.target_loss import MovedTarget, TargetEnd
from fused_losses.functions import target_end
from fused_losses.margins import AdaFace, ArcFace, CombinedMargin, CosFace, SphereFace

# a few roundings of each number, and of the two floats that a margin's are passed in
ROUNDED = 2.0**-44


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize(("n", "scale", "mean"), ((1, 64.0, True), (37, 64.0, True),
                                                  (2500, 30.3, False)))  # fmt: skip
def test_losses_against_float64(name: str, n: int, scale: float, mean: bool) -> None:
    end = TargetEnd(scale, target_end._moved(MARGINS[name]), mean)
    lse, target, labels = given(n, scale)
    labels[0] = 0
    assert kernels.takes_losses(lse, end)
    loss, slopes = kernels.losses(lse, target, labels, end)
    check_losses(loss, slopes, (lse, target, labels, end), ROUNDED)


def test_small_losses_keep_their_digits() -> None:
    """e^-40 and below, where 1 + e^-40 is 1."""
    gap = torch.tensor([-1.0, -20, -40, -300, -700], dtype=torch.float64)
    for i in range(5):
        alone = torch.full((5,), -1).index_fill(0, torch.tensor([i]), 2)
        end = TargetEnd(1.0, None, False)
        loss, slopes = kernels.losses(gap, torch.zeros(5, dtype=torch.float64), alone, end)
        want = gap[i].exp().log1p()
        assert abs(loss.double() - want) <= want * 2.0**-23 + torch.finfo(torch.float32).tiny
        share = gap[i].exp() / (1 + gap[i].exp())
        assert abs(slopes[0, i] - share) <= share * 2.0**-48


@pytest.mark.parametrize("name", MARGINS)
def test_what_is_no_number_is_as_the_formulas_have_it(name: str) -> None:
    end = TargetEnd(16.0, target_end._moved(MARGINS[name]), False)

    def formula(lse: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        given: dict[str, Any] = dict(margin=MARGINS[name], scale=16.0, reduction="sum")
        return target_end._formula(lse, target, labels=labels, **given)

    every = name in ("no margin", "linear beyond")
    check_what_is_no_number(kernels.losses, formula, end, 1 if every else 7)


@pytest.mark.parametrize("mean", (False, True))
def test_nothing_counts(mean: bool) -> None:
    lse = torch.full((70,), torch.nan, dtype=torch.float64)
    loss, slopes = kernels.losses(lse, lse, torch.full((70,), -1), TargetEnd(2.0, None, mean))
    assert loss == 0 and not slopes.any()


def test_through_autograd_and_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's slopes are handed on, and a second derivative is the formulas'."""
    end = TargetEnd(8.0, MovedTarget(0.5, 0.0, "linear"), True)
    lse, target, labels = given(40, 8.0)
    lse.requires_grad_()
    target.requires_grad_()

    def formula(lse: Tensor, target: Tensor) -> Tensor:
        return losses(lse, target, labels, end)

    def first(loss: Tensor, **how: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(3 * loss, (lse, target), **how)

    form = ends.FORMS[-1]
    by_kernel = ends._TargetLoss.apply(lse, target, labels, end, formula, form)
    assert isinstance(by_kernel, Tensor)
    got, want = first(by_kernel, retain_graph=True), first(formula(lse, target))
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))
    second: Callable[[Tensor], tuple[Tensor, ...]] = lambda loss: torch.autograd.grad(
        torch.cat(first(loss, create_graph=True)).square().sum(), (lse, target)
    )
    got, want = second(by_kernel), second(formula(lse, target))
    assert all(torch.allclose(a, b) and b.any() for a, b in zip(got, want, strict=True))
    (alone,) = torch.autograd.grad(
        ends._TargetLoss.apply(lse.detach(), target, labels, end, formula, form), (target,)
    )
    assert torch.allclose(3 * alone, first(formula(lse, target))[1])


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("margin", (None, CosFace(0.2), ArcFace(0.4)))
def test_whole_losses(
    reduction: str, margin: ArcFace | CosFace | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where no kernel is taken of itself: what the function hands over, and gets."""
    form, ran = ends.FORMS[-1], []

    def taken(*given: Any) -> Tensor:
        ran.append(given)
        loss = ends._TargetLoss.apply(*given, form)
        assert isinstance(loss, Tensor)
        return loss

    monkeypatch.setattr(target_end, "target_loss", taken)
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(9, 16, generator=g), torch.randn(21, 16, generator=g)
    labels = torch.randint(0, 21, (9,), generator=g).index_fill(0, torch.tensor([2]), -100)
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaves = a, b = [t.to(dtype).requires_grad_() for t in (x, w)]
        loss = F.margin_softmax(
            a, b, labels, margin=margin, scale=20.0, reduction=reduction, backend=backend
        )
        assert isinstance(loss, Tensor) and loss.dtype == dtype
        found.append((loss, *torch.autograd.grad(2 * loss, leaves)))
    assert len(ran) == 1
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
@pytest.mark.parametrize("ignored", (-100, -1, 3))
@pytest.mark.parametrize("n", (1, 37, 1024, 2500))
def test_labels(n: int, ignored: int, dtype: torch.dtype) -> None:
    labels = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n))
    labels[n // 2] = ignored
    named, fine = kernels.label_names(labels, 50, ignored, dtype)
    assert named.dtype == dtype and torch.equal(named, no_target(labels, ignored).to(dtype))
    assert fine.dtype == torch.bool and fine.item()
    for at in {0, n // 2, n - 1}:
        for wrong in (-1, -2, 50, 2**40, -(2**40)):
            if wrong == ignored:
                continue
            bad = labels.index_fill(0, torch.tensor([at]), wrong)
            named, fine = kernels.label_names(bad, 50, ignored, torch.int64)
            assert not fine.item() and torch.equal(named, no_target(bad, ignored))


def test_who_has_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    lse, _, labels = given(7, 1.0)
    end = TargetEnd(1.0, None, True)
    assert kernels.takes_losses(lse, end) and kernels.takes_labels(labels)
    assert not kernels.takes_losses(lse.float(), end)
    assert not kernels.takes_losses(lse, end._replace(moved=MovedTarget(0.5, 0, "clamp")))
    assert kernels.takes_losses(lse, end._replace(moved=MovedTarget(0.0, 0.3, "clamp")))
    assert not kernels.takes_labels(labels.int()) and not kernels.takes_labels(labels[:0])
    assert not kernels.takes_labels(labels[::2])
    assert not kernels.takes_labels(labels.new_zeros(kernels.MOST_ROWS + 1))
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "bounded")
    assert not kernels.takes_losses(lse, end) and not kernels.takes_labels(labels)


def test_margins_that_are_numbers() -> None:
    number = target_end._moved
    assert number(ArcFace(0.5)) == MovedTarget(0.5, 0.0, "linear")
    assert number(CosFace(0.25)) == MovedTarget(0.0, 0.25, "none")
    assert number(CombinedMargin(1.0, 0.3, 0.2)) == MovedTarget(0.3, 0.2, "monotone")
    for other in (
        ArcFace(torch.tensor(0.5)), CombinedMargin(2.0, 0.3, 0.2), SphereFace(), AdaFace(),
        ArcFace(0.0, beyond_pi="clip"), lambda cosine: cosine,
    ):  # fmt: skip
        assert number(other) is None
