"""Options of matrices, the k best, transport and MaxSim at other values, for the draws."""

from __future__ import annotations

import math
from typing import Any

import metric_draws
import torch
from class_pair_draws import best, matrices
from nested_formulas import counts, nested, weighted_rows, widths
from pair_cases import TOWERS
from pair_rows import Inputs, distance, equal, proxies, square_distance, towers
from row_option_draws import row
from torch import Tensor
from transport_formulas import debiased

import fused_losses.functional as fl


def finite(found: Tensor) -> Tensor:
    return torch.where(found == torch.inf, 0, found)


def nearest_kept(t: Inputs) -> Tensor:
    """Of pairs with other ids, but for excluded columns; missing ones count as 0."""
    out = equal(t.ids, t.y_ids) | (t.exclude[:, :, None] == torch.arange(len(t.y))).any(1)
    return finite(best(torch.where(out, torch.inf, distance(t.x, t.y)), t.x))


def nearest(t: Inputs, metric: str, **more: Any) -> Tensor:
    found, _ = fl.pairwise_topk(t.x, t.y, min(5, len(t.y)), metric, **more)
    return finite(found)


def chosen(t: Inputs, **more: Any) -> Tensor:
    ids: dict[str, Any] = dict(x_ids=t.ids, y_ids=t.y_ids, exclude=t.exclude)
    return nearest(t, "euclidean", screen="fp32", **ids, **more)


def weighed(n: int, m: int, d: int) -> Inputs:
    """Masses of equal sums: the first row and column have what is left of 1."""
    t = towers(n, m, d)
    for name, size in (("a", n), ("b", len(t.y))):
        masses = torch.full((size,), 1 / 64)
        masses[0] = 1 - (size - 1) / 64
        setattr(t, name, masses)
    return t


def transport(t: Inputs) -> Tensor:
    c = square_distance(t.x, t.y)
    k = -c.detach() / 0.5
    g = k.new_zeros(len(t.y))
    for _ in range(20):
        rows = t.a.log() - (k + g).logsumexp(1)
        g = t.b.log() - (k + rows[:, None]).logsumexp(0)
    return ((k + rows[:, None] + g).exp() * c).sum()


def moved_transport(t: Inputs, **more: Any) -> Tensor:
    given: dict[str, Any] = dict(eps=0.5, iterations=20, tolerance=1e-30, cost="sqeuclidean")
    given |= dict(stop="scalings", x_weight=t.a, y_weight=t.b)
    return fl.sinkhorn(t.x, t.y, **given, **more).cost


def moved_divergence(t: Inputs, **more: Any) -> Tensor:
    given: dict[str, Any] = dict(eps=0.5, iterations=20, tolerance=1e-30, cost="cosine")
    return fl.sinkhorn_divergence(t.x, t.y, x_weight=t.a, y_weight=t.b, **given, **more)


def texts(n: int, m: int, d: int) -> Inputs:
    """Queries of three tokens and documents of up to four; of each the first is real."""
    t = Inputs(x=torch.randn(n, 3, d) / d**0.5, y=torch.randn(m, 4, d) / d**0.5)
    t.asked, t.told = torch.rand(n, 3) < 0.7, torch.rand(m, 4) < 0.7
    t.asked[:, 0] = t.told[:, 0] = True
    t.lengths = torch.randint(1, 5, (m,))
    return t


def late(t: Inputs, kept: Tensor) -> Tensor:
    z = torch.einsum("qid,bjd->qbij", t.x, t.y)
    top = torch.where(kept[None, :, None], z, -torch.inf).amax(3)
    return torch.where(t.asked[:, None], top, 0).sum(2)


def masked(t: Inputs, **more: Any) -> Tensor:
    return fl.maxsim(t.x, t.y, query_mask=t.asked, document_mask=t.told, **more)


def real(t: Inputs) -> Tensor:
    return torch.arange(4) < t.lengths[:, None]


def ragged(t: Inputs, **more: Any) -> Tensor:
    return fl.maxsim(t.x, t.y[real(t)], query_mask=t.asked, lengths=t.lengths, **more)


def listed(t: Inputs) -> Tensor:
    near, far = (t.y[i] for i in t.picked[:2])
    a, b = ((t.x - u + 1e-3).abs().pow(3).sum(1) for u in (near, far))
    a, b = (torch.where(z > 0, torch.where(z > 0, z, 1).pow(1 / 3), 0) for z in (a, b))
    return (a - b + 0.5).clamp_min(0)


def by_index(t: Inputs, backend: str | None = None) -> Tensor:
    near, far = (t.y[i] for i in t.picked[:2])
    return fl.triplet_margin(t.x, near, far, margin=0.5, p=3.0, eps=1e-3, reduction="none")


def covaried(t: Inputs, **more: Any) -> Tensor:
    covariance = metric_draws.inverse(t.x.shape[1]).inverse()
    return fl.pairwise_distance(t.x, t.y, "mahalanobis", covariance=covariance, **more)


def binary(t: Inputs, **more: Any) -> Tensor:
    return fl.pairwise_distance(t.x.abs(), t.y.abs(), "jensenshannon", base=2.0, **more)


def counted(t: Inputs, **more: Any) -> Tensor:
    d = t.x.shape[1]
    options: dict[str, Any] = dict(margin=None, scale=4.0, row_weight=counts(t))
    return fl.nested_margin_softmax(t.x, t.w, t.targets, widths(d), **options, **more)


DRAWN = [
    row(
        fl.nested_margin_softmax,
        "weights",
        nested(weighted_rows, True),
        proxies,
        ("x", "w"),
        call=counted,
    ),
    row(fl.pairwise_topk, "ids", nearest_kept, towers, TOWERS, call=chosen),
    row(
        fl.pairwise_topk,
        "minkowski",
        lambda t: finite(best(metric_draws.minkowski(t, 3.0), t.x)),
        matrices,
        TOWERS,
        call=lambda t, **more: nearest(t, "minkowski", p=3.0, **more),
    ),
    row(fl.sinkhorn, "masses", transport, weighed, TOWERS, call=moved_transport),
    row(
        fl.sinkhorn_divergence,
        "masses",
        lambda t: debiased(t, "cosine", masses=(t.a.double(), t.b.double())),
        weighed,
        TOWERS,
        call=moved_divergence,
    ),
    row(fl.maxsim, "masked", lambda t: late(t, t.told), texts, TOWERS, call=masked),
    row(fl.maxsim, "ragged", lambda t: late(t, real(t)), texts, TOWERS, call=ragged),
    row(fl.triplet_margin, "cubic", listed, metric_draws.triples, TOWERS, call=by_index),
    row(
        fl.pairwise_distance,
        "covariance",
        metric_draws.mahalanobis,
        matrices,
        TOWERS,
        call=covaried,
    ),
    row(
        fl.pairwise_distance,
        "base",
        lambda t: metric_draws.jensenshannon(t) / math.log(2) ** 0.5,
        matrices,
        TOWERS,
        call=binary,
    ),
]
