"""The batch's shared negatives, materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import row_dtype
from fused_losses.base.products import product
from fused_losses.primitives.shared_negatives.inputs import SharedInputs, whiskers


def reference(p: SharedInputs, scale: Tensor, whisker: float) -> Tensor:
    """The formula on the whole matrix, by sorting it."""
    cosine = product(p.x, p.x)
    different = (p.labels[:, None] != p.labels) & p.valid[:, None] & p.valid
    negatives = cosine[different.triu(1)]
    ordered = negatives.detach().sort().values
    if len(ordered):
        low, high = whiskers(ordered[[len(ordered) // 4, 3 * len(ordered) // 4]], whisker)
        negatives = negatives[~((negatives < low) | (negatives > high))]
    return torch.logsumexp(scale * negatives, 0).to(row_dtype(p.x.device))
