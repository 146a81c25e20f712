"""mAP with junk against the definition, a query at a time: junk taken out, ranks counted."""

from __future__ import annotations

import math

import pytest
import torch
from metric_oracles import distances, rankings
from torch import Tensor

from fused_losses import metrics
from fused_losses.metrics import search

N, M = 9, 40
KS = (1, 3, 10, 100)


def lists(n: int, m: int) -> list[list[list[int]]]:
    """easy, hard and junk: disjoint columns of each query, some lists without any."""
    out: list[list[list[int]]] = [[], [], []]
    for i in range(n):
        columns = torch.randperm(m).tolist()
        for kind, told in enumerate(out):
            size = 0 if (i + kind) % 4 == 0 else (i * (kind + 2)) % 7
            told.append(columns[:size])
            columns = columns[size:]
    return out


def average_precision(order: list[int], right: set[int], ignored: set[int]) -> float:
    if not right:
        return math.nan
    area, seen, rank = 0.0, 0, 0
    for column in order:
        if column in ignored:
            continue
        if column in right:
            before = 1.0 if rank == 0 else seen / rank
            seen, rank = seen + 1, rank + 1
            area += (before + seen / rank) / 2 / len(right)
        else:
            rank += 1
    return area


def precision(order: list[int], right: set[int], ignored: set[int], k: int) -> float:
    if not right:
        return math.nan
    kept = [column for column in order if column not in ignored]
    ends = [rank for rank, column in enumerate(kept, 1) if column in right]
    end = min(max(ends), k) if len(ends) == len(right) else k
    return sum(column in right for column in kept[:end]) / end


def check(found: metrics.RevisitedMap, order, easy, hard, junk, ks=KS) -> None:
    told = {"easy": (easy, hard, junk), "hard": (hard, easy, junk)}
    for name in ("easy", "medium", "hard"):
        areas, at = [], {k: [] for k in ks}
        for i, columns in enumerate(order):
            if name == "medium":
                right, ignored = {*easy[i], *hard[i]}, {*junk[i]}
            else:
                first, *others = told[name]
                right, ignored = {*first[i]}, {c for o in others for c in o[i]}
            areas.append(average_precision(columns, right, ignored))
            for k in ks:
                at[k].append(precision(columns, right, ignored, k))
        got = getattr(found, name)
        assert got.average_precision.tolist() == pytest.approx(areas, rel=1e-12, nan_ok=True)
        kept = [a for a in areas if not math.isnan(a)]
        assert (got.queries, got.left_out) == (len(kept), len(areas) - len(kept))
        want = sum(kept) / len(kept) if kept else math.nan
        assert got.map == pytest.approx(want, rel=1e-12, nan_ok=True)
        assert list(got.precision) == list(ks)
        for k in ks:
            assert got.precision_at[k].tolist() == pytest.approx(at[k], rel=1e-12, nan_ok=True)
            some = [p for p in at[k] if not math.isnan(p)]
            want = sum(some) / len(some) if some else math.nan
            assert got.precision[k] == pytest.approx(want, rel=1e-12, nan_ok=True)


def padded(told: list[list[int]]) -> Tensor:
    wide = max(len(one) for one in told) + 1
    return torch.tensor([one + [-1] * (wide - len(one)) for one in told], dtype=torch.int32)


@pytest.fixture(params=["as it is", "small blocks", "long lists"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        monkeypatch.setattr(search, "LISTED", 100)
    if request.param == "long lists":
        monkeypatch.setattr(search, "MOST", 0)
        monkeypatch.setattr(search, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("metric", ["cosine", "cityblock", "dot"])
def test_against_loops(metric: str, path: None, backend: str) -> None:
    """Small integers, of which many tie, but for cosines."""
    tied = metric != "cosine"
    x, y = (torch.randint(-2, 3, (c, 4)).float() if tied else torch.randn(c, 4) for c in (N, M))
    easy, hard, junk = lists(N, M)
    order = rankings(distances(x, y, metric), False)
    given = dict(metric=metric, k=KS, backend=backend)
    found = metrics.revisited_map(x, y, easy=easy, hard=hard, junk=junk, **given)
    check(found, order, easy, hard, junk)
    again = metrics.revisited_map(
        *(x, y),
        easy=padded(easy),
        hard=[torch.tensor(one).long() for one in hard],
        junk=padded(junk),
        **given,
    )
    check(again, order, easy, hard, junk)


def test_known_numbers(backend: str) -> None:
    """Ranks 1 and 3 of two right rows, then with the row between them as junk."""
    x, y = torch.zeros(1, 1), torch.arange(4.0)[:, None]
    given = dict(metric="euclidean", k=[1, 3], backend=backend)
    found = metrics.revisited_map(x, y, easy=[[0, 2]], **given)
    assert found.easy.map == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert found.easy.precision == {1: 1.0, 3: pytest.approx(2 / 3)}
    assert metrics.revisited_map(x, y, easy=[[0, 2]], junk=[[1]], **given).easy.map == 1
    # the divisor is the last right row's rank, where that is less than k
    assert metrics.revisited_map(x, y, easy=[[0]], **given).easy.precision == {1: 1.0, 3: 1.0}
    assert found.medium.map == found.easy.map and math.isnan(found.hard.map)


def test_edges_and_nan(backend: str) -> None:
    easy, hard, junk = lists(N, M)
    x, y = torch.randn(N, 3), torch.randn(M, 3)
    given = dict(backend=backend, k=list(KS))
    nothing = metrics.revisited_map(x, y, **given)
    assert all(math.isnan(p.map) and p.left_out == N for p in nothing)
    for a, b, left in ((x[:0], y, 0), (x, y[:0], N), (x[:0], y[:0], 0)):
        found = metrics.revisited_map(a, b, **given)
        assert all(math.isnan(p.map) and (p.queries, p.left_out) == (0, left) for p in found)
    # a row that is never found is missing from the ranks, not from R
    lost = easy[1][0] if easy[1] else hard[1][0]
    y[lost], x[3] = math.nan, math.nan
    order = rankings(distances(x, y, "cosine").nan_to_num(nan=9.0), False)
    order = [[c for c in row if c != lost] for row in order]
    order[3] = []
    told = dict(easy=easy, hard=hard, junk=junk)
    check(metrics.revisited_map(x, y, **told, **given), order, easy, hard, junk)


X, Y = torch.randn(2, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(easy=[[0]]), ValueError, "easy: expected a list for each of 2 queries, got 1"),
        (dict(easy=[[0], [5]]), IndexError, r"easy: expected columns in \[0, 5\)"),
        (dict(junk=torch.tensor([[-2], [0]])), IndexError, "junk: expected columns"),
        (dict(hard=torch.zeros(3, 1).long()), ValueError, "hard: expected shape"),
        (dict(hard=[[0], [0.5]]), TypeError, r"hard\[1\]: expected an integer"),
        (dict(hard=[[0], ["a"]]), TypeError, r"hard\[1\]: expected integers"),
        (dict(hard=3), TypeError, "hard: expected integers"),
        (dict(easy=[[0], [1]], junk=[[2], [3, 1]]), ValueError, "column 1 twice for query 1"),
        (dict(easy=[[0, 0], []]), ValueError, "column 0 twice for query 0"),
        (dict(k=0), ValueError, "k: expected"),
        (dict(metric="mahalanobis"), ValueError, "metric: expected"),
        (dict(gallery=Y[:, :2]), ValueError, "gallery: expected"),
        (dict(queries=X.long()), TypeError, "queries: expected"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        metrics.revisited_map(**(dict(queries=X, gallery=Y) | change))
