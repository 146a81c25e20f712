"""Formulas of the losses over rows, with their triplets and pairs written out.

They follow the papers and use nothing of the package; they run in the dtype of their inputs, so
that in float64 they are the truth and in float32 or bfloat16 what a user would write.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pair_rows import Inputs, batch, unit
from torch import Tensor

# ---- inputs -------------------------------------------------------------------------------------


def crowded(n: int, m: int, d: int) -> Inputs:
    """One batch of two classes and a row of its own."""
    t = batch(n, m, d)
    t.labels = torch.arange(n) % 2
    t.labels[-1] = 7
    return t


def two_batches(n: int, m: int, d: int) -> Inputs:
    """A batch and a second one, some of whose classes are nowhere else."""
    labels = torch.randint(0, n // 3 + 1, (n,))
    y_labels = torch.randint(0, n // 3 + 3, (m,))
    centers = torch.randn(n // 3 + 3, d)
    x, y = torch.randn(n, d) + centers[labels], torch.randn(m, d) + centers[y_labels]
    return Inputs(x=x / d**0.5, y=y / d**0.5, labels=labels, y_labels=y_labels)


def bounded_batch(n: int, m: int, d: int) -> Inputs:
    """One batch with a boundary for all and one a class."""
    t = batch(n, m, d)
    t.labels = torch.randint(0, n // 4 + 1, (n,))
    t.beta = torch.tensor(1.1)
    t.class_beta = 1 + torch.rand(n // 4 + 1) / 3
    return t


def prototypes(n: int, m: int, d: int) -> Inputs:
    labels = torch.randint(0, m, (n,))
    w = torch.randn(m, d)
    return Inputs(x=(torch.randn(n, d) + w[labels]) / d**0.5, w=w / d**0.5, targets=labels)


# ---- distances and who is whose positive --------------------------------------------------------


def root(squared: Tensor) -> Tensor:
    """The square root, with slope 0 at 0."""
    alive = squared > 0
    return torch.where(alive, torch.where(alive, squared, 1).sqrt(), 0)


def distances(x: Tensor, y: Tensor, name: str = "euclidean") -> Tensor:
    if name == "cosine":
        return 1 - x @ y.T
    squared = (x[:, None] - y).square().sum(-1)
    return squared if name == "sqeuclidean" else root(squared)


def members(
    labels: Tensor, y_labels: Tensor | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Each row's positives and negatives by index."""
    alone = y_labels is None
    y_labels = labels if alone else y_labels
    near, far = [], []
    for i, own in enumerate(labels.tolist()):
        columns = list(enumerate(y_labels.tolist()))
        near.append([j for j, other in columns if other == own and not (alone and i == j)])
        far.append([j for j, other in columns if other != own])
    return near, far


def single(x: Tensor) -> Tensor:
    """At least float32: 16 bits have no 1 - 1e-6, and no 1e-12."""
    return x if x.dtype == torch.float64 else x.float()


def zero(t: Inputs) -> Tensor:
    return (t.x * 0).sum()


def over_nonzero(losses: Tensor, like: Tensor) -> Tensor:
    """The mean of what is above 0."""
    some = losses > 0
    return losses[some].mean() if some.any() else like


# ---- triplets -----------------------------------------------------------------------------------


def triplet_losses(
    d: Tensor,
    near: list[list[int]],
    far: list[list[int]],
    margin: float,
    kind: str = "all",
    smooth: bool = False,
) -> list[Tensor]:
    """Of each row the losses of its triplets of a kind, one by one."""
    out = []
    for i, row in enumerate(d):
        gap = row[near[i]][:, None] - row[far[i]]
        chosen = {
            "all": gap == gap,
            "hard": gap >= 0,
            "semihard": (gap < 0) & (gap >= -margin),
            "easy": gap < -margin,
        }[kind]
        violation = gap[chosen] + margin
        out.append(F.softplus(violation, threshold=80) if smooth else F.relu(violation))
    return out


