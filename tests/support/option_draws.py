"""Options at other values than their defaults, for the draws: calls, and literal formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import margin_calls as calls
import margin_draws as m
import torch
from class_pair_draws import best, matrices
from pair_cases import TOWERS, Case
from pair_formulas import diagonal_nce, lifted, supcon_rows
from pair_rows import (
    Inputs,
    attention,
    batch,
    distance,
    equal,
    eye,
    lse,
    nce_rows,
    others,
    proxies,
    samples,
    square_distance,
    towers,
    trilinear,
    unit,
)
from row_loss_formulas import distances, members, zero
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import class_losses, margins

Formula = Callable[[Inputs], Tensor]


def third_order(t: Inputs) -> Tensor:
    pairs = (t.few[:, None] * t.z).flatten(0, 1)
    values = (t.few_values[:, None] * t.w).flatten(0, 1)
    return (0.3 * t.x @ pairs.T).softmax(1) @ values


def uniformity(t: Inputs) -> Tensor:
    x, n = unit(t.x), len(t.x)
    if n < 2:
        return zero(t)
    z = (-3 * square_distance(x, x)).flatten()
    return lse(z, ~eye(n).flatten()) - math.log(n * (n - 1))


def multi_similarity(t: Inputs) -> Tensor:
    s = unit(t.x) @ unit(t.x).T
    positive, negative = others(t.labels)
    attract = torch.where(positive, torch.exp(-3 * (s - 0.3)), 0).sum(1)
    repel = torch.where(negative, torch.exp(20 * (s - 0.3)), 0).sum(1)
    return ((1 + attract).log() / 3 + (1 + repel).log() / 20).sum()


def generalized_lifted(t: Inputs) -> Tensor:
    d = distance(t.x, t.x)
    positive, negative = others(t.labels)
    both = positive.any(1) & negative.any(1)
    inside = torch.where(both, lse(d - 0.1, positive) + lse(0.7 - d, negative), 0)
    return inside.clamp_min(0)


def proxy_anchor(t: Inputs) -> Tensor:
    s, target = unit(t.w) @ unit(t.x).T, equal(torch.arange(len(t.w)), t.targets)
    attract = (1 + torch.where(target, torch.exp(-8 * (s - 0.2)), 0).sum(1)).log()
    repel = (1 + torch.where(target, 0, torch.exp(8 * (s + 0.2))).sum(1)).log()
    return attract.sum() / target.any(1).sum() + repel.mean()


def angular(t: Inputs) -> Tensor:
    x, tan = unit(t.x), math.tan(math.radians(30)) ** 2
    positive, negative = others(t.labels)
    losses = []
    for a, p in positive.nonzero().tolist():
        f = 4 * tan * (x[a] + x[p]) @ x.T - 2 * (1 + tan) * (x[a] * x[p]).sum()
        losses.append(torch.log1p(torch.where(negative[a], f.exp(), 0).sum()))
    return (torch.stack(losses).mean() if losses else zero(t)) + zero(t)


def tuplets(t: Inputs) -> Tensor:
    s = unit(t.x) @ unit(t.x).T
    losses = [zero(t)[None][:0]]
    for row, near, far in zip(s, *members(t.labels), strict=True):
        angle = row[near].clamp(-1 + 1e-6, 1 - 1e-6).acos() - math.radians(8.0)
        losses.append(torch.log1p((20 * (row[far] - angle.cos()[:, None])).exp().sum(1)))
    each = torch.cat(losses)
    return (each.mean() if len(each) else zero(t)) + zero(t)


def laplacian(t: Inputs) -> Tensor:
    k = (-distance(t.x, t.x) / 1.3).exp()
    return torch.where(eye(len(k)), 0, k).sum(1) / max(len(k) - 1, 1)


def attended(t: Inputs) -> Tensor:
    z = t.scale * (t.x @ t.y.T)
    return torch.cat([z.softmax(1) @ t.v, z.logsumexp(1)[:, None]], dim=1)


def attend(t: Inputs, **more: Any) -> Tensor:
    out, total = fl.similarity_attention(t.x, t.y, t.v, scale=t.scale, return_lse=True, **more)
    return torch.cat([out.to(total.dtype), total[:, None]], dim=1)


def of_others(t: Inputs) -> Tensor:
    """The five nearest of another label; missing ones count as 0."""
    apart = torch.where(equal(t.labels, t.y_labels), torch.inf, distance(t.x, t.y))
    found = best(apart, t.x)
    return torch.where(found == torch.inf, 0, found)


def nearest_others(t: Inputs, **more: Any) -> Tensor:
    given = dict(x_labels=t.labels, y_labels=t.y_labels, match="different")
    found, _ = fl.pairwise_topk(t.x, t.y, min(5, len(t.y)), "euclidean", **given, **more)
    return torch.where(found == torch.inf, 0, found)


def farthest(t: Inputs, **more: Any) -> Tensor:
    k = min(5, len(t.y))
    return fl.pairwise_topk(t.x, t.y, k, "euclidean", largest=True, **more)[0]


def sface(t: Inputs) -> Tensor:
    s = m.Seen(t)
    angle = s.cosine.detach().clamp(-1, 1).acos()
    pull, push = torch.sigmoid(40 * (angle - 0.9)), torch.sigmoid(40 * (1.1 - angle))
    rows = torch.where(s.own, 0, push * s.cosine).sum(1) - s.over_labels(pull * s.cosine)
    return s.mean(32.0 * rows)


def sphereface2(t: Inputs) -> Tensor:
    s = m.Seen(t)
    g = 2 * ((s.cosine + 1) / 2) ** 2 - 1
    labels = s.over_labels(m.softplus(-(30 * (g - 0.3) + t.bias)))
    rest = torch.where(s.own, 0, m.softplus(30 * (g + 0.3) + t.bias)).sum(1)
    return s.mean(20 / 30 * (0.6 * labels + 0.4 * rest))


def magface(t: Inputs) -> Tensor:
    def moved(c: Tensor, t: Inputs) -> Tensor:
        return calls.easy(c, 0.3 / 1.5 * (calls.norm_of(t).clamp(0.5, 2.0) - 0.5) + 0.3)

    a = calls.norm_of(t).clamp(0.5, 2.0)
    return calls.head(moved)(t) + (20.0 * (a / 4 + 1 / a)).mean()


def curricular(c: Tensor, own: Tensor) -> Tensor:
    mean = 0.05 * own.detach().mean()
    return calls.bent(c, calls.added(own, 0.4)[1], c * (mean + c))


def mv(c: Tensor, own: Tensor) -> Tensor:
    return calls.bent(c, own - 0.3, 1.4 * c + 0.4)


def run(function: str, *names: str, **options: Any) -> Callable[..., Tensor]:
    f = getattr(fl, function)
    return lambda t, **more: f(*(getattr(t, n) for n in names), **(options | more))


OWN = ("x", "labels")
# function, what it is called with, options, inputs, leaves, formula
PLAIN: list[tuple[str, tuple[str, ...], dict[str, Any], Any, tuple[str, ...], Formula]] = [
    ("uniformity", ("x",), dict(t=3.0, normalize=True), samples, ("x",), uniformity),
    (
        "trilinear_attention",
        ("x", "few", "z", "few_values", "w"),
        dict(scale=0.3),
        trilinear,
        ("x", "few", "z", "few_values", "w"),
        third_order,
    ),
    (
        "multi_similarity",
        OWN,
        dict(alpha=3.0, beta=20.0, base=0.3, normalize=True, reduction="sum"),
        batch,
        ("x",),
        multi_similarity,
    ),
    (
        "generalized_lifted_structure",
        OWN,
        dict(negative_margin=0.7, positive_margin=0.1, reduction="none"),
        batch,
        ("x",),
        generalized_lifted,
    ),
    ("lifted_structure", OWN, dict(margin=0.7), batch, ("x",), lambda t: lifted(t, 0.7)),
    (
        "proxy_anchor",
        ("x", "w", "targets"),
        dict(alpha=8.0, margin=0.2, normalize=True),
        proxies,
        ("x", "w"),
        proxy_anchor,
    ),
    ("angular", OWN, dict(alpha=30.0, normalize=True), batch, ("x",), angular),
    ("tuplet_margin", OWN, dict(margin=8.0, scale=20.0, normalize=True), batch, ("x",), tuplets),
    (
        "kernel_mean",
        ("x",),
        dict(kernel="laplacian", bandwidth=1.3, skip_self=True, reduction="none"),
        samples,
        ("x",),
        laplacian,
    ),
    (
        "info_nce",
        TOWERS,
        dict(temperature=0.2, reduction="none"),
        towers,
        TOWERS,
        lambda t: nce_rows(t.x @ t.y.T / 0.2, e := eye(len(t.x), len(t.y)), ~e)[0],
    ),
    (
        "info_nce",
        TOWERS,
        dict(temperature=0.2, reduction="sum"),
        towers,
        TOWERS,
        lambda t: diagonal_nce(t) * len(t.x),
    ),
    (
        "supervised_contrastive",
        OWN,
        dict(temperature=0.3, reduction="sum"),
        batch,
        ("x",),
        lambda t: supcon_rows(t.x @ t.x.T / 0.3, others(t.labels)[0], ~eye(len(t.x)))[0].sum(),
    ),
    (
        "soft_nearest_neighbor",
        OWN,
        dict(temperature=0.3, reduction="none"),
        batch,
        ("x",),
        lambda t: nce_rows(-square_distance(t.x, t.x) / 0.3, *others(t.labels))[0],
    ),
    (
        "pairwise_similarity",
        TOWERS,
        dict(similarity="polynomial", gamma=0.5, degree=2, coef0=0.25),
        matrices,
        TOWERS,
        lambda t: (0.5 * (t.x @ t.y.T) + 0.25).square(),
    ),
    (
        "prototype_triplet",
        ("x", "w", "targets"),
        dict(margin=0.3, eps=1e-3, reduction="sum"),
        proxies,
        ("x", "w"),
        lambda t: prototype_triplets(t),
    ),
]


def prototype_triplets(t: Inputs) -> Tensor:
    d = (distances(t.x, t.w, "sqeuclidean") + 1e-3).sqrt()
    losses = []
    for row, own in zip(d, t.targets.tolist(), strict=True):
        rest = torch.cat([row[:own], row[own + 1 :]])
        losses.append((row[own] - rest.min() + 0.3).clamp_min(0) if len(rest) else zero(t))
    return torch.stack(losses).sum() + (t.w * 0).sum()


MARGINS: dict[str, tuple[Callable[[], Any], Formula]] = {
    "SphereFace_3": (
        partial(margins.SphereFace, 3.0),
        calls.head(lambda c, t: calls.monotone(c, 0.0, 3.0)),
    ),
    "CombinedMargin_others": (
        partial(margins.CombinedMargin, 1.4, 0.4, 0.1),
        calls.head(lambda c, t: calls.monotone(c, 0.4, 1.4) - 0.1),
    ),
    "MagFace_others": (
        partial(margins.MagFace, 0.5, 2.0, l_margin=0.3, u_margin=0.6, penalty_weight=20.0),
        magface,
    ),
    "CurricularFace_others": (
        partial(margins.CurricularFace, 0.4, momentum=0.05),
        calls.head(lambda c, t: calls.linear(c, 0.4), curricular),
    ),
    "MVSoftmax_hardness": (
        partial(margins.MVSoftmax, "am", 0.3, 0.4, "adaptive"),
        calls.head(lambda c, t: c - 0.3, mv),
    ),
    "InterclassFilter_threshold": (
        partial(margins.InterclassFilter, margins.ArcFace(0.3), 0.2),
        calls.head(lambda c, t: calls.linear(c, 0.3), lambda c, y: torch.where(c > 0.2, 0.0, c)),
    ),
}
LOSSES: dict[str, tuple[Callable[[Inputs], Any], Formula]] = {
    "SoftTriple_others": (
        lambda t: class_losses.SoftTriple(la=10.0, gamma=0.2, margin=0.05),
        m.of_softmax(10.0, 0.05, 0.2),
    ),
    "SFace_others": (lambda t: class_losses.SFace(scale=32.0, k=40.0, a=0.9, b=1.1), sface),
    "SphereFace2_others": (
        lambda t: class_losses.SphereFace2(
            t.bias, alpha=0.6, margin=0.3, scale=30.0, t=2.0, lw=20.0
        ),
        sphereface2,
    ),
}


def averaging(make: Callable[[], Any], t: Inputs) -> Any:
    """Averages are float64's for float64 rows."""
    made = make()
    wide = torch.float64 if t.x.dtype == torch.float64 else torch.float32
    return made.to(wide) if isinstance(made, torch.nn.Module) else made


