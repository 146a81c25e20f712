"""NDCG of graded columns against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from metric_oracles import distances, rankings

from fused_losses import metrics
from fused_losses.metrics import search


def by_loops(
    order: list[list[int]],
    judged: list[list[int]],
    grades: list[list[float]],
    k: int | None,
    exponential: bool,
) -> list[float]:
    """Each query's value, NaN without a gain to find."""
    out = []
    for columns, told, marks in zip(order, judged, grades, strict=True):
        of = dict(zip(told, marks, strict=True))
        gains = [of.get(j, 0.0) for j in columns]
        gains = [2**g - 1 if exponential else g for g in gains]
        totals = [
            sum(g / math.log2(i + 2) for i, g in enumerate(row[:k]))
            for row in (gains, sorted(gains, reverse=True))
        ]
        out.append(totals[0] / totals[1] if totals[1] else math.nan)
    return out


def lists(n: int, m: int) -> tuple[list[list[int]], list[list[float]]]:
    """Unlike lengths, none at all among them; grades of 0, too."""
    told = [torch.randperm(m)[: (3 * i) % 7].tolist() for i in range(n)]
    return told, [torch.randint(0, 4, (len(one),)).tolist() for one in told]


@pytest.fixture(params=["as it is", "small blocks", "long lists"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        monkeypatch.setattr(search, "LISTED", 64)
        monkeypatch.setattr(search, "BLOCK_BYTES", 2000)
    if request.param == "long lists":
        monkeypatch.setattr(search, "MOST", 0)


@pytest.mark.parametrize("galleries", [False, True], ids=["all", "own galleries"])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("k", [1, 5, None])
def test_against_loops(k, gain: str, galleries: bool, path: None, backend: str) -> None:
    """Small integers, most of which tie; ids, two sides and one."""
    x, y = torch.randint(0, 3, (13, 2)).float(), torch.randint(0, 3, (19, 2)).float()
    ids, ref_ids = torch.randint(0, 9, (13,)), torch.randint(0, 9, (19,))
    for own in (False, True):
        columns = x if own else y
        order = rankings(distances(x, columns, "cityblock"), own, ids, ids if own else ref_ids)
        judged, grades = lists(len(x), len(columns))
        given = dict(k=k, gain=gain, metric="cityblock", per_query=True, backend=backend)
        given |= dict(ids=ids) if own else dict(ids=ids, ref_ids=ref_ids)
        if galleries:
            m = len(columns)
            given["galleries"] = [torch.randperm(m)[: (5 * i) % m].tolist() for i in range(13)]
            pairs = zip(order, given["galleries"], strict=True)
            order = [[c for c in row if c in told] for row, told in pairs]
        rest = () if own else (None, y)
        found = metrics.ndcg(x, *rest, judged=judged, grades=grades, **given)
        each = by_loops(order, judged, grades, k, gain == "exponential")
        assert found.per_query.tolist() == pytest.approx(each, rel=1e-12, nan_ok=True)
        known = [value for value in each if not math.isnan(value)]
        assert found.value == pytest.approx(sum(known) / len(known), rel=1e-12)
        assert (found.queries, found.left_out) == (len(known), 13 - len(known))


def test_padded_lists_and_several_k(backend: str) -> None:
    x, y = torch.randn(3, 4), torch.randn(9, 4)
    judged, grades = [[8, 0, 3], [], [5, 2, 1, 4]], [[1, 2.5, 0], [], [3, 1, 1, 2]]
    padded = torch.tensor([[8, -1, 0, 3], [-1, -1, -1, -1], [5, 2, 1, 4]])
    told = torch.tensor([[1, -7.0, 2.5, 0], [math.nan] * 4, [3, 1, 1, 2]])
    given = dict(ref_embeddings=y, k=[1, 9, 4], per_query=True, backend=backend)
    found = metrics.ndcg(x, judged=judged, grades=grades, **given)
    again = metrics.ndcg(x, judged=padded, grades=told, **given)
    assert found.value == again.value and found[1:3] == again[1:3] == (2, 1)
    for k, value in found.value.items():
        one = metrics.ndcg(x, judged=judged, grades=grades, **(given | {"k": k}))
        assert one.value == value
        assert torch.equal(one.per_query.nan_to_num(9), found.per_query[k].nan_to_num(9))
    # grades of 1 are those of labels
    labels, ref_labels = torch.arange(3), torch.arange(9) % 3
    listed = [torch.arange(i, 9, 3) for i in range(3)]
    by_label = metrics.ndcg(x, labels, y, ref_labels, k=4, backend=backend)
    assert metrics.ndcg(x, None, y, judged=listed, k=4, backend=backend).value == by_label.value


def test_best_order_is_1_and_nothing_is_nan(backend: str) -> None:
    y = torch.eye(6) * torch.arange(6, 0, -1)[:, None]
    judged, grades = [list(range(6))], [[9.0, 5.0, 5.0, 3.0, 2.0, 0.5]]
    given = dict(judged=judged, grades=grades, metric="dot", backend=backend)
    assert metrics.ndcg(torch.ones(1, 6), None, y, k=None, **given).value == 1
    worst = metrics.ndcg(torch.ones(1, 6), None, y.flip(0), k=1, **given)
    # products are longest in front: of the rows turned round the last
    assert worst.value == pytest.approx(0.5 / 9.0)
    for x, m, told in ((torch.ones(0, 6), 6, []), (torch.ones(2, 6), 0, [[], []])):
        found = metrics.ndcg(x, None, y[:m], judged=told, k=None, backend=backend)
        assert math.isnan(found.value) and (found.queries, found.left_out) == (0, len(x))
    lost = torch.full((1, 6), math.nan)
    assert metrics.ndcg(lost, None, y, **given).value == 0


X, JUDGED = torch.randn(2, 3), [[0], [1, 0]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(judged=None), ValueError, "labels: expected labels or judged"),
        (dict(judged=None, grades=X), ValueError, "grades: expected None without judged"),
        (dict(labels=torch.arange(2)), ValueError, "labels: expected None beside judged"),
        (dict(judged=[[0], [2]]), IndexError, r"judged: expected columns in \[0, 2"),
        (dict(judged=[[0], [1, 1]]), ValueError, "judged: .* column 1 twice"),
        (dict(gain="burges"), ValueError, "gain: expected one of"),
        (dict(k=0), ValueError, "k: expected a value >= 1"),
        (dict(grades=[[1.0], [1.0]]), ValueError, r"grades\[1\]: expected 2 numbers"),
        (dict(grades=[[1.0], ["a", 2]]), TypeError, r"grades\[1\]: expected numbers"),
        (dict(grades=[[1.0]]), ValueError, "grades: expected 2 lists as judged, got 1"),
        (dict(grades=3), ValueError, "grades: expected 2 lists as judged, got int"),
        (dict(grades=[[-1.0], [1.0, 1.0]]), ValueError, "grades: expected values >= 0"),
        (dict(grades=[[2e3], [1, 1]], gain="exponential"), ValueError, "gains are finite"),
        (dict(judged=torch.zeros(2, 1).long(), grades=[[1], [1]]), TypeError, "grades: .* tensor"),
        (dict(judged=torch.zeros(2, 1).long(), grades=X), ValueError, r"numbers \[2, 1\]"),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        metrics.ndcg(**(dict(embeddings=X, judged=JUDGED) | change))
