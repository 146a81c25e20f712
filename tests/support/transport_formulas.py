"""Entropic transport with its plan, as literal formulas; nothing of the package."""

from __future__ import annotations

import torch
from pair_rows import Inputs, square_distance, unit
from torch import Tensor


def potentials(
    costs: Tensor,
    eps: float,
    iterations: int,
    *,
    rho: tuple[float | None, float | None] = (None, None),
    masses: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """f and g over eps after so many updates of both, the columns' last."""
    k = (-costs.detach() / eps).double()
    n, m = k.shape
    a, b = masses or (k.new_full((n,), 1 / n), k.new_full((m,), 1 / m))
    of_x, of_y = (1 if r is None else r / (r + eps) for r in rho)
    f, g = k.new_zeros(n), k.new_zeros(m)
    for _ in range(iterations):
        f = a.log() - of_x * (k + g).logsumexp(1)
        g = b.log() - of_y * (k + f[:, None]).logsumexp(0)
    return f, g


def plan(costs: Tensor, eps: float, f: Tensor, g: Tensor) -> Tensor:
    return (-costs / eps + f[:, None] + g).exp()


def unbalanced(t: Inputs) -> Tensor:
    c = 1 - unit(t.x) @ unit(t.y).T
    f, g = potentials(c, 0.5, 8, rho=(2.0, 2.0))
    return (plan(c.detach(), 0.5, f, g).to(c.dtype) * c).sum()


def halfway(costs: Tensor, eps: float, iterations: int, rho: float | None, a: Tensor) -> Tensor:
    """The potential over eps of rows against themselves, by steps of half the way."""
    k, f = (-costs.detach() / eps).double(), a.log() * 0
    share = 1 if rho is None else rho / (rho + eps)
    for _ in range(iterations):
        f = (f + a.log() - share * (k + f).logsumexp(1)) / 2
    return f


def dual(
    costs: Tensor, eps: float, f: Tensor, g: Tensor, rho: float | None, a: Tensor, b: Tensor
) -> Tensor:
    """With all its terms; differentiable in the costs alone."""
    wide = costs.double()
    value = -eps * (plan(wide, eps, f, g).sum() - a.sum() * b.sum())
    for potential, mass in ((f, a), (g, b)):
        own = eps * (potential - mass.log())
        value = value + (mass * (own if rho is None else rho * (1 - (-own / rho).exp()))).sum()
    return value.to(costs.dtype)


def debiased(
    t: Inputs,
    cost: str,
    *,
    eps: float = 0.5,
    iterations: int = 20,
    rho: float | None = None,
    masses: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    def of(x: Tensor, y: Tensor) -> Tensor:
        if cost == "sqeuclidean":
            return square_distance(x, y)
        return 1 - (unit(x) @ unit(y).T if cost == "cosine" else x @ y.T)

    even = (torch.full((len(r),), 1 / len(r), dtype=torch.float64) for r in (t.x, t.y))
    a, b = masses or even
    between = of(t.x, t.y)
    f, g = potentials(between, eps, iterations, rho=(rho, rho), masses=(a, b))
    total = dual(between, eps, f, g, rho, a, b)
    for rows, mass in ((t.x, a), (t.y, b)):
        c = of(rows, rows)
        f = halfway(c, eps, iterations, rho, mass)
        total = total - dual(c, eps, f, f, rho, mass, mass) / 2
    return total + (eps / 2 * (a.sum() - b.sum()) ** 2).to(total.dtype)


def foa(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """FOA-Attack's loop, in scalings: sum T S of cosines S, and how many iterations there were."""
    s = unit(x) @ unit(y).T
    n, m = s.shape
    k = (-(1 - s.detach()) / 0.1).exp()
    r, c = k.new_ones(n), k.new_ones(m)
    done = 0
    while done < 100:
        done += 1
        last, r = r, 1 / n / (k @ c)
        c = 1 / m / (r @ k)
        if float((r - last).abs().mean()) < 1e-2:
            break
    return (r[:, None] * k * c * s).sum(), done
