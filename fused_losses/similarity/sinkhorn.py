"""Entropic optimal transport in the log domain: alternating logsumexps, and no plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    exact_center,
    followed,
    no_autocast,
    row_dtype,
)
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_both, check_count, check_plain, number
from fused_losses.functions.scored_pairs import scored
from fused_losses.primitives.pairs.inputs import NEGATIVE, PairInputs
from fused_losses.primitives.pairs.op import pair_attention, pair_statistics, pair_transport

COSTS = ("cosine", "dot", "sqeuclidean")
STOPS = ("masses", "scalings")


CostSweep = tuple[PairInputs, Tensor | float, Tensor | float]


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of two sets of rows, C_ij over eps, of which sweeps make what is asked."""

    x: Tensor  # [N, D], of norm 1 for cosines
    y: Tensor  # [M, D]
    sharp: Tensor  # [], 1 / eps, float64
    cost: str
    precision: str
    backend: str | None
    fixed: CostSweep  # of rows without gradients

    def sweep(
        self, bias: Tensor, *, turned: bool = False, held: bool = True
    ) -> tuple[PairInputs, Tensor | float]:
        """Pairs with bias_j - C_ij / eps as scores, but for a row's own part, [N] or a number.

        turned: columns against rows.
        """
        rest = self.sharp, self.cost, self.precision
        pairs, of_rows, of_columns = self.fixed if held else near_zero(self.x, self.y, *rest)
        if turned:
            pairs = pairs._replace(x=pairs.y, y=pairs.x)
            of_rows, of_columns = of_columns, of_rows
        bias = (bias + of_columns).to(accumulate_dtype(pairs.x.dtype))
        return pairs._replace(y_bias=bias), of_rows

    def mass(self, bias: Tensor, *, turned: bool = False) -> Tensor:
        """log sum_j exp(bias_j - C_ij / eps), [N] float64."""
        inputs, own = self.sweep(bias, turned=turned)
        return own + pair_statistics(inputs, backend=self.backend)[0].value[NEGATIVE]

    def transported(self, f: Tensor, g: Tensor) -> Tensor:
        """sum_ij T_ij C_ij with T fixed; of products an attention whose values are the columns."""
        x, y, (plan, own) = self.x, self.y, self.sweep(g)
        f = f + own
        if self.cost == "sqeuclidean":
            return pair_transport(x, y, plan, f, backend=self.backend)
        out, lse = pair_attention(y.contiguous(), plan, backend=self.backend)
        mass = (f + lse).exp().detach()
        product = (x.to(accumulate_dtype(x.dtype)) * out).sum(dim=1)
        return (mass * (1 - product)).sum()


def near_zero(x: Tensor, y: Tensor, sharp: Tensor, cost: str, precision: str) -> CostSweep:
    """Pairs that have the plan of x and y, and what -C / eps has of x_i and of y_j alone.

    <x, y> = <x - a, y - b> + <x - a, b> + <a, y - b> + <a, b>, with rows moved as far as that is
    exact: far from 0 the products' roundings would be the plan.
    """
    of_x: Tensor | float = 0.0 if cost == "sqeuclidean" else -1.0
    of_y: Tensor | float = 0.0
    a, b = (exact_center(x), exact_center(y)) if cost == "dot" else (None, None)
    if a is not None and b is not None:
        x, y = x - a, y - b
        narrow, wide = accumulate_dtype(x.dtype), row_dtype(x.device)
        of_x, of_y = ((rows.to(narrow) @ c.to(narrow)).to(wide) for rows, c in ((x, b), (y, a)))
        of_x = of_x + (a.to(wide) @ b.to(wide) - 1)
    similarity = "rbf" if cost == "sqeuclidean" else "dot"
    pairs = scored(x, y, sharp, similarity=similarity, precision=precision)
    return pairs, sharp * of_x, sharp * of_y


