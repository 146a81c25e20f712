"""LeanVec: two projections to fewer coordinates, whose products are near those of whole rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.blocks import runs
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast, power_of_two, row_dtype
from fused_losses.base.parameters import check_parameter
from fused_losses.base.validation import check_count, check_matrix, describe

BLOCK_BYTES = 4 << 20  # of rows in float64
LIVE_SQUARES = 24  # D x D matrices in float64, LAPACK's workspace among them
METHODS = ("pca", "eigenvectors", "frank_wolfe", "sphering")
AWARE = METHODS[1:]  # of the queries
GRID, NARROWINGS = 16, 20  # of the search for a share


class LeanVec(NamedTuple):
    """Projections: <A^T q, B^T x> is about <q, x>.

    query: A, row: B, both [D, d] float32, or float64 for float64 rows. error: [] of that dtype, the
    share of sum <q, x>^2 that is lost, |Q A B^T X^T - Q X^T|^2 / |Q X^T|^2, before A and B are
    rounded. iterations, converged: of "frank_wolfe"; 0 and True of the others.
    """

    query: Tensor
    row: Tensor
    error: Tensor
    iterations: int
    converged: bool


@plans.hands_out
@torch.no_grad()
def leanvec(
    x: Tensor,  # [N, D]
    dim: int,
    queries: Tensor | None = None,  # [Q, D]
    *,
    method: str | None = None,
    iterations: int = 500,
    tolerance: float = 3e-4,
) -> LeanVec:
    """Projections to d coordinates that keep the products of queries and rows.

        min over A, B in R^{D x d} of  |Q A B^T X^T - Q X^T|^2,    A^T A = B^T B = 1

    Args:
        x: [N, D] the rows that are searched. queries: [Q, D] such as will be asked, of any number;
            None: the rows themselves.
        dim: d, in [1, D].
        method:
            "pca": A = B, the first eigenvectors of X^T X (not centred): the best where queries are
                the rows. It does not look at the queries.
            "eigenvectors": A = B, those of a mean of X^T X and Q^T Q, each divided by its trace, at
                the share that loses least; among the shares are 0, which is pca, and 1.
            "frank_wolfe": from there on, A and B in turn, each a step of Frank and Wolfe over the
                matrices of spectral norm at most 1 (what their columns may span between orthonormal
                ones), as far as loses least. It never loses more than it began with.
            "sphering": without orthonormal columns the least of all pairs, in closed form: with S
                the root of Q^T Q and U the first d left singular vectors of S X^T, A = S^-1 U and
                B = S U, S of norm 1.
            None: "pca" without queries and "frank_wolfe" with them.
        iterations, tolerance: "frank_wolfe" ends after so many rounds, >= 1, or where one takes no
            more than this share, >= 0, off what is lost.

    Only the Grams enter, in float64, and rows are read in blocks. Rows of zeros add nothing. No
    gradient flows. A, B are unique up to a rotation of the d coordinates, where eigenvalues are
    apart. With NaN or inf all is NaN. The authors step by (t + 1)^-0.999, which may lose more from
    one round to the next, and end at a change of 1e-3.

    Returns `LeanVec`. Raises ValueError, TypeError for bad arguments. It reads values on the host.
    Time O((N + Q) D^2 + D^3), the shares' search some forty times D^3, a round D^2 d; memory O(D^2)
    and a few blocks of rows. Papers: Tepper et al., LeanVec, 2023; GleanVec, 2024 (sphering).
    """
    method = _check(x, dim, queries, method, iterations, tolerance)
    # tangents end here, too
    x, queries = x.detach(), None if queries is None else queries.detach()
    d, dtype = x.shape[1], accumulate_dtype(x.dtype)
    if plans.explaining() or x.is_meta:
        block = max(
            [8 * d, *(min(BLOCK_BYTES, 8 * t.numel()) for t in (x, queries) if t is not None)]
        )
        plans.needs(2 * block + LIVE_SQUARES * 8 * d * d + (1 << 16))
        either = x.new_empty((d, dim), dtype=dtype)
        return LeanVec(either, either.clone(), x.new_empty((), dtype=dtype), 0, True)
    with no_autocast(x.device):
        of_rows = _gram(x)
        of_queries = of_rows if queries is None else _gram(queries)
        if not bool((of_rows.trace() + of_queries.trace()).isfinite()):
            lost = x.new_full((d, dim), torch.nan, dtype=dtype)
            return LeanVec(lost, lost.clone(), lost.new_full((), torch.nan), 0, True)
        work = _RootedGrams.of(of_queries, of_rows)
        rounds, converged = 0, True
        if method == "sphering":
            a, b = _sphered(work, of_queries, dim)
        else:
            a = b = _first(of_rows, dim)
            if method != "pca":
                a = b = _of_shares(work, of_queries, of_rows, dim)
            if method == "frank_wolfe":
                a, b, rounds, converged = _stepped(work, a, b, iterations, tolerance)
        error = work.lost(a, b).to(dtype)
        return LeanVec(a.to(dtype), b.to(dtype).clone(), error, rounds, converged)


class _RootedGrams(NamedTuple):
    """Queries and rows by the roots of their Grams: any product's square sum is that of these."""

    query: Tensor  # [D, D], S_Q
    row: Tensor  # [D, D], S_X
    whole: Tensor  # [D, D], S_Q S_X
    total: Tensor  # []

    @classmethod
    def of(cls, of_queries: Tensor, of_rows: Tensor) -> _RootedGrams:
        query, row = _root(of_queries), _root(of_rows)
        whole = query @ row
        return cls(query, row, whole, whole.square().sum())

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """What projected products are above whole ones. [D, D]"""
        return (self.query @ a) @ (self.row @ b).mT - self.whole

    def lost(self, a: Tensor, b: Tensor) -> Tensor:
        square = self.apart(a, b).square().sum()
        return torch.where(self.total > 0, square / self.total.clamp_min(_tiny(square)), 0)


