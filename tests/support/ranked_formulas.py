"""Losses over rows where a miner says which pairs, or a second batch is met: triplet by triplet.

They follow the papers and use nothing of the package, and run in the dtype of their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pair_rows import Inputs, unit
from row_loss_formulas import distances, hats, members, over_nonzero, single, zero
from torch import Tensor

Made = Callable[[Tensor, Tensor], Tensor]


def nothing(t: Inputs) -> Tensor:
    return (t.x * 0).sum() + (t.y * 0).sum()


def mean(values: list[Tensor], t: Inputs) -> Tensor:
    return torch.stack(values).mean() + nothing(t) if values else nothing(t)


def lists(t: Inputs) -> tuple[list[list[int]], list[list[int]]]:
    """The columns that each row is listed with, as positives and as negatives."""
    near, far = ([[] for _ in t.x] for _ in range(2))
    for side, rows, columns in ((near, t.a, t.p), (far, t.b, t.q)):
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
            side[i].append(j)
    return near, far


def triplets(t: Inputs, swap: bool = False) -> Tensor:
    return hinges(t, lists(t), distances(t.y, t.y) if swap else None)


def hinges(
    t: Inputs, sides: tuple[list[list[int]], list[list[int]]], between: Tensor | None
) -> Tensor:
    """Of each row's positives and negatives; between: a negative is that of its positive, too."""
    each = [torch.zeros(0, dtype=t.x.dtype)]
    for row, near, far in zip(distances(t.x, t.y), *sides, strict=True):
        if near and far:
            beyond = row[far] if between is None else torch.minimum(row[far], between[near][:, far])
            each.append(F.relu(row[near][:, None] - beyond + 0.3).flatten())
    return over_nonzero(torch.cat(each), nothing(t)) + nothing(t)


def harmonic(t: Inputs) -> Tensor:
    """Squared distances to both models' rows; the negatives are the old one's."""
    d = distances(t.x, torch.cat([t.x, t.y.detach()]), "sqeuclidean")
    each = []
    for row, near, far in zip(d, *lists(t), strict=True):
        each += [F.relu(row[p] - row[len(t.x) + n] + 0.3) for p in near for n in far]
    return over_nonzero(torch.stack(each), zero(t)) + zero(t) if each else zero(t)


def anchors(t: Inputs) -> Tensor:
    """A row's terms times e^(w - 1), w how often it is listed over the most that one is."""
    counts = torch.cat([t.a, t.p, t.q]).bincount(minlength=len(t.x)).to(t.x)
    move = counts / counts.max() - 1
    s = unit(t.w) @ unit(t.x).T
    target = torch.arange(len(t.w))[:, None] == t.targets
    attract = torch.where(target, torch.exp(-8 * (s - 0.1) + move), 0).sum(1).log1p()
    repel = torch.where(target, 0, torch.exp(8 * (s + 0.1) + move)).sum(1).log1p()
    return attract.sum() / target.any(1).sum() + repel.mean()


def swapped(t: Inputs) -> Tensor:
    """Of all triplets of two batches."""
    return hinges(t, members(t.labels, t.y_labels), distances(t.y, t.y))


def batch_hard(t: Inputs) -> Tensor:
    each = []
    for row, near, far in zip(distances(t.x, t.y), *lists(t), strict=True):
        at = row.detach().tolist().__getitem__
        if near and far:
            each.append(F.relu(row[max(near, key=at)] - row[min(far, key=at)] + 0.3))
    return mean(each, t)


def easy_semihard(t: Inputs) -> Tensor:
    each = []
    for row, near, far in zip(distances(t.x, t.y), *lists(t), strict=True):
        at = row.detach().tolist().__getitem__
        p = min(near, key=at, default=None)
        beyond = [] if p is None else [n for n in far if at(n) > at(p)]
        if beyond:
            each.append(F.relu(row[p] - row[min(beyond, key=at)] + 0.3))
    return mean(each, t)


