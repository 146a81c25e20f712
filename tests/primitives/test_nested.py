"""Pairs at several widths: one product of the widest, units of each width's own, hard rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import require
from pair_rows import eye, nce, unit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses.functional as fl
from fused_losses.base.numerics import ROUNDOFF
from fused_losses.functions.nested import nested, prefix_units
from fused_losses.primitives.nested import bounded
from fused_losses.primitives.nested.inputs import NestedNeeds
from fused_losses.primitives.nested.op import nested_statistics
from fused_losses.primitives.pairs import bounded as pairs
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds

WIDTHS = [4, 8, 16, 32]


def one_by_one(x: Tensor, y: Tensor, widths: list[int], temperature: float = 0.2) -> Tensor:
    """The formula, [W]: each width's rows by norms of their own."""
    found = []
    for w in widths:
        z = unit(x[:, :w]) @ unit(y[:, :w]).T / temperature
        found.append(nce(z, eye(*z.shape), ~eye(*z.shape)))
    return torch.stack(found)


class Products(TorchDispatchMode):
    """Counts the multiplications of the library's products."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            self.work += args[0].numel() * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def product_work(call: Callable[[], object]) -> int:
    with Products() as counted, torch.no_grad():
        call()
    return counted.work


@pytest.mark.parametrize("normalize", [False, True])
def test_all_widths_cost_one_product_of_the_widest(normalize: bool) -> None:
    # the forms as they are: a mode does not see into an op
    n, m, d = 40, 56, WIDTHS[-1]
    scale = torch.ones((), dtype=torch.float64)
    p = nested(torch.randn(n, d), torch.randn(m, d), WIDTHS, scale, normalize=normalize)
    one, share = n * m * d, sum(WIDTHS) / d
    assert product_work(lambda: bounded.statistics(p, True)) == one
    stats = bounded.statistics(p, True)
    grads = tuple(torch.ones_like(s[:, :2]) for s in stats)
    needs = NestedNeeds(True, True, True, normalize, normalize)
    backward = lambda: bounded.statistics_backward(*grads, *stats, p, True, needs)
    assert product_work(backward) == 3 * one
    # what it is compared with: each width its own
    apart = [PairInputs(p.x[:, :w], p.y[:, :w], scale) for w in WIDTHS]
    assert product_work(lambda: [pairs.statistics(q, "lse", True) for q in apart]) == share * one
    known = [(q, pairs.statistics(q, "lse", True)) for q in apart]
    asked = PairNeeds(True, True, True, False, False)
    each = lambda q, s: pairs.statistics_backward(
        *(torch.ones_like(t[:2]) for t in s), *s, q, "lse", True, asked
    )
    assert product_work(lambda: [each(*one_width) for one_width in known]) == 3 * share * one


def hard_rows(kind: str, n: int, d: int) -> Tensor:
    x = torch.randn(n, d, dtype=torch.float64)
    if kind == "far":
        return x + 100
    if kind == "near":
        return torch.ones(d, dtype=torch.float64) + 1e-3 * x
    if kind == "tied":
        return x[torch.arange(n) // 2]
    if kind == "no prefix":
        # zeros, whose gradient a wider one still has
        x[::2, :4] = 0
        x[3] = 0
    if kind == "short prefix":
        x[:, :4] *= 2.0**-40
    if kind == "long prefix":
        x[:, :4] *= 2.0**40
    if kind == "every length":
        x = x * 2.0 ** torch.linspace(-60, 60, n, dtype=torch.float64)[:, None]
        x[:, 8:] *= 2.0**30
    return x


HARD = ("far", "near", "tied", "no prefix", "short prefix", "long prefix", "every length")


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("backend", ["reference", "bounded"])
def test_rows_of_every_kind_in_float32(kind: str, backend: str) -> None:
    n, d, temperature = 12, 16, 0.2
    widths = [4, 8, 16]
    y = hard_rows(kind, n + 3, d).float()
    x = (y[:n] * (1 + 0.1 * torch.randn(n, d))).requires_grad_()
    y.requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    want = one_by_one(*exact, widths, temperature)
    got = fl.nested_info_nce(x, y, widths, temperature=temperature, normalize=True, backend=backend)
    # a cosine errs by its sum's roundings and those of two norms (docs/nested.md); a row's loss is
    # a difference of two logsumexps of such
    u = ROUNDOFF[torch.float32]
    of_score = [(2 * w + 8) * u / temperature for w in widths]
    for value, truth, bound in zip(got.double(), want, of_score, strict=True):
        assert (value - truth).abs() <= 2 * bound + 4 * u * truth.abs()
    weights = torch.tensor([1.0, 0.5, 0.25])
    found = torch.autograd.grad(weights @ got, (x, y))
    truths = torch.autograd.grad(weights.double() @ want, exact)
    for rows, grad, truth in zip((x, y), found, truths, strict=True):
        # a column's slope goes over the norm of the narrowest width that has it: before the parts
        # along the rows cancel it is the sum of |G| <= 2 / temperature / N a row, of which each
        # weight moves by its score's error; a factor of 2 for the projection
        norms = [torch.linalg.vector_norm(rows.detach().double()[:, :w], dim=1) for w in widths]
        size = torch.zeros(len(rows), d, dtype=torch.float64)
        for w, norm, weight in zip(widths, norms, weights.tolist(), strict=True):
            size[:, :w] += torch.where(norm > 0, weight / norm, 0)[:, None]
        slope = 2 * len(rows) / (temperature * n)
        bound = 2 * slope * size * (2 * max(of_score) + 16 * u)
        assert ((grad.double() - truth).abs() <= bound).all()


def test_units_are_powers_of_two_and_lose_no_bit() -> None:
    x = hard_rows("every length", 9, 16).float()
    x[2, :4] = 0
    found = prefix_units(x, [4, 8, 16])
    shrinks = found.shrink[1:]
    assert (torch.frexp(shrinks).mantissa == 0.5).all() and (shrinks <= 1).all()
    for part in (slice(0, 4), slice(4, 8), slice(8, 16)):
        there, here = x[:, part], found.rows[:, part]
        some = there != 0
        assert torch.equal(here != 0, some)
        mantissas = (torch.frexp(t[some]).mantissa for t in (there, here))
        assert torch.equal(*mantissas)
    assert found.factor[0, 2] == 0 and (found.factor > 0).sum() == found.factor.numel() - 1


def test_a_prefix_of_zeros_has_the_gradient_of_the_wider_ones() -> None:
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    x[:, :3] = 0
    leaves = x.requires_grad_(), y.requires_grad_()
    for backend in ("reference", "bounded"):
        got = fl.nested_info_nce(*leaves, [3, 6], normalize=True, temperature=0.2, backend=backend)
        want = one_by_one(*leaves, [3, 6])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for g, w in zip(
            torch.autograd.grad(got.sum(), leaves),
            torch.autograd.grad(want.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)
        assert abs(got[0] - math.log(7)) < 1e-15


def test_a_direction_of_one_coordinate_has_no_slope() -> None:
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    call = lambda *widths: fl.nested_info_nce(x, y, widths, normalize=True, symmetric=True)
    assert all(not g.any() for g in torch.autograd.grad(call(1).sum(), (x, y)))
    got, want = call(5, 1, 2), torch.cat([call(5), call(1), call(2)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    both = (torch.autograd.grad(t.sum(), (x, y)) for t in (got, want))
    for g, w in zip(*both, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "bounded", "cpu"])
def test_inf_is_nan_and_of_the_widths_that_have_it(backend: str) -> None:
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    x[2, 4], y[1, 5] = torch.inf, torch.nan
    for normalize in (False, True):
        options: dict = dict(normalize=normalize, backend=require(backend), reduction="none")
        rows = fl.nested_info_nce(x, y[:4].repeat(2, 1)[:5], [2, 5], **options)
        assert rows[0].isfinite().all()
        assert torch.equal(rows[1].isnan(), torch.arange(5) == 2)
        assert fl.nested_info_nce(x, y, [6, 2], **options)[0].isnan().all()


def test_the_order_of_widths_is_the_callers() -> None:
    x, y = torch.randn(6, 9), torch.randn(8, 9)
    one = fl.nested_info_nce(x, y, [9, 2, 5], reduction="none")
    assert one.shape == (3, 6)
    assert torch.equal(one[[1, 2, 0]], fl.nested_info_nce(x, y, (2, 5, 9), reduction="none"))
    # no width is the narrowest
    alone = fl.nested_info_nce(x[:, :5], y[:, :5], [5], reduction="none")
    torch.testing.assert_close(one[[2]], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("widths", "error", "words"),
    [
        ([], ValueError, r"widths: expected at least one, each once and at most D=4, got \[\]"),
        ([2, 2], ValueError, r"widths: expected at least one, each once .*, got \[2, 2\]"),
        ([2, 5], ValueError, r"widths: expected .* at most D=4, got \[2, 5\]"),
        ([0], ValueError, "widths: expected a value >= 1, got 0"),
        ([True], TypeError, "widths: expected an integer >= 1, got"),
        ([2.0], TypeError, "widths: expected an integer >= 1, got 2.0"),
        (3, TypeError, "widths: expected a sequence of integers, got int"),
        (torch.tensor([2, 4]), TypeError, "widths: expected a sequence of integers, got Tensor"),
    ],
)
def test_widths_that_are_none(widths: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        fl.nested_info_nce(torch.randn(3, 4), torch.randn(3, 4), widths)


def test_other_arguments_that_do_not_fit() -> None:
    x, y, labels = torch.randn(3, 4), torch.randn(5, 4), torch.arange(5)
    with pytest.raises(ValueError, match="^symmetric: expected False with offset=1"):
        fl.nested_info_nce(x, y, [2], symmetric=True, offset=1)
    with pytest.raises(ValueError, match="^reduction: expected 'mean' or 'sum' for symmetric"):
        fl.nested_info_nce(
            x, y, [2], labels=labels[:3], key_labels=labels, symmetric=True, reduction="none"
        )
    with pytest.raises(ValueError, match="^key: expected"):
        fl.nested_info_nce(x, y[:, :3], [2])


def test_inputs_of_the_primitive_that_do_not_fit() -> None:
    scale = torch.ones((), dtype=torch.float64)
    p = nested(torch.randn(3, 4), torch.randn(5, 4), [2, 4], scale, normalize=True)
    for wrong in ([4, 2], [2, 3], [], [0, 4]):
        with pytest.raises(ValueError, match="^widths: expected increasing ones .* is D=4, got"):
            nested_statistics(p._replace(widths=wrong))
    with pytest.raises(ValueError, match="^x_factor, y_factor, .*: expected all or none, got some"):
        nested_statistics(p._replace(y_factor=None))
    with pytest.raises(ValueError, match=r"^y_shrink: expected shape \(2, 5\), got"):
        nested_statistics(p._replace(y_shrink=torch.ones(1, 5)))


def test_autocast_changes_nothing_but_the_dtype_of_rows() -> None:
    x, y = torch.randn(6, 8), torch.randn(7, 8)
    call = lambda a, b: fl.nested_info_nce(a, b, [4, 8], normalize=True, symmetric=True)
    want = call(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(x, y), want)


@pytest.mark.parametrize("normalize", [False, True])
def test_forward_mode_is_the_gradient(normalize: bool) -> None:
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    call = lambda a, b: fl.nested_info_nce(
        a, b, [2, 6], normalize=normalize, symmetric=True, backend="bounded"
    )
    along = torch.randn_like(x), torch.randn_like(y)
    _, moved = torch.func.jvp(call, (x, y), along)
    for w in range(2):
        slopes = torch.func.grad(lambda a, b, w=w: call(a, b)[w], argnums=(0, 1))(x, y)
        want = sum((g * t).sum() for g, t in zip(slopes, along, strict=True))
        torch.testing.assert_close(moved[w], want, rtol=1e-10, atol=1e-12)
