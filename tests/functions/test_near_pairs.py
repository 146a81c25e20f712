"""Rows that nearly meet, on every backend, against literal formulas of differences in float64.

Bounds (docs/pairs.md). With unit roundoff u, a far pair's |x - y|^2 comes from products, whose
error of at most (D + 8) u (|x|^2 + |y|^2) is 16 times that of |x - y|^2; a near one's comes from
differences, with (D + 3) u. How far that moves a value is its derivative G = dL/d|x - y|^2, how
far it moves G the second derivative. A gradient sum_j G_ij (x_i - y_j) is held against
sum_j |G_ij| |x_i - y_j|: a far pair's part loses its roundings 4 times over, as |x| <= 4 |x - y|.
A logsumexp L is rounded in its own length, u |L|, and so is a score z when the gradient finds it
again: a weight exp(z - L) errs by (|z| + |L|) u of itself, even one of 1 that another takes away.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import require
from near_rows import BACKENDS, DATA, SHARE, WIDE, D, N, Problem, constant, problem, root, squares
from torch import Tensor

from fused_losses import functional
from fused_losses.similarity.attention import similarity_attention
from fused_losses.similarity.kernel_means import kernel_mean, uniformity


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require(request.param)


# ---- the formulas, of d = |x - y| and its square -------------------------------------------------


def masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    same, own = labels[:, None] == labels, torch.eye(len(labels), dtype=torch.bool)
    return same & ~own, ~same


def lse(z: Tensor, mask: Tensor, p: Problem) -> Tensor:
    z = z.masked_fill(~mask, -torch.inf)
    p.logsums.append((z, z.logsumexp(1)))
    return p.logsums[-1][1]


def mean_of_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


@dataclass(frozen=True)
class Function:
    """A loss of squared distances by its formula, and the call that computes it."""

    formula: Callable[[Tensor, Problem], Tensor]  # of |x_i - x_j|^2, [N, N]
    call: Callable[..., Tensor]  # (x, problem, backend=)


def contrastive(square: Tensor, p: Problem) -> Tensor:
    d, (same, other) = root(square), masks(p.labels)
    attract = torch.where(same, d - p.width / 4, 0).clamp_min(0)
    repel = torch.where(other, 2 * p.width - d, 0).clamp_min(0)
    return mean_of_nonzero(attract) + mean_of_nonzero(repel)


def margin_loss(square: Tensor, p: Problem) -> Tensor:
    d, (same, other) = root(square), masks(p.labels)
    attract = torch.where(same, d - 0.9 * p.width, 0).clamp_min(0)
    repel = torch.where(other, 1.1 * p.width - d, 0).clamp_min(0)
    return (attract + repel).sum() / ((attract > 0) | (repel > 0)).sum().clamp_min(1)


def generalized_lifted(square: Tensor, p: Problem) -> Tensor:
    d, (same, other) = root(square), masks(p.labels)
    loss = lse(d, same, p) + lse(1 - d, other, p)
    return loss.clamp_min(0).mean()


def soft_nearest(square: Tensor, p: Problem) -> Tensor:
    same, other = masks(p.labels)
    z = -square / p.width**2
    return (lse(z, same | other, p) - lse(z, same, p)).mean()


def gaussian(square: Tensor, p: Problem) -> Tensor:
    return (-square / (2 * p.width**2)).exp().mean()


def laplacian(square: Tensor, p: Problem) -> Tensor:
    return (-root(square) / p.width).exp().mean()


def uniform(square: Tensor, p: Problem) -> Tensor:
    z, others = -square / (2 * p.width**2), ~torch.eye(len(p.x), dtype=torch.bool)
    return lse(z.view(1, -1), others.view(1, -1), p)[0] - math.log(N * (N - 1))


def proxies(square: Tensor, p: Problem) -> Tensor:
    # each fourth row is the proxy of its label
    z = -square[:, ::4] / p.width**2
    same = p.labels[:, None] == p.labels[::4]
    return (lse(z, torch.ones_like(same), p) - lse(z, same, p)).mean()


def summed(square: Tensor, p: Problem) -> Tensor:
    others = ~torch.eye(len(p.x), dtype=torch.bool)
    return lse(-root(square) / p.width, others, p).mean()


def values_of(p: Problem) -> Tensor:
    return torch.linspace(-1, 1, len(p.x) * 5, dtype=torch.float64).cos().view(-1, 5)


def attended(score: Callable[[Tensor, Problem], Tensor]) -> Callable[[Tensor, Problem], Tensor]:
    def formula(square: Tensor, p: Problem) -> Tensor:
        weights = score(square, p).softmax(1)
        return (weights @ values_of(p)).square().sum()

    return formula


def attention(similarity: str, power: int) -> Callable[..., Tensor]:
    def call(x: Tensor, p: Problem, backend: str) -> Tensor:
        found = similarity_attention(
            x,
            x,
            values_of(p).to(x.dtype),
            similarity=similarity,
            scale=p.width**-power,
            backend=backend,
        )
        return found.double().square().sum()

    return call


FUNCTIONS = {
    "contrastive": Function(
        contrastive,
        lambda x, p, backend: functional.contrastive(
            x, p.labels, positive_margin=p.width / 4, negative_margin=2 * p.width, backend=backend
        ),
    ),
    "margin_loss": Function(
        margin_loss,
        lambda x, p, backend: functional.margin_loss(
            x, p.labels, beta=p.width, margin=0.1 * p.width, backend=backend
        ),
    ),
    "generalized_lifted_structure": Function(
        generalized_lifted,
        lambda x, p, backend: functional.generalized_lifted_structure(x, p.labels, backend=backend),
    ),
    "soft_nearest_neighbor": Function(
        soft_nearest,
        lambda x, p, backend: functional.soft_nearest_neighbor(
            x, p.labels, temperature=p.width**2, backend=backend
        ),
    ),
    "gaussian": Function(
        gaussian, lambda x, p, backend: kernel_mean(x, bandwidth=p.width, backend=backend)
    ),
    "laplacian": Function(
        laplacian,
        lambda x, p, backend: kernel_mean(x, None, "laplacian", p.width, backend=backend),
    ),
    "uniformity": Function(
        uniform, lambda x, p, backend: uniformity(x, t=0.5 / p.width**2, backend=backend)
    ),
    "proxy_nca": Function(
        proxies,
        lambda x, p, backend: functional.proxy_nca(
            x,
            x[::4],
            p.labels,
            scale=p.width**-2,
            positive_in_denominator=True,
            backend=backend,
        ),
    ),
    "logsumexp_similarity": Function(
        summed,
        lambda x, p, backend: functional.logsumexp_similarity(
            x, similarity="euclidean", scale=1 / p.width, skip_self=True, backend=backend
        ).mean(),
    ),
    "attention, rbf": Function(
        attended(lambda square, p: -square / p.width**2), attention("rbf", 2)
    ),
    "attention, euclidean": Function(
        attended(lambda square, p: -root(square) / p.width), attention("euclidean", 1)
    ),
}


# ---- the tests -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """In float64, with how far relative errors of |x - y|^2 move it, and roundings of its own."""

    value: Tensor
    value_moves: Tensor  # sum |G| |x - y|^2
    gradient: Tensor  # [N, D]
    size: Tensor  # [N]: sum_j |G_ij| |x_i - x_j|
    size_moves: Tensor  # [N]: the same of what G moves by
    value_rounds: Tensor  # sum |dL/dlogsumexp| |logsumexp|
    size_rounds: Tensor  # [N]: of weights exp(z - logsumexp), by the lengths of both


def truth(f: Function, p: Problem) -> Truth:
    x = p.x.double()
    square = squares(x, x).flatten().requires_grad_()
    value = f.formula(square.view(N, N), p)
    (g,) = torch.autograd.grad(value, square, create_graph=True)
    ones = torch.eye(N * N, dtype=torch.float64)
    again = dict(retain_graph=True, is_grads_batched=True, allow_unused=True)
    (bend,) = torch.autograd.grad(g, square, ones, **again)
    bend = torch.zeros_like(ones) if bend is None else bend
    value_rounds, rounds = torch.zeros(()).double(), torch.zeros_like(square)
    for z, total in p.logsums:
        (slope,) = torch.autograd.grad(value, total, retain_graph=True)
        value_rounds += (slope * total).abs().nan_to_num(0, 0, 0).sum()
        weight = (z - total[:, None]).exp() * (z.abs() + total.abs()[:, None])
        by = (slope.abs()[:, None] * weight).nan_to_num(0, 0, 0)
        rounds += torch.autograd.grad(z, square, by, retain_graph=True)[0].abs()
    g, square = g.detach().view(N, N), square.detach()
    g_moves = (bend.abs() @ square).view(N, N)
    square, differences = square.view(N, N), x[:, None] - x
    # dL/dx_i = sum_j 2 (G_ij + G_ji) (x_i - x_j)
    both, both_moves = 2 * (g + g.T), 2 * (g_moves + g_moves.T)
    rounds = 2 * (rounds.view(N, N) + rounds.view(N, N).T)
    return Truth(
        value.detach(),
        (g.abs() * square).sum(),
        (both[:, :, None] * differences).sum(1),
        (both.abs() * square.sqrt()).sum(1),
        (both_moves * square.sqrt()).sum(1),
        value_rounds.detach(),
        (rounds * square.sqrt()).sum(1).detach(),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("data", "dtype"),
    [*((data, torch.float32) for data in DATA), *((data, torch.float64) for data in DATA | WIDE)],
    ids=str,
)
def test_near_pairs(name: str, data: str, dtype: torch.dtype, backend: str) -> None:
    p, want = known(name, data, dtype)
    held(FUNCTIONS[name], p, want, backend)


@functools.cache
def known(name: str, data: str, dtype: torch.dtype) -> tuple[Problem, Truth]:
    """One draw and its truth, for all backends."""
    torch.manual_seed(zlib.crc32(f"{name} {data} {dtype}".encode()))
    p = problem((DATA | WIDE)[data], dtype)
    want = truth(FUNCTIONS[name], p)
    p.logsums.clear()  # their graph goes
    return p, want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_weights_of_one(dtype: torch.dtype, backend: str) -> None:
    """A far row's nearest one is of its class: both softmaxes have 1 there, of sums of 1e5."""
    torch.manual_seed(zlib.crc32(b"soft_nearest_neighbor zero row torch.float64"))
    f, p = FUNCTIONS["soft_nearest_neighbor"], problem(DATA["zero row"], torch.float64)
    x = p.x.to(dtype)
    p = Problem(x, p.width, p.labels)
    held(f, p, truth(f, p), backend)


