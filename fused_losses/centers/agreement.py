"""What the ranks agree on before a step: that its numbers are finite, and can stay so in the table.

Each rank sees its own incoming gradient and its own shard; all take the step, or none does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.centers.collectives import Ranks
from fused_losses.centers.engines import Gradients
from fused_losses.centers.step import SavedForward

# of a table's rows, where nobody looks; a gradient of 1e8 over it is still in the range
SHORTEST = 2.0**-100
FINE, DOUBTFUL, NOT_FINITE, REFUSED = range(4)  # the worst of all ranks counts


@torch.no_grad()
def outlook(saved: SavedForward, grad: Gradients) -> Tensor:
    """FINE, NOT_FINITE, or DOUBTFUL where a row's gradient may leave the range of its type. []

    Time O(B D); of a float16 table also a look at the length of every row that takes part.
    """
    tensors = (saved.x, grad.statistics, grad.targets)
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    reach = _reach(saved, grad)
    if saved.normalize:  # the slope of w / |w| is at most 1 / |w|
        smallest = _shortest(saved) if saved.table.dtype == torch.float16 else SHORTEST
        reach = reach / smallest
    doubt = ~(reach <= torch.finfo(saved.table.dtype).max / 2)  # half: its roundings
    return torch.where(finite, torch.where(doubt, DOUBTFUL, FINE), NOT_FINITE)


def agreed(ranks: Ranks, own: Tensor, refusal: Exception | None = None) -> int:
    """The worst outlook of all ranks, 8 bytes of each; a rank's refusal is raised on all."""
    told = ranks.all_gather(own if refusal is None else torch.full_like(own, REFUSED)).tolist()
    if refusal is not None:
        raise refusal
    if REFUSED in told:
        raise RuntimeError(
            f"rank {told.index(REFUSED)} refused its backward; its own error says why"
        )
    return max(told)


def _reach(saved: SavedForward, grad: Gradients) -> Tensor:
    """A bound on the length of the loss's gradient in any unit row of the table. []"""
    engine = saved.sweep.engine
    # what stands for 1 / chance classes counts so often in a sum; an lse has shares of 1
    times = max([1.0, *(1 / group.chance for group in saved.sweep.groups)])
    of_cosines = grad.statistics.abs().sum(dim=0) * (engine.steepest(saved.values) * times)
    of_cosines = of_cosines + grad.targets.abs().sum(dim=1)
    lengths = torch.linalg.vector_norm(saved.x, dim=1).double()
    return (of_cosines * engine.pooling * lengths).sum()


def _shortest(saved: SavedForward) -> Tensor:
    """Of the rows that take part and are not zero. []"""
    least = torch.full((), torch.inf, dtype=torch.float64, device=saved.x.device)
    for chunk in saved.sweep.chunks():
        rows = chunk.weight if chunk.ids is None else chunk.weight[chunk.ids]
        wide = accumulate_dtype(rows.dtype)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=wide).double()
        norms = torch.where(norms == 0, torch.inf, norms)
        least = torch.minimum(least, norms.amin().to(least) if norms.numel() else least)
    return least
