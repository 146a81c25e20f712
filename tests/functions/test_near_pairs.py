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
from dataclasses import dataclass, field

import pytest
import torch
from conftest import CUDA, require
from torch import Tensor

from fused_losses import functional
from fused_losses.base.numerics import exactly_centered
from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.similarity.attention import similarity_attention
from fused_losses.similarity.kernel_means import kernel_mean, mmd, uniformity
from fused_losses.similarity.sinkhorn import sinkhorn

BACKENDS = ("reference", "bounded", "cpu", *CUDA)
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


def lse(z: Tensor, mask: Tensor, p: Problem) -> Tensor:
    z = z.masked_fill(~mask, -torch.inf)
    p.logsums.append((z, z.logsumexp(1)))
    return p.logsums[-1][1]


def mean_of_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


@dataclass(frozen=True)
class Problem:
    """Rows, the width of what is near among them, and labels."""

    x: Tensor
    width: float
    labels: Tensor
    # scores and their logsumexp, as the formula takes them
    logsums: list[tuple[Tensor, Tensor]] = field(default_factory=list)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("data", ["clusters", "partners 3e-4", "constant", "far away"])
def test_transport(data: str, dtype: torch.dtype, backend: str) -> None:
    """The cost and its gradients with the plan fixed; a plan moves as its potentials do."""
    x, y = DATA[data]().to(dtype), DATA[data]()[: N - 3].to(dtype)
    near = squares(x.double(), y.double())
    eps, iterations = max(float(near.min(1).values.max()), 1e-9), 3
    leaves = [t.double().requires_grad_() for t in (x, y)]
    cost = squares(*leaves)
    f, g = torch.zeros(len(x)).double(), torch.zeros(len(y)).double()
    for _ in range(iterations):
        f = -((g - cost.detach() / eps).logsumexp(1) + math.log(len(x)))
        g = -((f[:, None] - cost.detach() / eps).logsumexp(0) + math.log(len(y)))
    plan = (f[:, None] + g - cost.detach() / eps).exp()
    want = (plan * cost).sum()
    gradients = torch.autograd.grad(want, leaves)
    rows = [x.requires_grad_(), y.requires_grad_()]
    found = sinkhorn(
        *rows, eps=eps, iterations=iterations, cost="sqeuclidean", backend=backend
    ).cost
    # an exponent errs where its pair has mass, by its distance and by its potentials' rounding;
    # a logsumexp passes errors on and makes them no larger, 2 in each iteration
    u = torch.finfo(dtype).eps / 2
    alive = (plan > 1e-9) | (plan == plan.max(1, keepdim=True).values)
    top = float((cost.detach() / eps)[alive].max())
    potential = float(torch.cat([f, g]).abs().max())
    moved = (2 * iterations + 1) * ((D + 8) * u / SHARE * top + (N + 32 + 2 * potential) * u)
    moved += (D + 8) * u / SHARE
    assert abs(float(found.detach()) - float(want.detach())) <= moved * float(want.detach())
    lengths = plan * cost.detach().sqrt()
    for got, right, size in zip(
        torch.autograd.grad(found, rows), gradients, (lengths.sum(1), lengths.sum(0)), strict=True
    ):
        errors = torch.linalg.vector_norm(got.double() - right, dim=1)
        bound = 2 * (moved + ((D + 8) / SHARE**0.5 + N) * u) * size + 2 * u * right.norm(dim=1)
        assert bool((errors <= bound + 1e-30).all()), float((errors / (bound + 1e-30)).max())


def test_the_second_derivative_of_a_fixed_plan(backend: str) -> None:
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    found = sinkhorn(x, y, eps=0.5, iterations=3, cost="sqeuclidean", backend=backend)
    f, g = found.x_potential, found.y_potential
    plan = ((f[:, None] + g - squares(x.detach().double(), y.detach().double())) / 0.5).exp()
    dx, dy = torch.autograd.grad(found.cost, (x, y), create_graph=True)
    a, b = torch.randn(5, 3), torch.randn(4, 3)
    got = torch.autograd.grad((dx * a).sum() + (dy * b).sum(), (x, y))
    # of the Hessian with (a, b): 2 sum_j T_ij (a_i - b_j), 2 sum_i T_ij (b_j - a_i)
    both = 2 * plan[:, :, None] * (a[:, None] - b).double()
    torch.testing.assert_close(got[0].double(), both.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), -both.sum(0), rtol=1e-5, atol=1e-6)


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
    assert abs(float(found) - float(want)) <= 4 * ((D + 8) * u / SHARE + (N + 16) * u)


def two_kernels(x: Tensor, y: Tensor, width: float) -> tuple[Tensor, Tensor]:
    a, b = ((-squares(t.double(), t.double()) / (2 * width**2)).exp() for t in (x, y))
    return a, b


def criterion(x: Tensor, y: Tensor, width: float) -> Tensor:
    k, l = two_kernels(x, y, width)
    h = torch.eye(N).double() - 1 / N
    return (k @ h @ l @ h).trace() / N**2


def information(x: Tensor, y: Tensor, width: float) -> Tensor:
    k, l = two_kernels(x, y, width)
    cross = (k.sum(1) * l.sum(1)).sum()
    return (k * l).sum().log() + (k.sum() * l.sum()).log() - 2 * cross.log()


def divergence(x: Tensor, y: Tensor, width: float) -> Tensor:
    k, l = two_kernels(x, y, width)
    m = two_kernels(y.flip(0), y, width)[0]
    between = (-squares(y.double().flip(0), y.double()) / (2 * width**2)).exp()
    weight = k.square().sum(1)
    terms = [((k * t).sum(1) / weight).sum().log() for t in (l, m, between)]
    return terms[0] + terms[1] - 2 * terms[2]


