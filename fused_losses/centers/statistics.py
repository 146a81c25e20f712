"""The O(B) numbers of a step: merged over the shards, and what is told of a rank's own rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.centers.collectives import Ranks
from fused_losses.centers.engines import Sums


class HeadStats(NamedTuple):
    """What a step knows of this rank's rows, detached; ignored rows 0 and False."""

    target_cosine: Tensor  # [n] float64, of the first label, before the margin
    hit: Tensor  # [n] bool: that label scores above every other class that took part


def over_shards(ranks: Ranks, found: Sums, kinds: tuple[str, ...], with_best: bool) -> Sums:
    """Statistics over all shards, by the maximum and the sum of O(B) numbers."""
    if ranks.world == 1:
        return found
    is_lse = torch.tensor([kind == "lse" for kind in kinds], device=found.best.device)
    own = found.statistics[is_lse]
    top = torch.cat([own, found.best[None]]) if with_best else own.clone()
    if top.shape[0]:
        ranks.maximum_(top)
    shift = top[: own.shape[0]]
    shift = torch.where(shift > -torch.inf, shift, 0)
    statistics = found.statistics.clone()
    statistics[is_lse] = (own - shift).exp()
    together = torch.cat([statistics, found.targets.T])
    ranks.sum_(together)
    statistics, targets = together[: len(kinds)].clone(), together[len(kinds) :].T
    statistics[is_lse] = statistics[is_lse].log() + shift
    return Sums(statistics, targets.contiguous(), top[-1] if with_best else found.best)
