"""Distances of pairs in float64, by their definitions, and the metrics by loops."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


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


def meet(one: int | list[int], other: int | list[int]) -> bool:
    """Equal labels; or sets of labels, -1 for none, that share one."""
    if isinstance(one, list) and isinstance(other, list):
        return bool({label for label in one if label >= 0} & set(other))
    return one == other


def by_loops(name: str, order: list[list[int]], labels, ref_labels, k: int | None) -> tuple:
    """(mean, queries that count)"""
    labels, ref_labels, values = labels.tolist(), ref_labels.tolist(), []
    for i, columns in enumerate(order):
        hits = [meet(labels[i], ref_labels[j]) for j in columns]
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
        elif name == "ndcg":
            gains = [h / math.log2(r + 2) for r, h in enumerate(hits)]
            value = sum(gains[:k]) / sum(1 / math.log2(r + 2) for r in range(min(relevant, k)))
        elif name == "r_precision":
            value = sum(hits[:relevant]) / relevant
        else:
            value = 1 / (first + 1) if k is None or first < k else 0.0
        values.append(value)
    return (sum(values) / len(values) if values else math.nan), len(values)


def rates(scores: Tensor, same: Tensor, threshold: float) -> tuple[float, float]:
    above = scores > threshold
    return float(above[~same].double().mean()), float(above[same].double().mean())


def accuracy_by_loops(
    scores: Tensor, same: Tensor, fold: list[int]
) -> tuple[list[float], list[float]]:
    """(accuracy, threshold) of each fold."""
    out, thresholds = [], []
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
        thresholds.append(threshold)
        out.append(float(((scores[mine] > threshold) == same[mine]).double().mean()))
    return out, thresholds
