"""Gradients of distances: of near rows, at kinks and ends, by differences, of the second order."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import widest
from distance_rows import BOUNDS, DTYPES, F64, close, few, gradients, near, options, rows
from torch import Tensor

from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.pairwise.metrics import METRICS, WEIGHTED
from fused_losses.primitives.distances.inputs import (
    FLAT,
    KINDS,
    PRODUCTS,
)
from fused_losses.primitives.distances.op import distance_matrix

# those that are made of products, and so have a second derivative
TWICE = (
    "euclidean",
    "sqeuclidean",
    "cosine",
    "correlation",
    "hellinger",
    "mahalanobis",
    "angular",
    "snr",
    "poincare",
    "lorentz",
)


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_gradient_of_a_near_pair(metric: str, streamed: str) -> None:
    # alone: no larger gradient of another pair covers it
    x = torch.tensor([[300.0, -500.0, 200.0], [-300.0, 500.0, -200.0]])
    y = x + torch.tensor([[0.25, 0.5, -0.125], [0.0, 0.0, 0.0]])
    upstream = torch.eye(2)
    f = lambda a, b: pairwise_distance(a, b, metric, backend=streamed)
    exact = lambda a, b: pairwise_distance(a, b, metric, backend="reference")
    got = gradients(f, upstream, x, y)
    want = gradients(exact, upstream.double(), x.double(), y.double())
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-6)
    assert bool((got[0][1] == 0).all())


def test_jensenshannon_of_near_rows(streamed: str) -> None:
    x = rows("jensenshannon", 20, 30, dtype=torch.float32)
    x = x / x.sum(1, keepdim=True)
    y = x * (1 + 1e-4 * torch.randn(20, 30))
    want = distance_matrix(x.double(), y.double(), kind="jensenshannon", backend="reference")
    close(distance_matrix(x, y, kind="jensenshannon", backend=streamed), want, 1e-5)


@pytest.mark.parametrize("metric", [m for m in METRICS if m not in FLAT])
def test_gradient_is_zero_at_distance_zero(metric: str, backend: str) -> None:
    dtype = widest(backend)
    x = rows(metric, 1, 6, dtype=dtype).expand(4, 6).clone().requires_grad_()
    y = x.detach().clone().requires_grad_()
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options(metric, 6).items()}
    sum_of = pairwise_distance(x, y, metric, backend=backend, **given).sum()
    for g in torch.autograd.grad(sum_of, (x, y)):
        # kl is no distance: its slope in x is 1 where it is 0
        assert metric == "kl" or float(g.abs().max()) < (1e-15 if dtype == F64 else 1e-6), g
        assert bool(g.isfinite().all())


@pytest.mark.parametrize(
    "metric", ["cosine", "correlation", "angular", "canberra", "braycurtis", "snr", "hellinger"]
)
def test_rows_of_zeros(metric: str, backend: str) -> None:
    x = rows(metric, 3, 5, dtype=widest(backend))
    x[1] = 0
    x.requires_grad_()
    out = pairwise_distance(x, metric=metric, backend=backend)
    want = dict(cosine=1.0, correlation=1.0, angular=0.5, canberra=5, braycurtis=1, snr=math.inf)
    if metric in want:
        torch.testing.assert_close(out[1, [0, 2]], torch.full((2,), want[metric], dtype=x.dtype))
    assert out[1, 1] == 0
    g = torch.autograd.grad(out[[0, 2]].sum() + out[1, 1], x)[0]
    assert bool(g.isfinite().all())


def test_ties_go_to_the_first_coordinate(backend: str) -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    y = torch.tensor([[1.0, -2.0, 2.0, -2.0]], requires_grad=True)
    pairwise_distance(x, y, "chebyshev", backend=backend).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 1, 0, 0]]))
    assert torch.equal(y.grad, torch.tensor([[0.0, -1, 0, 0]]))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FLAT])
def test_kinks(kind: str, streamed: str) -> None:
    """Equal coordinates, zeros and signs: the slopes that the reference takes there."""
    dtype = widest(streamed)
    bound = BOUNDS[dtype]
    x = torch.tensor([[0.0, 1, 2, 0, 3], [2, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=dtype)
    y = torch.tensor([[0.0, 1, 1, 2, 3], [2, 0, 0, 1, 1], [1, 1, 4, 1, 0]], dtype=dtype)
    w = torch.rand(3, 5, dtype=dtype) if kind == "scaled" else None
    upstream = torch.randn(3, 3, dtype=dtype)
    for p in (0.5, 1.0, 1.5, 3.0) if kind == "minkowski" else (2.0,):
        f = lambda b, p=p: lambda a, c: distance_matrix(a, c, w, kind=kind, p=p, backend=b)
        close(f(streamed)(x, y), f("reference")(x, y), bound)
        # where a distance is inf nothing flows
        live = torch.where(f("reference")(x, y).isinf(), 0, upstream)
        got, want = (gradients(f(b), live, x, y) for b in (streamed, "reference"))
        for g, r in zip(got, want, strict=True):
            close(g, r, bound)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_its_row_only(kind: str, backend: str) -> None:
    x, y = torch.rand(9, 20) + 0.1, torch.rand(70, 20) + 0.1
    x[3, 7], y[66, 19], y[5] = torch.nan, torch.nan, torch.nan
    w = torch.rand(70, 20) if kind == "scaled" else None
    out = distance_matrix(x, y, w, kind=kind, p=3.0, backend=backend)
    want = x.isnan().any(1)[:, None] | y.isnan().any(1)
    assert torch.equal(out.isnan(), want)


@pytest.mark.float64
@pytest.mark.parametrize("metric", [m for m in METRICS if m not in FLAT])
def test_gradcheck(metric: str, backend: str) -> None:
    x = rows(metric, 4, 3).requires_grad_()
    y = rows(metric, 5, 3).requires_grad_()
    f = lambda a, b: pairwise_distance(a, b, metric, backend=backend, **given)
    given = options(metric, 3)
    assert torch.autograd.gradcheck(f, (x, y))
    assert torch.autograd.gradcheck(lambda a: f(a, None)[0, 1:], (x,))


@pytest.mark.float64
@pytest.mark.parametrize(
    ("metric", "name"),
    [
        *((m, "w") for m in WEIGHTED if m not in (*FLAT, "chebyshev")),
        ("mahalanobis", "VI"),
        ("mahalanobis", "covariance"),
        ("mahalanobis", "variance"),
    ],
)
def test_gradcheck_of_weights(metric: str, name: str, backend: str) -> None:
    x, y = rows(metric, 4, 3), rows(metric, 5, 3)
    matrix = options("mahalanobis", 3)["VI"]
    value = dict(w=torch.rand(3, dtype=F64) + 0.1, variance=torch.rand(5, 3, dtype=F64) + 0.5)
    value = value.get(name, matrix).requires_grad_()
    given = options(metric, 3) if metric != "mahalanobis" else {}

    def f(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # the formulas read a symmetric matrix
        v = v if name in ("w", "variance") else (v + v.T) / 2
        return pairwise_distance(a, b, metric, backend=backend, **given, **{name: v})

    assert torch.autograd.gradcheck(f, (value, x.requires_grad_(), y.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(23, 66, 17), (130, 9, 66), (7, 200, 300)])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FLAT])
def test_gradients_against_the_formula(
    kind: str, n: int, m: int, d: int, dtype: torch.dtype, streamed: str
) -> None:
    few(streamed, (n if dtype == torch.float32 else d) < 20)
    metric = "kl" if kind in ("kl", "jensenshannon") else kind
    x, y = rows(metric, n, d, dtype=dtype), rows(metric, m, d, dtype=dtype)
    shape = dict(canberra=(d,), scaled=(m, d)).get(kind)
    w = [] if shape is None else [torch.rand(shape) + 0.5]
    upstream = torch.randn(n, m, dtype=F64)
    f = lambda b: lambda *t: distance_matrix(*t, kind=kind, p=2.5, backend=b)
    got = gradients(f(streamed), upstream, x, y, *w)
    want = gradients(f("reference"), upstream, *(t.double() for t in (x, y, *w)))
    for g, r, t in zip(got, want, (x, y, *w), strict=True):
        assert g.dtype == t.dtype
        near(g, r, 2e-5 if t.dtype == torch.float32 else 4 * torch.finfo(t.dtype).eps)


@pytest.mark.float64
@pytest.mark.parametrize("metric", TWICE)
def test_second_derivative(metric: str, backend: str) -> None:
    x, y = rows(metric, 4, 3).requires_grad_(), rows(metric, 5, 3).requires_grad_()
    given = options(metric, 3)
    f = lambda a, b: pairwise_distance(a, b, metric, backend=backend, **given)
    assert torch.autograd.gradgradcheck(f, (x, y))
    assert torch.autograd.gradgradcheck(lambda a: f(a, None)[0, 1:], (x,))


@pytest.mark.float64
def test_second_derivative_of_one_side(streamed: str) -> None:
    x, y = rows("dot", 4, 3).requires_grad_(), rows("dot", 5, 3)
    for kind in PRODUCTS:
        f = lambda a, k=kind: distance_matrix(a, y, kind=k, backend=streamed)
        assert torch.autograd.gradgradcheck(f, (x,))
        f = lambda a, k=kind: distance_matrix(y, a, kind=k, backend=streamed)
        assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
def test_second_derivative_of_near_rows(kind: str, streamed: str) -> None:
    x = 1e4 * torch.randn(6, 8)
    y = torch.cat([x[:3] + 0.25 * torch.randn(3, 8), x[3:4], 1e4 * torch.randn(2, 8)])
    # of the near pairs alone: nothing larger covers them
    tangent, upstream = torch.randn(6, 8, dtype=F64), torch.randn(6, dtype=F64)
    upstream = torch.where(torch.arange(6) < 4, upstream, 0).diag()

    def penalty(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        out = distance_matrix(*leaves, kind=kind, backend=name)
        inner = (out * upstream.to(dtype)).sum()
        first = torch.autograd.grad(inner, leaves[0], create_graph=True)[0]
        return list(torch.autograd.grad((first * tangent.to(dtype)).sum(), leaves))

    for g, w in zip(penalty(streamed, torch.float32), penalty("reference", F64), strict=True):
        near(g, w, 1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in (*PRODUCTS, *FLAT)])
def test_second_derivative_refused(kind: str, streamed: str) -> None:
    dtype = widest(streamed)
    x, y = rows("kl", 4, 3, dtype=dtype).requires_grad_(), rows("kl", 5, 3, dtype=dtype)
    w = torch.rand(5, 3, dtype=dtype) if kind == "scaled" else None
    out = distance_matrix(x, y, w, kind=kind, p=3.0, backend=streamed)
    first = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


@pytest.mark.float64
@pytest.mark.parametrize("metric", FLAT)
def test_no_gradient(metric: str, backend: str) -> None:
    x = rows(metric, 4, 3).requires_grad_()
    assert not pairwise_distance(x, metric=metric, backend=backend).requires_grad
