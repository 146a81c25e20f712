"""What distances refuse, and by what name."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import CUDA, require
from distance_rows import F64, gradients, near, rows

from fused_losses.pairwise.distance import pairwise_distance, pairwise_similarity
from fused_losses.primitives.distances.inputs import PRODUCTS
from fused_losses.primitives.distances.op import distance_matrix


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
