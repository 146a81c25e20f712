"""Entropic optimal transport in the log domain: alternating logsumexps, and no plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_both, check_count, check_plain, number
from fused_losses.losses.scored_pairs import scored
from fused_losses.primitives.pairs.inputs import NEGATIVE, PairInputs
from fused_losses.primitives.pairs.op import pair_attention, pair_statistics, pair_transport

COSTS = ("cosine", "dot", "sqeuclidean")


class Transport(NamedTuple):
    """An entropic transport plan T_ij = exp((f_i + g_j - C_ij) / eps), by its potentials."""

    cost: Tensor  # sum T C, differentiable
    x_potential: Tensor  # f [N], detached
    y_potential: Tensor  # g [M]
    iterations: int


def sinkhorn(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    *,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float | None = None,
    cost: str = "cosine",
    x_weight: Tensor | None = None,  # [N]
    y_weight: Tensor | None = None,  # [M]
    precision: str = "fp32",
    backend: str | None = None,
) -> Transport:
    """Entropic optimal transport between two sets of rows, in the log domain, without its plan.

        f_i = eps log a_i - eps log sum_j e^((g_j - C_ij) / eps)      and the same for g_j

    Args:
        x, y: [N, D] and [M, D], at least one row each.
        eps: > 0, in the units of the cost. iterations: >= 1.
        tolerance: stop when the rows' masses are off by less than this in sum |.| (the host reads
            it each time); None: always all iterations.
        cost: "cosine" 1 - cos(x, y), "dot" 1 - <x, y>, "sqeuclidean" |x - y|^2.
        x_weight, y_weight: the masses a and b, > 0, of equal sums; None: 1/N and 1/M.

    Returns `Transport`. The gradient of its cost is that of sum T C with T held fixed (the
    authors' convention; for large eps not that of the whole iteration).
    Raises ValueError, TypeError for bad arguments. Time O(iterations N M D); memory O((N + M) D).
    Papers: Cuturi, 2013; Jia et al., 2025 (FOA: eps 0.1, at most 100 iterations).
    """
    check_plain(eps=eps, tolerance=tolerance, x_weight=x_weight, y_weight=y_weight)
    x = check_both("x", x, "y", y, precision)
    n, m = x.shape[0], y.shape[0]
    if n == 0 or m == 0:
        raise ValueError(f"x, y: expected at least one row each, got N={n}, M={m}")
    validation.check_choice("cost", cost, COSTS)
    sharp = 1 / number("eps", eps, x).detach()
    check_count("iterations", iterations)
    weights = []
    for name, weight, size in (("x_weight", x_weight, n), ("y_weight", y_weight, m)):
        if weight is not None:
            validation.check_vector(name, weight, size, "one mass a row", x)
        even = torch.full((size,), 1 / size, dtype=torch.float64, device=x.device)
        weights.append((even if weight is None else weight.detach().double()).log())
    log_a, log_b = weights
    with no_autocast(x.device):
        if cost == "cosine":
            x, y = unit(x), unit(y)
        similarity = "rbf" if cost == "sqeuclidean" else "dot"
        fixed = scored(x.detach(), y.detach(), sharp, similarity=similarity, precision=precision)
        # (f_i + g_j - C_ij) / eps, where "dot" and "cosine" have C = 1 - <x, y>
        constant = 0 if cost == "sqeuclidean" else -sharp
        f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)  # over eps
        done = 0
        with torch.no_grad():
            while done < iterations:
                rows = _mass(fixed, None, g + constant, backend)
                off = (f + rows).exp() - log_a.exp()
                if done and tolerance is not None and float(off.abs().sum()) < tolerance:
                    break
                f = log_a - rows
                g = log_b - _mass(_turned(fixed), None, f + constant, backend)
                done += 1
        return Transport(
            _transported(x, y, _with_bias(fixed, None, g + constant), f, cost, backend).to(
                accumulate_dtype(x.dtype)
            ),
            f / sharp,
            g / sharp,
            done,
        )


def _with_bias(inputs: PairInputs, x_bias: Tensor | None, y_bias: Tensor | None) -> PairInputs:
    def added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
        if old is None or new is None:
            return old if new is None else new.to(accumulate_dtype(inputs.x.dtype))
        return (old + new).to(old.dtype)

    return inputs._replace(x_bias=added(inputs.x_bias, x_bias), y_bias=added(inputs.y_bias, y_bias))


def _turned(p: PairInputs) -> PairInputs:
    return p._replace(x=p.y, y=p.x, x_bias=p.y_bias, y_bias=p.x_bias)


def _mass(inputs: PairInputs, x_bias: Tensor | None, y_bias: Tensor, backend: str | None) -> Tensor:
    """log sum_j exp(score + y_bias_j), [N]."""
    stats, _ = pair_statistics(_with_bias(inputs, x_bias, y_bias), backend=backend)
    return stats.value[NEGATIVE]


def _transported(
    x: Tensor, y: Tensor, plan: PairInputs, f: Tensor, cost: str, backend: str | None
) -> Tensor:
    """sum_ij T_ij C_ij with T fixed; of products an attention whose values are the columns."""
    if cost == "sqeuclidean":
        return pair_transport(x, y, plan, f, backend=backend)
    out, lse = pair_attention(y.contiguous(), plan, backend=backend)
    mass = (f + lse).exp().detach()
    product = (x.to(accumulate_dtype(x.dtype)) * out).sum(dim=1)
    return (mass * (1 - product)).sum()


examples(
    sinkhorn,
    lambda f, t: f(t.x, t.y, eps=0.5, iterations=20),
    {cost: dict(cost=cost) for cost in ("cosine", "dot", "sqeuclidean")},
)
