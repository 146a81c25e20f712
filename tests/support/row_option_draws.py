"""Options of the functions over rows at other values than their defaults, for the draws.

Most are reductions: a value a row, by the literal formulas of `pair_formulas` and
`row_loss_formulas` before their mean is taken. Nothing of the package is used in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import row_loss_formulas as f
import torch
import torch.nn.functional as F
from centroid_formulas import centroids
from pair_cases import TOWERS, Case
from pair_formulas import circle_rows, lifted_pairs, multi_similarity_mined, supcon_rows, zero_rows
from pair_rows import (
    Inputs,
    batch,
    equal,
    eye,
    lse,
    others,
    proxies,
    siglip,
    square_distance,
    towers,
    unit,
)
from torch import Tensor

import fused_losses.functional as fl

Formula = Callable[[Inputs], Tensor]
X, OWN = ("x",), ("x", "labels")
W = ("x", "w")


# ---- one batch, a value a row -------------------------------------------------------------------


def softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


def circle(t: Inputs) -> Tensor:
    each, both = circle_rows(t)
    return torch.where(both, each, 0)


def lifted(t: Inputs) -> Tensor:
    """Half of each pair's loss at each of its ends."""
    each, positive = lifted_pairs(t)
    return torch.where(positive, each, 0).sum(1) / 2


def n_pairs(t: Inputs) -> Tensor:
    """Squares of the rows as they are, beside cosines."""
    x, y = t.x, t.y[: len(t.x)]
    z = unit(x) @ unit(y).T
    squares = (x.square().sum(1) + y.square().sum(1)) / 2
    return z.logsumexp(1) - z.diagonal() + 0.1 * squares


def paired(t: Inputs, **more: Any) -> Tensor:
    return fl.n_pairs(t.x, t.y[: len(t.x)], l2_weight=0.1, **UNIT, **NONE, **more)


def nt_xent(t: Inputs) -> Tensor:
    return supcon_rows(t.x @ t.x.T / 0.3, others(t.labels)[0], ~eye(len(t.x)))[0]


def ranked_list(t: Inputs) -> Tensor:
    x = unit(t.x)
    near, far = f.pair_lists(t, f.distances(x, x), False)
    losses = []
    for p, n in zip(near, far, strict=True):
        loss = f.zero(t)
        for hinge, rate in ((F.relu(p - 0.8), 0.0), (F.relu(1.1 - n), 10.0)):
            w = torch.where(hinge > 0, (rate * hinge).exp(), 0)
            loss = loss + 0.5 * (w * hinge).sum() / (w.sum() + 1e-5 * len(x))
        losses.append(loss)
    return torch.stack(losses)


def snr(t: Inputs) -> Tensor:
    noise = (t.x - t.x[:, None]).var(dim=2, unbiased=False)
    power = (t.x - t.x[:, :1]).var(dim=1, unbiased=False)[:, None]
    alive = power > 0
    d = torch.where(alive, noise / torch.where(alive, power, 1), 0)
    near, far = f.pair_lists(t, d, False)
    rows = [F.relu(p - 0.1).sum() + F.relu(1.5 - n).sum() for p, n in zip(near, far, strict=True)]
    return torch.stack(rows) + 0.3 * t.x.sum(1).abs()


def average_precision(t: Inputs) -> Tensor:
    x = unit(t.x)
    near, far = f.pair_lists(t, f.distances(x, x, "sqeuclidean"), False)
    nodes = torch.linspace(0, 4, 9, dtype=x.dtype)
    losses = []
    for p, n in zip(near, far, strict=True):
        h = f.hats(p, nodes)
        every = h.cumsum(0) + f.hats(n, nodes).cumsum(0)
        some = every > 0
        found = 1 - (h * h.cumsum(0))[some].div(every[some]).sum() / max(len(p), 1)
        losses.append(found if len(p) else f.zero(t))
    return torch.stack(losses) + f.zero(t)


