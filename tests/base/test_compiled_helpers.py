"""The extension's helpers around a sweep: PyTorch's own formulas, to a rounding, of any order."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fused_losses.base import compiled, integers, numerics, unit_norm
from fused_losses.base.integers import dense
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import (
    exact_center,
    nan_where_infinite,
    reduced,
    share_loss,
    softplus,
)
from fused_losses.base.unit_norm import unit
from fused_losses.functions import pair_sums
from fused_losses.functions.pair_sums import Shares, mean_of_each, reduced_shares
from fused_losses.primitives.pairs import op as pairs
from fused_losses.primitives.pairs.inputs import PairInputs, Rule
from fused_losses.primitives.pairs.op import pair_statistics

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
USERS = (integers, numerics, unit_norm, pair_sums, pairs)


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
            for name in ("helpers", "offered"):
                if hasattr(user, name):
                    now.setattr(user, name, lambda *_: None)
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
        lambda z: mean_of_each(torch.stack([z, low]), kept.to(dtype).repeat(2, 1), dtype),
        lambda z: mean_of_each(torch.stack([low, low * z]), torch.zeros(2, len(z)).to(z), dtype),
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
        lambda a, b: mean_of_each(torch.stack([a * b, b]), kept.double().repeat(2, 1), a.dtype),
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


def shares(dtype: torch.dtype, mean: bool) -> Shares:
    """Rows of all sorts: without positives, without negatives, without either."""
    value, count = torch.randn(2, 21, dtype=dtype) * 9, torch.arange(21) % 5
    others, total = (torch.arange(21) % 3).to(dtype), torch.randn(2, 21, dtype=dtype)
    value[0] = torch.where(count == 0, -torch.inf, value[0])
    value[1] = torch.where(others == 0, -torch.inf, value[1])
    return Shares(value, others, *((total, count.to(dtype)) if mean else ()))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("everyone", [False, True])
def test_reduced_shares(
    dtype: torch.dtype, reduction: str, everyone: bool, formulas: pytest.MonkeyPatch
) -> None:
    for mean, sides in ((False, 1), (True, 1), (False, 2)):
        rows, columns = (shares(dtype, mean) for _ in range(2))

        def both(rows: Shares = rows, columns: Shares = columns, sides: int = sides) -> list:
            leaves = [t.clone().requires_grad_() for t in (rows.value, columns.value)]
            total = None if rows.total is None else rows.total.clone().requires_grad_()
            of_rows = rows._replace(value=leaves[0], total=total)
            of_columns = columns._replace(value=leaves[1]) if sides == 2 else None
            out = reduced_shares(of_rows, of_columns, reduction, dtype, everyone=everyone)
            leaves = leaves[:sides] + ([] if total is None else [total])
            return [out.detach(), *torch.autograd.grad(out, leaves)]

        # 42 terms of up to 60, added in another order
        bound = 128 * torch.finfo(dtype).eps
        for got, wanted in zip(both(), without(formulas, both), strict=True):
            torch.testing.assert_close(got, wanted, rtol=bound, atol=60 * bound)


@pytest.mark.parametrize("mean", [False, True])
def test_reduced_shares_of_any_order(mean: bool) -> None:
    rows, columns = shares(torch.float64, mean), shares(torch.float64, False)
    kept = (rows.value.isfinite() & columns.value.isfinite()).all(dim=0)
    total = torch.zeros_like(rows.value) if rows.total is None else rows.total
    given = [t[:, kept].requires_grad_() for t in (rows.value, total, columns.value)]

    def run(value: Tensor, total: Tensor, second: Tensor) -> Tensor:
        count = None if rows.count is None else rows.count[kept]
        one = Shares(value, rows.others[kept], total if mean else None, count)
        other = None if mean else Shares(second, columns.others[kept])
        return reduced_shares(one, other, "mean", torch.float64) + 0 * (total + second).sum()

    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


class Nothing(torch.autograd.Function):
    """The identity, which has no gradient to give."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        return None


