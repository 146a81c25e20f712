"""Retrieval, kNN and verification metrics against small loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import widest
from torch import Tensor

from fused_losses import metrics
from fused_losses.metrics import retrieval, verification
from fused_losses.train.faces import evaluation as trained

RANKED = ("recall_at_k", "precision_at_k", "map_at_k")


def batch(n: int, d: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple:
    return torch.randn(n, d, dtype=torch.float64).to(dtype), torch.randint(0, classes, (n,))


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Smaller is nearer, float64."""
    x, y = x.double(), y.double()
    if metric == "cosine":
        x, y = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
        return 1 - (x[:, None] * y).sum(dim=2)
    if metric == "dot":
        return -(x[:, None] * y).sum(dim=2)
    apart = x[:, None] - y
    return apart.abs().sum(dim=2) if metric == "cityblock" else apart.square().sum(dim=2).sqrt()


def rankings(d: Tensor, own: bool, ids=None, ref_ids=None) -> list[list[int]]:
    """Each query's columns, nearest first, the lowest of equals."""
    out = []
    ids, ref_ids = (None if t is None else t.tolist() for t in (ids, ref_ids))
    for i, row in enumerate(d.tolist()):
        columns = [
            j
            for j in range(len(row))
            if not (own and i == j) and not (ids is not None and ids[i] == ref_ids[j])
        ]
        out.append(sorted(columns, key=lambda j: (row[j], j)))
    return out


def by_loops(name: str, order: list[list[int]], labels, ref_labels, k: int | None) -> tuple:
    """(mean, queries that count)"""
    labels, ref_labels, values = labels.tolist(), ref_labels.tolist(), []
    for i, columns in enumerate(order):
        hits = [labels[i] == ref_labels[j] for j in columns]
        relevant = sum(hits)
        if not relevant:
            continue
        precision = [sum(hits[: r + 1]) / (r + 1) for r in range(len(hits))]
        first = hits.index(True)
        at_hits = [p if h else 0.0 for p, h in zip(precision, hits, strict=True)]
        if name == "recall_at_k":
            value = float(any(hits[:k]))
        elif name == "precision_at_k":
            value = sum(hits[:k]) / k
        elif name == "map_at_k":
            value = sum(at_hits[:k]) / min(relevant, k)
        elif name == "map_at_r":
            value = sum(at_hits[:relevant]) / relevant
        elif name == "r_precision":
            value = sum(hits[:relevant]) / relevant
        else:
            value = 1 / (first + 1) if k is None or first < k else 0.0
        values.append(value)
    return (sum(values) / len(values) if values else math.nan), len(values)


def check(found: metrics.Retrieval, want: tuple, n: int) -> None:
    assert isinstance(found.value, float)
    assert found.value == pytest.approx(want[0], rel=1e-12, nan_ok=True)
    assert (found.queries, found.left_out) == (want[1], n - want[1])


CALLS = [
    *((name, k) for name in RANKED for k in (1, 3, 10, 1000)),
    ("map_at_r", None),
    ("r_precision", None),
    *(("mean_reciprocal_rank", k) for k in (None, 2, 1000)),
]


