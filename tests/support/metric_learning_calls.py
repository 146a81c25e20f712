"""Losses of pytorch-metric-learning as users build them, and the calls of each that we compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import hard_data
import pytest
import torch
from torch import Tensor

pml = pytest.importorskip("pytorch_metric_learning", reason="the peer is not installed")
distances = pytest.importorskip("pytorch_metric_learning.distances")
losses = pytest.importorskip("pytorch_metric_learning.losses")
miners = pytest.importorskip("pytorch_metric_learning.miners")
reducers = pytest.importorskip("pytorch_metric_learning.reducers")
regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")

C, D, N, M = 6, 8, 24, 20

ALONE, REF, PAIRS, TRIPLETS, LISTED_REF = "alone", "ref", "pairs", "triplets", "pairs of ref"
EVERY = (ALONE, REF, PAIRS, TRIPLETS, LISTED_REF)
OWN = (ALONE, PAIRS, TRIPLETS)


class Case(NamedTuple):
    """A loss and the ways of calling it."""

    name: str
    build: Callable[[], Any]
    ways: tuple[str, ...] = EVERY
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.note}".strip()


def _of(name: str, ways: tuple[str, ...] = EVERY, note: str = "", **options: Any) -> Case:
    def build() -> Any:
        made = {key: value() for key, value in options.items() if callable(value)}
        return getattr(losses, name)(**{**options, **made})

    return Case(name, build, ways, note)


def _classes(name: str, note: str = "", **options: Any) -> Case:
    return _of(name, OWN, note, num_classes=C, embedding_size=D, **options)


cosine, dot = distances.CosineSimilarity, distances.DotProductSimilarity
plain_dot = lambda: dot(normalize_embeddings=False)
euclidean = lambda: distances.LpDistance(p=2, power=1)
squared = lambda: distances.LpDistance(p=2, power=2)
long = lambda: distances.LpDistance(normalize_embeddings=False)
total, mean = reducers.SumReducer, reducers.MeanReducer
per_class = lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, C))

CASES = (
    _of("CircleLoss"),
    _of("CircleLoss", note="m, gamma, sum", m=0.25, gamma=20, reducer=total),
    _of("MultiSimilarityLoss"),
    _of("MultiSimilarityLoss", note="distance", beta=10, distance=euclidean),
    _of("MultiSimilarityLoss", note="classes weighted", beta=10, reducer=per_class),
    _of(
        "MultiSimilarityLoss", note="regularised", embedding_regularizer=regularizers.LpRegularizer
    ),
    _of("GeneralizedLiftedStructureLoss"),
    _of("GeneralizedLiftedStructureLoss", note="cosine", distance=cosine),
    _of("SupConLoss"),
    _of("SupConLoss", note="products", temperature=2.0, distance=plain_dot),
    _of("SupConLoss", note="distance", distance=euclidean, reducer=mean),
    _of("ContrastiveLoss"),
    _of("ContrastiveLoss", note="cosine", pos_margin=0.9, neg_margin=0.1, distance=cosine),
    _of("ContrastiveLoss", note="mean", reducer=mean),
    _of("ContrastiveLoss", note="sum, squared", reducer=total, distance=squared),
    _of("ContrastiveLoss", note="lengths", neg_margin=3, distance=long),
    _of("NTXentLoss"),
    _of("NTXentLoss", note="sum", temperature=0.5, reducer=total),
    _of("NTXentLoss", note="products of unit rows", distance=dot),
    _of("TupletMarginLoss"),
    _of("TupletMarginLoss", note="sum", scale=8, reducer=total),
    _of("LiftedStructureLoss", OWN),
    _of("LiftedStructureLoss", OWN, "margins, sum", pos_margin=0.3, neg_margin=2, reducer=total),
    _of("AngularLoss"),
    _of("AngularLoss", note="sum", alpha=35, reducer=total),
    _of("IntraPairVarianceLoss"),
    _of("SignalToNoiseRatioContrastiveLoss"),
    _of("ThresholdConsistentMarginLoss", OWN),
    _of("TripletMarginLoss", margin=0.2),
    _of("TripletMarginLoss", note="smooth, cosine", smooth_loss=True, distance=cosine),
    _of("TripletMarginLoss", OWN, "swap", swap=True, margin=0.3),
    _of("TripletMarginLoss", note="mean", margin=0.3, reducer=mean),
    _of("TripletMarginLoss", note="sum, squared", margin=0.3, reducer=total, distance=squared),
    _of("TripletMarginLoss", note="drawn", margin=0.3, triplets_per_anchor=5),
    _of("MarginLoss"),
    _of("MarginLoss", note="beta", learn_beta=True, nu=0.1),
    _of("MarginLoss", note="class beta", learn_beta=True, num_classes=C),
    _of("NCALoss", (ALONE, REF, PAIRS, TRIPLETS)),
    _of("NCALoss", (ALONE, REF), "cosine", softmax_scale=5, distance=cosine),
    _of("NPairsLoss", OWN),
    _of("FastAPLoss", OWN),
    _of("SmoothAPLoss", OWN, temperature=0.1),
    _of("PNPLoss", (ALONE,), anneal=0.1),
    *(
        _of("PNPLoss", (ALONE,), variant, anneal=0.1, variant=variant)
        for variant in ("Ds", "Dq", "Iu", "Ib")
    ),
    _of("RankedListLoss", (ALONE,), margin=0.4, Tn=4, Tp=1),
    _of("HistogramLoss", OWN, n_bins=20),
    _of("InstanceLoss", (ALONE,), gamma=16),
    _classes("ArcFaceLoss"),
    _classes("ArcFaceLoss", "beyond pi", margin=80, scale=16),
    _classes("ArcFaceLoss", "regularised", weight_regularizer=regularizers.LpRegularizer),
    _classes("ArcFaceLoss", "classes weighted", reducer=per_class),
    _classes("CosFaceLoss"),
    _classes("SphereFaceLoss"),
    _classes("LargeMarginSoftmaxLoss"),
    _classes("SubCenterArcFaceLoss"),
    _classes("NormalizedSoftmaxLoss"),
    _classes("NormalizedSoftmaxLoss", "products", temperature=1.0, distance=plain_dot),
    _classes("SoftTripleLoss", centers_per_class=3),
    _classes("ProxyNCALoss"),
    _classes("ProxyNCALoss", "scale", softmax_scale=3),
    _classes("ProxyAnchorLoss"),
)

KINDS = ("plain", "near duplicates", "large", "outlier")


class Given(NamedTuple):
    """Rows in float64, of float32's values, and how they are told apart."""

    x: Tensor  # [N, D]
    labels: Tensor  # [N]
    y: Tensor  # [M, D]
    y_labels: Tensor  # [M]
    pairs: tuple[Tensor, ...]  # (a, p, a, n) of the batch, some twice
    triplets: tuple[Tensor, ...]  # (a, p, n) of the batch
    ref_pairs: tuple[Tensor, ...]  # of the batch and y


