"""Ends of margin softmaxes in float64, by the angle: what kernels of them are held to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses.base.target_loss import MovedTarget, TargetEnd
from fused_losses.margins import ArcFace, CombinedMargin, CosFace

BEYOND = ("linear", "none", "easy", "monotone")
MARGINS = {
    "no margin": None,
    "minus": CosFace(0.35),
    "minus of an angle": CombinedMargin(1.0, 0.0, 0.2),
    "both": CombinedMargin(1.0, 0.3, 0.2),
    "straight": ArcFace(math.pi),
    **{f"{beyond} beyond": ArcFace(0.5, beyond_pi=beyond) for beyond in BEYOND},
}


def moved(t: Tensor, end: MovedTarget | None) -> Tensor:
    """cos(acos(t) + m2) - m3, with its convention beyond pi, by the angle."""
    if end is None or end.m2 == 0:
        return t if end is None else t - end.m3
    phi = t.acos() + end.m2
    value = phi.cos()
    if end.beyond_pi == "linear":
        value = torch.where(phi < math.pi, value, t - end.m2 * math.sin(end.m2))
    elif end.beyond_pi == "easy":
        value = torch.where(t > 0, value, t)
    elif end.beyond_pi == "monotone":
        value = torch.where(phi < math.pi, value, -value - 2)
    return value - end.m3


def given(n: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    t = torch.rand(n, generator=g, dtype=torch.float64) * 1.998 - 0.999
    lse = (torch.rand(n, generator=g, dtype=torch.float64) * 3 - 1.5) * scale
    labels = torch.randint(-1, 5, (n,), generator=g)
    return lse, t * scale, labels


def losses(lse: Tensor, target: Tensor, labels: Tensor, end: TargetEnd) -> Tensor:
    gap = lse - end.scale * moved(target / end.scale, end.moved)
    # softplus of both signs with all its digits
    each = torch.where(gap > 0, gap, 0) + torch.log1p((-gap.abs()).exp())
    kept = each[labels >= 0]
    return kept.sum() / max(len(kept), 1) if end.mean else kept.sum()


def check_losses(
    loss: Tensor, slopes: Tensor, of: tuple[Tensor, Tensor, Tensor, TargetEnd], rounded: float
) -> None:
    """A form's loss and slopes, where each number is within so many of its own size."""
    lse, target, labels, end = of
    lse, target = (t.clone().requires_grad_() for t in (lse, target))
    want = losses(lse, target, labels, end)
    along = torch.stack(torch.autograd.grad(want, (lse, target)))
    # of a mean's sum each row brings the roundings of its own score
    size = (lse.abs() + target.abs() + end.scale).detach()
    assert loss.shape == () and loss.dtype == torch.float32
    shares = 1 / max(int((labels >= 0).sum()), 1) if end.mean else 1.0
    bound = rounded * float(size.sum()) * shares + 2.0**-24 * abs(want.item())
    assert abs(loss.item() - want.item()) <= bound
    # a slope is a share, times what the angle's is near its ends
    steep = 1 / (1 - (target.detach() / end.scale) ** 2)
    room = rounded * shares * (1 + size) * steep
    assert ((slopes - along).abs() <= room).all()
    assert not slopes[:, labels < 0].any()


def check_what_is_no_number(
    run: Callable[[Tensor, Tensor, Tensor, TargetEnd], tuple[Tensor, Tensor]],
    formula: Callable[[Tensor, Tensor, Tensor], Tensor],
    end: TargetEnd,
    step: int = 1,
) -> None:
    """NaN, infinities and cosines beyond 1 as the formula of (lse, target, labels) has them.

    step: every so many rows are looked at alone.
    """
    scores = (torch.nan, torch.inf, -torch.inf, *(c * end.scale for c in (0, 1, -1, 1.1, -1.1)))
    others = (torch.nan, torch.inf, -torch.inf, 3.0)
    pairs = torch.cartesian_prod(torch.tensor(others), torch.tensor(scores)).double()
    lse, target = (column.clone().requires_grad_() for column in pairs.T)

    def by_form(labels: Tensor) -> tuple[Tensor, Tensor]:
        return run(lse.detach(), target.detach(), labels, end)

    every = torch.zeros(len(pairs), dtype=torch.int64)
    along = torch.stack(torch.autograd.grad(formula(lse, target, every), (lse, target)))
    _, slopes = by_form(every)
    told = torch.cat((pairs.T, slopes, along)).T
    assert torch.allclose(slopes, along, rtol=1e-9, atol=1e-9, equal_nan=True), told
    assert torch.equal(by_form(every - 1)[1], torch.zeros_like(slopes))
    # a sum hides what is no number: each row's loss by itself, those of others ignored
    for i in range(0, len(pairs), step):
        alone = (every - 1).index_fill(0, torch.tensor([i]), 2)
        loss, _ = by_form(alone)
        want = formula(lse, target, alone).float()
        assert torch.allclose(loss, want, rtol=1e-6, equal_nan=True), pairs[i]
