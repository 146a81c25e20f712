"""LeanVec's projections: what they lose, by the whole products in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses as fl
from fused_losses.similarity import leanvec as module

METHODS = ("pca", "eigenvectors", "frank_wolfe", "sphering")
# rounds turn roundings into other ways: they meet where none takes anything off
LIMIT: dict[str, Any] = dict(tolerance=0.0, iterations=50_000)


def literal(x: Tensor, q: Tensor, a: Tensor, b: Tensor) -> float:
    x, q, a, b = (t.double() for t in (x, q, a, b))
    whole = q @ x.T
    return float(((q @ a) @ (x @ b).T - whole).square().sum() / whole.square().sum())


def sets(n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """Spectra that decay, along other axes."""
    fall = torch.logspace(0, -1.5, d, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    x = torch.randn(n, d, dtype=torch.float64) * fall
    return x, torch.randn(m, d, dtype=torch.float64) * fall.flip(0) @ turned + 0.1 * x[:1]


@pytest.mark.parametrize(
    ("n", "m", "d", "dim"), [(60, 40, 12, 3), (7, 5, 13, 2), (50, 1, 5, 2), (3, 31, 6, 6)]
)
def test_each_method_loses_at_most_what_the_one_before_does(n, m, d, dim) -> None:
    x, q = sets(n, m, d)
    lost = []
    for method in METHODS:
        found = fl.leanvec(x, dim, q, method=method)
        assert found.query.shape == found.row.shape == (d, dim)
        told = literal(x, q, found.query, found.row)
        assert float(found.error) == pytest.approx(told, rel=1e-9, abs=1e-13)
        lost.append(told)
        if method in ("pca", "eigenvectors"):
            assert torch.equal(found.query, found.row)
            one = torch.eye(dim, dtype=torch.float64)
            torch.testing.assert_close(found.row.T @ found.row, one, rtol=0, atol=1e-13)
        if method == "frank_wolfe":
            assert found.converged and found.iterations >= 1
            for side in (found.query, found.row):
                assert float(torch.linalg.matrix_norm(side, 2)) <= 1 + 1e-12
    for before, after in itertools.pairwise(lost):
        assert after <= before + 1e-13
    if dim == 3:  # the methods are not one
        assert lost[0] - lost[1] > 1e-3 and lost[1] - lost[2] > 1e-3 and lost[2] - lost[3] > 1e-3


@pytest.mark.parametrize("dim", [1, 4, 9])
def test_the_least_is_what_singular_values_say(dim: int) -> None:
    x, q = sets(50, 30, 9)
    squares = torch.linalg.svdvals(x).square()
    want = float(squares[dim:].square().sum() / squares.square().sum())
    assert float(fl.leanvec(x, dim).error) == pytest.approx(want, rel=1e-9, abs=1e-13)
    squares = torch.linalg.svdvals(q @ x.T).square()[:9]
    want = float(squares[dim:].sum() / squares.sum())
    found = fl.leanvec(x, dim, q, method="sphering")
    assert float(found.error) == pytest.approx(want, rel=1e-9, abs=1e-13)


def test_planted_subspaces() -> None:
    """Of the rows: nothing is lost. Of the queries: pca does not see it.

    A Gram's own rounding is D eps of it, and so is a square's that would be 0.
    """
    x, q = sets(40, 30, 10)
    basis = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64)).Q
    for method in METHODS:
        found = fl.leanvec(x @ basis @ basis.T, 3, q, method=method)
        assert float(found.error) < 1e-14
    for method in METHODS[1:]:
        found = fl.leanvec(x, 3, q @ basis @ basis.T, method=method)
        assert float(found.error) < 1e-14
    assert float(fl.leanvec(x, 3, q @ basis @ basis.T, method="pca").error) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_what_leaves_it_alone(method: str) -> None:
    x, q = sets(40, 30, 8)
    want = fl.leanvec(x, 3, q, method=method)
    found = fl.leanvec(x * 2.0**300, 3, q * 2.0**-300, method=method)
    assert torch.equal(found.query, want.query) and torch.equal(found.row, want.row)
    assert torch.equal(found.error, want.error)
    want = fl.leanvec(x, 3, q, method=method, **LIMIT)
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    zeros = torch.cat([x, torch.zeros(5, 8, dtype=torch.float64)])
    for rows, queries in (
        (zeros, q),
        (x.flip(0), q.flip(0)),
        (x @ turned, q @ turned),
        (x.repeat(3, 1), q),
    ):
        found = fl.leanvec(rows, 3, queries, method=method, **LIMIT)
        assert found.converged
        assert float(found.error) == pytest.approx(float(want.error), rel=1e-6)


def test_rounds_never_lose_more() -> None:
    x, q = sets(40, 30, 8)
    start = float(fl.leanvec(x, 3, q, method="eigenvectors").error)
    found = [fl.leanvec(x, 3, q, iterations=n, tolerance=0.0) for n in (1, 2, 5, 20)]
    lost = [start, *(float(one.error) for one in found)]
    assert all(after < before for before, after in itertools.pairwise(lost))
    assert [one.iterations for one in found] == [1, 2, 5, 20]
    assert not any(one.converged for one in found)
    assert fl.leanvec(x, 3, q, tolerance=1.0).iterations == 1
    assert torch.equal(fl.leanvec(x, 3, q).row, fl.leanvec(x, 3, q, method="frank_wolfe").row)
    assert torch.equal(fl.leanvec(x, 3).row, fl.leanvec(x, 3, method="pca").row)


def of_the_paper(x: Tensor, q: Tensor, a: Tensor, b: Tensor) -> float:
    """Block coordinate Frank-Wolfe with the authors' steps and end, by whole products."""
    before = literal(x, q, a, b)
    for t in range(500):
        for _ in range(2):
            slope = 2 * q.T @ (q @ a @ (x @ b).T - q @ x.T) @ x @ b
            u, _, v = torch.linalg.svd(-slope, full_matrices=False)
            a = a + (t + 1) ** -0.999 * (u @ v - a)
            x, q, a, b = q, x, b, a
        after = literal(x, q, a, b)
        if abs(before - after) <= 1e-3 * before:
            return after
        before = after
    return before


