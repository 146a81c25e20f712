"""Retrieval in a query's own gallery, by sets of labels, and each query's value: against loops."""

from __future__ import annotations

import math

import pytest
import torch
from metric_oracles import by_loops, distances, rankings
from torch import Tensor

from fused_losses import metrics
from fused_losses.metrics import search

CALLS = [
    *((name, k) for name in ("recall_at_k", "precision_at_k", "map_at_k") for k in (1, 4, 100)),
    ("ndcg", 4),
    ("map_at_r", None),
    ("r_precision", None),
    ("mean_reciprocal_rank", None),
    ("mean_reciprocal_rank", 3),
]


@pytest.fixture(params=["as it is", "small blocks", "long lists"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        monkeypatch.setattr(search, "LISTED", 64)
        monkeypatch.setattr(search, "BLOCK_BYTES", 2000)
    if request.param == "long lists":
        monkeypatch.setattr(search, "MOST", 0)


def label_sets(n: int, wide: int) -> Tensor:
    """Some rows have no label, some the same one twice."""
    return torch.randint(0, 7, (n, wide)).where(torch.rand(n, wide) < 0.5, -1)


def check(found: metrics.Retrieval, name, order, labels, ref_labels, k) -> None:
    each = [
        by_loops(name, [columns], labels[i, None], ref_labels, k)[0]
        for i, columns in enumerate(order)
    ]
    assert found.per_query.tolist() == pytest.approx(each, rel=1e-12, nan_ok=True)
    value, queries = by_loops(name, order, labels, ref_labels, k)
    assert found.value == pytest.approx(value, rel=1e-12, nan_ok=True)
    assert (found.queries, found.left_out) == (queries, len(labels) - queries)


@pytest.mark.parametrize("sets", [False, True], ids=["labels", "label sets"])
@pytest.mark.parametrize("galleries", [False, True], ids=["all", "own galleries"])
@pytest.mark.parametrize(("name", "k"), CALLS)
def test_against_loops(name, k, galleries: bool, sets: bool, path: None, backend: str) -> None:
    """Small integers, most of which tie; ids, two sides and one."""
    x, y = torch.randint(0, 3, (14, 2)).float(), torch.randint(0, 3, (23, 2)).float()
    labels, ref_labels = torch.randint(0, 4, (14,)), torch.randint(0, 4, (23,))
    if sets:
        labels, ref_labels = label_sets(14, 3), label_sets(23, 2)
    ids, ref_ids = torch.randint(0, 9, (14,)), torch.randint(0, 9, (23,))
    call = getattr(metrics, name)
    given = dict(metric="cityblock", per_query=True, backend=backend)
    given |= {} if k is None else {"k": k}
    for own in (False, True):
        columns = x if own else y
        order = rankings(distances(x, columns, "cityblock"), own, ids, ids if own else ref_ids)
        if galleries:
            m = len(columns)
            told = [torch.randperm(m)[: (5 * i) % m].tolist() for i in range(len(x))]
            order = [[c for c in row if c in told[i]] for i, row in enumerate(order)]
            given["galleries"] = told
        rest = () if own else (y, ref_labels)
        side = dict(ids=ids) if own else dict(ids=ids, ref_ids=ref_ids)
        found = call(x, labels, *rest, **side, **given)
        check(found, name, order, labels, labels if own else ref_labels, k)


def test_padded_galleries_and_several_k(backend: str) -> None:
    x, y = torch.randn(3, 4), torch.randn(9, 4)
    labels, ref_labels = torch.tensor([0, 1, 2]), torch.arange(9) % 3
    lists = [[8, 0, 3], [], [5, 2, 1, 4]]
    padded = torch.tensor([[8, -1, 0, 3], [-1, -1, -1, -1], [5, 2, 1, 4]])
    given = dict(k=[1, 2, 9], per_query=True, backend=backend)
    found = metrics.recall_at_k(x, labels, y, ref_labels, galleries=lists, **given)
    again = metrics.recall_at_k(x, labels, y, ref_labels, galleries=padded, **given)
    assert found.value == again.value and found[1:3] == again[1:3] == (2, 1)
    for k in (1, 2, 9):
        one = metrics.recall_at_k(
            *(x, labels, y, ref_labels), k=k, galleries=lists, per_query=True, backend=backend
        )
        assert one.value == found.value[k]
        assert torch.equal(one.per_query.nan_to_num(9), found.per_query[k].nan_to_num(9))
        assert math.isnan(one.per_query[1])
    assert metrics.recall_at_k(x, labels, y, ref_labels, backend=backend).per_query is None


@pytest.mark.parametrize(("name", "k"), CALLS)
def test_empty_and_nan(name: str, k: int | None, backend: str) -> None:
    given = dict(backend=backend, per_query=True) | ({} if k is None else {"k": k})
    call = getattr(metrics, name)
    x, none = torch.randn(4, 3), torch.zeros(0, 2).long()
    labels = torch.zeros(4, 2).long()
    for rows, told, more in (
        ((x[:0], none), [], 0),
        ((x, labels, x[:0], none), [[]] * 4, 4),
        ((x, labels), [[]] * 4, 4),
        ((x, labels[:, :0]), [[0, 1, 2, 3]] * 4, 4),
    ):
        found = call(*rows, galleries=told, **given)
        assert math.isnan(found.value) and (found.queries, found.left_out) == (0, more)
        assert len(found.per_query) == more and bool(found.per_query.isnan().all())
    x[2] = math.nan
    found = call(x, labels[:, 0], x.clone(), labels[:, 0], galleries=[[0, 1]] * 4, **given)
    assert found.queries == 4 and found.per_query[2] == 0 and float(found.per_query[0]) > 0


X, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(galleries=[[0]]), ValueError, "galleries: expected a list for each of 4"),
        (dict(galleries=[[0], [1], [4], []]), IndexError, r"galleries: expected columns in \[0, 4"),
        (dict(galleries=[[0], [1], [2, 2], []]), ValueError, "galleries: .* column 2 twice"),
        (dict(labels=LABELS[:2, None]), ValueError, "labels: expected shape"),
        (dict(labels=LABELS[:, None].float()), TypeError, "labels: expected an integer"),
        (
            dict(labels=LABELS[:, None], ref_embeddings=X[:2], ref_labels=LABELS[:2]),
            ValueError,
            "ref_labels: expected shape",
        ),
        (dict(labels=LABELS[:, None], ref_labels=LABELS[:, None]), ValueError, "ref_embeddings"),
        (dict(labels=LABELS[:, None], ref_embeddings=X[:2]), ValueError, "ref_labels"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        metrics.recall_at_k(**(dict(embeddings=X, labels=LABELS) | change))