def tuplets(t: Inputs) -> Tensor:
    s = single(unit(t.x)) @ single(unit(t.y)).T
    each = []
    for row, near, far in zip(s, *lists(t), strict=True):
        for p in near:
            angle = row[p].clamp(-1 + 1e-6, 1 - 1e-6).acos() - math.radians(5.73)
            each.append(F.pad(20 * (row[far] - angle.cos()), (0, 1)).logsumexp(dim=0))
    return mean(each, t)


def angular(t: Inputs, listed: bool = True) -> Tensor:
    x, y, tan = unit(t.x), unit(t.y), math.tan(math.radians(40)) ** 2
    near, far = members(t.labels, t.y_labels)
    near = lists(t)[0] if listed else near
    each = []
    for a, (positives, negatives) in enumerate(zip(near, far, strict=True)):
        for p in positives:
            f = 4 * tan * (y[negatives] @ (x[a] + y[p])) - 2 * (1 + tan) * (x[a] @ y[p])
            each.append(F.pad(f, (0, 1)).logsumexp(dim=0))
    return mean(each, t)


def often(t: Inputs) -> Tensor:
    """How often each row is listed, over the most."""
    times = torch.cat([t.a, t.b]).bincount(minlength=len(t.x)).to(t.x.dtype)
    return times / times.max() if times.any() else torch.ones_like(times)


def fast_ap(t: Inputs) -> Tensor:
    d = distances(unit(t.x), unit(t.y), "sqeuclidean")
    nodes, each = torch.linspace(0, 4, 9, dtype=d.dtype), []
    sides = members(t.labels, t.y_labels)
    for row, near, far, weight in zip(d, *sides, often(t), strict=True):
        if near:
            h = hats(row[near], nodes)
            every = h.cumsum(0) + hats(row[far], nodes).cumsum(0)
            some = every > 0
            share = (h * h.cumsum(0))[some].div(every[some]).sum() / len(near)
            each.append((1 - share) * weight)
    return mean(each, t)


def histogram(t: Inputs, listed: bool = True) -> Tensor:
    s, nodes = unit(t.x) @ unit(t.y).T, torch.linspace(-1, 1, 13, dtype=t.x.dtype)
    sides = lists(t) if listed else members(t.labels, t.y_labels)
    near, far = [], []
    for row, one, other in zip(s, *sides, strict=True):
        if (one and other) or not listed:
            near += [row[j] for j in dict.fromkeys(one)]
            far += [row[j] for j in dict.fromkeys(other)]
    if not near or not far:
        return nothing(t)
    of_near = hats(torch.stack(near), nodes) / len(near)
    return (hats(torch.stack(far), nodes) / len(far) * of_near.cumsum(0)).sum()


def ranked_list(t: Inputs) -> Tensor:
    d, each = distances(unit(t.x), unit(t.y)), []
    for row, near, far in zip(d, *members(t.labels, t.y_labels), strict=True):
        loss = nothing(t)
        sides = ((0.7, F.relu(row[near] - 0.8), 1.5), (0.3, F.relu(1.2 - row[far]), 4.0))
        for weight, hinge, rate in sides:
            w = torch.where(hinge > 0, (rate * hinge).exp(), 0)
            loss = loss + weight * (w * hinge).sum() / (w.sum() + 1e-5 * len(t.y))
        each.append(loss)
    return mean(each, t)


def centroids(t: Inputs) -> Tensor:
    """Rows against the means of the other batch's classes."""
    labels = t.y_labels.tolist()
    classes = list(dict.fromkeys(labels))
    y = single(t.y)
    means = torch.stack([y[[j for j, k in enumerate(labels) if k == c]].mean(0) for c in classes])
    d = (single(t.x)[:, None] - means).square().sum(2).clamp_min(1e-12).sqrt()
    each = []
    for row, own in zip(d, t.labels.tolist(), strict=True):
        if own in classes and len(classes) > 1:
            at = classes.index(own)
            rest = torch.cat([row[:at], row[at + 1 :]])
            each.append(F.relu(row[at] - rest.min() + 0.5))
    return mean(each, t)


