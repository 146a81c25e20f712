"""Distillation where a softmax is nearly one class: slopes are of the terms that are left."""

from __future__ import annotations

import pytest
import torch
from conftest import require
from softmax_digits import slopes
from torch import Tensor

from fused_losses import distillation
from fused_losses.primitives.divergence import bounded

DOUBLE = torch.float64
LABEL = 2
OPTIONS = {"pskd": dict(alpha=0.6), "jsd": dict(beta=0.3)}
KINDS = ("kl", "reverse_kl", "tv", "soft_ce", "pskd", "ofa", "jsd")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TILE_BYTES", 1)


def scores(size: float, near: float) -> tuple[Tensor, Tensor]:
    """[3, 40] of both sides: the teacher's are the student's and `near` of others."""
    u, more = size * torch.randn(2, 3, 40, dtype=DOUBLE)
    v = (1 - near) * u + near * more
    # the label is no class that rules
    u[:, LABEL], v[:, LABEL] = u.amin(1), v.amin(1)
    return u, v


def gradients(kind: str, form: str, u: Tensor, v: Tensor, alone: bool) -> tuple[Tensor, ...]:
    """Of the sum over rows, by both matrices; alone: the teacher's as dense scores."""
    eye = torch.eye(u.shape[1], dtype=DOUBLE)
    sides = u.clone().requires_grad_(), v.clone().requires_grad_()
    labels = torch.full((len(u),), LABEL)
    loss = distillation(
        sides[0], eye, sides[1], None if alone else eye, kind=kind, labels=labels,
        temperature=1.0, teacher_grad=True, reduction="sum", backend=form, **OPTIONS.get(kind, {}),
    )  # fmt: skip
    return torch.autograd.grad(loss, sides)


@pytest.mark.float64
@pytest.mark.parametrize("form", ["bounded", "cpu"])
@pytest.mark.parametrize("near", [1.0, 0.05, 1e-7])
@pytest.mark.parametrize("size", [3.0, 15.0, 60.0])
@pytest.mark.parametrize("kind", KINDS)
def test_slopes_have_their_digits(kind: str, size: float, near: float, form: str) -> None:
    require(form)
    u, v = scores(size, near)
    option = next(iter(OPTIONS.get(kind, {"": 1.0}).values()))
    # a share is known as its scores are, each rounded in its length
    bound = 64 * 2.0**-53 * (1 + 4 * size)
    for alone in (False, True):
        got = gradients(kind, form, u, v, alone)
        for i in range(len(u)):
            wanted = slopes(kind, u[i].tolist(), v[i].tolist(), LABEL, option)
            for side, (mine, want) in enumerate(zip(got, wanted, strict=True)):
                right = torch.tensor(want, dtype=DOUBLE)
                off = float((mine[i] - right).norm())
                assert off <= bound * float(right.norm()) + _spare(kind, side), (side, off, right)


def _spare(kind: str, side: int) -> float:
    """Where a sum of slopes of size 1 is all that the statistics tell of a class."""
    if kind == "jsd":  # a class beside a mixture that has none of it: log beta, and no more
        return 2.0**-50
    return 2.0**-50 if kind in ("pskd", "ofa") and side == 0 else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(DOUBLE, marks=pytest.mark.float64)])
@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0, 75.0])
def test_a_mixture_of_two_classes(gap: float, dtype: torch.dtype, streamed: str) -> None:
    """Each side has one class that the other hardly has: log(q / m) is as long as scores are."""
    if streamed == "cuda" and dtype == DOUBLE:
        pytest.skip("cuda takes no float64")
    u, v = torch.tensor([[gap, 0.0]], dtype=dtype), torch.tensor([[0.0, gap]], dtype=dtype)
    eye, sides = torch.eye(2, dtype=dtype), [z.requires_grad_() for z in (u, v)]
    loss = distillation(
        u, eye, v, eye, kind="jsd", beta=0.3, teacher_grad=True, backend=streamed
    )  # fmt: skip
    wanted = slopes("jsd", u[0].tolist(), v[0].tolist(), -1, 0.3)
    for mine, want in zip(torch.autograd.grad(loss, sides), wanted, strict=True):
        right = torch.tensor(want, dtype=DOUBLE)
        off = (mine[0].double() - right).norm() / right.norm()
        assert off <= 64 * (1 + gap) * torch.finfo(dtype).eps
