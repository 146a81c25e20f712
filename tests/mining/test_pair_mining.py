"""Pairs that are mined: multi-similarity, margins, ranks, angles, drawn by distance."""

from __future__ import annotations

import itertools
import math

import mining_checks
import pytest
import torch
from mining_checks import LABELS, X, grid
from mining_formulas import (
    allowed,
    batch,
    lines,
    matrix,
    multi_similarity,
    pairs_by_loops,
)
from torch import Tensor

from fused_losses.mining import batch as mining_batch
from fused_losses.mining import pairs as mining_pairs
from fused_losses.mining import triplets as mining
from fused_losses.mining.lists import Pairs
from fused_losses.mining.pairs import mine_pairs

block = mining_checks.block  # a fixture of these tests


def check_pairs(found: Pairs, want: tuple, d: Tensor) -> None:
    assert list(zip(found.anchor.tolist(), found.positive.tolist(), strict=True)) == want[0]
    assert (
        list(zip(found.negative_anchor.tolist(), found.negative.tolist(), strict=True)) == want[1]
    )
    torch.testing.assert_close(found.positive_distance, d[found.anchor, found.positive])
    torch.testing.assert_close(found.negative_distance, d[found.negative_anchor, found.negative])
    assert found.left_out == len(d) - len({i for side in want for i, _ in side})


def k_best(z: list[float], columns: list[int], k: int, farthest: bool) -> list[int]:
    return sorted(columns, key=lambda j: (-z[j] if farthest else z[j], j))[:k]


@pytest.mark.float64
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_multi_similarity(metric: str, backend: str, block: int) -> None:
    x, labels = batch(24, 5, 6)
    labels[0] = 17  # alone
    d = matrix(x, x, metric)
    sign = -1 if metric == "cosine" else 1
    want = pairs_by_loops(d, sign, *allowed(labels, labels, True), multi_similarity)
    found = mine_pairs(x, labels, metric=metric, backend=backend)
    check_pairs(found, want, d)
    assert found.left_out >= 1
    if metric == "cosine":
        check_pairs(mine_pairs(x, labels, backend=backend), want, d)


@pytest.mark.float64
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_pair_margin(metric: str, backend: str) -> None:
    x, labels = batch(20, 3, 4)
    y, ref_labels = batch(25, 3, 4)
    d = matrix(x, y, metric)
    if metric == "cosine":
        margins = dict(positive_margin=0.6, negative_margin=-0.1)
        choose = lambda z, ps, ns: (
            [p for p in ps if -z[p] < 0.6],
            [n for n in ns if -z[n] > -0.1],
        )
    else:
        margins = dict(positive_margin=1.0, negative_margin=1.5)
        choose = lambda z, ps, ns: ([p for p in ps if z[p] > 1.0], [n for n in ns if z[n] < 1.5])
    sign = -1 if metric == "cosine" else 1
    want = pairs_by_loops(d, sign, *allowed(labels, ref_labels, False), choose)
    given = dict(strategy="pair_margin", metric=metric, backend=backend)
    check_pairs(mine_pairs(x, labels, y, ref_labels, **margins, **given), want, d)


@pytest.mark.float64
@pytest.mark.parametrize("k", [1, 3, 99])
@pytest.mark.parametrize("positive", mining.RANKS)
@pytest.mark.parametrize("negative", mining.RANKS)
def test_ranked(negative: str, positive: str, k: int, backend: str) -> None:
    x, labels = grid(18, 3, 4)
    d = matrix(x, x, "cityblock")

    def choose(z: list[float], ps: list[int], ns: list[int]) -> tuple:
        return (
            ps if positive == "all" else k_best(z, ps, k, positive == "hardest"),
            ns if negative == "all" else k_best(z, ns, k, negative == "easiest"),
        )

    want = pairs_by_loops(d, 1, *allowed(labels, labels, True), choose)
    given = dict(strategy="ranked", positive=positive, negative=negative, k=k, backend=backend)
    check_pairs(mine_pairs(x, labels, metric="cityblock", **given), want, d)
    if positive == negative == "all":
        given["strategy"] = "all"
        check_pairs(mine_pairs(x, labels, metric="cityblock", **given), want, d)


@pytest.mark.float64
def test_ranked_within_ranges(backend: str) -> None:
    x, labels = batch(18, 3, 4)
    d = matrix(x, x, "euclidean")

    def choose(z: list[float], ps: list[int], ns: list[int]) -> tuple:
        ps, ns = [p for p in ps if 1 <= z[p] <= 3], [n for n in ns if 0.5 <= z[n] <= 2]
        return ps, k_best(z, ns, 2, False)

    want = pairs_by_loops(d, 1, *allowed(labels, labels, True), choose)
    given = dict(strategy="ranked", k=2, positive_range=(1, 3), negative_range=(0.5, 2))
    check_pairs(mine_pairs(x, labels, **given, backend=backend), want, d)


@pytest.mark.float64
def test_angular(backend: str, block: int) -> None:
    x, labels = batch(14, 3, 4)
    same, different = allowed(labels, labels, True)
    want = []
    for i in range(14):
        for p, n in itertools.product(same[i], different[i]):
            apart, away = (x[i] - x[p]).norm(), (x[n] - (x[i] + x[p]) / 2).norm()
            if math.degrees(math.atan2(float(apart), float(2 * away))) > 40:
                want.append((i, p, n))
    found = mine_pairs(x, labels, strategy="angular", angle=40.0, backend=backend)
    assert len(want) > 10
    assert lines((found.anchor, found.positive, found.negative)) == want
    assert torch.equal(found.anchor, found.negative_anchor)
    d = matrix(x, x, "euclidean")
    torch.testing.assert_close(found.positive_distance, d[found.anchor, found.positive])
    torch.testing.assert_close(found.negative_distance, d[found.anchor, found.negative])


