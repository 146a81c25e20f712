"""Transport: the plan times values, relaxed masses, stops, sharp costs; against plans in full."""

from __future__ import annotations

import pytest
import torch
import transport_formulas as formulas
from conftest import require, widest
from pair_cases import EXACT
from pair_rows import square_distance, unit
from torch import Tensor

import fused_losses.functional as fl

COST = {
    "cosine": lambda x, y: 1 - unit(x) @ unit(y).T,
    "dot": lambda x, y: 1 - x @ y.T,
    "sqeuclidean": square_distance,
}
RHOS = ((None, None), (2.0, 2.0), (None, 1.5), (0.5, None))


@pytest.fixture(params=EXACT)
def exact(request: pytest.FixtureRequest) -> str:
    return require(request.param)


def rows(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("cost", COST)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize(("n", "m", "d"), [(7, 5, 3), (1, 1, 1), (2, 13, 1)])
def test_the_plan_times_values(exact: str, cost: str, rho: tuple, n: int, m: int, d: int) -> None:
    x, y = rows(n, m, d)
    found = fl.sinkhorn(x, y, eps=0.3, iterations=9, cost=cost, unbalanced=rho, backend=exact)
    c = COST[cost](x, y)
    f, g = (p.requires_grad_() for p in formulas.potentials(c, 0.3, 9, rho=rho))
    given = found._replace(
        x_potential=(0.3 * f).detach().requires_grad_(),
        y_potential=(0.3 * g).detach().requires_grad_(),
    )
    torch.testing.assert_close(found.x_potential, given.x_potential.detach())
    plan = formulas.plan(c, 0.3, f, g)
    torch.testing.assert_close(found.cost, (plan * c).sum())
    for transpose, size in ((False, m), (True, n)):
        v = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
        wanted = (plan.T if transpose else plan) @ v
        torch.testing.assert_close(found.apply(v, transpose=transpose), wanted)
        slope = torch.randn_like(wanted)
        # a constant plan, then one that moves with rows and potentials
        (held,) = torch.autograd.grad((found.apply(v, transpose=transpose) * slope).sum(), v)
        torch.testing.assert_close(held, (plan if transpose else plan.T).detach() @ slope)
        moving = given.apply(v, transpose=transpose, held=False)
        leaves = x, y, v, given.x_potential, given.y_potential
        got = torch.autograd.grad((moving * slope).sum(), leaves, retain_graph=True)
        want = torch.autograd.grad((wanted * slope).sum(), (x, y, v, f, g), retain_graph=True)
        for a, b in zip(got, (*want[:3], want[3] / 0.3, want[4] / 0.3), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_held_values_alone_have_a_gradient() -> None:
    x, y = rows(4, 5, 2)
    assert not fl.sinkhorn(x, y, iterations=2).apply(torch.ones_like(y)).requires_grad


def test_values_without_width() -> None:
    x, y = rows(4, 5, 2)
    assert fl.sinkhorn(x, y, iterations=2).apply(y[:, :0]).shape == (4, 0)


@pytest.mark.parametrize("cost", COST)
def test_float32_errs_no_more_than_its_scores(cost: str, backend: str) -> None:
    x, y = (t.detach().float() for t in rows(23, 29, 7))
    found = fl.sinkhorn(x, y, eps=0.5, iterations=10, cost=cost, backend=backend)
    c = COST[cost](x.double(), y.double())
    plan = formulas.plan(c, 0.5, *formulas.potentials(c, 0.5, 10))
    # a potential is off by no more than the scores are (each update is an average of them), so an
    # entry of the plan by three times that, and a product of D terms by D + 2 roundings
    scores = (7 + 2) * 2.0**-24 * (c.abs().max() + 2) / 0.5
    got = found.apply(y)
    bound = 4 * scores * plan @ y.double().abs()
    assert ((got.double() - plan @ y.double()).abs() <= bound).all()
    assert got.dtype == torch.float32


@pytest.mark.parametrize("cost", COST)
def test_costs_a_thousand_times_eps(exact: str, cost: str) -> None:
    x, y = rows(6, 9, 3)
    eps = 1e-3
    found = fl.sinkhorn(x, y, eps=eps, iterations=30, cost=cost, backend=exact)
    c = COST[cost](x, y)
    plan = formulas.plan(c.detach(), eps, *formulas.potentials(c, eps, 30))
    want = torch.autograd.grad((plan * c).sum(), (x, y))
    # a score's rounding is 2^-53 of C / eps, some 2e4 here, and of each iteration's
    near = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.cost, (plan * c).sum(), **near)
    for a, b in zip(torch.autograd.grad(found.cost, (x, y)), want, strict=True):
        torch.testing.assert_close(a, b, **near)
    torch.testing.assert_close(found.apply(y.detach()), plan @ y.detach(), **near)


def test_relaxed_masses_of_a_large_rho_are_met_and_of_a_small_one_vanish() -> None:
    x, y = rows(6, 5, 3)
    stiff = fl.sinkhorn(x, y, eps=0.2, iterations=50, unbalanced=1e9)
    met = fl.sinkhorn(x, y, eps=0.2, iterations=50)
    torch.testing.assert_close(stiff.cost, met.cost, rtol=1e-6, atol=0)
    loose = fl.sinkhorn(x, y, eps=0.2, iterations=50, unbalanced=1e-9)
    one = torch.ones(5, 1, dtype=torch.float64)
    # nothing is paid for mass that is not moved: T is a b e^(-C / eps)
    want = (-COST["cosine"](x, y) / 0.2).exp().mean(1, keepdim=True) / 6
    torch.testing.assert_close(loose.apply(one), want.detach(), rtol=1e-6, atol=0)


def test_the_rule_of_foa(exact: str) -> None:
    x, y = rows(10, 7, 4)
    score, iterations = formulas.foa(x, y)
    found = fl.sinkhorn(x, y, tolerance=1e-2, stop="scalings", backend=exact)
    assert found.iterations == iterations < 100
    torch.testing.assert_close(found.cost, 1 - score)
    got, want = (torch.autograd.grad(s, x)[0] for s in (-found.cost, score))
    torch.testing.assert_close(got, want)


def test_a_stop_by_masses_of_relaxed_sides_is_of_their_change() -> None:
    x, y = rows(10, 7, 4)
    given = dict(eps=0.2, iterations=500, unbalanced=1.0)
    found = fl.sinkhorn(x, y, tolerance=1e-6, **given)
    assert found.iterations < 500
    one = torch.ones(7, 1, dtype=torch.float64)
    torch.testing.assert_close(
        found.apply(one), fl.sinkhorn(x, y, **given).apply(one), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("unbalanced", [None, 1.0])
def test_a_divergence_of_equal_sides_is_nothing(unbalanced: float | None, backend: str) -> None:
    x = torch.randn(9, 4, dtype=widest(backend), requires_grad=True)
    given = dict(eps=2.0, iterations=600, unbalanced=unbalanced, backend=backend)
    found = fl.sinkhorn_divergence(x, x.detach().clone(), **given)
    (slope,) = torch.autograd.grad(found, x)
    # of scores up to 30, each with some five roundings, times distances up to 8
    near = 1e-9 if x.dtype == torch.float64 else 30 * 5 * 8 * 2.0**-24
    assert found.abs() <= near and slope.abs().max() <= near
    assert fl.sinkhorn_divergence(x, x + 1, **given) > 0.1


def test_a_second_derivative_of_the_divergence_is_refused() -> None:
    x, y = rows(4, 5, 2)
    found = fl.sinkhorn_divergence(x, y, iterations=3)
    (slope,) = torch.autograd.grad(found, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="sinkhorn_divergence: .*second derivative"):
        slope.sum().backward()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.hessian(lambda t: fl.sinkhorn_divergence(t, y.detach(), iterations=3))(
            x.detach()
        )
