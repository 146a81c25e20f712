"""Pairs of a batch: scores and formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_scores(x: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
    """c_ab of every pair a < b of different labels, in a double loop."""
    x = F.normalize(x) if normalize else x
    n = len(x)
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n)]
    found = [x[a] @ x[b] for a, b in pairs if labels[a] != labels[b] and -100 not in labels[[a, b]]]
    return torch.stack(found) if found else x.new_zeros(0)


def formula(scores: Tensor, scale: float, whisker: float) -> Tensor:
    """lambda from the scores of all pairs."""
    ordered = scores.detach().sort().values
    q1, q3 = ordered[int(0.25 * len(ordered))], ordered[int(0.75 * len(ordered))]
    reach = whisker * (q3 - q1)
    kept = scores[(scores >= q1 - reach) & (scores <= q3 + reach)]
    return (scale * kept).exp().sum().log()
