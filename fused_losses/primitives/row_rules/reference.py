"""Folds over rows, materialised."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.primitives.distances import reference as reference_distances
from fused_losses.primitives.row_rules.inputs import ROW_SCORES, RowInputs, block
from fused_losses.primitives.row_rules.rules import ROW_FOLDS


def reference(p: RowInputs) -> Tensor:
    """The rule's formula on the whole matrix, of every difference of two rows at once."""
    kind, sign = ROW_SCORES[p.score]
    score = sign * reference_distances.distance(kind, p.x, p.y, None, 2.0)
    # one rule for what is not finite, whichever way a kernel would have ordered it
    score = score.masked_fill(score.isinf(), torch.nan)
    second = None
    if p.x_second is not None and p.y_second is not None:
        second = reference_distances.distance("dot", p.x_second, p.y_second, None, 2.0)
        second = second.masked_fill(second.isinf(), torch.nan)
    return ROW_FOLDS[p.rule].formula(block(p, score, slice(0, p.x.shape[0]), second))
