"""The truth: each loss from its formula, materialised, in plain PyTorch, in the dtype it is given.

Nothing here knows how the kernels work: the scores are a matrix, the loss is F.cross_entropy.
Memory O(N C); runs on any device, in float64, with derivatives of any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import over_last, unit_rows
from fused_losses.base.products import product


def bent(score: Tensor, bend: Tensor) -> Tensor:
    """psi of `row_statistics`: a row's scores above its threshold as its polynomial says.

    score [N, C] · bend [4, N] · returns [N, C]
    """
    t, p, q, r = bend.to(score.dtype)[:, :, None]
    return torch.where(score > t, p + q * score + r * score**2, score)


def row_statistics(
    x: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N], -1: no target
    classes: Tensor | None,
    bias: Tensor | None,
    column_weight: Tensor | None,
    normalize: bool,
    bend: Tensor | None = None,  # [4, N]
) -> dict[str, Tensor]:
    """The primitive, spelled out on the score matrix."""
    ids = torch.arange(weight.shape[0], device=x.device) if classes is None else classes
    if classes is not None:
        # a class that takes no part must not reach the gradients, not even with NaN
        taking = torch.zeros(len(weight) + 1, dtype=torch.bool, device=x.device)
        taking = taking.index_fill(0, ids, True).index_fill(0, labels.remainder(len(taking)), True)
        weight = torch.where(taking[:-1, None], weight, 0)
    w = unit_rows(weight) if normalize else weight
    raw = product(x, w)
    scores = raw if bend is None else bent(raw, bend)
    scores = (scores if bias is None else scores + bias)[:, ids]
    is_target = labels[:, None] == ids[None, :]
    others = scores.masked_fill(is_target, -torch.inf)
    has_target = labels >= 0
    target = raw.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    v = torch.ones_like(scores[:1]) if column_weight is None else column_weight[ids].to(scores)
    best, lse = others.max(dim=1), over_last(others)
    return {
        # an infinite score is a fault that must show
        "lse": torch.where(lse == torch.inf, torch.nan, lse),
        "target": torch.where(has_target, target, 0),
        "weighted_sum": (v * scores).masked_fill(is_target, 0).sum(dim=1),
        "hardest": torch.where(best.values > -torch.inf, ids[best.indices], -1),
        "hardest_score": best.values,
    }
