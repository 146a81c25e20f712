"""Rows of the catalogue: losses over whole rows of distances, a row at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from catalogue_table import Case
from catalogue_triplets_cases import mean, members, root, squares, zero
from torch import Tensor, nn

from fused_losses import losses


def single(x: Tensor) -> Tensor:
    """At least float32: 16 bits have no 1 - 1e-6."""
    return x if x.dtype == torch.float64 else x.float()


def angular(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit, t = F.normalize(x, dim=1), math.tan(math.radians(40)) ** 2
    each = []
    for a, (near, far) in enumerate(zip(*members(labels), strict=True)):
        for p in near:
            f = 4 * t * (x[far] @ (unit[a] + unit[p])) - 2 * (1 + t) * (unit[a] @ unit[p])
            each.append(F.pad(f, (0, 1)).logsumexp(dim=0))
    return mean(each, zero(x))


def tuplets(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = single(F.normalize(x, dim=1))
    s = unit @ unit.T
    each = []
    for row, near, far in zip(s, *members(labels), strict=True):
        for p in near if far else []:
            angle = row[p].clamp(-1 + 1e-6, 1 - 1e-6).acos() - math.radians(5.73)
            each.append(F.pad(64 * (row[far] - angle.cos()), (0, 1)).logsumexp(dim=0))
    return mean(each, zero(x))


def hats(values: Tensor, nodes: Tensor) -> Tensor:
    """How much of the values is at each node: 1 there, 0 at its neighbours. [nodes]"""
    values = values.clamp(nodes[0], nodes[-1])
    return F.relu(1 - (values[:, None] - nodes).abs() / (nodes[1] - nodes[0])).sum(dim=0)


def fast_ap(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    d, nodes = squares(unit, unit), torch.linspace(0, 4, 11, dtype=x.dtype)
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        if near:
            h = hats(row[near], nodes)
            every = h.cumsum(0) + hats(row[far], nodes).cumsum(0)
            some = every > 0
            each.append(1 - (h * h.cumsum(0))[some].div(every[some]).sum() / len(near))
    return mean(each, zero(x))


def histogram(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    s, nodes = unit @ unit.T, torch.linspace(-1, 1, 101, dtype=x.dtype)
    lists = [zip(s, side, strict=True) for side in members(labels)]
    near, far = (torch.cat([row[of] for row, of in side]) for side in lists)
    if not len(near) or not len(far):
        return zero(x)
    return (hats(far, nodes) / len(far) * (hats(near, nodes) / len(near)).cumsum(0)).sum()


def ranked_list(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    d = root(squares(unit, unit))
    each = []
    for row, near, far in zip(d, *members(labels), strict=True):
        attract = [row[p] - 0.8 for p in near if row[p] > 0.8]
        repel = [1.2 - row[n] for n in far if row[n] < 1.2]
        pull = sum(attract, zero(x)) / (len(attract) + 1e-5 * len(x))
        weights = [(10 * v).exp() for v in repel]
        push = sum((w * v for w, v in zip(weights, repel, strict=True)), zero(x))
        each.append(0.5 * pull + 0.5 * push / (sum(weights, zero(x)) + 1e-5 * len(x)))
    return mean(each, zero(x))


def icnn(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d, tags, k, window = root(squares(x, x)), labels.tolist(), 4, 6
    same, other, alike = [], [], 0
    for i, row in enumerate(d):
        value = row.detach().tolist()
        order = sorted((j for j in range(len(x)) if j != i), key=value.__getitem__)[:window]
        near = [j for j in order[:k] if tags[j] == tags[i]]
        far = [j for j in order[:k] if tags[j] != tags[i]]
        beyond = [j for j in order if tags[j] != tags[i]]
        radius = row[far[-1]] if far else row[beyond[0]] if beyond else torch.inf
        alike += len(near)
        if near:
            share = row[near] / (radius + 1e-6)
            same.append((share / share.max().clamp_min(1)).mean())
        if far:
            other.append(row[far])
    close = 1 - mean(same, zero(x))
    apart = torch.ones(())
    if other:
        largest = torch.cat(other).max() + 1e-6
        apart = mean([v.mean() / largest for v in other], zero(x))
    return -(((close + apart) / 2 + alike / (k * len(x))) / 2).log()


def before(row: Tensor, p: int, columns: list[int]) -> Tensor:
    """How many columns stand before p."""
    return ((row[columns] - row[p]) / 0.01).sigmoid().sum()


def smooth_ap(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    each = []
    for i, (near, far) in enumerate(zip(*members(labels), strict=True)):
        if near:
            row, own, parts = unit @ unit[i], [*near, i], []
            for p in own:
                ahead = 1 + before(row, p, [q for q in own if q != p])
                parts.append(ahead / (ahead + before(row, p, far)))
            each.append(1 - torch.stack(parts).mean())
    return mean(each, zero(x))


def pnp(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    each = []
    for i, (near, far) in enumerate(zip(*members(labels), strict=True)):
        if near:
            row = unit @ unit[i]
            each.append(torch.stack([before(row, p, far) for p in [*near, i]]).mean())
    return mean(each, zero(x))


CASES = {
    "SmoothAPLoss": Case(lambda d: losses.SmoothAPLoss(), smooth_ap),
    "PNPLoss": Case(lambda d: losses.PNPLoss(), pnp),
    "AngularLoss": Case(lambda d: losses.AngularLoss(), angular),
    "TupletMarginLoss": Case(lambda d: losses.TupletMarginLoss(), tuplets),
    "FastAPLoss": Case(lambda d: losses.FastAPLoss(), fast_ap),
    "HistogramLoss": Case(lambda d: losses.HistogramLoss(), histogram),
    "RankedListLoss": Case(lambda d: losses.RankedListLoss(), ranked_list),
    "ICNNLoss": Case(lambda d: losses.ICNNLoss(), icnn),
}
