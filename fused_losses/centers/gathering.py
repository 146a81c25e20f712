"""Every rank's rows on each rank, with their gradient: global negatives for a local loss.

    keys, first = all_rows(key)
    loss = info_nce(query, keys, offset=first)

A rank's loss is then of its n rows against all N, streamed: no N x N is anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_losses.base.validation import check_choice, describe
from fused_losses.centers.collectives import Gathered, Ranks, Scattered

GRADIENT_SCALES = ("global_sum", "ddp_mean")


class AllRows(NamedTuple):
    """Rows of all ranks, in the order of the ranks."""

    rows: Tensor  # [N, ...]
    first: int  # where this rank's begin


class _Together(torch.autograd.Function):
    """This rank's rows -> all ranks'; back comes the sum of what all ranks' copies get."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: list[int], times: int) -> Tensor:
        ctx.ranks, ctx.counts, ctx.times = ranks, counts, times
        found = Gathered(ranks, rows, counts).wait()
        return found.view_as(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return Scattered(ctx.ranks, grad, ctx.counts).wait() * ctx.times, None, None, None


def all_rows(
    rows: Tensor,  # [n, ...]
    *,
    process_group: dist.ProcessGroup | None = None,
    gradient_scale: str = "global_sum",
    even: bool = False,
) -> AllRows:
    """The rows of every rank, and where this rank's begin among them; differentiable.

    Args:
        rows: [n, ...] of this rank; n may differ between ranks and be 0, what follows may not.
        process_group: whose ranks; default: all, or this process alone.
        gradient_scale: "global_sum": rows get the sum over ranks of what their copies get, as the
            loss that is summed over ranks has it; "ddp_mean": W times that.
        even: every rank has n rows: they need not ask each other.

    Every rank must call it, and its backward. Under DistributedDataParallel, which averages over W
    ranks, the mean loss of each rank's rows against all has with "global_sum" the gradient of the
    mean over all ranks' rows, where these are as many on each; a loss that every rank computes
    alike over all rows needs "ddp_mean".
    Raises TypeError, ValueError for bad arguments. Time and memory O(N D); a rank receives N D
    numbers, forward and backward.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows: expected a tensor [n, ...], got {type(rows).__name__}")
    if rows.dim() == 0:
        raise ValueError(f"rows: expected a tensor [n, ...], got {describe(rows)}")
    check_choice("gradient_scale", gradient_scale, GRADIENT_SCALES)
    ranks = Ranks(process_group)
    counts = [len(rows)] * ranks.world
    if not even and ranks.world > 1:
        told = torch.tensor([len(rows)], device=rows.device)
        counts = ranks.all_gather(told).flatten().tolist()
    times = ranks.world if gradient_scale == "ddp_mean" else 1
    return AllRows(_Together.apply(rows, ranks, counts, times), sum(counts[: ranks.rank]))
