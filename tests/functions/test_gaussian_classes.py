"""A covariance a class: distances, neighbours, densities; medians and Grams: what is special."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal

import fused_losses.functional as fl
from fused_losses.functions import gaussian_classes
from fused_losses.pairwise import class_covariance, topk_in_full
from fused_losses.similarity import bandwidth


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_covariance, "BLOCK_BYTES", 300)
    monkeypatch.setattr(class_covariance, "BLOCK_ROWS", 4)
    monkeypatch.setattr(gaussian_classes, "BLOCK_BYTES", 200)
    monkeypatch.setattr(topk_in_full, "BLOCK_BYTES", 4_000)
    monkeypatch.setattr(bandwidth, "ROWS", 5)


def given(n: int = 9, c: int = 6, d: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows, means and covariances that ask for gradients."""
    a = torch.randn(c, d, d, dtype=torch.float64)
    made = torch.randn(n, d), torch.randn(c, d), a @ a.mT + torch.eye(d)
    return [t.to(dtype).requires_grad_() for t in made]


def squares(x: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    apart = x[:, None] - means
    return torch.einsum("ncd,cde,nce->nc", apart, covariance.inverse(), apart)


def same(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    slope = torch.randn_like(want)
    pairs = [torch.autograd.grad((f * slope).sum(), leaves, retain_graph=True) for f in (got, want)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def of(x: Tensor, means: Tensor, covariance: Tensor, **more: Any) -> Tensor:
    return fl.pairwise_distance(x, means, "mahalanobis", covariance=covariance, **more)


@pytest.mark.parametrize(("n", "c", "d"), [(9, 6, 4), (1, 1, 1), (13, 2, 1), (2, 17, 3)])
def test_distances_by_a_covariance_a_class(n: int, c: int, d: int) -> None:
    leaves = given(n, c, d)
    same(of(*leaves), squares(*leaves).sqrt(), leaves)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_nearest_classes(k: int) -> None:
    leaves = given()
    x, means, covariance = leaves
    found, index = fl.pairwise_topk(x, means, k, "mahalanobis", covariance=covariance)
    want, at = squares(*leaves).sqrt().topk(min(k, 6), largest=False)
    assert torch.equal(index[:, :6], at)
    assert (index[:, 6:] == -1).all() and (found[:, 6:] == torch.inf).all()
    same(found[:, :6], want, leaves)


def test_no_rows_and_no_classes() -> None:
    x, means, covariance = given()
    assert of(x[:0], means, covariance).shape == (0, 6)
    assert of(x, means[:0], covariance[:0]).shape == (9, 0)
    loss = fl.gaussian_cross_entropy(
        x[:0], torch.zeros(0, dtype=torch.int64), means, covariance=covariance
    )
    assert loss == 0 and (torch.autograd.grad(loss, means)[0] == 0).all()
    assert fl.pairwise_topk(x[:0], means, 2, "mahalanobis", covariance=covariance)[0].shape == (
        0,
        2,
    )


def test_a_row_on_its_mean_is_at_zero_with_gradient_zero() -> None:
    _, means, covariance = given()
    met = means.detach().clone().requires_grad_()
    found = of(met, means, covariance).diagonal()
    assert (found == 0).all()
    assert (torch.autograd.grad(found.sum(), met)[0] == 0).all()


def test_rows_near_a_far_mean_keep_their_digits() -> None:
    step = torch.randn(5, 3) * 2.0**-6
    means = torch.full((1, 3), 4096.0)
    covariance = (torch.eye(3) + 0.3)[None]
    x = means + (step * 2**14).round() / 2**14  # a number of float32 each
    want = squares(x.double(), means.double(), covariance.double()).sqrt()
    got = of(x, means, covariance)
    # differences are exact, products in float64, one rounding to float32
    assert ((got - want).abs() <= 2.0**-23 * want).all()


def test_not_finite_rows_are_nan_and_others_are_not() -> None:
    x, means, covariance = (t.detach() for t in given())
    x[2, 1], means[3, 0] = torch.inf, torch.nan
    bad = of(x, means, covariance).isnan()
    assert bad[2].all() and bad[:, 3].all() and bad.sum() == 9 + 6 - 1


def test_second_derivatives() -> None:
    x, means, covariance = given(3, 2, 2)
    labels = torch.tensor([0, 1, 1])
    both = lambda s: (s + s.mT) / 2 + 3 * torch.eye(2)
    assert torch.autograd.gradgradcheck(lambda *t: of(*t[:2], both(t[2])), (x, means, covariance))
    assert torch.autograd.gradgradcheck(
        lambda x, m, s: fl.gaussian_cross_entropy(x, labels, m, covariance=both(s)),
        (x, means, covariance),
    )
    assert torch.autograd.gradgradcheck(
        lambda x, m, s: fl.class_aware_alignment(x, labels, m, both(s)), (x, means, covariance)
    )


def test_forward_mode() -> None:
    x, means, covariance = (t.detach() for t in given())
    along = torch.randn_like(x)
    f = lambda x: fl.gaussian_cross_entropy(x, torch.arange(9) % 6, means, covariance=covariance)
    _, moved = torch.func.jvp(f, (x,), (along,))
    torch.testing.assert_close(moved, (torch.func.grad(f)(x) * along).sum())


def test_scores_are_log_densities() -> None:
    leaves = given()
    x, means, covariance = leaves
    prior = (torch.rand(6, dtype=torch.float64) + 0.1).requires_grad_()
    want = MultivariateNormal(means, covariance).log_prob(x[:, None]) + prior.log()
    got = fl.gaussian_scores(x, means, covariance=covariance, prior=prior)
    same(got, want, [*leaves, prior])
    labels = torch.arange(9) % 6
    for reduction in ("mean", "sum", "none"):
        loss = fl.gaussian_cross_entropy(
            x, labels, means, covariance=covariance, prior=prior, reduction=reduction
        )
        same(loss, F.cross_entropy(want, labels, reduction=reduction), [*leaves, prior])


def test_variances_are_diagonals() -> None:
    x, means, _ = given()
    variance = (torch.rand(6, 4, dtype=torch.float64) + 0.2).requires_grad_()
    labels = torch.arange(9) % 6
    leaves = [x, means, variance]
    same(
        fl.gaussian_cross_entropy(x, labels, means, variance=variance),
        fl.gaussian_cross_entropy(x, labels, means, covariance=torch.diag_embed(variance)),
        leaves,
    )


X, MEANS, COVARIANCE = (t.detach() for t in given(3, 2, 2))
LABELS = torch.tensor([0, 1, 1])
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (
        lambda: of(X, MEANS, COVARIANCE[:1]),
        ValueError,
        r"covariance: expected shape \(2, 2\), or \(2, 2, 2\) beside y",
    ),
    "integers": (
        lambda: of(X, MEANS, COVARIANCE.long()),
        TypeError,
        "covariance: expected a floating point tensor",
    ),
    "singular": (
        lambda: of(X, MEANS, COVARIANCE * torch.tensor([1.0, 0.0])[:, None, None]),
        ValueError,
        "covariance: expected symmetric positive definite matrices, but .* of class 1 is not",
    ),
    "leading": (
        lambda: of(X[None], MEANS, COVARIANCE),
        ValueError,
        r"x: expected \[N, D\] with a covariance a row of y",
    ),
    "both": (
        lambda: fl.gaussian_scores(X, MEANS, variance=MEANS, covariance=COVARIANCE),
        ValueError,
        "variance, covariance: expected one of them",
    ),
    "neither": (
        lambda: fl.gaussian_scores(X, MEANS),
        ValueError,
        "variance, covariance: expected one of them",
    ),
    "variance": (
        lambda: fl.gaussian_scores(X, MEANS, variance=MEANS[:1]),
        ValueError,
        r"variance: expected shape \(2, 2\) as means has",
    ),
    "negative": (
        lambda: fl.gaussian_scores(X, MEANS, variance=-(MEANS**2)),
        ValueError,
        "variance: expected values > 0",
    ),
    "prior": (
        lambda: fl.gaussian_scores(X, MEANS, covariance=COVARIANCE, prior=X[:, 0]),
        ValueError,
        r"prior: expected shape \(2,\) one a class",
    ),
    "labels": (
        lambda: fl.class_aware_alignment(X, LABELS + 1, MEANS, COVARIANCE),
        IndexError,
        r"labels: expected class ids in \[0, 2\)",
    ),
    "classes": (
        lambda: fl.class_aware_alignment(X, LABELS, MEANS[:0], COVARIANCE[:0]),
        ValueError,
        "means: expected at least one class",
    ),
    "one row": (
        lambda: fl.median_bandwidth(X[:1]),
        ValueError,
        "x, y: expected at least one pair of rows",
    ),
    "sample": (
        lambda: fl.median_bandwidth(X, sample=0),
        ValueError,
        "sample: expected a value >= 1, got 0",
    ),
    "unpaired": (lambda: fl.cka(X, MEANS), ValueError, "y: expected 3 rows to match x"),
    "rates": (
        lambda: fl.coding_rate(X, labels=LABELS, membership=X),
        ValueError,
        "labels, membership: expected at most one of them",
    ),
    "members": (
        lambda: fl.coding_rate(X, membership=MEANS),
        ValueError,
        "membership: expected 3 rows to match x",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    call, kind, told = REFUSED[name]
    with pytest.raises(kind, match=told):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 3, 5, 11, 12])
def test_the_median_is_that_of_all_distances(n: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(n, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    x[-1] = x[0]
    i, j = torch.triu_indices(n, n, 1)
    assert torch.equal(fl.median_bandwidth(x), fl.pairwise_distance(x)[i, j].median())
    assert torch.equal(fl.median_bandwidth(x, y), fl.pairwise_distance(x, y).flatten().median())
    few = fl.median_bandwidth(x, y, sample=2, seed=4)
    assert torch.equal(few, fl.median_bandwidth(x, y, sample=2, seed=4))
    assert (fl.pairwise_distance(x, y) == few).any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_median_of_rows_that_are_not_finite_is_nan(value: float, dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, dtype=dtype)
    x[4, 0] = value
    assert fl.median_bandwidth(x).isnan()
    assert fl.median_bandwidth(x[4:5], x).isnan()  # more than half of the distances have a sign


def test_coding_rates_of_a_plan() -> None:
    x, means, _ = given(8, 3)
    soft = (
        fl.sinkhorn(x, means, eps=0.3, iterations=400).apply(torch.eye(3, dtype=torch.float64)) * 8
    )
    torch.testing.assert_close(soft.sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(soft.sum(0), torch.full((3,), 8 / 3, dtype=torch.float64))
    whole, parts = fl.coding_rate(x), fl.coding_rate(x, membership=soft)
    # the rate is concave in the mixture
    assert 0 < parts < whole


def test_cka_of_features_that_do_not_vary() -> None:
    x = torch.full((5, 3), 0.1, requires_grad=True)
    found = fl.cka(x, torch.randn(5, 2))
    assert found == 0
    assert (torch.autograd.grad(found, x)[0] == 0).all()
    y = torch.randn(5, 3)
    torch.testing.assert_close(
        fl.cka(y, y @ torch.linalg.qr(torch.randn(3, 3))[0] * 7 + 1), 1 + found
    )
