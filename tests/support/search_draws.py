"""Neighbours and clusters for the draws, chosen by loops."""

from __future__ import annotations

from typing import Any

import torch
from choice_draws import Batch, Choice
from mining_formulas import matrix
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import metrics


def nearest(values: Tensor, given: Batch) -> list[int]:
    """The first column of the least value."""
    return [min(range(len(row)), key=lambda j: (row[j], j)) for row in values.tolist()]


def clustered(spherical: bool) -> Any:
    def call(given: Batch, more: dict[str, Any]) -> list[int]:
        centers = given.columns[0]
        options = dict(init=centers, iterations=0, spherical=spherical)
        return fl.kmeans(given.x, len(centers), **options, **more).labels.tolist()

    return call


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).abs().pow(3).sum(2).pow(1 / 3)


def own_cosines(x: Tensor, _: Tensor) -> Tensor:
    return matrix(x, x, "cosine")


def scores(x: Tensor, y: Tensor) -> Tensor:
    return matrix(x, y, "dot") + y[:, 0]


# ---- within a radius ----------------------------------------------------------------------------

EDGE = 0.9


def inside(values: Tensor, given: Batch) -> list[tuple[int, int]]:
    return [
        (i, j) for i, row in enumerate(values.tolist()) for j in range(len(row)) if row[j] <= EDGE
    ]


def met(found: Any) -> list[tuple[int, int]]:
    return list(zip(found.rows().tolist(), found.indices.tolist(), strict=True))


def search(given: Batch, more: dict[str, Any]) -> list[tuple[int, int]]:
    return met(fl.radius_search(given.x, given.columns[0], EDGE, **more))


def alone(given: Batch, more: dict[str, Any]) -> list[tuple[int, int]]:
    return met(fl.radius_search(given.x, None, EDGE, "cosine", skip_self=True, **more))


def others(values: Tensor, given: Batch) -> list[tuple[int, int]]:
    return [(i, j) for i, j in inside(1 - values, given) if i != j]


def told(given: Batch) -> dict[str, Any]:
    y, labels = given.columns
    ids = dict(x_ids=torch.arange(len(given.x)) // 2, y_ids=torch.arange(len(y)) // 2)
    both = dict(x_labels=given.labels, y_labels=labels, match="different")
    return dict(**ids, **both, exclude=torch.zeros(len(given.x), 1, dtype=torch.int64))


def far(given: Batch, more: dict[str, Any]) -> list[tuple[int, int]]:
    if more.get("backend") == "cuda":
        more = {}  # float64 decides, which its kernels do not take
    options = dict(metric="minkowski", p=3.0, largest=True)
    return met(fl.radius_search(given.x, given.columns[0], EDGE, **options, **told(given), **more))


def beyond(values: Tensor, given: Batch) -> list[tuple[int, int]]:
    labels, known = given.columns[1].tolist(), given.labels.tolist()
    return [
        (i, j)
        for i, row in enumerate(values.tolist())
        for j in range(1, len(row))
        if row[j] >= EDGE and labels[j] != known[i] and i // 2 != j // 2
    ]


def voted(given: Batch, more: dict[str, Any]) -> list[int]:
    y, labels = given.columns
    known = labels.clamp(0, 1_000)
    options: dict[str, Any] = dict(weights="uniform", temperature=0.2, metric="euclidean")
    ids = dict(ids=torch.arange(len(given.x)) // 2, ref_ids=torch.arange(len(y)) // 2)
    rows = (given.x, y.clone(), known, EDGE)
    found = metrics.radius_classify(*rows, num_classes=1_001, **options, **ids, **more)
    assert found.scores is not None and len(found.scores) == len(given.x)
    return found.labels.tolist()


def majority(values: Tensor, given: Batch) -> list[int]:
    known, found = given.columns[1].clamp(0, 1_000).tolist(), []
    for i, row in enumerate(values.tolist()):
        votes = [known[j] for j in range(len(row)) if row[j] <= EDGE and i // 2 != j // 2]
        found.append(min(set(votes), key=lambda c: (-votes.count(c), c)) if votes else -1)
    return found


# ---- codes --------------------------------------------------------------------------------------


def codes(given: Batch, more: dict[str, Any]) -> list[list[int]]:
    y = given.columns[0]
    among = torch.arange(len(y)) % 3 != 1
    bias = y[:, 0].contiguous()
    return fl.sparse_codes(given.x, y, 1, bias=bias, among=among, **more)[1].tolist()


def coded(values: Tensor, given: Batch) -> list[list[int]]:
    return [
        [min((j for j in range(len(row)) if j % 3 != 1), key=lambda j: (-row[j], j))]
        for row in values.tolist()
    ]


CHOICES = [
    Choice("radius_search", fl.radius_search, "euclidean", search, inside),
    Choice("radius_search_own", fl.radius_search, "cosine", alone, others, values=own_cosines),
    Choice("radius_search_far", fl.radius_search, "minkowski", far, beyond, values=cubic),
    Choice("radius_classify", metrics.radius_classify, "euclidean", voted, majority),
    Choice("sparse_codes", fl.sparse_codes, "dot", codes, coded, values=scores),
    Choice("kmeans", fl.kmeans, "sqeuclidean", clustered(False), nearest),
    Choice("kmeans_spherical", fl.kmeans, "cosine", clustered(True), lambda v, g: nearest(-v, g)),
]