def law(d: Tensor, negatives: list[int], dimension: int, cutoff: float, far: float) -> Tensor:
    """The exact probabilities of a row's columns."""
    weight = torch.zeros(len(d), dtype=torch.float64)
    for j in negatives:
        at = max(float(d[j]), cutoff)
        if at < far and at < 2:
            density = at ** (dimension - 2) * (1 - at * at / 4) ** ((dimension - 3) / 2)
            weight[j] = 1 / density
    return weight / weight.sum()


@pytest.mark.float64
@pytest.mark.parametrize("dimension", [2, 3, 8, 64])
def test_distance_weighted_law(dimension: int, backend: str) -> None:
    """4 anchors, each with many positives: what is drawn against the exact probabilities."""
    copies, negatives = 4000, 12
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, dimension, dtype=torch.float64)
    y = torch.cat(
        [
            torch.randn(copies, dimension, dtype=torch.float64),
            x.repeat(3, 1) + 0.7 / dimension**0.5 * torch.randn(negatives, dimension).double(),
        ]
    )
    ref_labels = torch.cat([torch.zeros(copies), torch.ones(negatives)]).long()
    labels = torch.zeros(4).long()
    given = dict(strategy="distance_weighted", backend=backend)
    found = mine_pairs(x, labels, y, ref_labels, generator=generator, **given)
    d = matrix(*(t / t.norm(dim=1, keepdim=True) for t in (x, y)), "euclidean")
    kept = 0
    for i in range(4):
        drawn = found.negative[found.negative_anchor == i]
        exact = law(d[i], list(range(copies, copies + negatives)), dimension, 0.5, 1.4)
        if not bool(exact.isfinite().all()):
            assert len(drawn) == 0
            continue
        kept += 1
        assert len(drawn) == copies
        count = drawn.bincount(minlength=len(exact)).double()
        assert bool((count[exact == 0] == 0).all())
        exact = exact[exact > 0] * copies
        count = count[law(d[i], range(copies, copies + negatives), dimension, 0.5, 1.4) > 0]
        statistic = float(((count - exact).square() / exact).sum())
        # mean k - 1 and variance 2 (k - 1): six deviations
        freedom = len(exact) - 1
        assert statistic <= freedom + 6 * (2 * freedom) ** 0.5 + 1e-9
    assert kept >= 3 and found.left_out == 4 - kept
    again = mine_pairs(x, labels, y, ref_labels, generator=generator.manual_seed(3), **given)
    assert torch.equal(again.negative, found.negative)
    torch.testing.assert_close(found.negative_distance, d[found.negative_anchor, found.negative])


@pytest.mark.float64
def test_distance_weighted_draws_do_not_depend_on_blocks(monkeypatch, backend: str) -> None:
    x, labels = batch(60, 6, 7)
    found = []
    for size in (1, 7 * 60 * 8, 1 << 30):
        monkeypatch.setattr(mining_batch, "BLOCK_BYTES", size)
        generator = torch.Generator().manual_seed(11)
        given = dict(strategy="distance_weighted", generator=generator, backend=backend)
        found.append(mine_pairs(x, labels, **given))
    assert torch.equal(found[0].negative, found[1].negative)
    assert torch.equal(found[0].negative, found[2].negative)
    same, different = allowed(labels, labels, True)
    positives = [(i, p) for i in range(60) for p in same[i] if i in set(found[0].anchor.tolist())]
    drawn = lines((found[0].anchor, found[0].positive, found[0].negative))
    assert [(i, p) for i, p, _ in drawn] == positives
    assert all(n in different[i] for i, _, n in drawn)


@pytest.mark.float64
def test_distance_weighted_without_a_near_negative(backend: str) -> None:
    x = torch.eye(4, dtype=torch.float64)  # every distance is the root of 2, above 1.4
    found = mine_pairs(x, torch.tensor([0, 0, 1, 1]), strategy="distance_weighted", backend=backend)
    assert len(found.anchor) == 0 and found.left_out == 4


def test_no_pairs(backend: str) -> None:
    x = torch.randn(5, 3)
    for strategy in mining_pairs.STRATEGIES:
        for labels in (torch.zeros(5).long(), torch.arange(5)):
            found = mine_pairs(x, labels, strategy=strategy, backend=backend)
            assert found.positive_distance.dtype == torch.float32
            assert len(found.anchor) == len(found.positive_distance)
            one_sided = strategy in ("pair_margin", "ranked", "all")
            assert one_sided or len(found.anchor) == len(found.negative) == 0
            assert one_sided or found.left_out == 5
        none = torch.zeros(0).long()
        found = mine_pairs(x[:0], none, strategy=strategy, backend=backend)
        assert len(found.negative) == 0 and found.left_out == 0
        found = mine_pairs(x, torch.arange(5), x[:0], none, strategy=strategy, backend=backend)
        assert len(found.negative) == 0 and found.left_out == 5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(strategy="hardest"), ValueError, "strategy: expected one of"),
        (dict(positive="semihard"), ValueError, "positive: expected one of"),
        (dict(negative="semihard"), ValueError, "negative: expected one of"),
        (dict(epsilon=None), TypeError, "epsilon: expected a number"),
        (dict(k=0), ValueError, "k: expected a value >= 1"),
        (dict(k=1.0), TypeError, "k: expected an integer"),
        (dict(angle=90), ValueError, "angle: expected degrees"),
        (dict(cutoff=0.0), ValueError, "cutoff: expected a distance"),
        (dict(strategy="angular", metric="cosine"), ValueError, "metric: expected None"),
    ],
)
def test_bad_choices_of_pairs(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        mine_pairs(X, LABELS, **change)
