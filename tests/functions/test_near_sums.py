"""What is summed over rows that nearly meet: transport, kernels, attention, and the moved centre.

Held to float64 by the bounds of test_near_pairs.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import require
from near_rows import BACKENDS, DATA, SHARE, D, N, clusters, far_away, problem, root, squares
from torch import Tensor

from fused_losses import functional
from fused_losses.base.numerics import exactly_centered
from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.similarity.attention import similarity_attention
from fused_losses.similarity.kernel_means import kernel_mean, mmd
from fused_losses.similarity.sinkhorn import sinkhorn


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require(request.param)


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
