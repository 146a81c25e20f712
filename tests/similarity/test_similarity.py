"""Similarity, attention, kernel means and transport: each against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import widest
from pair_cases import (
    BACKENDS,
    NEAR,
    error,
    require_pairs,
    small_blocks,
)
from torch import Tensor

from fused_losses import functional as fl
from fused_losses.similarity import trilinear


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require_pairs(request.param)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_blocks(monkeypatch):
        yield


@pytest.mark.float64
def test_a_second_derivative_of_trilinear_attention_is_refused(backend: str) -> None:
    q, k, v = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = fl.trilinear_attention(q, k, k, v, v, backend=backend).sum()
    grad = torch.autograd.grad(out, q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative.*einsum"):
        grad.sum().backward()


# ---- what is special ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [100.0, 20.0])
def test_no_flush_at_scale_100(scale: float, backend: str) -> None:
    # a fixed maximum of `scale` would leave e^-200 of these rows, which float32 flushes to zero
    x = F.normalize(torch.randn(17, 24))
    rows = fl.logsumexp_similarity(x, -x, scale=scale, match="any", skip_self=False)
    far = fl.logsumexp_similarity(x, -x[:1].expand(17, -1), scale=scale, backend=backend)
    wanted = scale * -(x.double() @ x[0].double()) + math.log(17)
    torch.testing.assert_close(far.double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.isfinite(rows).all()


def test_all_masked_rows_are_minus_infinity_without_gradient(backend: str) -> None:
    x = torch.randn(4, 3, dtype=widest(backend), requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    rows, columns = fl.logsumexp_similarity(
        x, x_labels=labels, match="same", skip_self=True, cols=True, backend=backend
    )
    assert rows.isinf().tolist() == columns.isinf().tolist() == [False, False, True, True]
    grad = torch.autograd.grad(rows[:2].sum() + torch.where(rows.isinf(), 0, rows).sum(), x)[0]
    assert torch.isfinite(grad).all() and (grad[2:] == 0).all()
    out, lse = fl.similarity_attention(
        x,
        x,
        x,
        query_labels=labels,
        key_labels=labels + 1,
        match="same",
        return_lse=True,
        backend=backend,
    )
    assert (out[3] != 0).any() == (lse[3] > -torch.inf)
    assert (out[2] != 0).any() and torch.isfinite(out).all()


@pytest.mark.parametrize("similarity", ["dot", "cosine", "rbf", "euclidean"])
def test_half_the_pairs_tell_as_much_as_all(similarity: str, backend: str) -> None:
    x = torch.randn(13, 4, dtype=widest(backend))
    x[5] = x[6]  # duplicates
    call = partial(
        fl.logsumexp_similarity, similarity=similarity, skip_self=True, cols=True, backend=backend
    )
    half, whole = call(x), call(x, x.clone())
    # the distance of two duplicates is the root of a rounding
    near = 1e-9 if x.dtype == torch.float64 else 2e-3
    torch.testing.assert_close(half[0], whole[0], rtol=near, atol=near)
    torch.testing.assert_close(half[0], half[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b, **o: fl.logsumexp_similarity(a, b, **o).sum(),
        lambda a, b, **o: fl.logsumexp_similarity(a, b, similarity="rbf", **o).sum(),
        lambda a, b, **o: fl.similarity_attention(a, b, a, **o).square().sum(),
        lambda a, b, **o: fl.kernel_mean(a, b, **o),
        lambda a, b, **o: fl.sinkhorn(a, b, iterations=5, **o).cost,
    ],
)
def test_one_tensor_twice_gets_both_gradients(call: Callable[..., Tensor], backend: str) -> None:
    x = torch.randn(11, 5, dtype=widest(backend), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    once = torch.autograd.grad(call(x, x, backend=backend), x)[0]
    apart = torch.autograd.grad(call(x, y, backend=backend), (x, y))
    torch.testing.assert_close(once, sum(apart), **NEAR[x.dtype])


def test_far_from_the_origin_distances_keep_their_digits(backend: str) -> None:
    x, y = torch.randn(9, 6, dtype=torch.float64) + 1000, torch.randn(8, 6).double() + 1000
    wanted = (-torch.cdist(x.float().double(), y.float().double())).logsumexp(1)
    got = fl.logsumexp_similarity(x.float(), y.float(), similarity="euclidean", backend=backend)
    assert error(got.double(), wanted) <= 1e-5


@pytest.mark.parametrize("lead", [(2,), (2, 3), (0,)])
def test_leading_dimensions(lead: tuple[int, ...], backend: str) -> None:
    q, k, v = (torch.randn(*lead, n, d) for n, d in ((5, 4), (7, 4), (7, 3)))
    out, lse = fl.similarity_attention(q, k, v, return_lse=True, backend=backend)
    assert lse.shape == (*lead, 5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    third = fl.trilinear_attention(q, k, k, v, v, backend=backend)
    assert third.shape == (*lead, 5, 3)


def test_trilinear_blocks_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k1, k2 = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 7, 6))
    v1, v2 = torch.randn(7, 3).double(), torch.randn(6, 3).double()
    tensors = [t.requires_grad_() for t in (q, k1, k2, v1, v2)]
    found = []
    for rows in (5, 12, 4096):
        monkeypatch.setattr(trilinear, "TRILINEAR_ROWS", rows)
        out = fl.trilinear_attention(*tensors, backend="bounded")
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.float64
def test_sinkhorn_meets_its_masses(backend: str) -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(9, 3).double()
    a, b = torch.rand(6).double() + 0.1, torch.rand(9).double() + 0.1
    a, b = a / a.sum(), b / b.sum()
    found = fl.sinkhorn(
        x, y, eps=0.05, iterations=2000, tolerance=1e-8, x_weight=a, y_weight=b, backend=backend
    )
    cost = 1 - F.normalize(x) @ F.normalize(y).T
    plan = ((found.x_potential[:, None] + found.y_potential - cost) / 0.05).exp()
    torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=1e-8)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.cost, (plan * cost).sum())
    assert found.iterations < 2000
    sharp = fl.sinkhorn(x.float(), y.float(), eps=1e-3, iterations=20, backend=backend)
    assert torch.isfinite(sharp.cost)


def test_a_dot_plan_of_rows_far_from_zero(backend: str) -> None:
    """Its scores of 1e7 were rounded by more than 1, and its masses by factors."""
    x, y = torch.randn(5, 4) + 1000, torch.randn(7, 4) + 1000
    found = fl.sinkhorn(x, y, eps=0.5, iterations=50, cost="dot", backend=backend)
    cost = 1 - x.double() @ y.double().T
    plan = ((found.x_potential[:, None] + found.y_potential - cost) / 0.5).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7).double(), rtol=0.01, atol=0)
    # potentials of 4e3 in float32 are within 5e-4 over eps
    torch.testing.assert_close(found.cost.double(), (plan * cost).sum(), rtol=1e-3, atol=0)


def test_no_rows(backend: str) -> None:
    x, y = torch.zeros(0, 3), torch.randn(4, 3)
    rows, columns = fl.logsumexp_similarity(x, y, cols=True, backend=backend)
    assert rows.shape == (0,) and (columns == -torch.inf).all()
    assert (fl.logsumexp_similarity(y, x, backend=backend) == -torch.inf).all()
    assert fl.similarity_attention(x, y, y, backend=backend).shape == (0, 3)
    assert (fl.similarity_attention(y, x, x, backend=backend) == 0).all()
    assert fl.kernel_mean(x, y, backend=backend) == 0


@pytest.mark.slow
def test_compiles_whole() -> None:
    def call(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
        options = {"similarity": "rbf", "backend": "bounded"}
        rows = fl.logsumexp_similarity(
            x, x_labels=labels, match="different", skip_self=True, **options
        )
        return rows.sum() + fl.similarity_attention(x, y, y, **options).sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 11):
        x, y = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
        got, wanted = (f(x, y, torch.arange(n) % 3) for f in (compiled, call))
        torch.testing.assert_close(got, wanted)
        grads = [torch.autograd.grad(loss, x)[0] for loss in (got, wanted)]
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()
