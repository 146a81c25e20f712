"""What chooses, drawn: mining, miners and metrics against loops; what is given scores alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from choice_draws import answer, batch
from choice_option_draws import BY_NAME
from conftest import BACKENDS, require
from draws import DRAWS, Draw, chooses
from fuzz_settings import drawn
from hypothesis import given
from hypothesis import strategies as st
from metric_oracles import accuracy_by_loops, rates
from torch import Tensor

from fused_losses import metrics, miners

SCORES = st.lists(
    st.tuples(st.integers(-6, 6).map(lambda v: v / 4), st.booleans()), min_size=0, max_size=24
)


@pytest.mark.parametrize("name", list(BY_NAME))
def test_choices(name: str) -> None:
    choice = BY_NAME[name]

    @drawn(8)
    @given(DRAWS, st.booleans())
    def check(draw: Draw, both: bool) -> None:
        rows = batch(draw, both)
        judged, right = answer(choice, draw, rows)
        if not judged:
            return
        for backend in BACKENDS:
            if chooses(backend, draw):
                assert choice.call(rows, {"backend": backend}) == right, (draw, both, backend)

    check()


@drawn(25)
@given(DRAWS, st.booleans())
def test_distance_weighted(draw: Draw, both: bool) -> None:
    """Each positive pair once, beside a negative nearer than 1.4; which one is drawn."""
    rows = batch(draw, both)
    x, y = (r.double() for r in (rows.x, rows.columns[0]))
    norms = [r.norm(dim=1) for r in (x, y)]
    if min(float(n.min()) for n in norms) < 1e-30:
        return
    unit = [r / n[:, None] for r, n in zip((x, y), norms, strict=True)]
    d = (unit[0][:, None] - unit[1]).square().sum(2).sqrt()
    same, different = rows.sides()
    for backend in BACKENDS:
        if not chooses(backend, draw):
            continue
        miner = miners.DistanceWeightedMiner(backend=backend)
        a, p, n = (t.tolist() for t in miner(*rows.given))
        assert len(set(zip(a, p, strict=True))) == len(a)
        assert all(j in same[i] and k in different[i] for i, j, k in zip(a, p, n, strict=True))
        room = 1e-3 if draw.dtype != torch.float64 else 1e-9
        assert all(float(d[i, k]) < 1.4 + room for i, k in zip(a, n, strict=True))
        # a row has all its positive pairs or, where no negative is near enough, none
        some = [any(float(d[i, k]) < 1.4 - room for k in different[i]) for i in range(len(d))]
        assert all(a.count(i) == len(same[i]) for i in range(len(d)) if some[i])


def _given(pairs: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([s for s, _ in pairs], dtype=torch.float64)
    return scores, torch.tensor([k for _, k in pairs], dtype=torch.bool)


@drawn(50)
@given(SCORES)
def test_scores(pairs: list[tuple[float, bool]]) -> None:
    """roc, auc, eer, the thresholds and the accuracy over folds, by walking thresholds."""
    scores, same = _given(pairs)
    genuine, impostors = scores[same], scores[~same]
    curve = metrics.roc(scores, same)
    for far, tar, threshold in zip(*(t.tolist() for t in curve), strict=True):
        for got, side in ((far, impostors), (tar, genuine)):
            want = float((side > threshold).double().mean())
            assert got == want or (math.isnan(got) and math.isnan(want))
    for far in (0.0, 0.1, 0.29, 0.5, 1.0):
        threshold = metrics.threshold_at_far(scores, same, far)
        tries = [-math.inf, *sorted(set(impostors.tolist()))]
        enough = [t for t in tries if int((impostors > t).sum()) <= far * len(impostors) + 1e-12]
        assert threshold == min(enough)
        tar = metrics.tar_at_far(scores, same, far)
        assert math.isnan(tar) if not len(genuine) else tar == rates(scores, same, threshold)[1]
    if len(genuine) and len(impostors):
        wins = (genuine[:, None] > impostors).double() + (genuine[:, None] == impostors) / 2
        assert metrics.auc(scores, same) == pytest.approx(float(wins.mean()), rel=1e-12)
        points = [
            (far, 1 - tar)
            for far, tar in (
                rates(scores, same, t)
                for t in (math.inf, *sorted(set(scores.tolist()), reverse=True), -math.inf)
            )
        ]
        crossings = [
            f0 + (r0 - f0) / ((f1 - r1) - (f0 - r0)) * (f1 - f0)
            for (f0, r0), (f1, r1) in itertools.pairwise(points)
            if f0 - r0 <= 0 <= f1 - r1 and (f0, r0) != (f1, r1)
        ]
        assert any(metrics.eer(scores, same).rate == pytest.approx(c, abs=1e-12) for c in crossings)
    else:
        assert math.isnan(metrics.auc(scores, same)) and math.isnan(metrics.eer(scores, same).rate)
    if len(pairs) >= 4:
        fold = [i * 2 // len(pairs) for i in range(len(pairs))]
        found = metrics.verification_accuracy(scores, same, torch.tensor(fold))
        want, thresholds = accuracy_by_loops(scores, same, fold)
        assert found.accuracy.tolist() == pytest.approx(want, rel=1e-12)
        assert found.threshold.tolist() == pytest.approx(thresholds, rel=1e-12)


@drawn(50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-1, 3), st.integers(-1, 3)), max_size=20))
def test_gap(queries: list[tuple[int, int, int]]) -> None:
    """By sorting all predictions and walking down the list."""
    listed = sorted((-s, q, p) for q, (s, p, _) in enumerate(queries) if p >= 0)
    total = right = 0
    for rank, (_, q, p) in enumerate(listed, 1):
        if p == queries[q][2]:
            right += 1
            total += right / rank
    known = sum(label >= 0 for _, _, label in queries)
    columns = [torch.tensor([query[i] for query in queries], dtype=torch.int64) for i in range(3)]
    found = metrics.gap(columns[0].double(), columns[1], columns[2])
    assert math.isnan(found) if not known else found == pytest.approx(total / known, rel=1e-12)


@drawn(25)
@given(DRAWS)
def test_all_pairs(draw: Draw) -> None:
    """Small whole rows, whose products are exact: the threshold and the share by the list."""
    generator = torch.Generator().manual_seed(draw.seed)
    n, _, d = draw.shape
    x = torch.randint(-2, 3, (n, d), generator=generator)
    labels = torch.randint(0, n // 3 + 1, (n,), generator=generator)
    i, j = torch.triu_indices(n, n, 1)
    scores, same = (x @ x.T)[i, j].double(), labels[i] == labels[j]
    for backend in BACKENDS:
        if not chooses(backend, draw):
            continue
        require(backend)
        given_rows = (x.to(draw.dtype), labels, [0.0, 0.1, 0.5, 1.0])
        found = metrics.all_pairs_tar_at_far(*given_rows, metric="dot", backend=backend)
        for far, got in found.items():
            assert got.genuine == int(same.sum()) and got.impostors == int((~same).sum())
            want = metrics.tar_at_far(scores, same, far)
            assert got.tar == want or (math.isnan(got.tar) and math.isnan(want))
            assert got.threshold == metrics.threshold_at_far(scores, same, far)
