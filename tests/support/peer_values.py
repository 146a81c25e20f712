"""A peer's own values and gradients, and how far ours may be from them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import integrations
from fused_losses.base.disturbance import Movement, distance, rounded_once

Outcome = Callable[[torch.dtype], list[Tensor]]


def check_as_the_peer(
    peer: str | ModuleType | type,
    name: str,
    outcome: Outcome,
    dtype: torch.dtype,
    width: int,
    rounded: torch.dtype | None = None,
    left_out: float = 0.0,
    calls: int = 1,
) -> None:
    """Accelerated calls, within what roundings move the peer's float64 result at these rows.

    outcome: of `calls` calls in a dtype, the loss and then its gradients. rounded: the dtype of the
    roundings, where the peer has a narrower one inside. left_out: what its formula leaves out.
    """
    truth = outcome(torch.float64)
    own = truth if dtype == torch.float64 else outcome(dtype)
    with integrations.accelerate(peer, strict=True) as acceleration:
        got = outcome(dtype)
        (ran,) = acceleration.report()
    assert ran == (name, calls, {})
    for ours, theirs in zip(got, own, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    rounded = rounded or dtype
    movement = Movement(lambda: outcome(torch.float64), truth, rounded, width)
    errors = [distance(a, b) for a, b in zip(got, truth, strict=True)]
    spare = [2 * rounded_once(part.to(rounded), float(part.norm())) + left_out for part in truth]
    bounds = movement.bounds(errors, spare)
    assert all(e <= b for e, b in zip(errors, bounds, strict=True)), (errors, bounds)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                # an expanded one holds what it was made of
                self.most = max(self.most, each.untyped_storage().nbytes() // each.element_size())
        return out
