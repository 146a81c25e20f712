"""Identification by rank and in an open set: against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from metric_oracles import distances, rankings
from torch import Tensor

from fused_losses import metrics
from fused_losses.metrics import search


@pytest.fixture(params=["as it is", "small blocks", "long lists"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        monkeypatch.setattr(search, "LISTED", 64)
        monkeypatch.setattr(search, "BLOCK_BYTES", 2000)
    if request.param == "long lists":
        monkeypatch.setattr(search, "MOST", 0)


def first_ranks(order: list[list[int]], labels: Tensor, ref_labels: Tensor) -> list[float]:
    """The rank of the first row of the query's label; NaN where there is none."""
    out = []
    for i, columns in enumerate(order):
        at = [r for r, j in enumerate(columns, 1) if ref_labels[j] == labels[i]]
        out.append(float(at[0]) if at else math.nan)
    return out


def check(found: metrics.MatchCurve, ranks: list[float], k: int) -> None:
    known = [rank for rank in ranks if not math.isnan(rank)]
    want = [sum(rank <= r for rank in known) / len(known) for r in range(1, k + 1)]
    assert found.value.tolist() == pytest.approx(want, rel=1e-12)
    assert found.value.dtype == torch.float64
    assert (found.queries, found.left_out) == (len(known), len(ranks) - len(known))
    each = [math.inf if rank > k else rank for rank in ranks]
    assert found.per_query.tolist() == pytest.approx(each, nan_ok=True)


@pytest.mark.parametrize("k", [1, 4, 50])
def test_cmc_against_loops(k: int, path: None, backend: str) -> None:
    """Small integers, most of which tie; own cameras left out; equal to recall at each rank."""
    x, y = torch.randint(0, 3, (17, 2)).float(), torch.randint(0, 3, (23, 2)).float()
    labels, ref_labels = torch.randint(0, 5, (17,)), torch.randint(0, 5, (23,))
    labels[4] = 99
    seen, ref_seen = torch.randint(0, 3, (17,)), torch.randint(0, 3, (23,))
    given = dict(k=k, metric="cityblock", per_query=True, backend=backend)
    for own in (False, True):
        columns = x if own else y
        theirs, cameras = (labels, seen) if own else (ref_labels, ref_seen)
        order = rankings(distances(x, columns, "cityblock"), own)
        rest = () if own else (y, ref_labels)
        found = metrics.cmc(x, labels, *rest, **given)
        check(found, first_ranks(order, labels, theirs), k)
        for r in (1, k):
            recall = metrics.recall_at_k(x, labels, *rest, k=r, metric="cityblock", backend=backend)
            assert recall.value == pytest.approx(float(found.value[r - 1]), rel=1e-12)
        order = [
            [j for j in row if theirs[j] != labels[i] or cameras[j] != seen[i]]
            for i, row in enumerate(order)
        ]
        told = dict(cameras=seen) if own else dict(cameras=seen, ref_cameras=ref_seen)
        check(
            metrics.cmc(x, labels, *rest, **told, **given),
            first_ranks(order, labels, theirs),
            k,
        )


def test_cmc_of_sets_in_galleries(backend: str) -> None:
    x = torch.tensor([[0.0], [10.0]])
    y = torch.tensor([[1.0], [2.0], [3.0]])
    sets, ref_sets = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[5, -1], [1, 5], [2, -1]])
    given = dict(k=3, metric="cityblock", per_query=True, backend=backend)
    found = metrics.cmc(x, sets, y, ref_sets, **given)
    assert found.per_query.tolist() == [2.0, 1.0] and found.value.tolist() == [0.5, 1.0, 1.0]
    found = metrics.cmc(x, sets, y, ref_sets, galleries=[[1, 2], [0, 1]], **given)
    assert found.per_query[0] == 1 and math.isnan(found.per_query[1]) and found.left_out == 1


def open_set(
    d: Tensor,
    order: list[list[int]],
    labels: Tensor,
    ref_labels: Tensor,
    far: float,
    rank: int,
) -> tuple[list[float], float, int, int]:
    """Walks the unmated probes' nearest distances; each probe's value, the threshold, counts."""
    alarms, own = [], []
    for i, columns in enumerate(order):
        mates = [j for j in columns if ref_labels[j] == labels[i]]
        if mates:
            first = columns.index(mates[0]) < rank
            own.append(float(d[i, mates[0]]) if first else math.inf)
        else:
            alarms.append(float(d[i, columns[0]]) if columns else math.inf)
            own.append(math.nan)
    tries = [math.inf, *alarms]
    allowed = [t for t in tries if sum(a < t for a in alarms) <= far * len(alarms) + 1e-12]
    t = max(allowed)
    return [v if math.isnan(v) else float(v < t) for v in own], t, len(order), len(alarms)