def test_at_most_what_the_authors_steps_lose() -> None:
    x, q = sets(60, 40, 12)
    drawn = (torch.randn(12, 3, dtype=torch.float64) for _ in range(2))
    begun = fl.leanvec(x, 3, q, method="eigenvectors")
    lost = float(fl.leanvec(x, 3, q).error)
    for a, b in (drawn, begun[:2]):
        theirs = of_the_paper(x, q, a, b)
        assert lost <= theirs < float(begun.error)


def test_the_share_is_the_best_of_a_walk() -> None:
    x, q = sets(60, 40, 12)
    parts = [t.T @ t / t.square().sum() for t in (x, q)]
    walked = []
    for i in range(101):
        first = torch.linalg.eigh(torch.lerp(*parts, i / 100)).eigenvectors[:, -3:]
        walked.append(literal(x, q, first, first))
    assert float(fl.leanvec(x, 3, q, method="eigenvectors").error) <= min(walked) + 1e-12


def test_blocks_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q = sets(40, 30, 8)
    want = [fl.leanvec(x, 3, q, method=method, **LIMIT) for method in METHODS]
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 8 * 3)
    for method, whole in zip(METHODS, want, strict=True):
        found = fl.leanvec(x, 3, q, method=method, **LIMIT)
        assert float(found.error) == pytest.approx(float(whole.error), rel=1e-9)
    given = dict(method="sphering")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = fl.leanvec(x.to(dtype), 3, q.to(dtype).requires_grad_(), **given)
        assert {t.dtype for t in found[:3]} == {torch.float32}
        assert not any(t.requires_grad for t in found[:3])
        exact = fl.leanvec(x.to(dtype).double(), 3, q.to(dtype).double(), **given)
        assert float(found.error) == pytest.approx(float(exact.error), rel=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            again = fl.leanvec(x.to(dtype), 3, q.to(dtype), **given)
        assert torch.equal(again.row, found.row)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_and_what_is_no_number(method: str) -> None:
    x, q = torch.randn(5, 4), torch.randn(6, 4)
    for rows, queries in ((x[:0], q), (x, q[:0]), (x * 0, q * 0), (x[:0], q[:0])):
        found = fl.leanvec(rows, 2, queries, method=method)
        assert float(found.error) == 0 and bool(found.row.isfinite().all())
        if method in ("pca", "eigenvectors"):
            torch.testing.assert_close(found.row.T @ found.row, torch.eye(2))
    for bad in (math.nan, math.inf):
        for at in (0, 1):
            rows = [x.clone(), q.clone()]
            rows[at][2, 1] = bad
            found = fl.leanvec(rows[0], 2, rows[1], method=method)
            assert all(bool(t.isnan().all()) for t in found[:3])


def test_found_again_after_whole_products() -> None:
    """In two stages: a hundred by the projections, of these the first by whole products."""
    x, q = sets(600, 20, 24)
    found = fl.leanvec(x, 12, q)
    first = fl.pairwise_topk(q @ found.query, x @ found.row, 100, "dot")[1]
    scores = (q[:, None] * x[first]).sum(dim=2)
    again = first.gather(1, scores.topk(10, dim=1).indices).sort(dim=1).values
    want = fl.pairwise_topk(q, x, 10, "dot")[1].sort(dim=1).values
    assert torch.equal(again, want)


def test_no_rows_by_queries_is_planned() -> None:
    """50,000 x 50,000 products of float64 are 20 GB."""
    x, q = torch.randn(50_000, 16), torch.randn(50_000, 16)
    assert fl.explain(fl.leanvec, x, 4, q).peak_extra_bytes < 2**24


X = torch.randn(6, 3)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(x=X[0]), ValueError, "x: expected two dimensions"),
        (dict(x=X.long()), TypeError, "x: expected a floating point"),
        (dict(dim=0), ValueError, "dim: expected a value >= 1"),
        (dict(dim=4), ValueError, "dim: expected at most the 3 columns of x, got 4"),
        (dict(dim=2.0), TypeError, "dim: expected an integer"),
        (dict(queries=X[:, :2]), ValueError, r"queries: expected \[Q, 3\] to match x"),
        (dict(queries=None, method="sphering"), ValueError, "queries: expected a tensor"),
        (dict(method="svd"), ValueError, "method: expected one of"),
        (dict(iterations=0), ValueError, "iterations: expected a value >= 1"),
        (dict(tolerance=-1.0), ValueError, "tolerance: expected"),
        (dict(tolerance=torch.ones((), requires_grad=True)), TypeError, "tolerance: expected"),
    ],
)
def test_bad_arguments(given: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        fl.leanvec(**(dict(x=X, dim=2, queries=X) | given))
