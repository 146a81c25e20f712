"""Losses over classes that take something from the batch, and distillation, for the draws.

Calls, and literal formulas that use nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from distillation_formulas import TEMPERATURE, of_scores
from margin_calls import SCALE
from pair_cases import Case
from pair_formulas import zero_rows
from pair_rows import Inputs, equal, eye, lse, proxies, unit
from torch import Tensor

import fused_losses.functional as fl

# ---- the batch's own negatives, scale and margin ------------------------------------------------


def shared(
    x: Tensor, cosine: Tensor, labels: Tensor, scale: float | Tensor, whisker: float = 1.5
) -> Tensor:
    """lambda: pairs a < b of other labels, within the whiskers of the sorted cosines."""
    pairs = ~equal(labels, labels) & torch.ones_like(cosine, dtype=torch.bool).triu(1)
    found = cosine[pairs]
    if bool((~x.isfinite().all(1)[:, None] & (pairs | pairs.T)).any()):
        return x.new_full((), torch.nan)
    if not len(found):
        return x.new_full((), -torch.inf)
    ordered = found.detach().sort().values
    q1, q3 = ordered[len(found) // 4], ordered[3 * len(found) // 4]
    kept = (found >= q1 - whisker * (q3 - q1)) & (found <= q3 + whisker * (q3 - q1))
    return lse(scale * found[None], kept[None])[0]


def shared_alone(t: Inputs) -> Tensor:
    found = shared(t.x, unit(t.x) @ unit(t.x).T, t.targets, t.scale)
    return (t.x.sum() + t.scale) * 0 if found == -torch.inf else found


def cosface(cosine: Tensor, own: Tensor) -> Tensor:
    return torch.where(own, cosine - 0.5, cosine)


def unpg_rows(
    t: Inputs,
    moved: Callable[[Tensor, Tensor], Tensor] = cosface,
    whisker: float = 1.5,
    normalize: bool = True,
) -> Tensor:
    """At scale 16; moved(cosines, which are the labels')."""
    x, w = (unit(t.x), unit(t.w)) if normalize else (t.x, t.w)
    own = eye(len(w))[t.targets]
    z = SCALE * moved(x @ w.T, own)
    more = shared(x, x @ x.T, t.targets, SCALE, whisker)
    every = torch.cat([z, more.expand(len(z), 1)], dim=1)
    return lse(every, ~(every == -torch.inf)) - z[own]


def mada_rows(
    t: Inputs,
    alpha: float = 0.02,
    smallest: float = 32.0,
    background: str = "sample",
    normalize: bool = True,
    training: bool = True,
) -> Tensor:
    """Odds 9,999,999, scale to 10,000; B of the row of the median, or the median of all B."""
    x, w = (unit(t.x), unit(t.w)) if normalize else (t.x, t.w)
    cosine, own = x @ w.T, eye(len(w))[t.targets]
    target, middle = cosine[own], (len(x) - 1) // 2
    median = target.detach().sort().values[middle]
    median = torch.where(target.isnan().any(), torch.nan, median)
    odds = math.log(alpha / (1 - alpha))
    span = math.log(9_999_999.0) - odds
    s = (span / (1 - median).clamp_min(span / 1e4)).clamp_min(smallest)
    log_b = lse(s * cosine, ~own)
    at = int((target.detach() == median).int().argmax())
    b = log_b.detach()
    b = b[at] if background == "sample" else b.sort().values[middle]
    m = (median - (b + odds) / s).clamp_min(0)
    m = torch.where(b == -torch.inf, 0, m) if training else 0.0
    z = s * (target - m)
    alone = (log_b == -torch.inf) & z.isfinite()
    return torch.where(alone, 0, torch.logaddexp(torch.where(alone, z, log_b), z) - z)


def _shared(t: Inputs, **more: Any) -> Tensor:
    return zero_rows(fl.shared_negatives(t.x, t.targets, scale=t.scale, **more))


# ---- distillation: every kind by its formula on both matrices ------------------------------------


def two_tables(n: int, m: int, d: int) -> Inputs:
    """A student's rows and classes, and a teacher's."""
    t = proxies(n, m, d)
    t.teacher, t.teacher_w = torch.randn(n, d) / d**0.25, torch.randn(m, d) / d**0.25
    return t


def _distilled(kind: str, t: Inputs, **more: Any) -> Tensor:
    given = (t.x, t.w, t.teacher, t.teacher_w)
    return fl.distillation(*given, kind=kind, labels=t.targets, teacher_grad=True, **more)


def distilled(kind: str, temperature: float) -> Callable[[Inputs], Tensor]:
    def formula(t: Inputs) -> Tensor:
        u, v = (x @ w.T / temperature for x, w in ((t.x, t.w), (t.teacher, t.teacher_w)))
        return of_scores(kind, u, v, t.targets, temperature).mean()

    return formula


DISTILLED = {
    kind: distilled(kind, TEMPERATURE.get(kind, 1.0))
    for kind in ("kl", "reverse_kl", "jsd", "tv", "soft_ce", "pskd", "dkd", "ofa", "mse")
    + ("bernoulli", "bernoulli_norm")
}


ROWS = ("x", "w")
DRAWN = [
    Case(
        "unpg_margin_softmax",
        proxies,
        lambda t, **more: fl.unpg_margin_softmax(t.x, t.w, t.targets, scale=SCALE, **more),
        lambda t: unpg_rows(t).mean(),
        ROWS,
        function=fl.unpg_margin_softmax,
    ),
    Case(
        "adaptive_margin_softmax",
        proxies,
        lambda t, **more: fl.adaptive_margin_softmax(t.x, t.w, t.targets, **more),
        lambda t: mada_rows(t).mean(),
        ROWS,
        function=fl.adaptive_margin_softmax,
    ),
    *(
        Case(
            f"distillation_{kind}",
            two_tables,
            partial(_distilled, kind),
            distilled,
            (*ROWS, "teacher", "teacher_w"),
            function=fl.distillation,
        )
        for kind, distilled in DISTILLED.items()
    ),
    Case(
        "shared_negatives",
        proxies,
        _shared,
        shared_alone,
        ("x", "scale"),
        function=fl.shared_negatives,
    ),
]
