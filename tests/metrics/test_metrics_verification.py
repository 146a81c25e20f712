"""Verification metrics against small loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from metric_oracles import accuracy_by_loops, distances, rates
from torch import Tensor

from fused_losses import metrics
from fused_losses.metrics import verification
from fused_losses.metrics.verification import best_threshold


def pairs(n: int, step: float | None) -> tuple[Tensor, Tensor]:
    """Scores, of which equal ones when there is a step, and what their pairs are."""
    same = torch.rand(n) < 0.4
    scores = torch.randn(n, dtype=torch.float64) + same
    return (scores if step is None else (scores / step).round() * step), same


@pytest.mark.parametrize("step", [None, 0.5])
def test_roc_and_its_areas(step: float | None) -> None:
    scores, same = pairs(200, step)
    curve = metrics.roc(scores, same)
    assert len(curve.far) == len(scores.unique()) + 1
    for far, tar, threshold in zip(*(t.tolist() for t in curve), strict=True):
        assert (far, tar) == pytest.approx(rates(scores, same, threshold), abs=1e-15)
    assert (curve.far[0], curve.tar[0], curve.far[-1], curve.tar[-1]) == (0, 0, 1, 1)
    genuine, impostor = scores[same], scores[~same]
    wins = (genuine[:, None] > impostor).double() + (genuine[:, None] == impostor).double() / 2
    assert metrics.auc(scores, same) == pytest.approx(float(wins.mean()), rel=1e-12)


@pytest.mark.parametrize("step", [None, 0.5])
def test_equal_error_rate(step: float | None) -> None:
    scores, same = pairs(300, step)
    found = metrics.eer(scores, same)
    # walk the polygon of (FAR, FRR) and solve for the crossing of its diagonal
    points = []
    for threshold in [math.inf, *sorted(scores.unique().tolist(), reverse=True), -math.inf]:
        far, tar = rates(scores, same, threshold)
        points.append((far, 1 - tar))
    for (f0, r0), (f1, r1) in itertools.pairwise(points):
        if f0 - r0 <= 0 <= f1 - r1 and (f0, r0) != (f1, r1):
            t = (r0 - f0) / ((f1 - r1) - (f0 - r0))
            assert found.rate == pytest.approx(f0 + t * (f1 - f0), rel=1e-9)
            break
    else:
        raise AssertionError("no crossing")
    far, tar = rates(scores, same, found.threshold)
    nearest = min(abs(f - r) for f, r in points)
    assert abs(far - (1 - tar)) <= nearest + 1e-12


def test_perfect_and_useless_scores() -> None:
    same = torch.tensor([True, True, False, False])
    apart = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert metrics.auc(apart, same) == 1 and metrics.eer(apart, same).rate == 0
    assert metrics.tar_at_far(apart, same, 0.0) == 1
    flat = torch.zeros(4)
    assert metrics.auc(flat, same) == 0.5 and metrics.eer(flat, same).rate == 0.5
    assert metrics.tar_at_far(flat, same, 0.4) == 0 and metrics.tar_at_far(flat, same, 1.0) == 1
    assert metrics.auc(-apart, same) == 0


@pytest.mark.parametrize("step", [None, 0.5])
def test_tar_at_far(step: float | None) -> None:
    scores, same = pairs(250, step)
    fars = [0.0, 1e-3, 0.01, 0.1, 0.29, 0.5, 1.0]
    found = metrics.tar_at_far(scores, same, fars)
    for far in fars:
        threshold = metrics.threshold_at_far(scores, same, far)
        accepted, tar = rates(scores, same, threshold)
        assert accepted <= far + 1e-12 and tar == found[far]
        # no lower threshold would do
        lower = scores[~same][scores[~same] <= threshold]
        if len(lower):
            below = float(lower.max()) - 1e-9
            assert rates(scores, same, below)[0] > far or far >= 1


@pytest.mark.parametrize("step", [None, 0.5])
def test_verification_accuracy(step: float | None) -> None:
    scores, same = pairs(103, step)
    found = metrics.verification_accuracy(scores, same)
    # as sklearn's KFold without shuffling: 3 folds of 11, then 7 of 10
    fold = [f for f in range(10) for _ in range(11 if f < 3 else 10)]
    want, thresholds = accuracy_by_loops(scores, same, fold)
    assert found.accuracy.tolist() == want and found.threshold.tolist() == thresholds
    assert found.mean == pytest.approx(sum(want) / 10)
    assert found.std == pytest.approx((sum((w - found.mean) ** 2 for w in want) / 10) ** 0.5)
    shuffled = torch.randint(0, 4, (103,)) * 3 - 5
    found = metrics.verification_accuracy(scores, same, shuffled)
    want, thresholds = accuracy_by_loops(scores, same, shuffled.tolist())
    assert found.accuracy.tolist() == want and found.threshold.tolist() == thresholds


def test_tar_at_far_counts_what_is_above_the_threshold() -> None:
    impostor = torch.arange(100, dtype=torch.float64)  # 99 highest
    scores = torch.cat([torch.tensor([98.5, 99.0, 99.5, 10.0], dtype=torch.float64), impostor])
    same = torch.arange(104) < 4
    # FAR 1/100: one impostor may pass, so the threshold is the second highest, 98
    assert metrics.threshold_at_far(scores, same, 0.01) == 98.0
    assert metrics.tar_at_far(scores, same, 0.01) == 0.75
    # FAR 1/1000 of 100 impostors: none may pass, ties with the highest are refused
    assert metrics.tar_at_far(scores, same, 0.001) == 0.25
    assert metrics.tar_at_far(scores, same, 1.0) == 1.0
    assert metrics.threshold_at_far(scores, same, 0.29) == 70.0
    assert math.isnan(metrics.tar_at_far(impostor, same[4:], 0.01))


def test_the_best_threshold_is_best() -> None:
    def accuracy(scores: Tensor, same: Tensor, threshold: float) -> float:
        return float(((scores > threshold) == same).double().mean())

    same = torch.tensor([True, True, True, False, False, False])
    scores = torch.tensor([0.9, 0.8, 0.3, 0.1, 0.2, 0.5])
    # between 0.2 and 0.3 five of six are right; so they are between 0.5 and 0.8: lowest wins
    assert best_threshold(scores, same) == pytest.approx(0.25)
    assert accuracy(scores, same, 0.25) == pytest.approx(5 / 6)
    assert best_threshold(torch.ones(2), torch.tensor([True, False])) == 0.0
    assert best_threshold(scores[:0], same[:0]) == 0.0
    generator = torch.Generator().manual_seed(0)
    same = torch.arange(100) < 50
    scores = torch.randn(100, generator=generator) + same.float()
    best = accuracy(scores, same, best_threshold(scores, same))
    assert best == max(accuracy(scores, same, t) for t in scores.tolist())


def test_undefined_rates_are_nan() -> None:
    scores = torch.randn(6)
    for same in (torch.zeros(6).bool(), torch.ones(6).bool()):
        assert math.isnan(metrics.auc(scores, same)) and math.isnan(metrics.eer(scores, same).rate)
    assert math.isnan(metrics.tar_at_far(scores, torch.zeros(6).bool(), 0.1))
    assert metrics.tar_at_far(scores, torch.ones(6).bool(), 0.1) == 1
    assert math.isnan(metrics.auc(scores[:0], torch.zeros(0).bool()))
    same = torch.arange(6) < 3
    scores[2] = math.nan
    assert bool(metrics.roc(scores, same).tar.isnan().all())
    assert math.isnan(metrics.auc(scores, same)) and math.isnan(metrics.eer(scores, same).rate)
    assert math.isnan(metrics.tar_at_far(scores, same, 0.1))
    assert math.isnan(metrics.verification_accuracy(scores, same, 2).mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean", "cityblock"])
@pytest.mark.parametrize("size", [1000, 1 << 30])
def test_all_pairs(monkeypatch, size: int, metric: str, dtype: torch.dtype, backend: str) -> None:
    """Against the list of all pairs; small integers tie exactly where products are taken."""
    monkeypatch.setattr(verification, "BLOCK_BYTES", size)
    tied = metric in ("dot", "cityblock")
    x = torch.randint(-2, 3, (30, 3)).to(dtype) if tied else torch.randn(30, 5).to(dtype)
    labels = torch.randint(0, 5, (30,))
    i, j = torch.triu_indices(30, 30, 1)
    scores = -distances(x, x, metric)[i, j] + (1 if metric == "cosine" else 0)
    same = labels[i] == labels[j]
    fars = [0.0, 1e-3, 0.01, 0.1, 0.5, 0.999, 1.0]
    found = metrics.all_pairs_tar_at_far(x, labels, fars, metric=metric, backend=backend)
    for far in fars:
        got = found[far]
        assert got.genuine == int(same.sum()) and got.impostors == int((~same).sum())
        assert got.tar == metrics.tar_at_far(scores, same, far)
        want = metrics.threshold_at_far(scores, same, far)
        want = want if metric in ("cosine", "dot") else -want
        assert got.threshold == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert tied is False or got.threshold == want
    one = metrics.all_pairs_tar_at_far(x, labels, 0.1, metric=metric, backend=backend)
    assert one == found[0.1]


def test_all_pairs_at_the_edges(backend: str) -> None:
    given = dict(far=0.1, backend=backend)
    x = torch.randn(5, 3)
    found = metrics.all_pairs_tar_at_far(x, torch.arange(5), **given)
    assert math.isnan(found.tar) and (found.genuine, found.impostors) == (0, 10)
    found = metrics.all_pairs_tar_at_far(x, torch.zeros(5).long(), **given)
    assert found == (1.0, -math.inf, 10, 0)
    for n in (0, 1):
        found = metrics.all_pairs_tar_at_far(x[:n], torch.arange(n), **given)
        assert math.isnan(found.tar) and found[2:] == (0, 0)
    x[2, 1] = math.nan
    found = metrics.all_pairs_tar_at_far(x, torch.tensor([0, 0, 1, 1, 1]), **given)
    assert math.isnan(found.tar) and math.isnan(found.threshold)
    assert (found.genuine, found.impostors) == (4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_ordered_as_integers(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    values = [0.0, tiny / 4, tiny, 1.0, 2.5, 3e38, math.inf]
    scores = torch.tensor([*(-v for v in reversed(values[1:])), *values], dtype=dtype)
    keys = verification._ordered(scores)
    assert bool((keys.diff() > 0).all())
    assert [verification._unordered(int(k), dtype) for k in keys] == scores.tolist()


# ---- bad input ----------------------------------------------------------------------------------

X, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: metrics.roc(X, LABELS == 0), ValueError, "scores: expected one dimension"),
        (lambda: metrics.roc(LABELS, LABELS == 0), TypeError, "scores: expected a floating"),
        (lambda: metrics.auc(X[:, 0], LABELS), TypeError, "same: expected a bool"),
        (lambda: metrics.eer(X[:, 0], LABELS[:2] == 0), ValueError, "same: expected shape"),
        (lambda: metrics.tar_at_far(X[:, 0], LABELS == 0, 1.5), ValueError, "far: expected"),
        (lambda: metrics.tar_at_far(X[:, 0], LABELS == 0, "1"), TypeError, "far: expected"),
        (
            lambda: metrics.verification_accuracy(X[:, 0], LABELS == 0, 10),
            ValueError,
            "folds: expected at least two folds",
        ),
        (
            lambda: metrics.verification_accuracy(X[:, 0], LABELS == 0, 1),
            ValueError,
            "folds: expected at least two folds",
        ),
        (
            lambda: metrics.verification_accuracy(X[:, 0], LABELS == 0, LABELS * 0),
            ValueError,
            "folds: expected at least two folds",
        ),
        (
            lambda: metrics.verification_accuracy(X[:, 0], LABELS == 0, 2.0),
            TypeError,
            "folds: expected an integer",
        ),
        (lambda: metrics.all_pairs_tar_at_far(X, LABELS, -0.1), ValueError, "far: expected"),
        (lambda: metrics.all_pairs_tar_at_far(X, LABELS[:2], 0.1), ValueError, "labels: expected"),
        (
            lambda: metrics.all_pairs_tar_at_far(X, LABELS, 0.1, metric="kl"),
            ValueError,
            "metric: expected",
        ),
    ],
)
def test_bad_values(call, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
