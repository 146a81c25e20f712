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
from conftest import CUDA, STREAMED, require, widest
from counted import COUNTER, MIB, told_by_child
from scipy.spatial.distance import cdist, jensenshannon, pdist, squareform
from scipy.special import rel_entr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
from fused_losses import backends
from fused_losses.pairwise.distance import SIMILARITIES, pairwise_distance, pairwise_similarity
from fused_losses.pairwise.metrics import METRICS, WEIGHTED
from fused_losses.primitives.distances import bounded as bounded_distances
from fused_losses.primitives.distances import op as primitive
from fused_losses.primitives.distances.inputs import (
    FLAT,
    KINDS,
    PRODUCTS,
    DistanceInputs,
    DistanceNeeds,
)
from fused_losses.primitives.distances.op import DISTANCE_MATRIX, distance_matrix

F64 = torch.float64
DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (7, 5, 3), (23, 66, 17), (65, 9, 130)]
SCIPY = (*WEIGHTED, "jensenshannon", "mahalanobis")
OWN = tuple(m for m in METRICS if m not in SCIPY)
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
POSITIVE = ("hellinger", "jensenshannon", "kl")
BOUNDS = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def rows(metric: str, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Rows that a metric is meant for, rounded to the dtype."""
    x = torch.randn(*shape, dtype=F64)
    if metric in FLAT:
        x = torch.randint(0, 3, shape).to(F64)
    elif metric in POSITIVE:
        x = torch.rand(*shape, dtype=F64) + 0.01
    elif metric == "poincare":
        x = x / x.norm(dim=-1, keepdim=True) * (0.1 + 0.8 * torch.rand(*shape[:-1], 1, dtype=F64))
    elif metric == "lorentz":
        space = (x[..., 1:] / shape[-1] ** 0.5).to(dtype).to(F64)
        x = torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)
    return x.to(dtype)


def few(backend: str, enough: bool) -> None:
    """Skips what the host would execute CUDA kernels for long, beyond cases that are enough."""
    if backend == "cuda" and not enough:
        pytest.skip("the host executes CUDA kernels slowly")


def options(metric: str, d: int) -> dict:
    if metric == "mahalanobis":
        a = torch.randn(d, d + 3, dtype=F64)
        return dict(VI=a @ a.T / d + torch.eye(d, dtype=F64))
    return dict(p=3.5) if metric == "minkowski" else {}


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


def close(got: Tensor, want: Tensor, bound: float) -> None:
    """Every element, relative to itself."""
    got, want = got.to(F64), torch.as_tensor(want, dtype=F64)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=bound, atol=0, equal_nan=True)


def near(got: Tensor, want: Tensor, bound: float) -> None:
    """As a whole: sums cancel where single elements do not say much."""
    assert got.shape == want.shape
    off = float((got.to(F64) - want.to(F64)).norm())
    assert off <= bound * float(want.to(F64).norm()) + 1e-13, off


def gradients(f: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return list(torch.autograd.grad((f(*leaves) * upstream).sum(), leaves))


# ---- values -------------------------------------------------------------------------------------


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


# ---- near rows, equal rows, rows far away -------------------------------------------------------


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


# ---- gradients ----------------------------------------------------------------------------------


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


# ---- similarities -------------------------------------------------------------------------------

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


# ---- shapes, layouts, transforms ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 3), (2, 3)),
        ((2, 1), (1, 3)),
        ((), (2, 3)),
        ((2, 3), ()),
        ((1,), (2, 3)),
        ((0,), (0,)),
        ((0,), (1,)),
        ((0,), ()),
    ],
)
@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "snr", "mahalanobis"])
@pytest.mark.parametrize(("n", "m"), [(4, 5), (1, 5), (4, 1)])
def test_leading_dimensions(
    metric: str, left: tuple, right: tuple, n: int, m: int, backend: str
) -> None:
    dtype = widest(backend)
    x = torch.randn(*left, n, 6, dtype=dtype, requires_grad=True)
    y = torch.randn(*right, m, 6, dtype=dtype, requires_grad=True)
    given = dict(variance=torch.rand(*right, m, 6, dtype=dtype) + 0.5)
    given = given if metric == "mahalanobis" else {}
    out = pairwise_distance(x, y, metric, backend=backend, **given)
    lead = torch.broadcast_shapes(left, right)
    assert out.shape == (*lead, n, m)
    wide_x, wide_y = (
        x.expand(*lead, n, 6).reshape(-1, n, 6),
        y.expand(*lead, m, 6).reshape(-1, m, 6),
    )
    upstream = torch.randn_like(out)
    want = x.sum() * 0
    for k, (a, b) in enumerate(zip(wide_x, wide_y, strict=True)):
        some = {n: v.expand(*lead, m, 6).reshape(-1, m, 6)[k] for n, v in given.items()}
        one = pairwise_distance(a, b, metric, backend="reference", **some)
        close(out.reshape(-1, n, m)[k], one, BOUNDS[dtype])
        want = want + (one * upstream.reshape(-1, n, m)[k]).sum()
    got = torch.autograd.grad((out * upstream).sum(), (x, y))
    for g, w in zip(got, torch.autograd.grad(want + y.sum() * 0, (x, y)), strict=True):
        if dtype == F64:
            close(g, w, 1e-10)
        else:
            near(g, w, BOUNDS[dtype])


def test_batch_with_itself(backend: str) -> None:
    x = torch.randn(3, 4, 6)
    out = pairwise_distance(x, metric="cosine", backend=backend)
    assert out.shape == (3, 4, 4) and bool((out.diagonal(dim1=1, dim2=2) == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "d"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (2, 3, 0)])
def test_empty(kind: str, n: int, m: int, d: int, backend: str) -> None:
    x, y = (torch.rand(k, d, requires_grad=True) for k in (n, m))
    w = torch.rand(m, d) if kind == "scaled" else None
    out = distance_matrix(x, y, w, kind=kind, backend=backend)
    assert out.shape == (n, m) and bool((out == 0).all())
    if kind not in FLAT:
        for g, t in zip(torch.autograd.grad(out.sum(), (x, y)), (x, y), strict=True):
            assert g.shape == t.shape and bool((g == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str, backend: str) -> None:
    x, y = torch.rand(20, 9), torch.rand(20, 66)
    w = torch.rand(20, 66) if kind == "scaled" else None
    f = lambda a, b, c: distance_matrix(a, b, c, kind=kind, p=3.0, backend=backend)
    inputs = [t for t in (x.T, y.T, w if w is None else w.T) if t is not None]
    inputs = [*inputs, None][:3]
    dense = [None if t is None else t.contiguous() for t in inputs]
    out = f(*inputs)
    # a product of other strides sums in another order
    torch.testing.assert_close(out, f(*dense), rtol=BOUNDS[torch.float32], atol=1e-7)
    if kind not in FLAT:
        # what comes back is often no dense matrix: of a sum, a transpose, a broadcast row
        for grad in (torch.ones(()).expand(9, 66), torch.randn(66, 9).T, torch.randn(1, 66)):
            grad = grad.expand(9, 66)
            found = []
            for given, up in ((inputs, grad), (dense, grad.contiguous())):
                leaves = [t.detach().requires_grad_() for t in given[:2]]
                found.append(torch.autograd.grad(f(*leaves, given[2]), leaves, up))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_long_rows(backend: str) -> None:
    x, y = torch.rand(3, 5_000), torch.rand(2, 5_000)
    for kind in KINDS:
        w = torch.rand(2, 5_000) if kind == "scaled" else None
        given = dict(kind=kind, p=3.0)
        wide = None if w is None else w.double()
        want = distance_matrix(x.double(), y.double(), wide, backend="reference", **given)
        close(distance_matrix(x, y, w, backend=backend, **given), want, 1e-5)


def weights_of(kind: str, m: int, d: int) -> Tensor | None:
    return dict(canberra=torch.rand(d), scaled=torch.rand(m, d), hamming=torch.rand(d)).get(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, streamed: str) -> None:
    few(streamed, kind == "scaled")
    x, y = (torch.rand(n, 4, requires_grad=True) for n in (3, 5))
    w = weights_of(kind, 5, 4)
    op = DISTANCE_MATRIX.op(streamed)
    torch.library.opcheck(op, (x, y, w, kind, 3.0, "fp32"))
    if kind in FLAT:
        return
    out = op(x, y, w, kind, 3.0, "fp32").detach()
    grad, *inputs = torch.randn_like(out), *(t.detach() for t in (out, x, y))
    needs_w = kind in ("canberra", "scaled")
    back = DISTANCE_MATRIX.op(streamed, "_backward")
    for needs in ((True, True, needs_w), (True, False, False), (False, True, False)):
        torch.library.opcheck(back, (grad, *inputs, w, kind, 3.0, "fp32", *needs))


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in FLAT])
def test_func_grad(metric: str, streamed: str) -> None:
    few(streamed, metric == "chebyshev")
    x, f = to_transform(metric, streamed)
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.func.grad(f)(x), torch.autograd.grad(f(leaf), leaf)[0])


OTHERS = [name for name in STREAMED if name != "cpu"]


# what is traced of another backend is the name of its op, which opcheck traces by itself
@pytest.mark.parametrize(
    ("streamed", "metric"),
    [*(("cpu", name) for name in METRICS), *((each, "chebyshev") for each in OTHERS)],
)
def test_compiles_whole(metric: str, streamed: str) -> None:
    x, f = to_transform(metric, require(streamed))
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    if metric in FLAT:
        assert torch.equal(compiled(x), f(x))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (5, 7):
            x = rows(metric, n, 4, dtype=torch.float32)
            leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            got = torch.autograd.grad(compiled(leaf), leaf)[0]
            torch.testing.assert_close(got, torch.autograd.grad(f(other), other)[0])


def to_transform(metric: str, backend: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    x, y = (rows(metric, n, 4, dtype=torch.float32) for n in (5, 6))
    given = {k: v.float() if isinstance(v, Tensor) else v for k, v in options(metric, 4).items()}
    return x, lambda a: pairwise_distance(a, y, metric, backend=backend, **given).square().sum()


def test_similarity_transforms(streamed: str) -> None:
    few(streamed, False)
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    gamma = torch.tensor(0.3)
    f = lambda a, g: pairwise_similarity(a, y, "rbf", gamma=g, backend=streamed).sum()
    leaves = [x.clone().requires_grad_(), gamma.clone().requires_grad_()]
    want = torch.autograd.grad(f(*leaves), leaves)
    for g, w in zip(torch.func.grad(f, argnums=(0, 1))(x, gamma), want, strict=True):
        assert torch.equal(g, w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "jensenshannon", "mahalanobis"])
def test_autocast(metric: str, backend: str) -> None:
    x, y = rows(metric, 5, 4).abs().float(), rows(metric, 6, 4).abs().float()
    given = options(metric, 4)
    plain = pairwise_distance(x, y, metric, backend=backend, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_distance(x, y, metric, backend=backend, **given), plain)
        out = pairwise_distance(x, y.bfloat16(), metric, backend=backend, **given)
    assert out.dtype == torch.float32
    with pytest.raises(TypeError, match="y: expected the dtype of x"):
        pairwise_distance(x, y.bfloat16(), metric, backend=backend, **given)


# ---- what never exists, which backend runs, bad input -------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FLAT])
def test_bounded_never_holds_all_differences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_distances, "BLOCK_BYTES", 4 << 10)
    n, m, d = 60, 50, 40
    # every pair is near
    x, y = 1 + 1e-3 * torch.rand(n, d), 1 + 1e-3 * torch.rand(m, d)
    w = weights_of(kind, m, d)
    inputs, needs = DistanceInputs(x, y, w, kind, 3.0), DistanceNeeds(True, True, w is not None)
    with Largest() as seen:
        out = bounded_distances.forward(inputs)
        bounded_distances.backward(out, out, inputs, needs)
    assert n * m <= seen.elements < n * m * d // 8


CHILD = (
    COUNTER
    + """
from fused_losses.primitives.distances import bounded as b
from fused_losses.primitives.distances.inputs import FLAT, DistanceInputs, DistanceNeeds
b.BLOCK_BYTES = 1 << 20
torch.set_num_threads(1)
def run(kind, n, d, spread):
    torch.manual_seed(0)
    x, y = (1 + spread * torch.rand(n, d) for _ in range(2))
    w = dict(canberra=torch.rand(d), scaled=torch.rand(n, d)).get(kind)
    got = []
    inputs = DistanceInputs(x, y, w, kind, 3.0)
    def step():
        out = b.forward(inputs)
        got.append(out)
        if kind not in FLAT:
            got.extend(b.backward(out, out, inputs, DistanceNeeds(True, True, w is not None)))
    peak = extra(step) - sum(t.nbytes for t in got)
    return peak, b.workspace_bytes(n, n, d, x.dtype, kind)
cases = json.loads(sys.argv[1])
# threads, lazy imports and the buffers that MKL keeps, by the products' sizes, are the process's
for case in cases.values():
    run(*case)
print(json.dumps({name: run(*case) for name, case in cases.items()}))
"""
)


@pytest.mark.slow
def test_bounded_memory_is_what_it_says() -> None:
    cases = {k: (k, 600, 40, 1.0) for k in KINDS if k != "dot"}
    # every pair near; rows of which few fit in a block
    cases["euclidean-near"] = ("euclidean", 600, 40, 1e-6)
    cases["sqeuclidean-long"] = ("sqeuclidean", 100, 4_000, 1.0)
    cases["cityblock-long"] = ("cityblock", 100, 4_000, 1.0)
    for name, (extra, told) in told_by_child(CHILD, cases).items():
        _, n, d, _ = cases[name]
        assert extra <= told < n * n * d * 4 / 4, name
        assert told <= 4 * extra + 2 * MIB, name


def test_the_kinds_without_products_on_triton() -> None:
    gpu, float32 = torch.device("cuda"), torch.float32
    for kind in KINDS:
        if kind in PRODUCTS:
            continue
        with pytest.raises(RuntimeError, match=f"backend='triton' cannot run kind '{kind}'"):
            primitive.choose("triton", gpu, float32, "fp32", kind)
        # the CUDA C++ kernels where there are any, and no word of Triton
        best = "bounded" if backends.reasons_against("cuda", gpu, float32, "fp32") else "cuda"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for asked, precision in ((None, "tf32"), ("auto", "fp32")):
                chosen, refused = primitive.choose(asked, gpu, float32, precision, kind)
                assert chosen == best and set(refused) <= {"cuda"}
    with pytest.raises(RuntimeError, match="made of products"):
        pairwise_distance(torch.rand(3, 4), metric="canberra", backend="triton")
    with fused_losses.use_backend("triton"), pytest.raises(RuntimeError, match="best path"):
        pairwise_distance(torch.rand(3, 4), metric="kl")


def test_the_exact_backends_refuse_rounded_products() -> None:
    for name in ("reference", "bounded"):
        with pytest.raises(RuntimeError, match="precision"):
            pairwise_distance(torch.rand(3, 4), precision="bf16", backend=name)
        # there is nothing to round
        pairwise_distance(torch.rand(3, 4), metric="canberra", precision="bf16", backend=name)


X, Y = torch.rand(4, 3), torch.rand(5, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=[1.0]), TypeError, r"x: expected a tensor \[..., N, D\], got list"),
        (dict(y=3), TypeError, "y: expected a tensor"),
        (dict(x=torch.ones(4, 3).long()), TypeError, "x: expected a floating point"),
        (dict(x=X > 0.5, y=Y > 0.5), TypeError, "x: expected a floating point"),
        (dict(x=torch.rand(3)), ValueError, "x: expected at least two dimensions"),
        (dict(y=torch.rand(5, 4)), ValueError, r"y: expected \[..., M, 3\]"),
        (dict(x=torch.rand(2, 4, 3), y=torch.rand(3, 5, 3)), ValueError, "y: expected leading"),
        (dict(y=Y.double()), TypeError, "y: expected the dtype of x"),
        (dict(y=Y.to("meta")), ValueError, "y: expected the device of x"),
        (dict(metric="manhattan"), ValueError, "metric: expected one of euclidean, "),
        (dict(precision="half"), ValueError, "precision: expected one of"),
        (dict(metric="minkowski", p=0), ValueError, "p: expected a value > 0, got 0"),
        (dict(metric="minkowski", p=math.nan), ValueError, "p: expected a value > 0"),
        (dict(metric="minkowski", p="2"), TypeError, "p: expected a number, got str"),
        (dict(p=3.0), ValueError, "p: expected no value with metric='euclidean'"),
        (dict(base=2.0), ValueError, "base: expected None"),
        (dict(metric="jensenshannon", base=1.0), ValueError, "base: expected a value > 0 other"),
        (dict(w=torch.rand(4)), ValueError, r"w: expected shape \(3,\)"),
        (dict(w=[1.0, 1, 1]), TypeError, "w: expected a floating point tensor"),
        (dict(w=torch.tensor([1.0, -2, 1])), ValueError, "w: expected values >= 0, got -2.0"),
        (dict(VI=torch.eye(3)), ValueError, "VI: expected None with metric='euclidean'"),
        (
            dict(metric="mahalanobis", VI=torch.eye(3), covariance=torch.eye(3)),
            ValueError,
            "covariance: expected one of VI, covariance and variance",
        ),
        (dict(metric="mahalanobis", VI=torch.eye(4)), ValueError, r"VI: expected shape \(3, 3\)"),
        (dict(metric="mahalanobis", VI=3), TypeError, "VI: expected a floating point tensor"),
        (
            dict(metric="mahalanobis", covariance=-torch.eye(3)),
            ValueError,
            "covariance: expected a symmetric positive definite",
        ),
        (
            dict(metric="mahalanobis", x=X[:1], y=Y[:2]),
            ValueError,
            "covariance: expected one, or VI or variance: 3 rows",
        ),
        (
            dict(metric="mahalanobis", variance=torch.rand(4, 3)),
            ValueError,
            r"variance: expected shape \(5, 3\)",
        ),
        (
            dict(metric="mahalanobis", variance=torch.zeros(5, 3)),
            ValueError,
            "variance: expected values > 0, got 0.0",
        ),
        (dict(metric="lorentz", x=X[:, :0], y=Y[:, :0]), ValueError, "x: expected a time"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    given = dict(x=X, y=Y) | change
    with pytest.raises(error, match=words):
        pairwise_distance(given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(similarity="gaussian"), ValueError, "similarity: expected one of dot"),
        (dict(similarity="rbf", gamma=0.0), ValueError, "gamma: expected a value > 0"),
        (dict(similarity="rbf", gamma="1"), TypeError, "gamma: expected a number"),
        (dict(similarity="rbf", gamma=torch.rand(2)), ValueError, "gamma: expected a number or a"),
        (dict(similarity="sigmoid", coef0=None), TypeError, "coef0: expected a number"),
        (dict(similarity="polynomial", degree="3"), TypeError, "degree: expected a number"),
        (dict(precision="half"), ValueError, "precision: expected one of"),
    ],
)
def test_bad_similarity(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        pairwise_similarity(X, Y, **change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(kind="cosine"), ValueError, "kind: expected one of dot"),
        (dict(x=X[0]), ValueError, "x: expected two dimensions"),
        (dict(x=X > 0.5, y=Y > 0.5), TypeError, "x: expected a floating point tensor"),
        (dict(x=(X > 0.5)[0], kind="hamming"), ValueError, "x: expected two dimensions"),
        (dict(y=torch.rand(5, 4)), ValueError, r"y: expected \[M, 3\]"),
        (dict(y=Y.double()), TypeError, "y: expected the dtype of x"),
        (dict(y=Y.to("meta")), ValueError, "y: expected the device of x"),
        (dict(kind="minkowski", p=math.inf), ValueError, "p: expected a finite value > 0"),
        (dict(kind="scaled"), ValueError, r"w: expected weights \[5, 3\]"),
        (dict(kind="scaled", w=torch.rand(4, 3)), ValueError, r"w: expected \(5, 3\)"),
        (dict(kind="canberra", w=torch.rand(4)), ValueError, r"w: expected shape \(3,\)"),
        (dict(w=torch.rand(3)), ValueError, "w: expected None with kind='euclidean'"),
        (dict(precision="half"), ValueError, "precision: expected one of"),
    ],
)
def test_bad_primitive(change: dict, error: type, words: str) -> None:
    given = dict(x=X, y=Y, kind="euclidean") | change
    with pytest.raises(error, match=words):
        distance_matrix(given.pop("x"), given.pop("y"), given.pop("w", None), **given)


@pytest.mark.parametrize("name", STREAMED)
def test_the_result_is_the_same_twice(name: str) -> None:
    require(name)
    x, y = torch.rand(130, 70), torch.rand(200, 70)
    for kind in KINDS:
        w = weights_of(kind, 200, 70)
        f = lambda k=kind, c=w: distance_matrix(x, y, c, kind=k, p=3.0, backend=name)
        assert torch.equal(f(), f())


@pytest.mark.parametrize("gpu", CUDA)
def test_the_same_bits_in_any_order_of_threads_and_blocks(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(gpu)
    dtype = torch.float32
    found = []
    for kind in KINDS:
        metric = "kl" if kind in ("kl", "jensenshannon") else kind
        # rows that are near some and far from others, in more than one block of pairs and tile
        x, y = rows(metric, 70, 40, dtype=dtype), rows(metric, 135, 40, dtype=dtype)
        y[:9] = x[:9] * 1.01
        w = weights_of(kind, 135, 40)
        upstream, got = torch.randn(70, 135), []
        for seed in (0, 1, 2):
            monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", str(seed))
            op = DISTANCE_MATRIX.op(gpu)
            out = op(x, y, w, kind, 3.0, "fp32")
            back = DISTANCE_MATRIX.op(gpu, "_backward")
            rest = (kind, 3.0, "fp32", True, True, kind in ("canberra", "scaled"))
            got.append([out, *(() if kind in FLAT else back(upstream, out, x, y, w, *rest))])
        found.append(got)
    for got in found:
        for other in got[1:]:
            assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))


@pytest.mark.parametrize("gpu", CUDA)
@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_rounded_products_on_cuda(kind: str, precision: str, gpu: str) -> None:
    require(gpu)
    x, y = rows(kind, 40, 33, dtype=torch.float32), rows(kind, 150, 33, dtype=torch.float32)
    y[:3] = x[:3] * 1.01
    f = lambda name, how: lambda a, b: distance_matrix(a, b, kind=kind, precision=how, backend=name)
    want = f("reference", "fp32")(x.double(), y.double())
    near(f(gpu, precision)(x, y), want, 1e-5 if precision == "mixed" else 1e-2)
    upstream = torch.randn(40, 150, dtype=F64)
    exact = gradients(f("reference", "fp32"), upstream, x.double(), y.double())
    for g, r in zip(gradients(f(gpu, precision), upstream, x, y), exact, strict=True):
        near(g, r, 1e-2)
