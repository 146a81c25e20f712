"""Retrieval and kNN metrics against small loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import widest
from metric_oracles import by_loops, distances, rankings

from fused_losses import metrics
from fused_losses.metrics import knn, search

RANKED = ("recall_at_k", "precision_at_k", "map_at_k", "ndcg")


def batch(n: int, d: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple:
    return torch.randn(n, d, dtype=torch.float64).to(dtype), torch.randint(0, classes, (n,))


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
        monkeypatch.setattr(search, "LISTED", 64)
        monkeypatch.setattr(knn, "LISTED", 64)
        monkeypatch.setattr(search, "BLOCK_BYTES", 2000)
    if request.param == "long lists":
        monkeypatch.setattr(search, "MOST", 0)


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
@pytest.mark.parametrize("weights", knn.WEIGHTS)
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
    for weights in knn.WEIGHTS:
        assert metrics.knn_classify(x, y, labels, weights=weights, **given).labels.item() == 2


def test_knn_without_neighbours(backend: str) -> None:
    x = torch.randn(3, 2)
    none = metrics.knn_classify(x, x[:0], torch.zeros(0).long(), num_classes=2, backend=backend)
    assert none.labels.tolist() == [-1] * 3 and none.score.tolist() == [0.0] * 3
    assert torch.equal(none.scores, torch.zeros(3, 2))
    ids = dict(ids=torch.zeros(3).long(), ref_ids=torch.tensor([0, 0, 1]))
    found = metrics.knn_classify(x, x.clone(), torch.tensor([0, 0, 1]), **ids, backend=backend)
    assert found.labels.tolist() == [1] * 3 and found.score.tolist() == [1.0] * 3


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
        (lambda: metrics.recall_at_k(X, LABELS, k=0), ValueError, "k: expected a value >= 1"),
        (lambda: metrics.recall_at_k(X, LABELS, k=[]), ValueError, "k: expected at least one"),
        (lambda: metrics.map_at_k(X, LABELS, k=1.5), TypeError, "k: expected an integer"),
        (lambda: metrics.mean_reciprocal_rank(X, LABELS, k=[1]), TypeError, "k: expected"),
        (lambda: metrics.knn_classify(X, X, LABELS, k=0), ValueError, "k: expected"),
        (lambda: metrics.knn_classify(X, X, LABELS, k=[1]), TypeError, "k: expected an integer"),
        (lambda: metrics.knn_classify(X, X, LABELS - 1), IndexError, "ref_labels: expected"),
        (lambda: metrics.knn_classify(X, X, LABELS, num_classes=1), IndexError, "ref_labels"),
        (lambda: metrics.knn_classify(X, X, LABELS, num_classes=0), ValueError, "num_classes"),
        (lambda: metrics.knn_classify(X, X, LABELS, num_classes=2.5), TypeError, "num_classes"),
        (lambda: metrics.knn_classify(X, X, LABELS, temperature=0.0), ValueError, "temperature"),
        (lambda: metrics.knn_classify(X, X, LABELS, weights="gauss"), ValueError, "weights"),
        (lambda: metrics.gap(LABELS, LABELS, LABELS), TypeError, "scores: expected"),
        (lambda: metrics.gap(X, LABELS, LABELS), ValueError, "predictions: expected"),
        (lambda: metrics.gap(X[:, 0], LABELS, LABELS[:2]), ValueError, "labels: expected"),
        (lambda: metrics.gap(X[:, 0], LABELS.float(), LABELS), TypeError, "predictions"),
    ],
)
def test_bad_values(call, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
