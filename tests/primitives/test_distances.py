"""Distances: every metric against SciPy or its formula, near rows, kinks, gradients of any order.

The oracles are SciPy, and float64 formulas that know nothing of the package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from distance_rows import BOUNDS, DTYPES, F64, close, few, gradients, near, options, rows
from scipy.spatial.distance import cdist, jensenshannon, pdist, squareform
from scipy.special import rel_entr
from torch import Tensor

from fused_losses.pairwise.distance import SIMILARITIES, pairwise_distance, pairwise_similarity
from fused_losses.pairwise.metrics import METRICS, WEIGHTED
from fused_losses.primitives.distances.inputs import FLAT
from fused_losses.primitives.distances.op import distance_matrix

SHAPES = [(1, 1, 1), (7, 5, 3), (23, 66, 17), (65, 9, 130)]
SCIPY = (*WEIGHTED, "jensenshannon", "mahalanobis")
OWN = tuple(m for m in METRICS if m not in SCIPY)


def _kl(x: Tensor, y: Tensor) -> Tensor:
    return torch.from_numpy(rel_entr(x[:, None].numpy(), y[None].numpy()).sum(-1))


def _angular(x: Tensor, y: Tensor) -> Tensor:
    cosine = x @ y.T / (x.norm(dim=1)[:, None] * y.norm(dim=1))
    return cosine.clamp(-1, 1).arccos() / math.pi


def _poincare(x: Tensor, y: Tensor) -> Tensor:
    room = (1 - x.square().sum(1))[:, None] * (1 - y.square().sum(1))
    return (1 + 2 * (x[:, None] - y).square().sum(2) / room).arccosh()


def _snr(x: Tensor, y: Tensor) -> Tensor:
    return (y - x[:, None]).var(2) / x.var(1)[:, None]


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hellinger": lambda x, y: (x.sqrt()[:, None] - y.sqrt()).norm(dim=2) / 2**0.5,
    "kl": _kl,
    "angular": _angular,
    "snr": _snr,
    "poincare": _poincare,
    "lorentz": lambda x, y: (x[:, :1] @ y[:, :1].T - x[:, 1:] @ y[:, 1:].T).clamp_min(1).arccosh(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("metric", SCIPY)
def test_scipy(metric: str, n: int, m: int, d: int, dtype: torch.dtype, backend: str) -> None:
    few(backend, dtype == torch.float32 or n == 23)
    # of one coordinate all distributions are the same, and correlations NaN
    d = max(d, 2) if metric in ("correlation", "jensenshannon") else d
    x, y = rows(metric, n, d, dtype=dtype), rows(metric, m, d, dtype=dtype)
    if metric == "jensenshannon":
        x, y = x.abs(), y.abs()
    given = options(metric, d)
    got = pairwise_distance(x, y, metric, backend=backend, **given)
    assert got.dtype == (F64 if dtype == F64 else torch.float32) and got.is_contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy's correlation of two coordinates
        plain = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in given.items()}
        want = torch.from_numpy(cdist(x.double().numpy(), y.double().numpy(), metric, **plain))
    if metric in ("cosine", "correlation"):
        # 1 - cos rounds where SciPy forms it
        torch.testing.assert_close(got.double(), want, rtol=BOUNDS[dtype], atol=BOUNDS[dtype] / 10)
    else:
        close(got, want, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES[1:])
@pytest.mark.parametrize("metric", OWN)
def test_own_formula(metric: str, n: int, m: int, d: int, dtype: torch.dtype, backend: str) -> None:
    x, y = rows(metric, n, d, dtype=dtype), rows(metric, m, d, dtype=dtype)
    got = pairwise_distance(x, y, metric, backend=backend)
    bound = BOUNDS[dtype]
    if metric in ("angular", "poincare", "lorentz"):
        # arccos and arccosh of the oracle lose digits near 1
        bound = max(bound, 1e-10)
    if metric == "lorentz" and dtype != F64:
        # a rounded time lies off the hyperboloid, which the two formulas see differently
        bound = 1e-4
        x, y = (r.to(torch.float32 if dtype.itemsize == 2 else dtype) for r in (x, y))
        for r in (x, y):
            r[:, 0] = (1 + r[:, 1:].double().square().sum(1)).sqrt()
        got = pairwise_distance(x, y, metric, backend=backend)
    # terms of either sign cancel in kl
    (near if metric == "kl" else close)(got, FORMULAS[metric](x.double(), y.double()), bound)


@pytest.mark.parametrize("metric", WEIGHTED)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_weights_are_scipys(metric: str, dtype: torch.dtype, backend: str) -> None:
    x, y = rows(metric, 12, 9, dtype=dtype), rows(metric, 8, 9, dtype=dtype)
    w = torch.rand(9, dtype=dtype) * 3
    w[4] = 0
    given = options(metric, 9)
    got = pairwise_distance(x, y, metric, w=w, backend=backend, **given)
    if metric == "jaccard":
        x, y = x != 0, y != 0
    sides = (
        (x.double().numpy(), y.double().numpy()) if metric != "jaccard" else (x.numpy(), y.numpy())
    )
    want = cdist(*sides, metric, w=w.double().numpy(), **given)
    torch.testing.assert_close(
        got.double(), torch.from_numpy(want), rtol=BOUNDS[dtype], atol=BOUNDS[dtype] / 10
    )


@pytest.mark.parametrize("metric", [m for m in METRICS if m not in WEIGHTED])
def test_no_weights_where_scipy_has_none(metric: str) -> None:
    with pytest.raises(ValueError, match="w: expected None"):
        pairwise_distance(torch.rand(4, 3), metric=metric, w=torch.ones(3))


@pytest.mark.parametrize("d", [1, 9, 64, 65, 200])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", FLAT)
def test_bools(metric: str, weighted: bool, d: int, backend: str) -> None:
    x, y = torch.rand(9, d) < 0.5, torch.rand(70, d) < 0.3
    x[0], y[0] = False, False
    w = torch.rand(d, dtype=F64) if weighted else None
    got = pairwise_distance(x, y, metric, w=w, backend=backend)
    want = cdist(x.numpy(), y.numpy(), metric, **({} if w is None else dict(w=w.numpy())))
    close(got, want, 1e-6)
    assert got.dtype == torch.float32
    as_numbers = pairwise_distance(x.float(), y.float(), metric, w=w, backend=backend)
    close(as_numbers, want, 1e-6)


@pytest.mark.float64
@pytest.mark.parametrize("p", [0.5, 1, 1.5, 2, 3, 4.0, 7, math.inf])
def test_minkowski_exponents(p: float, backend: str) -> None:
    for dtype in (F64, torch.float32):
        x, y = rows("minkowski", 13, 20, dtype=dtype), rows("minkowski", 66, 20, dtype=dtype)
        want = cdist(x.double().numpy(), y.double().numpy(), "minkowski", p=p)
        got = pairwise_distance(x, y, "minkowski", p=p, backend=backend)
        close(got, want, BOUNDS[dtype])
        if p != math.inf:
            close(
                distance_matrix(x, y, kind="minkowski", p=p, backend=backend), want, BOUNDS[dtype]
            )


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_large_exponents_stay_in_range(scale: float, backend: str) -> None:
    x, y = (scale * rows("minkowski", n, 20, dtype=torch.float32) for n in (5, 70))
    y[0] = x[0]
    f = lambda b: lambda a, c: distance_matrix(a, c, kind="minkowski", p=20.0, backend=b)
    want = cdist(x.double().numpy(), y.double().numpy(), "minkowski", p=20)
    close(f(backend)(x, y), want, 1e-5)
    upstream = torch.randn(5, 70, dtype=F64)
    got = gradients(f(backend), upstream, x, y)
    for g, w in zip(got, gradients(f("reference"), upstream, x.double(), y.double()), strict=True):
        near(g, w, 1e-5)


@pytest.mark.parametrize("kind", ["jensenshannon", "kl"])
def test_a_negative_entry_is_nan(kind: str, backend: str) -> None:
    x, y = torch.rand(4, 20) + 0.1, torch.rand(70, 20) + 0.1
    x[1, 3], y[66, 19] = -1.0, -0.5
    y[5, 3] = 1.0  # a sum of 0 beside x[1]
    out = distance_matrix(x, y, kind=kind, backend=backend)
    assert torch.equal(out.isnan(), (x < 0).any(1)[:, None] | (y < 0).any(1))


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_mahalanobis(dtype: torch.dtype, backend: str) -> None:
    d = 6
    a = torch.randn(d, 9, dtype=F64)
    covariance = a @ a.T + torch.eye(d, dtype=F64)
    x, y = torch.randn(30, d).to(dtype) + 100, torch.randn(20, d).to(dtype) + 100
    of = lambda *given, **more: pairwise_distance(*given, "mahalanobis", backend=backend, **more)
    want = cdist(x.double(), y.double(), "mahalanobis", VI=covariance.inverse().numpy())
    close(of(x, y, covariance=covariance), want, BOUNDS[dtype])
    close(of(x, y, VI=covariance.inverse().to(dtype)), want, BOUNDS[dtype])
    lopsided = covariance.inverse() + torch.triu(torch.randn(d, d, dtype=F64) / 9, 1)
    want = cdist(x.double(), y.double(), "mahalanobis", VI=lopsided.numpy())
    if float(torch.linalg.eigvalsh((lopsided + lopsided.T) / 2).min()) > 0:
        close(of(x, y, VI=lopsided), want, BOUNDS[dtype])
    close(of(x, y), cdist(x.double(), y.double(), "mahalanobis"), BOUNDS[dtype])
    close(of(x, None), squareform(pdist(x.double(), "mahalanobis")), BOUNDS[dtype])
    variance = torch.rand(20, d, dtype=dtype) + 0.5
    want = ((x.double()[:, None] - y.double()).square() / variance.double()).sum(2).sqrt()
    close(of(x, y, variance=variance), want, BOUNDS[dtype])


@pytest.mark.float64
def test_base_is_scipys(backend: str) -> None:
    x, y = rows("jensenshannon", 5, 7), rows("jensenshannon", 4, 7)
    x[0, :3] = 0
    y[1] = x[0]
    got = pairwise_distance(x, y, "jensenshannon", base=2, backend=backend)
    want = [[jensenshannon(a.numpy(), b.numpy(), base=2) for b in y] for a in x]
    torch.testing.assert_close(got, torch.tensor(np.array(want)), rtol=1e-12, atol=1e-7)
    assert got[0, 1] == 0


def test_kl_edges(backend: str) -> None:
    x = torch.tensor([[0.0, 0.5], [0.5, 0.5], [-0.1, 0.5], [0.0, 0.0]])
    y = torch.tensor([[0.0, 0.5], [0.25, 0.5], [0.2, -0.3], [0.0, 0.7]])
    got = pairwise_distance(x, y, "kl", backend=backend)
    nan, inf = math.nan, math.inf
    half = 0.5 * math.log(0.5 / 0.7)
    want = [
        [0, 0, nan, half],
        [inf, 0.5 * math.log(2), nan, inf],
        [nan, nan, nan, nan],
        [0, 0, nan, 0],
    ]
    torch.testing.assert_close(got, torch.tensor(want), equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_equal_rows_are_at_zero(metric: str, dtype: torch.dtype, backend: str) -> None:
    x = rows(metric, 70, 33, dtype=dtype)
    given = options(metric, 33)
    alone = pairwise_distance(x, metric=metric, backend=backend, **given)
    assert bool((alone.diagonal() == 0).all())
    twice = pairwise_distance(x, x.clone(), metric, backend=backend, **given)
    assert bool((twice.diagonal() == 0).all())
    if metric not in FLAT:
        assert int((alone == 0).sum()) == 70


@pytest.mark.parametrize("shift", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cityblock", "chebyshev"])
def test_near_rows_keep_their_digits(
    metric: str, dtype: torch.dtype, shift: float, backend: str
) -> None:
    # four clusters, so that no common shift takes the distance from the origin away
    centres = shift * torch.randn(4, 40)
    x = (centres[torch.arange(80) % 4] + torch.randn(80, 40)).to(dtype)
    y = (x[:70] + 1e-2 * torch.randn(70, 40)).to(dtype)
    upstream = torch.randn(80, 70, dtype=F64)
    formula = lambda a, b: pairwise_distance(a, b, metric, backend="reference")
    want = torch.from_numpy(cdist(x.double(), y.double(), metric))
    close(pairwise_distance(x, y, metric, backend=backend), want, BOUNDS[dtype])
    got = gradients(lambda a, b: pairwise_distance(a, b, metric, backend=backend), upstream, x, y)
    for g, w in zip(got, gradients(formula, upstream, x.double(), y.double()), strict=True):
        near(g, w, BOUNDS[dtype])


KERNELS: dict[str, Callable[..., Tensor]] = {
    "dot": lambda x, y, g: x @ y.T,
    "cosine": lambda x, y, g: x @ y.T / (x.norm(dim=1)[:, None] * y.norm(dim=1)),
    "rbf": lambda x, y, g: (-g * (x[:, None] - y).square().sum(2)).exp(),
    "laplacian": lambda x, y, g: (-g * (x[:, None] - y).abs().sum(2)).exp(),
    "polynomial": lambda x, y, g: (g * x @ y.T + 0.5) ** 4,
    "sigmoid": lambda x, y, g: (g * x @ y.T + 0.5).tanh(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarity(similarity: str, dtype: torch.dtype, backend: str) -> None:
    x, y = rows("dot", 13, 17, dtype=dtype), rows("dot", 66, 17, dtype=dtype)
    upstream = torch.randn(13, 66, dtype=F64)
    shape = {} if similarity in ("dot", "cosine", "rbf", "laplacian") else dict(coef0=0.5)
    given = shape | (dict(degree=4) if similarity == "polynomial" else {})
    of = lambda a, b, **more: pairwise_similarity(
        a, b, similarity, backend=backend, **given, **more
    )
    wide = [x.double(), y.double()]
    bound = BOUNDS[dtype]
    # products of either sign cancel
    near(of(x, y), KERNELS[similarity](*wide, 1 / 17), bound)
    gamma = torch.tensor(0.03, dtype=F64)
    used = similarity not in ("dot", "cosine")
    inputs = [x, y, gamma] if used else [x, y]
    got = gradients(lambda a, b, *g: of(a, b, **({"gamma": g[0]} if g else {})), upstream, *inputs)
    want = gradients(
        lambda a, b, *g: KERNELS[similarity](a, b, g[0] if g else None),
        upstream,
        *wide,
        *inputs[2:],
    )
    for g, w, t in zip(got, want, inputs, strict=True):
        loose = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(t.dtype, 0)
        near(g, w, max(bound * 10, loose))


@pytest.mark.float64
@pytest.mark.parametrize("similarity", [s for s in SIMILARITIES if s != "laplacian"])
def test_similarity_twice(similarity: str, streamed: str) -> None:
    x, y = rows("dot", 3, 4).requires_grad_(), rows("dot", 4, 4).requires_grad_()
    f = lambda a, b: pairwise_similarity(a, b, similarity, backend=streamed)
    assert torch.autograd.gradcheck(f, (x, y)) and torch.autograd.gradgradcheck(f, (x, y))


def test_self_similarity(backend: str) -> None:
    x = 100 + torch.randn(70, 33)
    for similarity in ("rbf", "laplacian"):
        out = pairwise_similarity(x, similarity=similarity, gamma=50.0, backend=backend)
        assert bool((out.diagonal() == 1).all()) and int((out == 1).sum()) == 70
