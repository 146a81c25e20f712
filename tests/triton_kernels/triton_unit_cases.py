"""Rows of norm 1 by the kernels against float64, in Triton's interpreter: `test_interpreted.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_losses.backends.triton import unit_rows
from fused_losses.base import unit_norm

# of a result: the interpreter cuts a bfloat16 where a GPU rounds it
ROUNDED = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}


def given(n: int, d: int, dtype: torch.dtype, lengths: tuple[float, ...] = (1.0,)) -> Tensor:
    """Rows of many lengths, none of which leaves the dtype's range."""
    g = torch.Generator().manual_seed(n + d)
    scale = torch.tensor(lengths, dtype=torch.float64).repeat(n)[:n, None]
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * scale).to(dtype)


def formula(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """u and dL/dx in float64."""
    x, grad = x.double(), grad.double()
    norm = x.norm(dim=1, keepdim=True)
    u = x / norm.masked_fill(norm == 0, 1)
    dx = (grad - u * (u * grad).sum(1, keepdim=True)) / norm
    return u, torch.where(norm == 0, 0, dx)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("n", "d"), ((1, 1), (5, 3), (37, 72), (130, 512), (3, 1100)))
def test_against_float64(n: int, d: int, dtype: torch.dtype) -> None:
    far = (1.0, 1e30, 1e-30, 0.0) if dtype != torch.float16 else (1.0, 100.0, 1e-3, 0.0)
    x, grad = given(n, d, dtype, far), given(n + 1, d, dtype)[1:]
    u, dx = formula(x, grad)
    # a rounding of the result, and in float32 those of a sum of D terms, a root and a quotient
    own = (d**0.5 + 8) * 2.0**-23
    least = 2 * ROUNDED[dtype] * torch.finfo(dtype).smallest_normal  # a step below the normal ones
    got = unit_rows.forward(x)
    assert got.dtype == dtype and got.is_contiguous()
    assert ((got.double() - u).abs() <= u.abs() * (ROUNDED[dtype] + own) + least).all()
    # the difference cancels: against the terms that it is made of
    norm = x.double().norm(dim=1, keepdim=True)
    size = (grad.double().abs() + u.abs() * grad.double().norm(dim=1, keepdim=True)) / norm
    bound = size.nan_to_num(0) * (ROUNDED[dtype] + 2 * own) + least
    got = unit_rows.backward(x, grad)
    fits = dx.abs() < torch.finfo(dtype).max
    assert ((got.double() - dx).abs()[fits] <= bound[fits]).all()


def test_strided_rows_and_gradients() -> None:
    x, grad = given(9, 40, torch.float32), given(11, 18, torch.float32)
    view, turned = x[1::2, 3:21], torch.stack([grad[i] for i in range(4)], 1).T
    assert turned.stride(1) != 1
    assert torch.equal(unit_rows.forward(view), unit_rows.forward(view.contiguous()))
    expected = unit_rows.backward(view.contiguous(), turned.contiguous())
    assert torch.equal(unit_rows.backward(view, turned), expected)
    repeated = grad[:1].expand(4, 18)
    expected = unit_rows.backward(view, repeated.contiguous())
    assert torch.equal(unit_rows.backward(view, repeated), expected)


def test_what_is_no_number_stays_in_its_row() -> None:
    x, grad = given(6, 300, torch.float32), given(7, 300, torch.float32)[1:]
    x[1, 299], x[2, 0], x[3, 17], x[4] = torch.nan, torch.inf, -torch.inf, 0
    grad[4], grad[5, 3] = torch.nan, torch.nan
    u, dx = unit_rows.forward(x), unit_rows.backward(x, grad)
    assert u[1].isnan().all() and not u[4].any() and not dx[4].any()
    assert u[2, 0].isnan() and u[3, 17].isnan() and dx[[1, 5]].isnan().all()
    for got, expected in (
        (u, unit_norm._forward(x)), (dx, unit_norm._backward(x, grad))
    ):  # fmt: skip
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.allclose(got.nan_to_num(), expected.nan_to_num(), rtol=1e-5, atol=1e-6)
    clean = [0, 5]
    assert torch.equal(u[clean], unit_rows.forward(x[clean]))


def test_a_row_does_not_see_the_others() -> None:
    """Whatever program it is in: the same bits alone."""
    x, grad = given(70, 72, torch.bfloat16), given(71, 72, torch.bfloat16)[1:]
    u, dx = unit_rows.forward(x), unit_rows.backward(x, grad)
    for i in (0, 15, 16, 69):
        assert torch.equal(u[i : i + 1], unit_rows.forward(x[i : i + 1]))
        assert torch.equal(dx[i : i + 1], unit_rows.backward(x[i : i + 1], grad[i : i + 1]))


def test_who_has_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = given(4, 8, torch.float32)
    assert unit_rows.takes(x)  # interpreted, they take what is on the CPU
    assert not unit_rows.takes(x.double()) and not unit_rows.takes(x[0])
    assert not unit_rows.takes(x.T) and not unit_rows.takes(x[:0])
    monkeypatch.setenv("FUSED_LOSSES_BACKEND", "bounded")
    assert not unit_rows.takes(x)
    monkeypatch.delenv("FUSED_LOSSES_BACKEND")
    ran = []
    torch.func.vmap(lambda r: ran.append(unit_rows.takes(r)) or r)(x[None])
    assert ran == [False]
