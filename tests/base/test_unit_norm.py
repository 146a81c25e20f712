"""Rows of norm 1: against torch's own, in any order, at zero and at NaN, twice differentiable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fused_losses.base import unit_norm
from fused_losses.base.unit_norm import unit, wide_unit


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_is_torchs(ordered: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_norm, "ROWS", rows)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(7) if ordered else None
    weight = torch.randn(7, 5, dtype=torch.float64)
    found = [
        (u, *torch.autograd.grad((u * weight).sum(), x))
        for u in (unit(x, order), F.normalize(x if order is None else x[order]))
    ]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(lambda a: unit(a, order), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a: unit(a, order), x, fast_mode=True)


def test_three_dimensions() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, x)
    torch.testing.assert_close(unit(x), F.normalize(x, dim=-1))


def test_zero_and_nan_rows_keep_to_themselves() -> None:
    x = torch.randn(3, 4)
    x[0], x[1, 2] = 0, torch.nan
    x.requires_grad_()
    u = unit(x)
    grad = torch.autograd.grad(u.sum(), x)[0]
    assert (u[0] == 0).all() and (grad[0] == 0).all()
    assert u[1].isnan().all() and grad[1].isnan().any()
    assert torch.isfinite(u[2]).all() and torch.isfinite(grad[2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(9, 33).to(dtype)
    assert torch.equal(unit(x), F.normalize(x.float()).to(dtype))


def test_non_contiguous_and_empty() -> None:
    x = torch.randn(4, 6).T.requires_grad_()
    u = unit(x)
    torch.testing.assert_close(u, F.normalize(x))
    assert u.is_contiguous() and torch.autograd.grad(u.sum(), x)[0].shape == (6, 4)
    assert unit(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (5, 3, 4), (0, 4)], ids=str)
def test_in_the_dtype_of_sums(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, gradients of both orders and tangents are those of the rows widened as a whole."""
    monkeypatch.setattr(unit_norm, "ROWS", 3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, tangent = (torch.randn(shape).to(dtype) for _ in range(2))
    x[:1] = 0
    weight = torch.randn(shape, dtype=wide)

    def found(rows: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        u = rows(leaf)
        (once,) = torch.autograd.grad((u * weight).sum(), leaf, retain_graph=True)
        (graphed,) = torch.autograd.grad((u * weight).sum(), leaf, create_graph=True)
        (twice,) = torch.autograd.grad((graphed.to(wide) * weight).sum(), leaf)
        value, moved = torch.func.jvp(rows, (x,), (tangent,))
        return [u.detach(), value, moved, once, graphed.detach(), twice]

    got, wanted = found(wide_unit), found(lambda t: unit(t.to(wide)))
    for name, a, b in zip("u u tangent once graphed twice".split(), got, wanted, strict=True):
        assert a.dtype == b.dtype == (wide if name in ("u", "tangent") else dtype)
        # a few roundings each, of two formulas; what is stored in 16 bits is rounded once more
        u = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=8 * u, atol=8 * u, msg=name)
