"""What the rows of sentence-transformers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.integrations.acceleration import NotCovered

PACKAGE = "sentence_transformers"
LOSSES = "sentence_transformer.losses"


def named(function: Any, **names: Any) -> Any:
    """What stands for a function of the peer's own."""
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", "")
    if name not in names or module.split(".")[0] != PACKAGE:
        raise NotCovered(f"{name or type(function).__name__}, a function that is not known")
    return names[name]


def as_peer(loss: Tensor, rows: Tensor) -> Tensor:
    """In the rows' dtype, but under autocast."""
    return loss if torch.is_autocast_enabled(rows.device.type) else loss.to(rows.dtype)


def finished(loss: Tensor, with_backward: bool) -> Tensor:
    """A cached loss, whose gradients are left in the mini-batches of rows where they are asked."""
    if with_backward:
        loss.backward()
        loss = loss.detach()
    return loss