def angular(t: Inputs) -> Tensor:
    """Anchors and positives of norm 1, negatives as they are."""
    x, tan = unit(t.x), math.tan(math.radians(40)) ** 2
    positive, negative = others(t.labels)
    a, p = positive.nonzero().T
    z = 4 * tan * (x[a] + x[p]) @ t.x.T - 2 * (1 + tan) * (x[a] * x[p]).sum(1, keepdim=True)
    return softplus(lse(z, negative[a])).sum() / max(len(a), 1) + f.zero(t)


def orthogonal(t: Inputs) -> Tensor:
    s = t.x @ t.x.T
    pairs = others(t.labels)
    near, far = (torch.where(m, s, 0).sum() / (m.sum().to(s.dtype) + 1e-6) for m in pairs)
    return 1 - near + 0.5 * far


# ---- a second set -------------------------------------------------------------------------------


def harmonic(t: Inputs) -> Tensor:
    """The violating ones of all triplets, by the distance itself, of rows of norm 1."""
    columns = torch.cat([unit(t.x), unit(t.y).detach()])
    near, far = f.members(t.labels, torch.cat([t.labels, t.y_labels]))
    near = [[j for j in row if j != i] for i, row in enumerate(near)]
    losses = f.triplet_losses(f.distances(unit(t.x), columns), near, far, 0.4, "all")
    return torch.stack([each.sum() for each in losses]) + f.zero(t)


def margin_ref(t: Inputs) -> Tensor:
    near, far = f.pair_lists(t, f.distances(t.x, t.y), True)
    attract = torch.cat([F.relu(p - 1.1 + 0.1) for p in near])
    repel = torch.cat([F.relu(1.1 + 0.1 - n) for n in far])
    count = int((attract > 0).sum() + (repel > 0).sum())
    return (attract.sum() + repel.sum()) / max(count, 1) + f.zero(t) + (t.y * 0).sum()


def proxy_anchor(t: Inputs) -> Tensor:
    s, target = unit(t.w) @ unit(t.x).T, equal(torch.arange(len(t.w)), t.targets)
    attract = torch.where(target, torch.exp(-8 * (s - 0.1)), 0).sum(1)
    return (1 + attract).log() + (1 + torch.where(target, 0, torch.exp(8 * (s + 0.1))).sum(1)).log()


def proxy_nca(t: Inputs) -> Tensor:
    z = -1.5 * square_distance(unit(t.x), unit(t.w))
    return z.logsumexp(1) - z.gather(1, t.targets[:, None])[:, 0]


def sigmoid(t: Inputs) -> Tensor:
    z = 3 * (t.x @ t.y.T) - 2
    positive = eye(len(t.x), len(t.y), len(t.y) - len(t.x))
    return softplus(torch.where(positive, -z, z)).sum(1)