def all_triplets(
    t: Inputs,
    margin: float = 0.3,
    kind: str = "all",
    smooth: bool = False,
    distance: str = "euclidean",
    reduction: str = "mean",
    ref: bool = False,
    normalize: bool = False,
) -> Tensor:
    x = unit(t.x) if normalize else t.x
    y = (unit(t.y) if normalize else t.y) if ref else x
    d = distances(x, y, distance)
    near, far = members(t.labels, t.y_labels if ref else None)
    losses = triplet_losses(d, near, far, margin, kind, smooth)
    if reduction == "none":
        return torch.stack([each.sum() for each in losses]) + zero(t)
    losses = torch.cat(losses)
    if reduction == "sum":
        return losses.sum() + zero(t)
    # a softplus is above 0, also where float64 has none so small
    mean = losses.mean() if smooth and len(losses) else over_nonzero(losses, zero(t))
    return mean + zero(t)


def harmonic(t: Inputs) -> Tensor:
    """Semihard triplets against the batch itself and the frozen rows."""
    columns = torch.cat([t.x, t.y.detach()])
    near, far = members(t.labels, torch.cat([t.labels, t.y_labels]))
    near = [[j for j in row if j != i] for i, row in enumerate(near)]
    d = distances(t.x, columns, "sqeuclidean")
    losses = triplet_losses(d, near, far, 0.4, "semihard")
    return over_nonzero(torch.cat(losses), zero(t)) + zero(t)


def hinged(gap: Tensor, margin: float | None) -> Tensor:
    return F.softplus(gap, threshold=80) if margin is None else F.relu(gap + margin)


