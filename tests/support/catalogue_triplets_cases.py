"""Rows of the catalogue: losses over the triplets of a batch, each triplet written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case
from torch import Tensor, nn

from fused_losses import losses

Rows = list[list[int]]


def root(squared: Tensor) -> Tensor:
    """The square root, with slope 0 at 0."""
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1).sqrt(), 0)


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(2)


def members(labels: Tensor, others: Tensor | None = None) -> tuple[Rows, Rows]:
    """Each row's positives and negatives; others None: the batch itself, without the row."""
    own = others is None
    columns = (labels if own else others).tolist()
    near, far = [], []
    for i, label in enumerate(labels.tolist()):
        near.append([j for j, k in enumerate(columns) if k == label and not (own and i == j)])
        far.append([j for j, k in enumerate(columns) if k != label])
    return near, far


def zero(*rows: Tensor) -> Tensor:
    return sum(((x * 0).sum() for x in rows), torch.zeros(()))


def mean(values: list[Tensor], nothing: Tensor) -> Tensor:
    return torch.stack(values).mean() + nothing if values else nothing


def over_nonzero(values: list[Tensor], nothing: Tensor) -> Tensor:
    """The mean over the values above 0."""
    return mean([v for v in values if v > 0], nothing)


def triplet_margin(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    d = root(squares(unit, unit))
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        each += [F.relu(row[p] - row[n] + 0.05) for p in near for n in far]
    return over_nonzero(each, zero(x))


def batch_semihard(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d = root(squares(x, x))
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        for p in near if far else []:
            beyond = [n for n in far if row[n] > row[p]]
            chosen = row[beyond].min() if beyond else row[far].max()
            each.append(F.relu(row[p] - chosen + 5))
    return mean(each, zero(x))


def facenet(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    d = squares(unit, unit)
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        gaps = [row[p] - row[n] for p in near for n in far]
        each += [g + 0.2 for g in gaps if -0.2 <= g < 0]
    return over_nonzero(each, zero(x))


def batch_hard(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d = root(squares(x, x))
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        if near and far:
            each.append(torch.log1p((row[near].max() - row[far].min()).exp()))
    return mean(each, zero(x))


def batch_easy_semihard(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    d = root(squares(unit, unit))
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        p = row[near].min() if near else torch.inf
        beyond = [n for n in far if row[n] > p]
        if beyond:
            each.append(F.relu(p - row[beyond].min() + 0.05))
    return mean(each, zero(x))


def harmonic(
    _: nn.Module, x: Tensor, labels: Tensor, frozen: Tensor, old: Tensor | None = None
) -> Tensor:
    unit, others = F.normalize(x, dim=1), F.normalize(frozen.detach(), dim=1)
    d = squares(unit, torch.cat([unit, others]))
    near, far = members(labels, torch.cat([labels, labels if old is None else old]))
    each = []
    for i, row in enumerate(d):
        for p in (p for p in near[i] if p != i):
            gaps = [row[p] - row[n] for n in far[i]]
            each += [g + 0.2 for g in gaps if -0.2 <= g < 0]
    return over_nonzero(each, zero(x))


def centroids(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Round by round, the rows of the round and their centroids one batch."""
    of: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        of.setdefault(label, []).append(i)
    each = []
    for r in range(max(map(len, of.values()))):
        taking = [v for v in of.values() if len(v) > max(r, 1)]
        if not taking:
            continue
        rows = torch.stack([x[v[r]] for v in taking])
        means = [x[[i for i in v if i != v[r]]].mean(dim=0) for v in taking]
        both = torch.cat([rows, torch.stack(means)])
        d = squares(both, both).clamp_min(1e-12).sqrt()
        own = torch.arange(len(taking)).repeat(2)
        for row, near, far in zip(d, *members(own), strict=True):
            if far:
                each.append(F.relu(row[near].max() - row[far].min() + 0.3))
    return mean(each, zero(x))


def prototypes(_: nn.Module, x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    d = (squares(x, w) + 1e-6).sqrt()
    each = []
    for row, own in zip(d, labels.tolist(), strict=True):
        others = torch.cat([row[:own], row[own + 1 :]])
        if len(others):
            each.append(F.relu(row[own] - others.min() + 0.5))
    return mean(each, zero(x, w))


def with_frozen(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """A batch, and the same samples by an old model."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    frozen = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return Call((x, labels, frozen))


def with_prototypes(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = torch.randn(int(labels.max()) + 1, d, generator=generator, dtype=torch.float64)
    return Call((x, w, labels))


CASES = {
    "TripletMarginLoss": Case(lambda d: losses.TripletMarginLoss(), triplet_margin),
    "BatchSemiHardTripletLoss": Case(lambda d: losses.BatchSemiHardTripletLoss(), batch_semihard),
    "FaceNetTripletLoss": Case(lambda d: losses.FaceNetTripletLoss(), facenet),
    "BatchHardTripletLoss": Case(lambda d: losses.BatchHardTripletLoss(), batch_hard),
    "BatchEasyHardTripletLoss": Case(
        lambda d: losses.BatchEasyHardTripletLoss(), batch_easy_semihard
    ),
    "HarmonicTripletLoss": Case(
        lambda d: losses.HarmonicTripletLoss(), harmonic, call=with_frozen, gradcheck=False
    ),
    "CentroidTripletLoss": Case(lambda d: losses.CentroidTripletLoss(), centroids, ordered=True),
    "PrototypeTripletLoss": Case(
        lambda d: losses.PrototypeTripletLoss(), prototypes, call=with_prototypes
    ),
}