def given(kind: str, seed: int = 0) -> Given:
    """Four rows a class, of one direction and noise, then made hard."""
    generator = torch.Generator().manual_seed(seed)

    def rows(labels: Tensor) -> Tensor:
        drawn = torch.randn(len(labels), D, generator=generator, dtype=torch.float64)
        return (directions[labels] + 0.6 * drawn) / D**0.5

    directions = torch.randn(C, D, generator=generator, dtype=torch.float64)
    labels = torch.arange(N) // 4
    labels = labels[torch.randperm(N, generator=generator)]
    y_labels = torch.randint(0, C, (M,), generator=generator)
    x, y = rows(labels), rows(y_labels)
    x, y = (hard_data.KINDS[kind](t, generator).float().double() for t in (x, y))
    own = _lists(labels, labels, True, generator)
    a, p, b, n = own
    # each positive pair with up to three negatives of its anchor
    lines = [(i, k) for i, anchor in enumerate(a) for k in (b == anchor).nonzero()[:3, 0]]
    first, meet = torch.tensor(lines).T
    triplets = a[first], p[first], n[meet]
    twice = tuple(torch.cat([t, t[:5]]) for t in own)
    return Given(
        x, labels, y, y_labels, twice, triplets, _lists(labels, y_labels, False, generator)
    )


def _lists(x: Tensor, y: Tensor, alone: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Most positive pairs and some negative ones, in any order."""
    alike = x[:, None] == y
    negative = ~alike & (torch.rand(alike.shape, generator=generator) < 0.5)
    if alone:
        alike.fill_diagonal_(False)
    a, p = alike.nonzero().T
    some = torch.randperm(len(a), generator=generator)[: len(a) * 4 // 5]
    b, n = negative.nonzero().T
    return a[some], p[some], b, n


def outcome(case: Case, t: Given, way: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, then the gradients of the rows, of the other rows and of the parameters."""
    torch.manual_seed(3)
    loss = case.build()
    for parameter in loss.parameters():
        # the same start in any dtype
        parameter.data = parameter.data.float().to(dtype)
    torch.manual_seed(4)
    x = t.x.to(dtype).requires_grad_()
    leaves, options = [x], {}
    if way in (REF, LISTED_REF):
        y = t.y.to(dtype).requires_grad_()
        leaves.append(y)
        options = dict(ref_emb=y, ref_labels=t.y_labels)
    lists = {PAIRS: t.pairs, TRIPLETS: t.triplets, LISTED_REF: t.ref_pairs}.get(way)
    value = loss(x, t.labels, lists, **options)
    leaves += list(loss.parameters())
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    found = [
        torch.zeros_like(at) if g is None else g for g, at in zip(gradients, leaves, strict=True)
    ]
    return [value.detach(), *found]
