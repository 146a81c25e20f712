"""Losses over a miner's pairs of two batches, for the draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import listed_formulas as f
from pair_cases import TOWERS, Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl

UNIT: dict[str, Any] = dict(normalize=True)


def mined(
    function: Callable[..., Tensor], formula: Callable[[Inputs], Tensor], **options: Any
) -> Case:
    """A case of two batches and a list of their pairs."""

    def call(t: Inputs, **more: Any) -> Tensor:
        given = {"indices": (t.a, t.p, t.b, t.q)} | options | more
        return function(t.x, t.labels, t.y, t.y_labels, **given)

    name = f"{function.__name__}_mined"
    return Case(name, f.mined, call, formula, TOWERS, function=function)


DRAWN = [
    mined(fl.contrastive, f.contrastive, positive_margin=0.2, negative_margin=1.1),
    mined(fl.margin_loss, f.margin, per="triplet"),
    mined(
        fl.threshold_consistent_margin,
        f.threshold_consistent,
        positive_margin=0.87,
        negative_margin=0.07,
        positive_weight=0.7,
        negative_weight=0.6,
    ),
    mined(fl.snr_contrastive, f.snr, positive_margin=0.1, negative_margin=1.5),
    mined(
        fl.intra_pair_variance, f.intra_pair_variance, positive_eps=0.05, negative_eps=0.03, **UNIT
    ),
    mined(fl.multi_similarity, f.multi_similarity, beta=20.0, **UNIT),
    mined(fl.circle, f.circle, m=0.25, gamma=40.0, **UNIT),
    mined(fl.generalized_lifted_structure, f.generalized_lifted, positive_margin=0.1),
    mined(fl.lifted_structure, f.lifted, margin=0.8),
    mined(fl.orthogonal_projection, f.orthogonal_projection),
    mined(
        fl.supervised_contrastive,
        f.supervised_contrastive,
        temperature=0.3,
        without_positive="skip",
        **UNIT,
    ),
    mined(fl.nt_xent, f.nt_xent, temperature=0.3, form="pairs", **UNIT),
    mined(fl.soft_nearest_neighbor, f.soft_nearest_neighbor, temperature=0.7),
]