@pytest.mark.parametrize("metric", ["cityblock", "dot"])
@pytest.mark.parametrize("rank", [1, 3])
def test_dir_against_loops(rank: int, metric: str, path: None, backend: str) -> None:
    centers = torch.randint(-6, 7, (12, 3))
    # of one set against itself the labels of its last rows are theirs alone
    labels, ref_labels = torch.randint(0, 12, (40,)), torch.randint(0, 6, (23,))
    labels[30:] = torch.arange(100, 110)
    x = (centers[labels % 12] + torch.randint(-1, 2, (40, 3))).float()
    y = (centers[ref_labels] + torch.randint(-1, 2, (23, 3))).float()
    shares = [0.0, 0.1, 0.29, 0.5, 1.0]
    given = dict(rank=rank, metric=metric, per_query=True, backend=backend)
    for own in (False, True):
        columns, theirs = (x, labels) if own else (y, ref_labels)
        d = distances(x, columns, metric)
        order = rankings(d, own)
        rest = () if own else (y, ref_labels)
        found = metrics.dir_at_far(x, labels, *rest, far=shares, **given)
        assert list(found) == shares
        for far, one in found.items():
            each, t, probes, unmated = open_set(d, order, labels, theirs, far, rank)
            assert one.per_query.tolist() == pytest.approx(each, nan_ok=True)
            assert (one.mated, one.unmated) == (probes - unmated, unmated) and unmated > 5
            assert one.threshold == (-t if metric == "dot" else t)
            known = [v for v in each if not math.isnan(v)]
            assert one.rate == pytest.approx(sum(known) / len(known), rel=1e-12)
        assert 0 < found[1.0].rate > found[0.0].rate
        single = metrics.dir_at_far(x, labels, *rest, far=0.1, **given)
        assert single[:4] == found[0.1][:4]


def test_ends_of_the_open_set(backend: str) -> None:
    x, labels = torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([0, 1, 2])
    y, known = torch.tensor([[1.0], [5.0]]), torch.tensor([0, 1])
    given = dict(metric="cityblock", backend=backend)
    # only mated probes: everything is accepted
    found = metrics.dir_at_far(x[:2], labels[:2], y, known, far=0.0, **given)
    assert found[:4] == (1.0, math.inf, 2, 0)
    # only unmated ones
    found = metrics.dir_at_far(x[2:], labels[2:], y, known, far=0.0, **given)
    assert math.isnan(found.rate) and found[1:4] == (4.0, 0, 1)
    # a row as near as the threshold is refused
    tied = torch.tensor([[6.0]])
    both = torch.cat([x[:2], tied])
    found = metrics.dir_at_far(both, labels, y, known, far=0.0, per_query=True, **given)
    assert found.threshold == 1 and found.rate == 0.5
    assert found.per_query[:2].tolist() == [0.0, 1.0] and math.isnan(found.per_query[2])
    lost = torch.full((1, 1), math.nan)
    found = metrics.dir_at_far(lost, labels[:1], y, known, far=1.0, **given)
    assert found[0::2] == (0.0, 1, None)
    for rows, told, n in ((x[:0], labels[:0], 0), (x, labels, 3)):
        found = metrics.dir_at_far(rows, told, y[:0], known[:0], **given)
        assert math.isnan(found.rate) and (found.mated, found.unmated) == (0, n)
        curve = metrics.cmc(rows, told, y[:0], known[:0], k=2, **given)
        assert bool(curve.value.isnan().all()) and (curve.queries, curve.left_out) == (0, n)


X, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(k=0), ValueError, "k: expected a value >= 1"),
        (dict(k=[1, 2]), TypeError, "k: expected an integer"),
        (dict(cameras=LABELS, ids=LABELS), ValueError, "ids: expected cameras or ids, got both"),
        (dict(cameras=LABELS[:2]), ValueError, "cameras: expected shape"),
        (dict(cameras=LABELS.float()), TypeError, "cameras: expected an integer"),
        (dict(ref_cameras=LABELS), ValueError, "ref_cameras: expected ref_embeddings"),
        (dict(cameras=LABELS, labels=LABELS[:, None]), ValueError, "cameras: expected one label"),
        (
            dict(cameras=LABELS, ref_embeddings=X[:2].clone(), ref_labels=LABELS[:2]),
            TypeError,
            "ref_cameras: expected an integer",
        ),
    ],
)
def test_bad_cmc(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        metrics.cmc(**(dict(embeddings=X, labels=LABELS) | change))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(far=1.5), ValueError, r"far: expected a rate in \[0, 1\]"),
        (dict(far="few"), TypeError, "far: expected a rate"),
        (dict(rank=0), ValueError, "rank: expected a value >= 1"),
        (dict(labels=LABELS[:2]), ValueError, "labels: expected shape"),
        (dict(metric="mahalanobis"), ValueError, "metric: expected one of"),
    ],
)
def test_bad_dir(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        metrics.dir_at_far(**(dict(embeddings=X, labels=LABELS) | change))