def gathered(t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(scale=3.0, bias=-2.0, offset=len(t.y) - len(t.x))
    return fl.sigmoid_contrastive(t.x, t.y, **options, **NONE, **more)


def compatibility(t: Inputs) -> Tensor:
    y = t.y[: len(t.x)]
    z = torch.where(equal(t.labels, t.labels), 0, 3 * (y @ t.x.T))
    return z.logsumexp(1) - 3 * (t.x * y).sum(1)


def older(t: Inputs, **more: Any) -> Tensor:
    new, old = t.x, t.y[: len(t.x)]
    return fl.higher_order_compatibility(new, old, t.labels, scale=3.0, **NONE, **more)


def kept_groups(t: Inputs) -> Tensor:
    z, columns = t.x @ t.y.T, torch.arange(len(t.y))
    excluded = (t.exclude[:, :, None] == columns).any(1)
    return zero_rows(lse(z, equal(t.labels, t.y_labels) & ~excluded))


def grouped(t: Inputs, **more: Any) -> Tensor:
    of_rows: dict[str, Any] = dict(x_groups=t.labels, y_groups=t.y_labels, exclude=t.exclude)
    found = fl.logsumexp_similarity(t.x, t.y, **of_rows, **more)
    assert isinstance(found, Tensor)
    return zero_rows(found)


def entropy_rows(t: Inputs) -> Tensor:
    z = t.x @ t.w.T
    return z.logsumexp(1) - z.gather(1, t.targets[:, None])[:, 0]


def row(
    function: Callable[..., Any],
    told: str,
    formula: Formula,
    make: Callable[[int, int, int], Inputs] = batch,
    leaves: tuple[str, ...] = X,
    *,
    call: Callable[..., Tensor] | None = None,
    given: tuple[str, ...] = OWN,
    **options: Any,
) -> Case:
    """A case of the fields that are given, and options; or of a call."""
    by_name = lambda t, **more: function(*(getattr(t, n) for n in given), **(options | more))
    name = f"{function.__name__}_{told}"
    return Case(name, make, call or by_name, formula, leaves, function=function)


NONE: dict[str, Any] = dict(reduction="none")
UNIT: dict[str, Any] = dict(normalize=True)
BETWEEN: dict[str, Any] = dict(make=f.two_batches, given=(*OWN, "y", "y_labels"))
CLASSES: dict[str, Any] = dict(make=proxies, leaves=W, given=(*W, "targets"))
DRAWN = [
    row(fl.circle, "none", circle, m=0.25, gamma=40.0, **UNIT, **NONE),
    row(fl.lifted_structure, "none", lifted, **NONE),
    row(fl.nt_xent, "none", nt_xent, temperature=0.3, **NONE),
    row(fl.ranked_list, "none", ranked_list, margin=0.3, alpha=1.1, **UNIT, **NONE),
    row(
        fl.snr_contrastive,
        "none",
        snr,
        positive_margin=0.1,
        negative_margin=1.5,
        zero_mean_weight=0.3,
        **NONE,
    ),
    row(fl.fast_ap, "none", average_precision, bins=8, **UNIT, **NONE),
    row(fl.angular, "plain_negatives", angular, normalize_negatives=False, **UNIT),
    row(
        fl.threshold_consistent_margin,
        "plain",
        lambda t: f.threshold_consistent(t, False, 0.9, 0.3),
        negative_margin=0.3,
        normalize=False,
    ),
    row(fl.orthogonal_projection, "plain", orthogonal, normalize=False),
    row(
        fl.multi_similarity,
        "duplicates",
        lambda t: multi_similarity_mined(t, 0.9),
        beta=20.0,
        mining_margin=0.1,
        duplicate=0.9,
        **UNIT,
    ),
    row(
        fl.centroid_triplet,
        "sum",
        lambda t: centroids(t, margin=None, total=True),
        margin=None,
        reduction="sum",
    ),
    row(
        fl.harmonic_triplet,
        "none",
        harmonic,
        margin=0.4,
        triplets="all",
        distance="euclidean",
        **BETWEEN,
        **UNIT,
        **NONE,
    ),
    row(fl.margin_loss, "ref", margin_ref, beta=1.1, margin=0.1, leaves=TOWERS, **BETWEEN),
    row(fl.proxy_anchor, "none", proxy_anchor, alpha=8.0, **CLASSES, **UNIT, **NONE),
    row(fl.proxy_nca, "none", proxy_nca, scale=1.5, **CLASSES, **UNIT, **NONE),
    row(
        fl.linear_cross_entropy,
        "none",
        entropy_rows,
        options={},
        **CLASSES,
        **NONE,
    ),
    row(fl.n_pairs, "none", n_pairs, towers, TOWERS, call=paired),
    row(fl.sigmoid_contrastive, "none", sigmoid, siglip, TOWERS, call=gathered),
    row(fl.higher_order_compatibility, "none", compatibility, siglip, TOWERS, call=older),
    row(fl.logsumexp_similarity, "groups", kept_groups, towers, TOWERS, call=grouped),
]
