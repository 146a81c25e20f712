"""What a Function keeps of its arguments: tensors where autograd finds them, the rest beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def keep(ctx: Any, arguments: Sequence[Any], *outputs: Tensor) -> None:
    """Keeps arguments of any kinds, and outputs behind them, for the backward."""
    tensors = [a if isinstance(a, Tensor) else None for a in arguments]
    ctx.save_for_backward(*tensors, *outputs)
    ctx.rest = [None if isinstance(a, Tensor) else a for a in arguments]


def kept(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The arguments in their order, and the outputs."""
    # read once: a checkpoint unpacks what was saved a single time
    saved, count = ctx.saved_tensors, len(ctx.rest)
    pairs = zip(saved[:count], ctx.rest, strict=True)
    return [rest if tensor is None else tensor for tensor, rest in pairs], saved[count:]