PAIR_CALLS = {
    "products": (lambda p: p, {}),
    "columns": (lambda p: p, dict(cols=True)),
    "kept": (lambda p: p, dict(cols=True, room=1 << 20)),
    "softplus": (lambda p: p._replace(negative=Rule(2.0, 0.5)), dict(reduction="softplus")),
    "triangle": (
        lambda p: p._replace(y=p.x, triangle=True, y_bias=None, y_labels=None, y_window=None),
        {},
    ),
    "apart": (lambda p: p._replace(apart=True, score="root", x_bias=None, y_bias=None), {}),
    "one": (lambda p: p._replace(y=p.x, y_bias=p.x_bias, y_labels=p.x_labels, skip_self=True), {}),
    "circle": (lambda p: p._replace(positive=Rule(-8, 0.6, 1.4), negative=Rule(8, 0.4, 0.4)), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PAIR_CALLS)
def test_pairs_in_plain_eager_code(
    name: str, dtype: torch.dtype, formulas: pytest.MonkeyPatch
) -> None:
    changed, options = PAIR_CALLS[name]
    n, wide = 13, torch.float64 if dtype == torch.float64 else torch.float32
    rows = [torch.randn(n, 7).to(dtype) for _ in range(2)]
    rows[0][3, 2] = torch.inf  # whose statistics are NaN
    biases = [torch.randn(n).to(wide) for _ in range(2)]
    labels = torch.arange(n, dtype=torch.int32) % 4
    window = (torch.rand(4, n) * torch.tensor([[-9], [9], [-9], [9]])).to(wide)
    scale = torch.tensor(1.5, dtype=torch.float64)
    calls = []

    def both() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*rows, scale, *biases)]
        p = PairInputs(*leaves, labels, labels.clone(), x_window=window)
        more = dict(options)
        room = Room(more.pop("room")) if "room" in more else None
        found = [t for s in pair_statistics(changed(p), room=room, **more) if s for t in s]
        calls.append(found[0].grad_fn.name())
        moving = [t for t in found if t.requires_grad]
        grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in moving]
        grads = [g.to(t) for g, t in zip(grads, moving, strict=True)]
        slopes = torch.autograd.grad(moving, leaves, grads, allow_unused=True)
        return [t.detach() for t in (*found, *(g for g in slopes if g is not None))]

    # the same kernels: the same bits
    for got, wanted in zip(both(), without(formulas, both), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert "Streamed" in calls[0] and "Streamed" not in calls[1]


def test_pairs_of_any_order_and_what_a_node_keeps(formulas: pytest.MonkeyPatch) -> None:
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows, columns = pair_statistics(PairInputs(x, y, scale, bias), cols=True)
        assert columns is not None
        return (rows.value[1] * rows.total[1]).sum() + columns.value[1].square().sum()

    assert torch.autograd.gradcheck(run, (x, y, scale, bias))
    assert torch.autograd.gradgradcheck(run, (x, y, scale, bias))
    out = run(x, y, scale, bias)
    out.backward(retain_graph=True)
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()
    x.grad = None
    Nothing.apply(run(x, y, scale, bias)).backward()
    assert x.grad is None
    out = run(x, y, scale, bias)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_pairs_that_do_not_fit_are_left_to_python() -> None:
    x, scale = torch.randn(5, 3), torch.tensor(1.0, dtype=torch.float64)
    numbers, bias = torch.zeros(5, dtype=torch.int32), torch.zeros(5)
    p = PairInputs(x, x, scale, bias, bias, numbers, numbers)
    fit = compiled.helpers().pairs_fit
    assert fit(p)
    for change in (
        dict(x=x[0]), dict(y=x[:, :2]), dict(y=x.double()), dict(x=None), dict(scale=1.0),
        dict(x=x.T), dict(x_bias=bias[:4]), dict(y_labels=None), dict(x_labels=numbers.long()),
        dict(x_ids=numbers), dict(x_window=bias), dict(score="power"), dict(precision="half"),
        dict(positive=1.0), dict(positive=Rule(scale)), dict(skip_self=1),
        dict(triangle=True, exclude=numbers[:, None]), dict(x=x.to("meta")),
        dict(apart=True, x_bias=bias.clone().requires_grad_()),
    ):  # fmt: skip
        assert not fit(p._replace(**change)), change


def test_a_checkpoint_that_stops_in_the_middle_leaves_nothing() -> None:
    """It ends its second run by an exception where the last tensor is saved, here the node's."""
    x, y = (torch.randn(9, 4, requires_grad=True) for _ in range(2))
    labels = torch.arange(9, dtype=torch.int32)

    def value(a: Tensor, b: Tensor) -> Tensor:
        scale = torch.tensor(2.0, dtype=torch.float64)
        inputs = PairInputs(a, b, scale, x_labels=labels, y_labels=labels)
        return pair_statistics(inputs)[0].value.sum()

    loss = checkpoint(value, x, y, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    alive = weakref.ref(y)
    del x, y, loss
    gc.collect()
    assert alive() is None
