"""Vectors around a sweep over classes: labels and ends of margin softmaxes by the extension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from target_ends import MARGINS, check_losses, check_what_is_no_number, given, losses
from torch import Tensor

from fused_losses import functional as F
from fused_losses.base import checked_labels as names
from fused_losses.base import compiled
from fused_losses.base import target_loss as ends
from fused_losses.base.checked_labels import checked_labels, no_target
from fused_losses.base.target_loss import MovedTarget, TargetEnd, target_loss
from fused_losses.functions import target_end
from fused_losses.margins import ArcFace, CosFace, Margin

RUN = ends.ON_CPU.run
ROUNDED = 2.0**-48  # a few roundings of each number


@pytest.fixture(autouse=True)
def built() -> None:
    if compiled.helpers() is None:
        pytest.skip("the helpers are not built")


def end_of(margin: Margin | None, scale: float = 64.0, mean: bool = True) -> TargetEnd:
    return TargetEnd(scale, target_end._moved(margin), mean)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize(("n", "scale", "mean"), ((1, 64.0, True), (37, 64.0, True),
                                                  (2500, 30.3, False)))  # fmt: skip
def test_losses_against_float64(name: str, n: int, scale: float, mean: bool) -> None:
    end = end_of(MARGINS[name], scale, mean)
    lse, target, labels = given(n, scale)
    labels[0] = 0
    assert ends.ON_CPU.takes(lse, end)
    loss, slopes = RUN(lse, target, labels, end)
    check_losses(loss, slopes, (lse, target, labels, end), ROUNDED)
    # vectors with gaps are read as they are
    gaps = lambda t: torch.stack((t, t)).T[:, 0]
    apart = RUN(gaps(lse), gaps(target), gaps(labels), end)
    for got, want in zip(apart, (loss, slopes), strict=True):
        assert torch.equal(got, want)


def test_small_losses_keep_their_digits() -> None:
    """e^-40 and below, where 1 + e^-40 is 1."""
    gap = torch.tensor([-1.0, -20, -40, -300, -700], dtype=torch.float64)
    for i in range(5):
        alone = torch.full((5,), -1).index_fill(0, torch.tensor([i]), 2)
        loss, slopes = RUN(gap, torch.zeros_like(gap), alone, TargetEnd(1.0, None, False))
        want = gap[i].exp().log1p()
        assert abs(loss.double() - want) <= want * 2.0**-23 + torch.finfo(torch.float32).tiny
        share = gap[i].exp() / (1 + gap[i].exp())
        assert abs(slopes[0, i] - share) <= share * 2.0**-50


@pytest.mark.parametrize("name", MARGINS)
def test_what_is_no_number_is_as_the_formulas_have_it(name: str) -> None:
    def formula(lse: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        options: dict[str, Any] = dict(margin=MARGINS[name], scale=16.0, reduction="sum")
        return target_end._formula(lse, target, labels=labels, **options)

    check_what_is_no_number(RUN, formula, end_of(MARGINS[name], 16.0, False))


@pytest.mark.parametrize("mean", (False, True))
@pytest.mark.parametrize("n", (0, 70))
def test_nothing_counts(n: int, mean: bool) -> None:
    lse = torch.full((n,), torch.nan, dtype=torch.float64)
    loss, slopes = RUN(lse, lse, torch.full((n,), -1), TargetEnd(2.0, None, mean))
    assert loss == 0 and not slopes.any()


def test_through_autograd_and_twice() -> None:
    """The slopes are handed on, and a second derivative is the formulas'."""
    end = TargetEnd(8.0, MovedTarget(0.5, 0.0, "linear"), True)
    lse, target, labels = given(40, 8.0)
    lse.requires_grad_()
    target.requires_grad_()
    formula = lambda lse, target: losses(lse, target, labels, end)

    def first(loss: Tensor, **how: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(3 * loss, (lse, target), **how)

    loss = target_loss(lse, target, labels, end, formula)
    assert loss is not None
    second: Callable[[Tensor], tuple[Tensor, ...]] = lambda loss: torch.autograd.grad(
        torch.cat(first(loss, create_graph=True)).square().sum(), (lse, target)
    )
    for order in (lambda loss: first(loss, retain_graph=True), second):
        for got, want in zip(order(loss), order(formula(lse, target)), strict=True):
            assert torch.allclose(got, want) and want.any()


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("margin", (None, CosFace(0.2), ArcFace(0.4)))
def test_whole_losses(
    reduction: str, margin: Margin | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the form and by the formulas, against float64."""
    make = torch.Generator().manual_seed(3)
    x, w = torch.randn(9, 16, generator=make), torch.randn(21, 16, generator=make)
    labels = torch.randint(0, 21, (9,), generator=make).index_fill(0, torch.tensor([2]), -100)
    ran = []
    form = ends.ON_CPU._replace(run=lambda *of: ran.append(of) or RUN(*of))
    monkeypatch.setattr(ends, "ON_CPU", form)

    def outcome(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        call: Any = F.margin_softmax
        options: dict[str, Any] = dict(margin=margin, scale=20.0, reduction=reduction)
        loss = call(*leaves, labels, backend=backend, **options)
        assert isinstance(loss, Tensor) and loss.dtype == dtype
        return loss, *torch.autograd.grad(2 * loss, leaves)

    want = outcome(torch.float64, "reference")
    assert not ran
    for count in (1, 1):
        for got, truth in zip(outcome(torch.float32, "bounded"), want, strict=True):
            assert (got - truth).norm() <= 1e-6 * truth.norm()
        assert len(ran) == count
        monkeypatch.setattr(ends, "helpers", lambda *_: None)


def test_who_has_the_form() -> None:
    lse, _, _ = given(7, 1.0)
    end, takes = TargetEnd(1.0, None, True), ends.ON_CPU.takes
    assert takes(lse, end) and not takes(lse.float(), end)
    assert not takes(lse, end._replace(moved=MovedTarget(0.5, 0, "clamp")))
    assert takes(lse, end._replace(moved=MovedTarget(0.0, 0.3, "clamp")))
    assert not takes(lse.new_zeros(ends.LONG + 1), end)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
@pytest.mark.parametrize("ignored", (-100, -1, 3))
@pytest.mark.parametrize("n", (0, 1, 37, 1024))
def test_labels(n: int, ignored: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n))
    if n:
        labels[n // 2] = ignored
    apart = torch.stack((labels, labels)).T[:, 0]
    for of in (labels, apart):
        named = checked_labels(of, 50, ignored, dtype)
        assert named.dtype == dtype and torch.equal(named, no_target(labels, ignored).to(dtype))
    assert compiled.extension().all_labelled(no_target(labels, ignored)) == (n == 0)
    for at in {0, n // 2, n - 1} if n else ():
        for wrong in (-1, -2, 50, 2**40, -(2**40)):
            if wrong == ignored:
                continue
            bad = labels.index_fill(0, torch.tensor([at]), wrong)
            with pytest.raises(IndexError) as found:
                checked_labels(bad, 50, ignored, dtype)
            with monkeypatch.context() as now, pytest.raises(IndexError) as wanted:
                now.setattr(names, "helpers", lambda *_: None)
                checked_labels(bad, 50, ignored, dtype)
            assert str(found.value) == str(wanted.value)
