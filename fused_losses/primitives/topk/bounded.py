"""The k best columns in pure PyTorch: any device, blocks of products, certified in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.primitives.topk.certified import (
    certified,
    certified_bytes,
    prepared,
    products_of_blocks,
)
from fused_losses.primitives.topk.inputs import TopkInputs


def select(p: TopkInputs) -> tuple[Tensor, Tensor]:
    """Codes and coordinates of a screen are not read: y itself is."""
    with torch.no_grad():
        return certified(p, prepared(p), products_of_blocks)


def workspace(p: TopkInputs) -> int:
    """Bytes beyond inputs and outputs, at most."""
    return certified_bytes(p)
