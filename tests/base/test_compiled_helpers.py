"""The extension's helpers around a sweep: PyTorch's own formulas, to a rounding, of any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.base import compiled, integers, numerics, unit_norm
from fused_losses.base.integers import dense
from fused_losses.base.numerics import (
    exact_center,
    nan_where_infinite,
    reduced,
    share_loss,
    softplus,
)
from fused_losses.base.unit_norm import unit

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
USERS = (integers, numerics, unit_norm)


@pytest.fixture(autouse=True)
def built() -> None:
    if compiled.helpers() is None:
        pytest.skip("the helpers are not built")


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Within its `context()` the helpers are passed over."""
    return monkeypatch


def without(patch: pytest.MonkeyPatch, run, *arguments):
    with patch.context() as now:
        for user in USERS:
            now.setattr(user, "helpers", lambda *_: None)
        return run(*arguments)


def hard_rows(dtype: torch.dtype) -> Tensor:
    x = torch.randn(9, 13).to(dtype)
    small, large = (1e-6, 1e3) if dtype == torch.float16 else (1e-36, 1e36)
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 0] = torch.inf, torch.nan, -torch.inf
    x[5], x[6] = x[5] * small, x[6] * large
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_unit_rows(dtype: torch.dtype, ordered: bool, formulas: pytest.MonkeyPatch) -> None:
    for x in (hard_rows(dtype), torch.randn(1, 1).to(dtype), torch.randn(0, 3).to(dtype)):
        order = torch.randperm(len(x)) if ordered else None
        grad, eps = torch.randn(x.shape).to(dtype), torch.finfo(dtype).eps

        def both(x: Tensor = x, order: Tensor | None = order, grad: Tensor = grad) -> list:
            leaf = x.clone().requires_grad_()
            u = unit(leaf, order)
            return [u.detach(), *torch.autograd.grad(u, leaf, grad)]

        # a gradient is as accurate as its row's largest entry is; float16 ends at 6e-8
        for got, wanted in zip(both(), without(formulas, both), strict=True):
            assert torch.equal(got.isnan(), wanted.isnan())
            known = wanted.double().nan_to_num(0, 0, 0)
            bound = 8 * eps * known.abs().amax(dim=1, keepdim=True) if len(x) else 0
            floor = 2**-23 if dtype == torch.float16 else 0
            assert ((got.double().nan_to_num(0, 0, 0) - known).abs() <= bound + floor).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_marks(dtype: torch.dtype, formulas: pytest.MonkeyPatch) -> None:
    x = hard_rows(dtype)
    for rows in (x, x[:, None], x[:, :7], x[0], x[:0], x[:, :0], x.T, x[2]):
        wanted = without(formulas, nan_where_infinite, rows)
        torch.testing.assert_close(nan_where_infinite(rows), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_ends_of_losses(dtype: torch.dtype, formulas: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 800.0, -800.0])
    z = torch.cat([torch.linspace(-40, 40, 23), ends]).to(dtype)
    low, kept = torch.randn(len(z)).to(dtype), torch.rand(len(z)) > 0.3
    fine = kept & z.isfinite()
    for run in (
        softplus,
        lambda z: share_loss(torch.stack([low, z]), kept.to(dtype))[0],
        lambda z: share_loss(torch.stack([z, low]), kept.to(dtype))[0],
        lambda z: reduced(z, fine, "mean", torch.float64),
        lambda z: reduced(z, fine, "sum", torch.float32),
        lambda z: reduced(z, torch.zeros_like(fine), "mean", dtype),
    ):
        found = []
        for call in (run, lambda z, run=run: without(formulas, run, z)):
            leaf = z.clone().requires_grad_()
            out = call(leaf)
            found.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
        for got, wanted in zip(*found, strict=True):
            assert got.dtype == wanted.dtype
            eps = torch.finfo(torch.float32 if got.dtype == torch.float32 else dtype).eps
            torch.testing.assert_close(got, wanted, rtol=8 * eps, atol=0, equal_nan=True)


def test_derivatives_of_any_order() -> None:
    high, low = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept = torch.tensor([True, False, True, True, False, True, True])
    for run in (
        lambda a, b: softplus(a) * b,
        lambda a, b: share_loss(torch.stack([a, b]), kept.double())[0],
        lambda a, b: reduced(a * b, kept, "mean", torch.float64),
        lambda a, b: reduced(a * b, kept, "sum", torch.float64),
    ):
        assert torch.autograd.gradcheck(run, (high, low))
        assert torch.autograd.gradgradcheck(run, (high, low))

    def third(a: Tensor) -> Tensor:
        first = torch.autograd.grad(softplus(a).sum(), a, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), a, create_graph=True)[0]

    s = torch.sigmoid(high.detach())
    torch.testing.assert_close(
        torch.autograd.grad(third(high).sum(), high)[0], s * (1 - s) * (1 - 2 * s)
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_numbers(dtype: torch.dtype, formulas: pytest.MonkeyPatch) -> None:
    for labels in (torch.randint(0, 90, (50,)).to(dtype), torch.zeros(0, dtype=dtype)):
        assert torch.equal(dense(labels), without(formulas, dense, labels))
    far = torch.tensor([2**62, -(2**62), 0, 2**62])
    assert dense(far).tolist() == [2, 0, 1, 2]


def test_who_looks_at_operations_sees_them() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        softplus(torch.randn(3))
    assert seen
    x = torch.randn(3)
    assert compiled.helpers(x) is not None
    assert torch.func.grad(lambda z: softplus(z).sum())(x).shape == (3,)
    assert torch.func.vmap(softplus)(x).shape == (3,)
    assert compiled.helpers(x.to("meta")) is None
    with torch.autograd.forward_ad.dual_level():
        assert compiled.helpers(x) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_center(dtype: torch.dtype, formulas: pytest.MonkeyPatch) -> None:
    x = (torch.rand(9, 7) + 40).to(dtype)
    y = (torch.rand(4, 7) + 41).to(dtype)
    x[:, 1], y[:, 1], x[:, 2] = -x[:, 1], -y[:, 1], -x[:, 2]
    x[3, 3], x[3, 4], x[3, 5] = torch.nan, torch.inf, 0
    for sides in ((x,), (x, y), (x, x[:0]), (x[:, :0],), (x[:0],)):
        got, wanted = exact_center(*sides), without(formulas, exact_center, *sides)
        if wanted is None:
            assert got is None
            continue
        # two orders of a mean's sum, cut to a multiple of the unit in the last place of 41
        step = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, wanted, rtol=0, atol=step)
        assert torch.equal(got == 0, wanted == 0)
        rows = sides[0][[0, 8]]
        moved = rows.double() - got.double()
        assert torch.equal((rows - got).double(), moved)