def _tiny(t: Tensor) -> float:
    return torch.finfo(t.dtype).tiny


def _gram(x: Tensor) -> Tensor:
    """x^T x / c^2, c a power of two that keeps the squares within range. [D, D]"""
    (n, d), wide = x.shape, row_dtype(x.device)
    total = torch.zeros((d, d), dtype=wide, device=x.device)
    if not n:
        return total
    top = x.new_zeros(())
    step = max(1, BLOCK_BYTES // (8 * d))
    for run in runs(n, step):
        # a maximum hands NaN on
        top = torch.maximum(top, x[run].abs().amax())
    factor = power_of_two(top.to(wide)[None])
    for run in runs(n, step):
        rows = x[run].to(wide) * factor
        total.addmm_(rows.mT, rows)
    # both halves alike, whatever the order of the sums
    return (total + total.mT) / 2


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def _first(gram: Tensor, dim: int) -> Tensor:
    """The eigenvectors of the largest values. [D, d]"""
    return torch.linalg.eigh(gram).eigenvectors[:, -dim:].flip(1)


def _of_shares(work: _RootedGrams, of_queries: Tensor, of_rows: Tensor, dim: int) -> Tensor:
    """The best eigenvectors of a weighted mean: a grid, then golden sections around its best."""
    rows, asked = (g / g.trace().clamp_min(_tiny(g)) for g in (of_rows, of_queries))
    seen: dict[float, float] = {}
    kept: list[Tensor] = []  # the best so far

    def lost(share: float) -> float:
        if share not in seen:
            vectors = _first(torch.lerp(rows, asked, share), dim)
            found = float(work.lost(vectors, vectors))
            if not seen or found < min(seen.values()):
                kept[:] = [vectors]
            seen[share] = found
        return seen[share]

    best = min((i / GRID for i in range(GRID + 1)), key=lost)
    low, high = max(0.0, best - 1 / GRID), min(1.0, best + 1 / GRID)
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    for _ in range(NARROWINGS):
        if lost(left) <= lost(right):
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
    return kept[0]


def _stepped(
    work: _RootedGrams, a: Tensor, b: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, int, bool]:
    before = float(work.lost(a, b))
    for done in range(1, iterations + 1):
        a = _step(work.query, work.row @ b, work.apart(a, b), a)
        b = _step(work.row, work.query @ a, work.apart(a, b).mT, b)
        after = float(work.lost(a, b))
        if before - after <= tolerance * before:
            return a, b, done, True
        before = after
    return a, b, iterations, False


def _step(own: Tensor, others: Tensor, apart: Tensor, a: Tensor) -> Tensor:
    """a towards the orthonormal matrix that the slope points at, as far as loses least.

    own: S of a's side, others: the other side's S B; own a others^T is a product.
    """
    slope = own @ (apart @ others)
    u, _, v = torch.linalg.svd(-slope, full_matrices=False)
    way = u @ v - a
    moved = (own @ way) @ others.mT
    square = moved.square().sum()
    share = -(apart * moved).sum() / torch.where(square > 0, square, 1)
    return a + share.clamp(0, 1) * way


def _sphered(work: _RootedGrams, of_queries: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(of_queries)
    values = values.clamp_min(0).sqrt()
    values = values / torch.where(values[-1] > 0, values[-1], 1)
    # of directions that no query has nothing is known, and roundings alone are left
    some = values > (len(values) * torch.finfo(values.dtype).eps) ** 0.5
    inverse = torch.where(some, 1 / torch.where(some, values, 1), 0)
    u = torch.linalg.svd(work.whole).U[:, :dim]
    turned = vectors.mT @ u
    return vectors @ (inverse[:, None] * turned), vectors @ (values[:, None] * turned)


def _check(
    x: Tensor,
    dim: int,
    queries: Tensor | None,
    method: str | None,
    iterations: int,
    tolerance: float,
) -> str:
    check_matrix("x", x, "[N, D]")
    check_count("dim", dim)
    if dim > x.shape[1]:
        raise ValueError(f"dim: expected at most the {x.shape[1]} columns of x, got {dim}")
    if queries is not None:
        check_matrix("queries", queries, "[Q, D]")
        if queries.shape[1] != x.shape[1]:
            raise ValueError(
                f"queries: expected [Q, {x.shape[1]}] to match x, got {describe(queries)}"
            )
        validation.check_device("x", x, "queries", queries)
    if method is None:
        method = "pca" if queries is None else "frank_wolfe"
    validation.check_choice("method", method, METHODS)
    if queries is None and method in AWARE:
        raise ValueError(f"queries: expected a tensor [Q, D] for method={method!r}, got None")
    check_count("iterations", iterations)
    check_parameter("tolerance", tolerance, 0)
    return method


_rounded = lambda found: found.error
examples(
    leanvec,
    lambda f, t: f(t.x, 3),
    bound=EXACT,
    value=_rounded,
    precisions=("fp32",),
)
examples(
    leanvec,
    lambda f, t: f(t.y, 3, t.x),
    {name: dict(method=name) for name in AWARE},
    bound=EXACT,
    value=_rounded,
    precisions=("fp32",),
)
