"""gather_across_devices: this rank's anchors beside every rank's rows, with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses.centers.collectives import Ranks
from fused_losses.centers.gathering import AllRows, all_rows
from fused_losses.integrations.acceleration import NotCovered


def over_ranks(loss: Any) -> bool:
    """Whether there are other ranks; without any the peer takes its own rows, too."""
    return bool(loss.gather_across_devices) and dist.is_available() and dist.is_initialized()


def agreed(loss: Any, check: Callable[[], None], like: Tensor) -> None:
    """Raises NotCovered on every rank where one rank's check does: all send, or none."""
    if not over_ranks(loss):
        return check()
    refusal: NotCovered | None = None
    try:
        check()
    except NotCovered as left:
        refusal = left
    told = torch.tensor([refusal is not None], dtype=torch.int64, device=like.device)
    refused = bool(Ranks(None).all_gather(told).any())
    if refusal is not None:
        raise refusal
    if refused:
        raise NotCovered("what another rank leaves to the peer")
    return None


def everyones(rows: Tensor) -> AllRows:
    """All ranks' rows; each has as many, as the peer's own gathering demands."""
    return all_rows(rows, even=True)


def own_first(rows: Tensor) -> Tensor:
    """All ranks' rows, this rank's at the front."""
    found, first = everyones(rows)
    return found.roll(-first, dims=0)