def held(f: Function, p: Problem, want: Truth, backend: str) -> None:
    dtype = p.x.dtype
    x = p.x.clone().requires_grad_()
    found = f.call(x, p, backend=backend)
    found.backward()
    assert x.grad is not None
    u = torch.finfo(dtype).eps / 2
    product = (D + 8) * u
    # exponentials, whose arguments round where they count (|z| < 16), and sums over N pairs
    own = (N + 32) * u
    moves = product / SHARE
    error = (found.detach().double() - want.value).abs()
    sums = u * want.value_rounds
    assert float(error) <= float(moves * want.value_moves + own * want.value.abs() + sums + 2 * u)
    bound = moves * want.size_moves + (product / SHARE**0.5 + own) * want.size
    bound += u * want.size_rounds
    errors = torch.linalg.vector_norm(x.grad.double() - want.gradient, dim=1)
    # rows share sums, whose errors are those of the largest
    assert float(errors.max()) <= float(bound.max()), (float(errors.max()), float(bound.max()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_duplicates_alone_have_no_gradient(name: str, backend: str) -> None:
    p = problem(constant, torch.float32)
    x = p.x.clone().requires_grad_()
    FUNCTIONS[name].call(x, p, backend=backend).backward()
    assert x.grad is not None
    assert not x.grad.any()