class Transport(NamedTuple):
    """An entropic transport plan T_ij = exp((f_i + g_j - C_ij) / eps), by its potentials."""

    cost: Tensor  # sum T C, differentiable
    x_potential: Tensor  # f [N], detached
    y_potential: Tensor  # g [M]
    iterations: int
    costs: Costs  # what `apply` makes the plan of

    def apply(
        self,
        values: Tensor,  # [M, Dv]; [N, Dv] with transpose
        *,
        transpose: bool = False,
        held: bool = True,
    ) -> Tensor:
        """The plan times values, streamed: sum_j T_ij v_j [N, Dv], or sum_i T_ij v_i [M, Dv].

        values: of the rows' dtype. transpose: T^T. held: T is a constant, as in `cost`, and values
        alone have a gradient; False: T's gradient goes to x and y through the costs, and to
        potentials that ask for one (`_replace(x_potential=f)`), each as if the others stood still.

        Returns values' dtype. Raises ValueError, TypeError for values that do not fit. Time
        O(N M (D + Dv)); memory O((N + M)(D + Dv)).
        """
        of, f, g = self.costs, self.x_potential, self.y_potential
        if transpose:
            f, g = g, f
        size = g.shape[0]
        validation.check_matrix("values", values, f"[{'N' if transpose else 'M'}, Dv]")
        if values.shape[0] != size:
            raise ValueError(
                f"values: expected {size} rows, one for each of "
                f"{'x' if transpose else 'y'}, got {validation.describe(values)}"
            )
        values = validation.beside("x", of.x, "values", values)
        if held:
            f, g = f.detach(), g.detach()
        with no_autocast(values.device):
            f, g = f.double() * of.sharp, g.double() * of.sharp
            plan, own = of.sweep(g.detach(), turned=transpose, held=held)
            moves = followed(g)
            # nearly equal values differ in their last digits
            center = None if moves else exact_center(values)
            moved = values if center is None else values - center
            if moves:
                # e^(g - g) is 1, and has the plan's slope in g
                moved = (moved * (g - g.detach()).exp()[:, None]).to(values.dtype)
            out, lse = pair_attention(moved.contiguous(), plan, backend=of.backend)
            out = out if center is None else out + center.to(out.dtype)
            return ((f + own + lse).exp()[:, None] * out).to(values.dtype)


