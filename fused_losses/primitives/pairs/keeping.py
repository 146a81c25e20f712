"""Who keeps scores of a forward for its backward, and how many."""

from __future__ import annotations

import torch

from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.pairs import bounded, cpu
from fused_losses.primitives.pairs.inputs import PairInputs

# of a room for so many scores, those of whole blocks; the other backends keep none
KEEPING = {"bounded": bounded.kept_scores, "cpu": cpu.kept_scores}


def kept_scores(name: str, p: PairInputs, room: Room | None) -> int:
    """How many scores the forward keeps, taken from the room; 0 where no gradient is asked for."""
    if room is None or name not in KEEPING or not torch.is_grad_enabled():
        return 0
    tensors = (p.x, p.y, p.scale, p.x_bias, p.y_bias)
    if not any(t is not None and t.requires_grad for t in tensors):
        return 0
    size = accumulate_dtype(p.x.dtype).itemsize
    kept = KEEPING[name](p, room.left // size)
    room.take(kept * size)
    return kept