@pytest.mark.parametrize("data", ["clusters", "far away", "duplicates"])
def test_kernels_of_two_features(data: str, backend: str) -> None:
    p = problem(DATA[data], torch.float32)
    x, y, w = p.x, DATA[data]().roll(3, dims=0), p.width
    both = dict(x_bandwidth=w, y_bandwidth=w, backend=backend)
    u = torch.finfo(torch.float32).eps / 2
    # of every kernel entry, as t e^-t <= 1/e; means of rows cancel, which four times covers
    rounding = (2 * D + 8) * u / SHARE + (N + 16) * u
    means = 1.0  # no kernel has a larger one
    assert abs(float(functional.hsic(x, y, **both)) - float(criterion(x, y, w))) <= 4 * (
        rounding * means
    )
    found = float(functional.cauchy_schwarz_qmi(x, y, **both))
    want = information(x, y, w)
    # of logarithms: each term's exponent is below 32 where it counts
    assert abs(found - float(want)) <= 4 * 32 * rounding
    found = float(
        functional.cauchy_schwarz_divergence(x, y, y.flip(0), bandwidth=w, backend=backend)
    )
    assert abs(found - float(divergence(x, y, w))) <= 4 * 32 * rounding


def test_kernel_mean_cannot_exceed_one(backend: str) -> None:
    found = kernel_mean(clusters(), bandwidth=0.03, backend=backend)
    assert 0 < float(found) < 1


def test_attention_over_nearly_equal_values(backend: str) -> None:
    # the gradient of a score is w (<g, v_j> - <g, out>), of values that share their first digits
    q, k, g = torch.randn(N, D), torch.randn(N, D), torch.randn(N, 5)
    v = 1e3 + 0.01 * torch.randn(N, 5)
    query = q.clone().requires_grad_()
    out = similarity_attention(query, k, v, scale=0.3, backend=backend)
    out.backward(g)
    assert query.grad is not None
    wide = q.double().requires_grad_()
    weights = (0.3 * wide @ k.double().T).softmax(1)
    want = weights @ v.double()
    want.backward(g.double())
    assert wide.grad is not None
    u = torch.finfo(torch.float32).eps / 2
    assert float((out.double() - want).detach().abs().max()) <= 1e3 * 4 * u
    # of what is summed: a weight, by how far its value lies from the mean, along g, times a key
    along = (g.double() @ v.double().T - (g.double() * want.detach()).sum(1, keepdim=True)).abs()
    size = 0.3 * (weights.detach() * along) @ k.double().abs()
    bound = (N + D + 64) * u * size.amax(dim=1, keepdim=True) * 4
    assert ((query.grad.double() - wide.grad).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", ["rbf", "euclidean"])
def test_attention_of_halves(similarity: str, dtype: torch.dtype, backend: str) -> None:
    # distances are in the accumulation dtype, values are not
    x, v = torch.randn(N, D).to(dtype), torch.rand(N, 5).to(dtype)
    found = similarity_attention(x, x, v, similarity=similarity, scale=0.2, backend=backend)
    square = squares(x.double(), x.double())
    z = -0.2 * (square if similarity == "rbf" else root(square))
    assert found.dtype == dtype
    # a weight or the result rounded to a half, of values below 1
    assert (
        float((found.double() - z.softmax(1) @ v.double()).abs().max())
        <= 3 * torch.finfo(dtype).eps
    )


def test_attention_over_nothing_is_zero(backend: str) -> None:
    # of values that are moved and moved back
    x, v = torch.randn(4, D), 5 + torch.rand(4, 3)
    labels = torch.tensor([0, 0, 1, 2])
    out = similarity_attention(
        x,
        x,
        v,
        query_labels=labels + 1,
        key_labels=labels,
        match="same",
        backend=backend,
    )
    assert not out[labels == 2].any()
    torch.testing.assert_close(out[:2], v[2].expand(2, 3))


@pytest.mark.parametrize("p", [1.5, 3.0])
def test_weighted_minkowski_far_from_the_origin(p: float, backend: str) -> None:
    x, y, w = far_away(), far_away(), torch.rand(D) + 0.1
    want = (w.double() * (x.double()[:, None] - y.double()).abs() ** p).sum(2) ** (1 / p)
    found = pairwise_distance(x, y, "minkowski", p=p, w=w, backend=backend)
    u = torch.finfo(torch.float32).eps / 2
    # moved exactly, a row is weighted at its distance from the mean: of that its product rounds
    size = max(float((t.double() - y.double().mean(0)).abs().max()) for t in (x, y))
    bound = (D + 8) * u * want + 4 * u * size * float(w.max()) ** (1 / p) * D ** (1 / p)
    assert ((found.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_center_moves_without_rounding(dtype: torch.dtype) -> None:
    x = torch.stack(
        [
            1e4 + torch.randn(N),
            3 + torch.randn(N),  # some below the mean's half, or of the other sign
            torch.rand(N) + 1e-3,
            -1e-3 * torch.rand(N) - 1e-5,
            torch.logspace(-4, 4, N),
            torch.randn(N),
        ],
        dim=1,
    ).to(dtype)
    moved, _ = exactly_centered(x, None)
    center = x.double() - moved.double()
    assert (center == center[:1]).all()
    assert center[0, 0] > 5e3


def test_a_center_leaves_out_what_is_not_finite() -> None:
    x = 100 + torch.randn(N, 3)
    x[1, 0], x[2, 1] = torch.nan, torch.inf
    moved, _ = exactly_centered(x, None)
    torch.testing.assert_close(moved[:, :2], x[:, :2], equal_nan=True, rtol=0, atol=0)
    assert moved[:, 2].abs().max() < 10