def margin_softmax(make: Callable[[], Any], t: Inputs, **more: Any) -> Any:
    margin = averaging(make, t)
    return fl.margin_softmax(t.x, t.w, t.targets, margin=margin, scale=calls.SCALE, **more)


DRAWN = [
    *(
        Case(
            f"{name}_options_{at}",
            make,
            run(name, *names, **options),
            formula,
            leaves,
            function=getattr(fl, name),
        )
        for at, (name, names, options, make, leaves, formula) in enumerate(PLAIN)
    ),
    Case(
        "attention_lse",
        attention,
        attend,
        attended,
        ("x", "y", "v", "scale"),
        function=fl.similarity_attention,
    ),
    Case(
        "pairwise_topk_match",
        attention,
        nearest_others,
        of_others,
        TOWERS,
        function=fl.pairwise_topk,
    ),
    Case(
        "pairwise_topk_farthest",
        matrices,
        farthest,
        lambda t: best(distance(t.x, t.y), t.x, True),
        TOWERS,
        function=fl.pairwise_topk,
    ),
    *(
        Case(
            f"margin_{name}",
            calls.classes,
            partial(margin_softmax, make),
            formula,
            ("x", "w"),
            function=fl.margin_softmax,
        )
        for name, (make, formula) in MARGINS.items()
    ),
    *(
        Case(
            f"class_loss_{name}",
            m.sub_centers,
            lambda t, make=make, **more: fl.class_loss(t.x, t.w, t.targets, make(t), **more),
            formula,
            ("x", "w", "bias") if name.startswith("SphereFace2") else ("x", "w"),
            function=fl.class_loss,
        )
        for name, (make, formula) in LOSSES.items()
    ),
]
