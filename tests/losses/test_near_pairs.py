"""Rows that nearly meet, on every backend, against literal formulas of differences in float64.

Bounds (docs/pairs.md). With unit roundoff u, a far pair's |x - y|^2 comes from products, whose
error of at most (D/8 + 16) u (|x|^2 + |y|^2) is 16 times that of |x - y|^2; a near one's comes from
differences, with (D/8 + 8) u. How far that moves a value is its derivative G = dL/d|x - y|^2, how
far it moves G the second derivative. A gradient sum_j G_ij (x_i - y_j) is held against
sum_j |G_ij| |x_i - y_j|: a far pair's part loses (D/8 + 16) u 4 times over, as |x| <= 4 |x - y|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import functional
from fused_losses.similarity.attention import similarity_attention
from fused_losses.similarity.kernel_means import kernel_mean, mmd, uniformity

BACKENDS = ("reference", "bounded", "cpu")  # those whose near pairs are mended
N, D = 32, 24
SHARE = 1 / 16


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require(request.param)


# ---- the rows ------------------------------------------------------------------------------------


def clusters() -> Tensor:
    x = 0.01 * torch.randn(N, D)
    x[: N // 2] += 100
    x[N // 2 :] -= 100
    return x


def partners(apart: float) -> Tensor:
    x = torch.nn.functional.normalize(torch.randn(N // 2, D).double(), dim=1)
    away = torch.nn.functional.normalize(torch.randn(N // 2, D).double(), dim=1)
    y = torch.nn.functional.normalize(x + apart * away, dim=1)
    return torch.stack([x, y], dim=1).flatten(0, 1)


def duplicates() -> Tensor:
    return torch.randn(N // 4, D).repeat_interleave(4, dim=0)


def constant() -> Tensor:
    return torch.full((N, D), 1.00389)


def far_away() -> Tensor:
    return 1e4 + torch.randn(N, D)


def alone_in_the_middle() -> Tensor:
    # the zero row keeps every coordinate where it is
    x = 50 + 0.1 * torch.randn(N, D)
    x[5] = 0
    return x


DATA: dict[str, Callable[[], Tensor]] = {
    "clusters": clusters,
    "partners 1e-3": lambda: partners(1e-3),
    "partners 3e-4": lambda: partners(3e-4),
    "duplicates": duplicates,
    "constant": constant,
    "far away": far_away,
    "zero row": alone_in_the_middle,
}
# float64 rows, as near as float32 cannot be
WIDE: dict[str, Callable[[], Tensor]] = {"partners 1e-9": lambda: partners(1e-9)}


# ---- the formulas, of d = |x - y| and its square -------------------------------------------------


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(2)


def root(square: Tensor) -> Tensor:
    alive = square > 0
    return torch.where(alive, torch.where(alive, square, 1).sqrt(), 0)


def masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    same, own = labels[:, None] == labels, torch.eye(len(labels), dtype=torch.bool)
    return same & ~own, ~same


def lse(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, -torch.inf).logsumexp(1)


def mean_of_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


@dataclass(frozen=True)
class Problem:
    """Rows, the width of what is near among them, and labels."""

    x: Tensor
    width: float
    labels: Tensor


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
    loss = lse(d, same) + lse(1 - d, other)
    return loss.clamp_min(0).mean()


def soft_nearest(square: Tensor, p: Problem) -> Tensor:
    same, other = masks(p.labels)
    z = -square / p.width**2
    return (lse(z, same | other) - lse(z, same)).mean()


def gaussian(square: Tensor, p: Problem) -> Tensor:
    return (-square / (2 * p.width**2)).exp().mean()


def laplacian(square: Tensor, p: Problem) -> Tensor:
    return (-root(square) / p.width).exp().mean()


def uniform(square: Tensor, p: Problem) -> Tensor:
    z = (-square / (2 * p.width**2)).masked_fill(torch.eye(len(p.x), dtype=torch.bool), -torch.inf)
    return z.flatten().logsumexp(0) - torch.tensor(float(N * (N - 1))).double().log()


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
    "attention, rbf": Function(
        attended(lambda square, p: -square / p.width**2), attention("rbf", 2)
    ),
    "attention, euclidean": Function(
        attended(lambda square, p: -root(square) / p.width), attention("euclidean", 1)
    ),
}


# ---- the tests -----------------------------------------------------------------------------------


def problem(rows: Callable[[], Tensor], dtype: torch.dtype) -> Problem:
    x = rows().to(dtype)
    square = squares(x.double(), x.double())
    other = square[square > 0]
    # a bandwidth that knows the near pairs
    width = float(other.quantile(0.2).sqrt()) if len(other) else 0.5
    return Problem(x, width, torch.arange(N) // 4)


@dataclass(frozen=True)
class Truth:
    """In float64, with how far relative errors of |x - y|^2 move it, and roundings of its own."""

    value: Tensor
    value_moves: Tensor  # sum |G| |x - y|^2
    gradient: Tensor  # [N, D]
    size: Tensor  # [N]: sum_j |G_ij| |x_i - x_j|
    size_moves: Tensor  # [N]: the same of what G moves by


def truth(f: Function, p: Problem) -> Truth:
    x = p.x.double()
    square = squares(x, x).flatten().requires_grad_()
    value = f.formula(square.view(N, N), p)
    (g,) = torch.autograd.grad(value, square, create_graph=True)
    ones = torch.eye(N * N, dtype=torch.float64)
    (bend,) = torch.autograd.grad(g, square, ones, is_grads_batched=True, allow_unused=True)
    bend = torch.zeros_like(ones) if bend is None else bend
    g, square = g.detach().view(N, N), square.detach()
    g_moves = (bend.abs() @ square).view(N, N)
    square, differences = square.view(N, N), x[:, None] - x
    # dL/dx_i = sum_j 2 (G_ij + G_ji) (x_i - x_j)
    both, both_moves = 2 * (g + g.T), 2 * (g_moves + g_moves.T)
    return Truth(
        value.detach(),
        (g.abs() * square).sum(),
        (both[:, :, None] * differences).sum(1),
        (both.abs() * square.sqrt()).sum(1),
        (both_moves * square.sqrt()).sum(1),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("data", "dtype"),
    [*((data, torch.float32) for data in DATA), *((data, torch.float64) for data in DATA | WIDE)],
    ids=str,
)
def test_near_pairs(name: str, data: str, dtype: torch.dtype, backend: str) -> None:
    f = FUNCTIONS[name]
    p = problem((DATA | WIDE)[data], dtype)
    want = truth(f, p)
    x = p.x.clone().requires_grad_()
    found = f.call(x, p, backend=backend)
    found.backward()
    assert x.grad is not None
    u = torch.finfo(dtype).eps / 2
    product = (D / 8 + 16) * u
    # exponentials, whose arguments round where they count (|z| < 16), and sums over N pairs
    own = (N / 8 + 32) * u
    moves = product / SHARE
    error = (found.detach().double() - want.value).abs()
    assert float(error) <= float(moves * want.value_moves + own * want.value.abs() + 2 * u)
    bound = moves * want.size_moves + (product / SHARE**0.5 + own) * want.size
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


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian"])
def test_mmd_of_clusters(kernel: str, backend: str) -> None:
    # the three means differ in their last digits: they are subtracted before they are rounded
    x, y = clusters(), clusters()
    width = 0.08
    k = {
        "gaussian": lambda a, b: (-squares(a, b) / (2 * width**2)).exp(),
        "laplacian": lambda a, b: (-root(squares(a, b)) / width).exp(),
    }[kernel]
    a, b = x.double(), y.double()
    want = k(a, a).mean() + k(b, b).mean() - 2 * k(a, b).mean()
    found = mmd(x, y, kernel, width, backend=backend)
    u = torch.finfo(torch.float32).eps / 2
    # each mean by its distances, of which t e^-t <= 1/e, and by its own roundings
    assert abs(float(found) - float(want)) <= 4 * ((D / 8 + 16) * u / SHARE + (N / 8 + 16) * u)


def test_kernel_mean_cannot_exceed_one(backend: str) -> None:
    found = kernel_mean(clusters(), bandwidth=0.03, backend=backend)
    assert 0 < float(found) < 1
