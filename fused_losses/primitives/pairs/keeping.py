"""Who keeps scores of a forward for its backward, and how many."""

from __future__ import annotations

import torch

from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.pairs import bounded, cpu
from fused_losses.primitives.pairs.inputs import PairInputs

# of a room for so many scores, those of whole blocks; the other backends keep none
KEEPING = {"bounded": bounded.kept_scores, "cpu": cpu.kept_scores}
# bytes of all scores of a call that "cpu" keeps without a room: no more than its tiles' own
SMALL = 256 << 10


def kept_scores(name: str, p: PairInputs, room: Room | None) -> int:
    """How many scores the forward keeps, taken from the room; 0 where no gradient is asked for.

    With no room those of a small call on "cpu", at most SMALL bytes; in compiled code, whose sizes
    may be symbols, none.
    """
    if name not in KEEPING or not torch.is_grad_enabled():
        return 0
    size = accumulate_dtype(p.x.dtype).itemsize
    if room is None and (name != "cpu" or torch.compiler.is_compiling()):
        return 0
    if room is None and p.x.shape[0] * p.y.shape[0] * size > SMALL:
        return 0
    tensors = (p.x, p.y, p.scale, p.x_bias, p.y_bias)
    if not any(t is not None and t.requires_grad for t in tensors):
        return 0
    kept = KEEPING[name](p, (SMALL if room is None else room.left) // size)
    if room is not None:
        room.take(kept * size)
    return kept