@pytest.fixture(params=["as it is", "small blocks", "long lists"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One search, searches of few queries, and the path beyond what pairwise_topk takes."""
    if request.param == "small blocks":
        monkeypatch.setattr(retrieval, "LISTED", 64)
        monkeypatch.setattr(retrieval, "BLOCK_BYTES", 2000)
    if request.param == "long lists":
        monkeypatch.setattr(retrieval, "MOST", 0)


@pytest.mark.float64
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot", "cityblock"])
@pytest.mark.parametrize(("name", "k"), CALLS)
def test_against_loops(name: str, k: int | None, metric: str, path: None, backend: str) -> None:
    x, labels = batch(25, 4, 6)
    labels[3] = 77  # alone
    given = dict(metric=metric, backend=backend) | ({} if k is None else {"k": k})
    want = by_loops(name, rankings(distances(x, x, metric), True), labels, labels, k)
    found = getattr(metrics, name)(x, labels, **given)
    assert found.left_out >= 1
    check(found, want, 25)
    check(getattr(metrics, name)(x, labels, x, labels, **given), want, 25)
    y, ref_labels = batch(31, 4, 5)
    want = by_loops(name, rankings(distances(x, y, metric), False), labels, ref_labels, k)
    check(getattr(metrics, name)(x, labels, y, ref_labels, **given), want, 25)


@pytest.mark.float64
@pytest.mark.parametrize(("name", "k"), CALLS)
def test_ties_and_ids(name: str, k: int | None, path: None, backend: str) -> None:
    """Few distinct points, so that most neighbours tie; several rows share an id."""
    x = torch.randint(0, 3, (21, 2)).double()
    y = torch.randint(0, 3, (33, 2)).double()
    labels, ref_labels = torch.randint(0, 4, (21,)), torch.randint(0, 4, (33,))
    ids, ref_ids = torch.randint(0, 9, (21,)), torch.randint(0, 9, (33,))
    given = dict(metric="cityblock", backend=backend) | ({} if k is None else {"k": k})
    order = rankings(distances(x, y, "cityblock"), False, ids, ref_ids)
    want = by_loops(name, order, labels, ref_labels, k)
    call = getattr(metrics, name)
    check(call(x, labels, y, ref_labels, ids=ids, ref_ids=ref_ids, **given), want, 21)
    order = rankings(distances(x, x, "cityblock"), True, ids, ids)
    check(call(x, labels, ids=ids, **given), by_loops(name, order, labels, labels, k), 21)


@pytest.mark.parametrize("name", RANKED)
def test_several_k(name: str, backend: str) -> None:
    x, labels = batch(20, 4, 4, widest(backend))
    call = getattr(metrics, name)
    found = call(x, labels, k=[1, 5, 3], backend=backend)
    assert list(found.value) == [1, 5, 3]
    for k, value in found.value.items():
        assert value == call(x, labels, k=k, backend=backend).value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype, backend: str) -> None:
    """Products of small integers are exact in every dtype."""
    x, labels = torch.randint(-3, 4, (60, 8)).to(dtype), torch.randint(0, 9, (60,))
    order = rankings(distances(x, x, "dot"), True)
    for name, k in CALLS:
        given = dict(metric="dot", backend=backend) | ({} if k is None else {"k": k})
        want = by_loops(name, order, labels, labels, k)
        check(getattr(metrics, name)(x, labels, **given), want, 60)


@pytest.mark.parametrize(("name", "k"), CALLS)
def test_empty_sets(name: str, k: int | None, backend: str) -> None:
    given = dict(backend=backend) | ({} if k is None else {"k": k})
    call = getattr(metrics, name)
    x, none = torch.randn(4, 3), torch.zeros(0).long()
    for arguments, n in (
        ((x[:0], none), 0),
        ((x, torch.arange(4)), 4),
        ((x, torch.arange(4), x[:0], none), 4),
        ((x[:0], none, x, torch.arange(4)), 0),
        ((x[:1], none.new_zeros(1)), 1),
    ):
        found = call(*arguments, **given)
        assert math.isnan(found.value) and found.queries == 0 and found.left_out == n


@pytest.mark.float64
@pytest.mark.parametrize(("name", "k"), CALLS)
def test_nan_query_finds_nothing(name: str, k: int | None, path: None, backend: str) -> None:
    x, labels = batch(16, 3, 3)
    order = rankings(distances(x, x, "euclidean"), True)
    bad = x.clone()
    bad[5] = math.nan
    given = dict(metric="euclidean", backend=backend) | ({} if k is None else {"k": k})
    given |= dict(ids=torch.arange(16), ref_ids=torch.arange(16))
    found = getattr(metrics, name)(bad, labels, x, labels, **given)
    counted = by_loops(name, order, labels, labels, k)[1]
    others = [i for i in range(16) if i != 5]
    rest = by_loops(name, [order[i] for i in others], labels[others], labels, k)
    assert found.queries == counted
    assert found.value == pytest.approx(rest[0] * rest[1] / counted, rel=1e-12)


def test_gap(backend: str) -> None:
    """Against the definition: sort all predictions, walk down the list."""
    for columns, truths in ((1, 1), (4, 1), (3, 2)):
        scores = torch.randint(0, 6, (30, columns)).double()
        predictions = torch.randint(-1, 5, (30, columns))
        labels = torch.randint(-1, 5, (30, truths))
        listed = [
            (-float(scores[q, c]), q, c, int(predictions[q, c]))
            for q in range(30)
            for c in range(columns)
            if predictions[q, c] >= 0
        ]
        total = right = 0
        for rank, (_, q, _, name) in enumerate(sorted(listed), 1):
            if name in labels[q].tolist():
                right += 1
                total += right / rank
        want = total / sum(bool((row >= 0).any()) for row in labels)
        given = (scores, predictions, labels)
        assert metrics.gap(*given) == pytest.approx(want, rel=1e-12)
        if columns == truths == 1:
            assert metrics.gap(*(t[:, 0] for t in given)) == pytest.approx(want, rel=1e-12)
    one = torch.zeros(1).long()
    assert metrics.gap(torch.ones(1), one, one) == 1
    assert math.isnan(metrics.gap(torch.ones(1), one, one - 1))
    assert math.isnan(metrics.gap(torch.full((1,), math.nan), one, one))
    assert math.isnan(metrics.gap(torch.ones(0), one[:0], one[:0]))


# ---- classification -----------------------------------------------------------------------------


@pytest.mark.float64
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot"])
@pytest.mark.parametrize("weights", retrieval.WEIGHTS)
@pytest.mark.parametrize("k", [1, 7, 500])
@pytest.mark.parametrize("own", [False, True])
def test_knn_classify(own, k, weights, metric, path: None, backend: str) -> None:
    y, ref_labels = batch(40, 4, 5)
    x = y if own else batch(22, 4, 5)[0]
    d = distances(x, y, metric)
    given = dict(k=k, weights=weights, temperature=0.3, metric=metric, backend=backend)
    found = metrics.knn_classify(x, y, ref_labels, num_classes=6, **given)
    want = torch.zeros(len(x), 6, dtype=torch.float64)
    for i, columns in enumerate(rankings(d, own)):
        columns = columns[:k]
        near = (1 if metric == "cosine" else 0) - d[i, columns]
        weight = {
            "uniform": lambda near: torch.ones_like(near),
            "exp": lambda near: (near / 0.3).exp(),
            "softmax": lambda near: (near / 0.3).softmax(0),
        }[weights](near)
        for j, w in zip(columns, weight.tolist(), strict=True):
            want[i, ref_labels[j]] += w
    torch.testing.assert_close(found.scores, want)
    torch.testing.assert_close(found.score, want.amax(dim=1))
    rounded = want.round(decimals=9)
    assert torch.equal(found.labels, (rounded == rounded.amax(dim=1, keepdim=True)).int().argmax(1))
    again = metrics.knn_classify(x, y, ref_labels, **given)
    assert again.scores is None and torch.equal(again.labels, found.labels)
    assert torch.equal(again.score, found.score)


def test_knn_ties_go_to_the_lowest_class(backend: str) -> None:
    x = torch.zeros(1, 2)
    y = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [9, 9]])
    labels = torch.tensor([4, 2, 4, 2, 0])
    given = dict(k=4, metric="cityblock", backend=backend)
    for weights in retrieval.WEIGHTS:
        assert metrics.knn_classify(x, y, labels, weights=weights, **given).labels.item() == 2


def test_knn_without_neighbours(backend: str) -> None:
    x = torch.randn(3, 2)
    none = metrics.knn_classify(x, x[:0], torch.zeros(0).long(), num_classes=2, backend=backend)
    assert none.labels.tolist() == [-1] * 3 and none.score.tolist() == [0.0] * 3
    assert torch.equal(none.scores, torch.zeros(3, 2))
    ids = dict(ids=torch.zeros(3).long(), ref_ids=torch.tensor([0, 0, 1]))
    found = metrics.knn_classify(x, x.clone(), torch.tensor([0, 0, 1]), **ids, backend=backend)
    assert found.labels.tolist() == [1] * 3 and found.score.tolist() == [1.0] * 3


# ---- verification -------------------------------------------------------------------------------


def pairs(n: int, step: float | None) -> tuple[Tensor, Tensor]:
    """Scores, of which equal ones when there is a step, and what their pairs are."""
    same = torch.rand(n) < 0.4
    scores = torch.randn(n, dtype=torch.float64) + same
    return (scores if step is None else (scores / step).round() * step), same


def rates(scores: Tensor, same: Tensor, threshold: float) -> tuple[float, float]:
    above = scores > threshold
    return float(above[~same].double().mean()), float(above[same].double().mean())


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
    given = trained.Scores(scores[same], scores[~same])
    fars = [0.0, 1e-3, 0.01, 0.1, 0.29, 0.5, 1.0]
    found = metrics.tar_at_far(scores, same, fars)
    for far in fars:
        assert found[far] == trained.tar_at_far(given, far)
        threshold = metrics.threshold_at_far(scores, same, far)
        accepted, tar = rates(scores, same, threshold)
        assert accepted <= far + 1e-12 and tar == found[far]
        # no lower threshold would do
        lower = scores[~same][scores[~same] <= threshold]
        if len(lower):
            below = float(lower.max()) - 1e-9
            assert rates(scores, same, below)[0] > far or far >= 1


def accuracy_by_loops(scores: Tensor, same: Tensor, fold: list[int]) -> list[float]:
    out = []
    for f in sorted(set(fold)):
        mine = torch.tensor([g == f for g in fold])
        values = sorted(set(scores[~mine].tolist()))
        candidates = [
            values[0] - 1,
            *((a + b) / 2 for a, b in itertools.pairwise(values)),
            values[-1] + 1,
        ]
        right = [int(((scores[~mine] > t) == same[~mine]).sum()) for t in candidates]
        threshold = candidates[right.index(max(right))]
        out.append(float(((scores[mine] > threshold) == same[mine]).double().mean()))
    return out


@pytest.mark.parametrize("step", [None, 0.5])
def test_verification_accuracy(step: float | None) -> None:
    scores, same = pairs(103, step)
    found = metrics.verification_accuracy(scores, same)
    # as sklearn's KFold without shuffling: 3 folds of 11, then 7 of 10
    fold = [f for f in range(10) for _ in range(11 if f < 3 else 10)]
    want = accuracy_by_loops(scores, same, fold)
    assert found.accuracy.tolist() == want
    assert found.mean == pytest.approx(sum(want) / 10)
    assert found.std == pytest.approx((sum((w - found.mean) ** 2 for w in want) / 10) ** 0.5)
    shuffled = torch.randint(0, 4, (103,)) * 3 - 5
    found = metrics.verification_accuracy(scores, same, shuffled)
    assert found.accuracy.tolist() == accuracy_by_loops(scores, same, shuffled.tolist())
    for f in range(4):
        mine = shuffled == sorted(set(shuffled.tolist()))[f]
        other = trained.Scores(scores[~mine & same], scores[~mine & ~same])
        assert float(found.threshold[f]) == trained.best_threshold(other)


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


@pytest.mark.parametrize("name", [*RANKED, "map_at_r", "r_precision", "mean_reciprocal_rank"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(embeddings=[1.0]), TypeError, "embeddings: expected a tensor"),
        (dict(embeddings=X[0]), ValueError, "embeddings: expected two"),
        (dict(labels=LABELS.float()), TypeError, "labels: expected an integer"),
        (dict(labels=LABELS[:3]), ValueError, "labels: expected shape"),
        (dict(ref_labels=LABELS), ValueError, "ref_embeddings: expected a tensor"),
        (dict(ref_embeddings=X.clone()), ValueError, "ref_labels: expected a tensor"),
        (
            dict(ref_embeddings=torch.randn(4, 2), ref_labels=LABELS),
            ValueError,
            "ref_embeddings: expected",
        ),
        (dict(ids=LABELS[:2]), ValueError, "ids: expected shape"),
        (dict(metric="mahalanobis"), ValueError, "metric: expected one of"),
    ],
)
def test_bad_searches(name: str, change: dict, error: type, words: str) -> None:
    given = dict(embeddings=X, labels=LABELS) | change
    with pytest.raises(error, match=words):
        getattr(metrics, name)(**given)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: metrics.recall_at_k(X, LABELS, k=0), ValueError, "k: expected values >= 1"),
        (lambda: metrics.recall_at_k(X, LABELS, k=[]), ValueError, "k: expected at least one"),
        (lambda: metrics.map_at_k(X, LABELS, k=1.5), TypeError, "k: expected integers"),
        (lambda: metrics.mean_reciprocal_rank(X, LABELS, k=[1]), TypeError, "k: expected"),
        (lambda: metrics.knn_classify(X, X, LABELS, k=0), ValueError, "k: expected"),
        (lambda: metrics.knn_classify(X, X, LABELS, k=[1]), TypeError, "k: expected an integer"),
        (lambda: metrics.knn_classify(X, X, LABELS - 1), IndexError, "ref_labels: expected"),
        (lambda: metrics.knn_classify(X, X, LABELS, num_classes=1), IndexError, "ref_labels"),
        (lambda: metrics.knn_classify(X, X, LABELS, num_classes=0), ValueError, "num_classes"),
        (lambda: metrics.knn_classify(X, X, LABELS, temperature=0.0), ValueError, "temperature"),
        (lambda: metrics.knn_classify(X, X, LABELS, weights="gauss"), ValueError, "weights"),
        (lambda: metrics.gap(LABELS, LABELS, LABELS), TypeError, "scores: expected"),
        (lambda: metrics.gap(X, LABELS, LABELS), ValueError, "predictions: expected"),
        (lambda: metrics.gap(X[:, 0], LABELS, LABELS[:2]), ValueError, "labels: expected"),
        (lambda: metrics.gap(X[:, 0], LABELS.float(), LABELS), TypeError, "predictions"),
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