def sinkhorn(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    *,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float | None = None,
    stop: str = "masses",
    cost: str = "cosine",
    x_weight: Tensor | None = None,  # [N]
    y_weight: Tensor | None = None,  # [M]
    unbalanced: float | tuple[float | None, float | None] | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Transport:
    """Entropic optimal transport at cost="cosine" (`SinkhornLoss`: "sqeuclidean").

    Between two sets of rows, in the log domain, without its plan.

        f_i = eps log a_i - lambda eps log sum_j e^((g_j - C_ij) / eps)    and the same for g_j

    with lambda = 1, or of an unbalanced side rho / (rho + eps).

    Args:
        x, y: [N, D] and [M, D], at least one row each.
        eps: > 0, in the units of the cost. iterations: >= 1.
        tolerance: when to stop, a number that the host reads each time; None: always all
            iterations.
        stop: "masses": when the rows' masses are off by less than `tolerance` in sum |.| (of an
            unbalanced side: change by less); "scalings": when the mean of
            |e^(f_i / eps) - its last value| is below it, the rule of FOA-Attack (0.01 there).
        cost: "cosine" 1 - cos(x, y), "dot" 1 - <x, y>, "sqeuclidean" |x - y|^2.
        x_weight, y_weight: the masses a and b, > 0, of equal sums; None: 1/N and 1/M.
        unbalanced: rho > 0, what a side's masses cost that are not a (or b), in units of the cost:
            + rho KL(T 1 | a). One for both sides, or (of x, of y); None: they are met. Sums then
            need not be equal.

    Returns `Transport`; its `apply` is the plan times values. The gradient of its cost is that of
    sum T C with T held fixed (the authors' convention; for large eps not that of the whole
    iteration).
    Raises ValueError, TypeError for bad arguments. Time O(iterations N M D); memory O((N + M) D).
    Papers: Cuturi, 2013; Chizat et al., 2018 (unbalanced); Jia et al., 2025 (FOA: eps 0.1, at most
    100 iterations).
    """
    check_plain(tolerance=tolerance, unbalanced=unbalanced)
    validation.check_choice("stop", stop, STOPS)
    costs, logs = prepared(x, y, eps, cost, x_weight, y_weight, precision, backend)
    check_count("iterations", iterations)
    sides = unbalanced if isinstance(unbalanced, tuple | list) else (unbalanced, unbalanced)
    if len(sides) != 2:
        raise ValueError(f"unbalanced: expected a number or (of x, of y), got {unbalanced!r}")
    shares = share_of(sides[0], costs), share_of(sides[1], costs)
    with no_autocast(x.device):
        f, g, done = alternated(costs, logs, shares, iterations, tolerance, stop)
        found = costs.transported(f, g).to(accumulate_dtype(costs.x.dtype))
        return Transport(found, f / costs.sharp, g / costs.sharp, done, costs)


def prepared(
    x: Tensor,
    y: Tensor,
    eps: float,
    cost: str,
    x_weight: Tensor | None,
    y_weight: Tensor | None,
    precision: str,
    backend: str | None,
) -> tuple[Costs, tuple[Tensor, Tensor]]:
    """Both sides checked: their costs, and log masses [N], [M] float64."""
    check_plain(eps=eps, x_weight=x_weight, y_weight=y_weight)
    x = check_both("x", x, "y", y, precision)
    n, m = x.shape[0], y.shape[0]
    if n == 0 or m == 0:
        raise ValueError(f"x, y: expected at least one row each, got N={n}, M={m}")
    validation.check_choice("cost", cost, COSTS)
    sharp = 1 / number("eps", eps, x).detach()
    weights = []
    for name, weight, size in (("x_weight", x_weight, n), ("y_weight", y_weight, m)):
        if weight is not None:
            validation.check_vector(name, weight, size, "one mass a row", x)
        even = torch.full((size,), 1 / size, dtype=torch.float64, device=x.device)
        weights.append((even if weight is None else weight.detach().double()).log())
    with no_autocast(x.device):
        if cost == "cosine":
            x, y = unit(x), unit(y)
        return costs_of(x, y, sharp, cost, precision, backend), (weights[0], weights[1])


def costs_of(
    x: Tensor, y: Tensor, sharp: Tensor, cost: str, precision: str, backend: str | None
) -> Costs:
    fixed = near_zero(x.detach(), y.detach(), sharp, cost, precision)
    return Costs(x, y, sharp, cost, precision, backend, fixed)


def share_of(rho: float | None, costs: Costs) -> Tensor | float:
    """lambda of a side, rho / (rho + eps); 1 of one whose masses are met."""
    if rho is None:
        return 1.0
    check_plain(unbalanced=rho)
    return 1 / (1 + 1 / (costs.sharp * number("unbalanced", rho, costs.x).detach()))


def below(value: Tensor, tolerance: float) -> bool:
    """Read on the host; never where there is no value."""
    return not (value.is_meta or plans.explaining()) and float(value) < tolerance


@torch.no_grad()
def alternated(
    costs: Costs,
    logs: tuple[Tensor, Tensor],
    shares: tuple[Tensor | float, Tensor | float],
    iterations: int,
    tolerance: float | None,
    stop: str,
) -> tuple[Tensor, Tensor, int]:
    """Both potentials over eps, the columns' last, and how many iterations there were."""
    f, g = torch.zeros_like(logs[0]), torch.zeros_like(logs[1])
    for done in range(iterations):
        rows = costs.mass(g)
        last, f = f, logs[0] - shares[0] * rows
        if done and tolerance is not None and stop == "masses":
            off = (last + rows).exp() - (f + rows).exp()
            if below(off.abs().sum(), tolerance):
                return last, g, done
        g = logs[1] - shares[1] * costs.mass(f, turned=True)
        if tolerance is not None and stop == "scalings":
            moved = (f.exp() - last.exp()).abs().mean()
            if below(moved, tolerance):
                return f, g, done + 1
    return f, g, iterations


examples(
    sinkhorn,
    lambda f, t: f(t.x, t.y, eps=0.5, iterations=8),
    {
        **{cost: dict(cost=cost) for cost in ("cosine", "dot", "sqeuclidean")},
        "unbalanced": dict(unbalanced=2.0),
    },
)