def chosen_triplets(
    t: Inputs,
    margin: float | None,
    positive: str = "hardest",
    negative: str = "hardest",
    distance: str = "euclidean",
    ref: bool = False,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """One positive and one negative a row, found by sorting plain lists."""
    x = unit(t.x) if normalize else t.x
    y = (unit(t.y) if normalize else t.y) if ref else x
    d = distances(x, y, distance)
    near, far = members(t.labels, t.y_labels if ref else None)
    losses, counted = [], []
    for i, row in enumerate(d):
        value = row.detach().tolist()
        p_pool, n_pool = near[i], far[i]
        at = value.__getitem__
        if positive == "semihard":
            n = (min if negative == "hardest" else max)(n_pool, key=at, default=None)
            p_pool = [] if n is None else [j for j in p_pool if value[j] < value[n]]
            p = max(p_pool, key=at, default=None)
        else:
            p = (max if positive == "hardest" else min)(p_pool, key=at, default=None)
            if negative == "semihard":
                n_pool = [] if p is None else [j for j in n_pool if value[j] > value[p]]
            n = (max if negative == "easiest" else min)(n_pool, key=at, default=None)
        counted.append(p is not None and n is not None)
        if not counted[-1]:
            losses.append(zero(t))
        else:
            gap = row[p] - row[n]
            losses.append(hinged(gap, margin))
    losses = torch.stack(losses) + zero(t)
    if reduction == "none":
        return losses
    return losses.sum() / (max(sum(counted), 1) if reduction == "mean" else 1)


def prototype_triplets(t: Inputs) -> Tensor:
    d = (distances(t.x, t.w, "sqeuclidean") + 1e-6).sqrt()
    losses = []
    for row, own in zip(d, t.targets.tolist(), strict=True):
        rest = torch.cat([row[:own], row[own + 1 :]])
        losses.append(F.relu(row[own] - rest.min() + 0.5) if len(rest) else zero(t))
    return torch.stack(losses).mean() + (t.w * 0).sum()


# ---- pairs --------------------------------------------------------------------------------------


def pair_lists(t: Inputs, d: Tensor, ref: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's distances to its positives, and to its negatives."""
    near, far = members(t.labels, t.y_labels if ref else None)
    return [d[i][k] for i, k in enumerate(near)], [d[i][k] for i, k in enumerate(far)]


def contrastive(t: Inputs, ref: bool = False, reduction: str = "mean") -> Tensor:
    d = distances(t.x, t.y if ref else t.x)
    near, far = pair_lists(t, d, ref)
    attract = [F.relu(v - 0.2) for v in near]
    repel = [F.relu(1.1 - v) for v in far]
    if reduction == "mean":
        parts = (over_nonzero(torch.cat(v), zero(t)) for v in (attract, repel))
        return sum(parts) + zero(t)
    rows = torch.stack([a.sum() + b.sum() for a, b in zip(attract, repel, strict=True)])
    rows = rows / (1 if ref else 2) + zero(t)
    return rows.sum() if reduction == "sum" else rows


def wu_margin(t: Inputs, beta: str, per: str = "pair", reduction: str = "mean") -> Tensor:
    """By pairs, or literally by triplets."""
    near, far = pair_lists(t, distances(t.x, t.x), False)
    boundary = t.class_beta[t.labels] if beta == "class_beta" else t.beta.expand(len(t.x))
    sums, count = [], 0
    for b, p, n in zip(boundary, near, far, strict=True):
        attract, repel = F.relu(p - b + 0.2), F.relu(b + 0.2 - n)
        if per == "triplet":
            attract = attract[:, None].expand(len(p), len(n))
            repel = repel.expand(len(p), len(n))
        count += int((attract > 0).sum() + (repel > 0).sum())
        sums.append(attract.sum() + repel.sum() + 0.1 * b)
    sums = torch.stack(sums) + zero(t)
    if reduction == "none":
        return sums
    return sums.sum() / (max(count, 1) if reduction == "mean" else 1)


def threshold_consistent(
    t: Inputs, normalize: bool = True, least: float = 1.25, most: float = -1.25
) -> Tensor:
    x = unit(t.x) if normalize else t.x
    near, far = (torch.cat(v) for v in pair_lists(t, x @ x.T, False))
    return over_nonzero(F.relu(least - near), zero(t)) + over_nonzero(F.relu(far - most), zero(t))


def snr(t: Inputs, ref: bool = False) -> Tensor:
    """var(y - x) / var(x), a biased variance in both."""
    y = t.y if ref else t.x
    noise = (y - t.x[:, None]).var(dim=2, unbiased=False)
    # about a coordinate, which takes rows far from 0 away without a rounding
    power = (t.x - t.x[:, :1]).var(dim=1, unbiased=False)[:, None]
    alive = power > 0
    d = torch.where(alive, noise / torch.where(alive, power, 1), 0)
    near, far = pair_lists(t, d, ref)
    attract = over_nonzero(torch.cat([F.relu(v - 0.1) for v in near]), zero(t))
    repel = over_nonzero(torch.cat([F.relu(1.5 - v) for v in far]), zero(t))
    return attract + repel + 0.3 * t.x.sum(1).abs().mean() + (y * 0).sum()


def intra_pair_variance(t: Inputs) -> Tensor:
    x = unit(t.x)
    near, far = (torch.cat(v) for v in pair_lists(t, x @ x.T, False))
    loss = zero(t)
    if len(near):
        loss = loss + F.relu(0.95 * near.mean() - near).square().mean()
    if len(far):
        loss = loss + F.relu(far - 1.03 * far.mean()).square().mean()
    return loss


# ---- a row's order ------------------------------------------------------------------------------


def tuplets(t: Inputs, ref: bool = False, reduction: str = "mean") -> Tensor:
    """By the angle itself."""
    x = single(unit(t.x))
    s = x @ (single(unit(t.y)) if ref else x).T
    near, far = pair_lists(t, s, ref)
    losses = []
    for p, n in zip(near, far, strict=True):
        angle = p.clamp(-1 + 1e-6, 1 - 1e-6).acos() - math.radians(5.73)
        z = 20 * (n - angle.cos()[:, None])
        losses.append(torch.log1p(z.exp().sum(1)) if len(n) else zero(t)[None][:0])
    if reduction == "none":
        return torch.stack([v.sum() for v in losses]) + zero(t)
    losses = torch.cat(losses)
    return (losses.mean() if len(losses) else zero(t)) + zero(t)


def angular(t: Inputs, reduction: str = "mean") -> Tensor:
    """All negatives of all positive pairs at once. [pairs, N]"""
    x = unit(t.x)
    tan = math.tan(math.radians(40)) ** 2
    same = t.labels[:, None] == t.labels
    a, p = (same & ~torch.eye(len(x), dtype=torch.bool)).nonzero().T
    f = 4 * tan * (x[a] + x[p]) @ x.T - 2 * (1 + tan) * (x[a] * x[p]).sum(1, keepdim=True)
    each = torch.log1p(torch.where(same[a], 0, torch.where(same[a], 0, f).exp()).sum(1))
    losses = zero(t) + each.new_zeros(len(x)).index_add(0, a, each)
    if reduction == "none":
        return losses
    return losses.sum() / max(len(a), 1)


def ranked_list(t: Inputs) -> Tensor:
    x = unit(t.x)
    near, far = pair_lists(t, distances(x, x), False)
    losses = []
    for p, n in zip(near, far, strict=True):
        loss = zero(t)
        for weight, hinge, rate in ((0.7, F.relu(p - 0.8), 1.5), (0.3, F.relu(1.2 - n), 4.0)):
            w = torch.where(hinge > 0, (rate * hinge).exp(), 0)
            loss = loss + weight * (w * hinge).sum() / (w.sum() + 1e-5 * len(x))
        losses.append(loss)
    return torch.stack(losses).mean()


def hats(values: Tensor, nodes: Tensor) -> Tensor:
    """The triangular histogram of some values, by every node. [nodes]"""
    values = values.clamp(nodes[0], nodes[-1])
    step = nodes[1] - nodes[0]
    return F.relu(1 - (values[:, None] - nodes).abs() / step).sum(0)


def average_precision(t: Inputs, ref: bool = False) -> Tensor:
    x = unit(t.x)
    d = distances(x, unit(t.y) if ref else x, "sqeuclidean")
    near, far = pair_lists(t, d, ref)
    nodes = torch.linspace(0, 4, 9, dtype=d.dtype)
    losses = []
    for p, n in zip(near, far, strict=True):
        if len(p):
            h, every = hats(p, nodes), hats(p, nodes).cumsum(0) + hats(n, nodes).cumsum(0)
            some = every > 0
            losses.append(1 - (h * h.cumsum(0))[some].div(every[some]).sum() / len(p))
    return (torch.stack(losses).mean() if losses else zero(t)) + zero(t)


def histogram(t: Inputs) -> Tensor:
    x = unit(t.x)
    near, far = (torch.cat(v) for v in pair_lists(t, x @ x.T, False))
    if not len(near) or not len(far):
        return zero(t)
    nodes = torch.linspace(-1, 1, 13, dtype=x.dtype)
    return (hats(far, nodes) / len(far) * (hats(near, nodes) / len(near)).cumsum(0)).sum()


def icnn(t: Inputs, k: int = 3, window: int = 5) -> Tensor:
    """A row at a time."""
    d, labels = distances(t.x, t.x), t.labels.tolist()
    same_rows, other_rows, alike = [], [], 0
    for i, row in enumerate(d):
        value = row.detach().tolist()
        order = sorted((j for j in range(len(labels)) if j != i), key=value.__getitem__)[:window]
        near = [j for j in order[:k] if labels[j] == labels[i]]
        far = [j for j in order[:k] if labels[j] != labels[i]]
        beyond = [j for j in order if labels[j] != labels[i]]
        alike += len(near)
        radius = row[far[-1]] if far else row[beyond[0]] if beyond else math.inf
        if near:
            n = row[near] / (radius + 1e-6)
            same_rows.append((n / n.max().clamp_min(1)).mean())
        if far:
            other_rows.append(row[far])
    same = 1 - (torch.stack(same_rows).mean() if same_rows else zero(t))
    if other_rows:
        largest = torch.cat(other_rows).max() + 1e-6
        other = torch.stack([(v / largest).mean() for v in other_rows]).mean()
    else:
        other = 1
    return -(((same + other) / 2 + alike / (k * len(labels))) / 2).log() + zero(t)
