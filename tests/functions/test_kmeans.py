"""k-means against literal loops: Lloyd's steps, seeds, clusters without a row, what is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses
from fused_losses import backends, kmeans, segment_mean

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def blobs(n: int, d: int, count: int) -> Tensor:
    centers = 4 * torch.randn(count, d, dtype=torch.float64)
    return centers[torch.randint(0, count, (n,))] + 0.3 * torch.randn(n, d, dtype=torch.float64)


def apart(x: Tensor, centers: Tensor, spherical: bool) -> Tensor:
    """[N, K] in float64"""
    x, centers = x.double(), centers.double()
    if spherical:
        return 1 - F.normalize(x, dim=1) @ F.normalize(centers, dim=1).T
    return (x[:, None] - centers).square().sum(dim=2)


def lloyd(x: Tensor, centers: Tensor, steps: int, spherical: bool) -> tuple[Tensor, Tensor]:
    """Centers that are not rounded, and labels; a cluster without a row keeps its center."""
    x, centers = x.double(), centers.double().clone()
    if spherical:
        x, centers = F.normalize(x, dim=1), F.normalize(centers, dim=1)
    for _ in range(steps):
        labels = apart(x, centers, spherical).argmin(dim=1)
        for c in range(len(centers)):
            mine = x[labels == c]
            if len(mine):
                total = mine.sum(dim=0)
                centers[c] = F.normalize(total, dim=0) if spherical else total / len(mine)
    return centers, apart(x, centers, spherical).argmin(dim=1)


@pytest.mark.float64
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (37, 3, 5), (101, 17, 13)])
def test_steps_of_lloyd(n: int, d: int, k: int, spherical: bool, backend: str) -> None:
    x = blobs(n, d, k)
    init = x[torch.randperm(n)[:k]] + 0.01
    for steps in (0, 1, 4):
        given = dict(init=init, iterations=steps, spherical=spherical, empty="keep")
        found = kmeans(x, k, **given, backend=backend)
        centers, labels = lloyd(x, init, steps, spherical)
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.centers, centers, rtol=1e-12, atol=1e-12)
        assert torch.equal(found.counts, labels.bincount(minlength=k))
        want = apart(x, centers, spherical).gather(1, labels[:, None]).sum()
        torch.testing.assert_close(found.inertia, want, rtol=1e-9, atol=1e-9)
        assert found.iterations <= steps


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_answer_is_a_fixed_point(dtype: torch.dtype, spherical: bool, backend: str) -> None:
    if backends.reasons_against(backend, torch.device("cpu"), dtype, "fp32"):
        return
    x = blobs(150, 6, 7).to(dtype)
    seeded = torch.Generator().manual_seed(3)
    found = kmeans(x, 7, spherical=spherical, generator=seeded, backend=backend)
    assert found.converged and found.iterations < 100
    assert found.centers.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # of what is returned: not of centers before they were rounded
    assert torch.equal(found.labels, apart(x, found.centers, spherical).argmin(dim=1))
    assert int(found.counts.sum()) == 150 and (found.counts > 0).all()
    if spherical:
        torch.testing.assert_close(found.centers.norm(dim=1), torch.ones_like(found.centers[:, 0]))
    else:
        means = segment_mean(x.double(), found.labels, 7)
        assert torch.equal(found.centers, means.to(found.centers.dtype))


def test_seeded_answers_are_the_same_on_every_backend(streamed: str) -> None:
    x = blobs(120, 5, 6).float()
    for init in ("k-means++", "random"):
        first, second = (
            kmeans(x, 6, init=init, generator=torch.Generator().manual_seed(8), backend=b)
            for b in (streamed, "reference")
        )
        assert all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(first, second, strict=True)
        )


def test_seeds_are_drawn_by_their_squared_distance() -> None:
    """Of three places, the first drawn; the second draw goes by the square: 1 to 9 from place 0."""
    x = torch.tensor([[0.0], [1.0], [3.0]])
    share, tries = 0, 0
    for seed in range(400):
        drawn = kmeans(x, 2, iterations=0, generator=torch.Generator().manual_seed(seed)).centers
        if drawn[0, 0] == 0:
            tries += 1
            share += int(drawn[1, 0] == 3)
    # 0.9 of them, within five deviations
    assert tries > 80 and abs(share / tries - 0.9) < 5 * (0.09 / tries) ** 0.5


def test_no_row_is_drawn_twice_while_another_has_a_distance() -> None:
    x = torch.arange(12.0)[:, None].repeat(1, 3)
    for seed in range(20):
        found = kmeans(x, 12, iterations=0, generator=torch.Generator().manual_seed(seed))
        assert found.inertia == 0 and (found.counts == 1).all()


def test_a_cluster_without_a_row_goes_to_the_farthest_one() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0], [90.0]])
    init = torch.tensor([[1.0], [-500.0], [-600.0]])
    kept = kmeans(x, 3, init=init, empty="keep")
    assert kept.counts.tolist() == [5, 0, 0] and torch.equal(kept.centers[1:], init[1:])
    once = kmeans(x, 3, init=init, iterations=1)
    # the mean 28.6 is farthest from 90, then, beside that, from 0
    assert once.centers.flatten().tolist() == pytest.approx([28.6, 90.0, 0.0])
    found = kmeans(x, 3, init=init)
    assert found.converged and sorted(found.counts.tolist()) == [1, 1, 3]
    assert found.inertia == 2.0


def test_fewer_unlike_rows_than_clusters() -> None:
    x = torch.tensor([[0.0, 1.0]] * 5 + [[2.0, 2.0]] * 3)
    for seed in range(5):
        found = kmeans(x, 4, generator=torch.Generator().manual_seed(seed))
        assert found.inertia == 0 and sorted(found.counts.tolist()) == [0, 0, 3, 5]
        assert found.converged and found.centers.isfinite().all()


def test_the_inertia_never_grows() -> None:
    x = torch.randn(300, 4, dtype=torch.float64)
    init = torch.cat([x[:20], x.new_full((20, 4), 100)])
    totals = [float(kmeans(x, 40, init=init, iterations=t).inertia) for t in range(12)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(totals))
    assert totals[-1] < 0.8 * totals[0]


def test_the_tolerance_stops_before_a_small_move() -> None:
    x = blobs(200, 3, 4)
    init = x[:4]
    full = kmeans(x, 4, init=init)
    found = kmeans(x, 4, init=init, tolerance=1e9)
    assert found.converged and found.iterations == 0 and torch.equal(found.centers, init)
    assert full.iterations > 0


def test_rows_that_are_not_finite_are_in_no_cluster(backend: str) -> None:
    x = blobs(60, 3, 4).float()
    x[5, 1], x[30] = torch.nan, torch.inf
    rest = x.isfinite().all(dim=1)
    found, want = (
        kmeans(rows, 4, generator=torch.Generator().manual_seed(0), backend=backend)
        for rows in (x, x[rest])
    )
    assert torch.equal(found.centers, want.centers) and torch.equal(found.counts, want.counts)
    assert torch.equal(found.labels[rest], want.labels)
    assert (found.labels[~rest] == -1).all() and found.inertia.isnan()


def test_rows_of_zeros_have_no_direction() -> None:
    x = torch.cat([torch.zeros(3, 2), torch.tensor([[1.0, 0], [0, 2.0]])])
    found = kmeans(x, 2, init=torch.tensor([[5.0, 0], [0, 1.0]]), spherical=True)
    assert found.labels.tolist() == [0, 0, 0, 0, 1] and found.inertia == 3
    assert torch.equal(found.centers, torch.eye(2))


def test_empty_rows_and_what_asks_for_a_gradient() -> None:
    init = torch.ones(2, 3)
    found = kmeans(torch.zeros(0, 3), 2, init=init)
    assert torch.equal(found.centers, init) and found.counts.tolist() == [0, 0]
    assert found.labels.shape == (0,) and found.inertia == 0
    found = kmeans(torch.randn(5, 3, requires_grad=True), 2)
    assert not found.centers.requires_grad and not found.inertia.requires_grad


def test_no_rows_by_clusters() -> None:
    """16,384 x 4,096 distances of float32 are 256 MiB."""
    plan = fused_losses.explain(kmeans, torch.randn(16_384, 32), 4_096)
    assert plan.peak_extra_bytes < 2**26


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(k=0), ValueError, "k: expected a value >= 1"),
        (dict(k=9), ValueError, "k: expected at most the 6 rows"),
        (dict(k=2.0), TypeError, "k: expected an integer"),
        (dict(iterations=-1), ValueError, "iterations: expected"),
        (dict(init="best"), ValueError, "init: expected one of"),
        (dict(init=3), TypeError, "init: expected one of"),
        (dict(init=torch.zeros(3, 3)), ValueError, r"init: expected \[2, 3\]"),
        (dict(init=torch.full((2, 3), torch.nan)), ValueError, "init: expected finite"),
        (dict(tolerance=-1.0), ValueError, "tolerance: expected"),
        (dict(empty="drop"), ValueError, "empty: expected one of"),
        (dict(generator=3), TypeError, "generator: expected a torch.Generator"),
    ],
)
def test_bad_arguments(given: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        kmeans(torch.randn(6, 3), **{"k": 2, **given})


def test_rows_whose_squares_leave_float64_are_refused() -> None:
    x = torch.tensor([[1e200], [-1e200], [0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="x: expected rows whose squared distances are finite"):
        kmeans(x, 2)
