"""The debiased Sinkhorn divergence: an entropic transport cost that is 0 where both sides agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.validation import check_count, check_plain
from fused_losses.similarity.sinkhorn import (
    Costs,
    alternated,
    below,
    costs_of,
    prepared,
    share_of,
)


class _Refused(torch.autograd.Function):
    """A gradient that has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError(
            "sinkhorn_divergence: a second derivative is not supported: potentials are held fixed"
        )

    @staticmethod
    def jvp(ctx: Any, *moves: Tensor) -> Tensor:
        return _Refused.backward(ctx, *moves)


class _Once(torch.autograd.Function):
    """Rows as they are, through which a single derivative goes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Refused.apply(grads[0])

    @staticmethod
    def jvp(ctx: Any, *moves: Tensor) -> Tensor:
        return moves[0].view_as(moves[0])


def sinkhorn_divergence(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    *,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float | None = None,
    cost: str = "sqeuclidean",
    x_weight: Tensor | None = None,  # [N]
    y_weight: Tensor | None = None,  # [M]
    unbalanced: float | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, entropic costs by their duals, without a plan.

        OT = max_f,g <a, f> + <b, g> - eps sum_ij (e^((f_i + g_j - C_ij) / eps) - 1) a_i b_j

    where with unbalanced masses f stands as rho (1 - e^(-f / rho)), and g; then
    + eps (sum a - sum b)^2 / 2. >= 0 and 0 of equal sides, where the cost is of squares.

    Arguments and errors as in `sinkhorn`; unbalanced: rho of both sides. The dual stands at what
    the iterations reached: it is off by the square of what the potentials are, and its gradient,
    that with f and g held fixed, by what they are. A row against its own side takes steps of half
    the way, which converge in few. Costs of about equal sides cancel: the error is one of
    roundings of the costs over eps, times eps.
    Returns float32 (float64 for float64 inputs). A second derivative is refused. Time
    O(iterations (N + M)^2 D); memory O((N + M) D).
    Papers: Feydy et al., 2019; Sejourne et al., 2019 (unbalanced).
    """
    check_plain(tolerance=tolerance)
    check_count("iterations", iterations)
    if not torch.compiler.is_compiling():
        # a trace has no second derivatives
        x, y = (_Once.apply(t) if isinstance(t, Tensor) else t for t in (x, y))
    between, (log_a, log_b) = prepared(x, y, eps, cost, x_weight, y_weight, precision, backend)
    share = share_of(unbalanced, between)
    rest = between.sharp, cost, precision, backend
    with no_autocast(x.device):
        f, g, _ = alternated(
            between, (log_a, log_b), (share, share), iterations, tolerance, "masses"
        )
        total = _dual(between, f, g, (log_a, log_b), share)
        for rows, log_mass in ((between.x, log_a), (between.y, log_b)):
            own = costs_of(rows, rows, *rest)
            f = _halfway(own, log_mass, share, iterations, tolerance)
            total = total - _dual(own, f, f, (log_mass, log_mass), share) / 2
        return total.to(accumulate_dtype(between.x.dtype))


@torch.no_grad()
def _halfway(
    costs: Costs,
    log_mass: Tensor,
    share: Tensor | float,
    iterations: int,
    tolerance: float | None,
) -> Tensor:
    """The potential over eps of rows against themselves."""
    f = torch.zeros_like(log_mass)
    for done in range(iterations):
        rows = costs.mass(f)
        aim = log_mass - share * rows
        if done and tolerance is not None:
            off = (f + rows).exp() - (aim + rows).exp()
            if below(off.abs().sum(), tolerance):
                break
        f = (f + aim) / 2
    return f


def _dual(
    costs: Costs, f: Tensor, g: Tensor, logs: tuple[Tensor, Tensor], share: Tensor | float
) -> Tensor:
    """The dual's value but for eps sum a sum b, with the gradient of sum T C, T held fixed."""
    with torch.no_grad():
        value = -(f + costs.mass(g)).exp().sum()
        for potential, log_mass in ((f, logs[0]), (g, logs[1])):
            own = potential - log_mass
            if isinstance(share, Tensor):
                # eps / rho is 1 / share - 1
                rate = 1 / share - 1
                own = -torch.expm1(-rate * own) / rate
            value = value + (log_mass.exp() * own).sum()
    moved = costs.transported(f, g)
    return value / costs.sharp + (moved - moved.detach())


examples(
    sinkhorn_divergence,
    lambda f, t: f(t.x, t.y, eps=0.5, iterations=20),
    {"": {}, "unbalanced": dict(unbalanced=1.0, cost="cosine")},
)