def icnn(t: Inputs, k: int = 3, window: int = 5) -> Tensor:
    d, labels, others = distances(t.x, t.y), t.labels.tolist(), t.y_labels.tolist()
    same_rows, other_rows, alike = [], [], 0
    for row, own in zip(d, labels, strict=True):
        order = sorted(range(len(others)), key=row.detach().tolist().__getitem__)[:window]
        near = [j for j in order[:k] if others[j] == own]
        far = [j for j in order[:k] if others[j] != own]
        beyond = [j for j in order if others[j] != own]
        radius = row[far[-1]] if far else row[beyond[0]] if beyond else math.inf
        alike += len(near)
        if near:
            n = row[near] / (radius + 1e-6)
            same_rows.append((n / n.max().clamp_min(1)).mean())
        if far:
            other_rows.append(row[far])
    close, apart = 1 - mean(same_rows, t), 1
    if other_rows:
        largest = torch.cat(other_rows).max() + 1e-6
        apart = torch.stack([(v / largest).mean() for v in other_rows]).mean()
    return -(((close + apart) / 2 + alike / (k * len(labels))) / 2).log()


# ---- one negative of each positive pair; smooth ranks -------------------------------------------


def semihard(t: Inputs, ref: bool = False, margin: float = 1.0, fallback: bool = True) -> Tensor:
    """Of each row the sum over its positives."""
    y = t.y if ref else t.x
    d = distances(t.x, y, "sqeuclidean" if ref else "euclidean")
    rows, count = [], 0
    for row, near, far in zip(d, *members(t.labels, t.y_labels if ref else None), strict=True):
        loss = zero(t) + (y * 0).sum()
        at = row.detach().tolist().__getitem__
        for p in near if far else []:
            beyond = [n for n in far if at(n) > at(p)]
            if beyond or fallback:
                n = min(beyond, key=at) if beyond else max(far, key=at)
                loss, count = loss + F.relu(row[p] - row[n] + margin), count + 1
        rows.append(loss)
    return torch.stack(rows) if not fallback else torch.stack(rows).sum() / max(count, 1)


def before(row: Tensor, own: list[int], columns: list[int]) -> Tensor:
    """Of each of a row's own columns how many of the others stand before it, smoothly."""
    apart = ((row[columns] - row[own][:, None]) / 0.1).sigmoid()
    itself = torch.tensor(own)[:, None] == torch.tensor(columns)
    return apart.masked_fill(itself, 0).sum(1)


def smooth_rows(
    t: Inputs, made: Made, ref: bool = False, count_self: bool = True
) -> list[Tensor | None]:
    """The mean of made(positives before, negatives before) over a row's positives, or None."""
    x = unit(t.x)
    s = x @ (unit(t.y) if ref else x).T
    out = []
    sides = members(t.labels, t.y_labels if ref else None)
    for i, (row, near, far) in enumerate(zip(s, *sides, strict=True)):
        own = [*near, i] if count_self and not ref else near
        out.append(made(before(row, own, own), before(row, own, far)).mean() if near else None)
    return out


def smooth_ap(t: Inputs, ref: bool = False, weighted: bool = False, **how: bool) -> Tensor:
    rows = smooth_rows(t, lambda p, n: (1 + p) / (1 + p + n), ref, **how)
    weights = torch.ones(len(rows), dtype=t.x.dtype)
    if weighted:
        weights = (torch.arange(len(rows)) < len(rows) // 2).to(t.x.dtype)
    each = [zero(t) if r is None else (1 - r) * w for r, w in zip(rows, weights, strict=True)]
    if ref:
        return torch.stack(each) + (t.y * 0).sum()
    kept = [v for v, r in zip(each, rows, strict=True) if r is not None]
    return torch.stack(kept).mean() if kept else zero(t)


MADE = {
    "O": lambda r: r,
    "Ds": lambda r: r.log1p(),
    "Dq": lambda r: 1 - 1 / (1 + r),
    "Iu": lambda r: (1 + r) * r.log1p(),
    "Ib": lambda r: (2 * r - (2 * r).log1p()) / 4,
}


def pnp(t: Inputs, variant: str, ref: bool = False) -> Tensor:
    rows = smooth_rows(t, lambda _, n: MADE[variant](n), ref)
    kept = [r for r in rows if r is not None]
    if ref:
        return (torch.stack(kept).sum() if kept else zero(t)) + nothing(t)
    return torch.stack(kept).mean() if kept else zero(t)
