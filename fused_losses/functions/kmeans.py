"""k-means: Lloyd's iterations, of which no N x K matrix is ever made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.blocks import runs
from fused_losses.base.examples import EXACT, examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype, unit_rows
from fused_losses.base.parameters import check_parameter
from fused_losses.base.validation import check_plain, describe
from fused_losses.functions.segments import counted, summed
from fused_losses.pairwise.topk import pairwise_topk

BLOCK_BYTES = 4 << 20  # of rows in float64, of which a few such are alive
LIVE_BLOCKS = 6
EMPTY = ("farthest", "keep")
INITS = ("k-means++", "random")


class Clusters(NamedTuple):
    """What `kmeans` found; labels, counts and inertia are those of these very centers."""

    centers: Tensor  # [K, D] float32, or float64 for float64 rows
    labels: Tensor  # [N] int64, of equally near centers the first; -1: a row with NaN or inf
    counts: Tensor  # [K] int64
    inertia: Tensor  # [] float64, sum_i |x_i - c_i|^2, or sum_i (1 - cos(x_i, c_i))
    iterations: int  # how often the centers were moved
    converged: bool  # no center would have moved farther than the tolerance


@plans.hands_out
@torch.no_grad()
def kmeans(
    x: Tensor,  # [N, D]
    k: int,
    *,
    iterations: int = 100,
    init: str | Tensor = "k-means++",
    spherical: bool = False,
    tolerance: float = 0.0,
    empty: str = "farthest",
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Clusters:
    """k clusters of rows, each row in that of its nearest center, each center its rows' mean.

        label_i = argmin_c |x_i - c|^2        c = mean of the rows with its label

    Args:
        x: [N, D] float32, bfloat16, float16 or float64. No gradient flows; of given labels
            `segment_mean(x, labels, k)` has one.
        k: how many clusters, at least 1; at most the rows, where they are drawn.
        iterations: how often the centers are moved at most, >= 0.
        init: "k-means++" draws each center among the rows with a chance proportional to the squared
            distance (spherical: 1 - cos) to the nearest one drawn before; "random" draws k rows; or
            centers [k, D].
        spherical: compare by cosine; a center is its unit rows' sum, divided by its length (where
            that is 0 it stays). A row of zeros has cosine 0 with every center.
        tolerance: stop where no center would move farther than this, >= 0, in x's own unit.
        empty: what becomes of a cluster without a row where the centers are moved: "farthest": its
            center is put on the row that is farthest from all centers, one cluster after another,
            the first of equal rows, and stays where none has a distance; "keep": it stays.
        generator: of the draws, on the CPU or on x's device; with a seeded one the answer is always
            the same.

    Labels are exact: the nearest center in float64, on every backend (`pairwise_topk`). Sums of the
    means are in float64 and in one order; centers are rounded once, to float32 or x's own float64.
    A row with NaN or inf is in no cluster, and then the inertia is NaN. With "farthest" or "keep"
    an iteration makes the inertia no larger, but for that rounding.

    Returns `Clusters`. Raises ValueError, TypeError for bad arguments. Time O(iterations N k D),
    drawing O(N k D); memory O(N + k D) and a few blocks. It reads values on the host, so that
    compiled code breaks its graph here. Papers: Lloyd, 1982; Arthur and Vassilvitskii, k-means++,
    2007; Dhillon and Modha, 2001 (spherical).
    """
    check_plain(tolerance=tolerance)
    _check(x, k, iterations, init, tolerance, empty, generator)
    rows = _Clustered(x.detach(), spherical, backend)
    if plans.explaining() or x.is_meta:
        return _told(rows, k)
    with no_autocast(x.device):
        fit = torch.cat([x.new_zeros(0).bool(), *(x[r].isfinite().all(1) for r in _runs(x))])
        whole = bool(fit.all())
        if not whole:
            rows = rows._replace(x=rows.x[fit])
        centers = _begun(rows, k, init, generator)
        labels = rows.nearest(centers)
        moves, converged = 0, False
        for _ in range(iterations):
            fresh = _moved(rows, centers, labels, empty)
            far = (fresh.double() - centers.double()).square().sum(dim=1).max().sqrt()
            if float(far) <= tolerance:
                converged = True
                break
            centers, moves = fresh, moves + 1
            labels = rows.nearest(centers)
        counts = counted(labels, k)
        inertia = rows.apart(centers, labels).sum()
        if not whole:
            everything = torch.full_like(fit, -1, dtype=torch.int64)
            everything[fit] = labels
            labels, inertia = everything, inertia * torch.nan
        return Clusters(centers, labels, counts, inertia, moves, converged)


class _Clustered(NamedTuple):
    """What is clustered, and how it is compared."""

    x: Tensor  # [N, D]
    spherical: bool
    backend: str | None

    def turned(self, rows: Tensor) -> Tensor:
        """In float64, of unit length where directions are compared."""
        wide = rows.to(row_dtype(rows.device))
        return unit_rows(wide) if self.spherical else wide

    def nearest(self, centers: Tensor) -> Tensor:
        """[N] int64"""
        metric = "cosine" if self.spherical else "sqeuclidean"
        return pairwise_topk(self.x, centers, 1, metric, backend=self.backend)[1][:, 0]

    def apart(self, centers: Tensor, labels: Tensor | None = None) -> Tensor:
        """How far each row is from the center of its label, or from a single one. [N] float64"""
        out = [centers.new_zeros(0, dtype=row_dtype(centers.device))]
        wide = self.turned(centers)
        for rows in _runs(self.x):
            x, c = self.turned(self.x[rows]), wide if labels is None else wide[labels[rows]]
            square = (x - c).square().sum(dim=1)
            # of unit rows half of it; a row of zeros has cosine 0
            live = (x != 0).any(dim=1) & (c != 0).any(dim=-1)
            out.append(torch.where(live, square / 2, 1) if self.spherical else square)
        return torch.cat(out)


def _runs(x: Tensor) -> list[slice]:
    return list(runs(x.shape[0], max(1, BLOCK_BYTES // (8 * max(1, x.shape[1])))))


def _begun(
    rows: _Clustered, k: int, init: str | Tensor, generator: torch.Generator | None
) -> Tensor:
    """The centers to begin with. [K, D]"""
    dtype = accumulate_dtype(rows.x.dtype)
    if isinstance(init, Tensor):
        return rows.turned(init.detach()).to(dtype)
    n, where = rows.x.shape[0], "cpu" if generator is None else generator.device
    if k > n:
        raise ValueError(f"k: expected at most the {n} rows of x that are finite, got {k}")
    if init == "random":
        chosen = torch.randperm(n, generator=generator, device=where)[:k].to(rows.x.device)
        return rows.turned(rows.x[chosen]).to(dtype)
    # all at once: the host waits for a device once a center less
    draws = torch.rand(k, generator=generator, device=where, dtype=torch.float64).tolist()
    chosen = [min(int(draws[0] * n), n - 1)]
    left = rows.apart(rows.x[chosen[0]])
    for draw in draws[1:]:
        mass = left.cumsum(0)
        if not bool(mass[-1].isfinite()):
            raise ValueError("x: expected rows whose squared distances are finite, got larger ones")
        if float(mass[-1]) > 0:
            at = torch.searchsorted(mass, draw * mass[-1], right=True)
            # where the product rounds up to the whole: the last row that has a chance
            at = min(int(at), int(left.nonzero()[-1]))
        else:  # fewer unlike rows than clusters
            at = min(int(draw * n), n - 1)
        chosen.append(at)
        left = torch.minimum(left, rows.apart(rows.x[at]))
    return rows.turned(rows.x[chosen]).to(dtype)


def _moved(rows: _Clustered, centers: Tensor, labels: Tensor, empty: str) -> Tensor:
    """Each center to the mean of its rows. [K, D]"""
    k = centers.shape[0]
    counts = counted(labels, k)
    sums = torch.zeros_like(centers, dtype=row_dtype(centers.device))
    for run in _runs(rows.x):
        sums += summed(rows.turned(rows.x[run]), labels[run], k)
    means = unit_rows(sums) if rows.spherical else sums / counts.clamp_min(1)[:, None]
    kept = counts == 0
    if rows.spherical:
        kept = kept | (sums == 0).all(dim=1)
    fresh = torch.where(kept[:, None], centers, means.to(centers.dtype))
    if empty == "keep" or not bool((counts == 0).any()):
        return fresh
    left = rows.apart(fresh, rows.nearest(fresh))
    for c in (counts == 0).nonzero()[:, 0].tolist():
        at = int(left.argmax()) if len(left) else 0
        if not len(left) or not float(left[at]) > 0:
            break
        fresh[c] = rows.turned(rows.x[at : at + 1])[0].to(fresh.dtype)
        left = torch.minimum(left, rows.apart(fresh[c]))
    return fresh


def _told(rows: _Clustered, k: int) -> Clusters:
    """Shapes, and what the work takes: for `explain`."""
    (n, d), dtype = rows.x.shape, accumulate_dtype(rows.x.dtype)
    centers = rows.x.new_empty((k, d), dtype=dtype)
    plans.needs(LIVE_BLOCKS * min(BLOCK_BYTES, 8 * n * d + 8) + 64 * n + 48 * k * (d + 2))
    labels = rows.nearest(centers)
    return Clusters(
        centers, labels, counted(labels, k), centers.new_empty((), dtype=torch.float64), 0, False
    )


def _check(
    x: Tensor,
    k: int,
    iterations: int,
    init: str | Tensor,
    tolerance: float,
    empty: str,
    generator: torch.Generator | None,
) -> None:
    validation.check_matrix("x", x, "[N, D]")
    validation.check_count("k", k)
    if iterations != 0:
        validation.check_count("iterations", iterations)
    check_parameter("tolerance", tolerance, 0)
    validation.check_choice("empty", empty, EMPTY)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if not isinstance(init, Tensor):
        if not isinstance(init, str):
            got = type(init).__name__
            raise TypeError(f"init: expected one of {', '.join(INITS)} or centers, got {got}")
        validation.check_choice("init", init, INITS)
        return
    validation.check_matrix("init", init, "[k, D]")
    if tuple(init.shape) != (k, x.shape[1]):
        raise ValueError(f"init: expected [{k}, {x.shape[1]}], got {describe(init)}")
    validation.check_device("x", x, "init", init)
    if not (plans.explaining() or init.is_meta) and not bool(init.isfinite().all()):
        raise ValueError("init: expected finite centers, got NaN or inf")


examples(
    kmeans,
    lambda f, t: f(t.x, 8, init=t.few, iterations=5),
    {"": {}, "spherical": dict(spherical=True)},
    bound=EXACT,
    value=lambda found: found.labels,
    precisions=("fp32",),
)
