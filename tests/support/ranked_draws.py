"""Losses over rows with a miner's lists, for the draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ranked_formulas as f
import torch
from listed_formulas import mined
from pair_cases import TOWERS, Case
from pair_rows import Inputs, batch, proxies
from torch import Tensor

import fused_losses.functional as fl

UNIT: dict[str, Any] = dict(normalize=True)


def listed(
    function: Callable[..., Tensor],
    formula: Callable[[Inputs], Tensor],
    told: str = "mined",
    **options: Any,
) -> Case:
    def call(t: Inputs, **more: Any) -> Tensor:
        given = dict(indices=(t.a, t.p, t.b, t.q)) | options | more
        return function(t.x, t.labels, t.y, t.y_labels, **given)

    name = f"{function.__name__}_{told}"
    return Case(name, mined, call, formula, TOWERS, function=function)


def others(t: Inputs, **more: Any) -> Tensor:
    return fl.pnp(t.x, t.labels, variant="Ib", b=2.5, temperature=0.1, **(UNIT | more))


def quality(t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(variant="Dq", alpha=2.0, temperature=0.1, **UNIT)
    return fl.pnp(t.x, t.labels, **(options | more))


def made(t: Inputs, of: Callable[[Tensor], Tensor]) -> Tensor:
    kept = [r for r in f.smooth_rows(t, lambda _, n: of(n)) if r is not None]
    return sum(kept[1:], kept[0]) / len(kept) if kept else f.zero(t)


def with_frozen(t: Inputs, **more: Any) -> Tensor:
    """Positives of either model, negatives of the old one."""
    given: dict[str, Any] = dict(indices=(t.a, t.p, t.b, t.q + len(t.x)), triplets="all")
    return fl.harmonic_triplet(t.x, None, t.y, **given, margin=0.3, **more)


def anchored(n: int, m: int, d: int) -> Inputs:
    """Rows, proxies, and a miner's triplets."""
    t = proxies(n, m, d)
    for name in "apq":
        setattr(t, name, torch.randint(n, (max(1, n - 1),)))
    return t


def anchor(t: Inputs, **more: Any) -> Tensor:
    given: dict[str, Any] = dict(indices=(t.a, t.p, t.q), alpha=8.0, **UNIT)
    return fl.proxy_anchor(t.x, t.w, t.targets, **(given | more))


LISTED = [
    listed(fl.all_triplets, f.triplets, margin=0.3),
    listed(fl.all_triplets, lambda t: f.triplets(t, True), "swap_mined", margin=0.3, swap=True),
    listed(fl.batch_hard_triplet, f.batch_hard, margin=0.3),
    listed(fl.batch_easy_hard_triplet, f.easy_semihard, margin=0.3),
    listed(fl.tuplet_margin, f.tuplets, scale=20.0, **UNIT),
    listed(fl.angular, f.angular, **UNIT),
    listed(fl.fast_ap, f.fast_ap, bins=8, **UNIT),
    listed(fl.histogram, f.histogram, bins=12, **UNIT),
]
DRAWN = [
    *LISTED,
    Case("harmonic_triplet_mined", mined, with_frozen, f.harmonic, function=fl.harmonic_triplet),
    Case("proxy_anchor_mined", anchored, anchor, f.anchors, ("x", "w"), function=fl.proxy_anchor),
    Case(
        "pnp_Ib_wider",
        batch,
        others,
        lambda t: made(t, lambda r: (2.5 * r - (2.5 * r).log1p()) / 6.25),
        function=fl.pnp,
    ),
    Case(
        "pnp_Dq_steeper",
        batch,
        quality,
        lambda t: made(t, lambda r: 1 - (1 + r) ** -2),
        function=fl.pnp,
    ),
]
