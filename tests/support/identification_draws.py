"""Identification and graded rankings for the draws, decided by loops over float64 values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from choice_draws import Batch, Choice
from metric_oracles import rankings
from torch import Tensor

from fused_losses import metrics

Told = list[Any]


def rounded(values: list[float]) -> Told:
    return ["nan" if math.isnan(value) else round(value, 9) for value in values]


def own_lists(given: Batch) -> list[list[int]]:
    """Three of four rows for each query."""
    return [[j for j in range(len(given.columns[0])) if (i + j) % 4] for i in range(len(given.x))]


def orders(d: Tensor, given: Batch, way: str) -> list[list[int]]:
    """Each query's columns by rank: all, or by what `told` gives for this way."""
    alone, labels = given.y is None, given.columns[1].tolist()
    numbers = [torch.arange(len(rows)) // 2 for rows in (given.x, given.columns[0])]
    order = rankings(d, alone, *(numbers if way == "ids" else ()))
    if way == "galleries":
        return [[j for j in row if (i + j) % 4] for i, row in enumerate(order)]
    if way == "cameras":
        return [
            [j for j in row if labels[j] != given.labels[i] or j % 3 != i % 3]
            for i, row in enumerate(order)
        ]
    return order


def told(given: Batch, way: str) -> dict[str, Any]:
    counts = {"": len(given.x)} | ({} if given.y is None else {"ref_": len(given.y)})
    if way == "galleries":
        return dict(galleries=own_lists(given))
    if way == "cameras":
        return {f"{side}cameras": torch.arange(count) % 3 for side, count in counts.items()}
    if way == "ids":
        return {f"{side}ids": torch.arange(count) // 2 for side, count in counts.items()}
    return {}


def first_match(order: list[list[int]], given: Batch) -> list[int]:
    """The place of each query's first row of its label; -1 where there is none."""
    labels = given.columns[1].tolist()
    out = []
    for own, columns in zip(given.labels.tolist(), order, strict=True):
        hits = [labels[j] == own for j in columns]
        out.append(hits.index(True) if True in hits else -1)
    return out


def ranks(way: str) -> Choice:
    k = 4

    def decide(d: Tensor, given: Batch) -> Told:
        first = first_match(orders(d, given, way), given)
        known = [at for at in first if at >= 0]
        curve = [sum(at <= r for at in known) / len(known) if known else math.nan for r in range(k)]
        each = [math.nan if at < 0 else at + 1.0 if at < k else math.inf for at in first]
        return [rounded(curve), rounded(each)]

    def call(given: Batch, more: dict[str, Any]) -> Told:
        options = dict(k=k, metric="euclidean", per_query=True) | told(given, way) | more
        found = metrics.cmc(*given.given, **options)
        assert found.per_query is not None
        return [rounded(found.value.tolist()), rounded(found.per_query.tolist())]

    return Choice(f"cmc_{way or 'all'}", metrics.cmc, "euclidean", call, decide)


def alarms(way: str) -> Choice:
    """Which probes are found where a fifth of the strangers may pass, at rank 2."""
    far, rank = 0.2, 2

    def decide(d: Tensor, given: Batch) -> Told:
        order = orders(d, given, way)
        first = first_match(order, given)
        strangers = [
            float(d[i, row[0]]) if row else math.inf
            for i, (row, at) in enumerate(zip(order, first, strict=True))
            if at < 0
        ]
        allowed = far * len(strangers) + 1e-12
        tries = [math.inf, *strangers]
        t = max(value for value in tries if sum(s < value for s in strangers) <= allowed)
        found = [
            math.nan if at < 0 else float(at < rank and float(d[i, order[i][at]]) < t)
            for i, at in enumerate(first)
        ]
        return rounded(found)

    def call(given: Batch, more: dict[str, Any]) -> Told:
        options: dict[str, Any] = dict(far=far, rank=rank, metric="euclidean", per_query=True)
        found = metrics.dir_at_far(*given.given, **(options | told(given, way) | more))
        assert isinstance(found, metrics.Identification) and found.per_query is not None
        return rounded(found.per_query.tolist())

    return Choice(f"dir_at_far_{way or 'all'}", metrics.dir_at_far, "euclidean", call, decide)


def grade(i: int, j: int) -> float:
    return float((3 * i + j) % 5)


def graded(d: Tensor, given: Batch) -> Told:
    """The columns of an even number are judged."""
    out = []
    for i, columns in enumerate(rankings(d, given.y is None)):
        gains = [2 ** grade(i, j) - 1 if j % 2 == 0 else 0.0 for j in columns]
        total, best = (
            sum(g / math.log2(r + 2) for r, g in enumerate(row[:3]))
            for row in (gains, sorted(gains, reverse=True))
        )
        out.append(total / best if best else math.nan)
    return rounded(out)


def judge(given: Batch, more: dict[str, Any]) -> Told:
    judged = [list(range(0, len(given.columns[0]), 2)) for _ in given.x]
    grades = [[grade(i, j) for j in row] for i, row in enumerate(judged)]
    options: dict[str, Any] = dict(k=3, gain="exponential", metric="euclidean", per_query=True)
    found = metrics.ndcg(given.x, None, given.y, judged=judged, grades=grades, **options, **more)
    assert isinstance(found.per_query, Tensor)
    return rounded(found.per_query.tolist())


WAYS: dict[Callable[[str], Choice], tuple[str, ...]] = {
    ranks: ("", "ids", "galleries", "cameras"),
    alarms: ("", "ids", "galleries"),
}
CHOICES = [
    *(kind(way) for kind, ways in WAYS.items() for way in ways),
    Choice("ndcg_graded", metrics.ndcg, "euclidean", judge, graded),
]
