"""The same values in other places of memory: what views, slices and broadcasts leave."""

from __future__ import annotations

from collections.abc import Callable

from pair_cases import Inputs
from torch import Tensor


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def _offset(t: Tensor) -> Tensor:
    """One element after an address that a vector load likes."""
    buffer = t.new_empty(t.numel() + 1)
    return buffer[1:].view(t.shape).copy_(t)


def _stepped(t: Tensor) -> Tensor:
    """Every second element of its rows."""
    buffer = t.new_empty(*t.shape[:-1], 2 * t.shape[-1]) if t.dim() else t.new_empty(())
    return (buffer[..., ::2] if t.dim() else buffer).copy_(t)


def _apart(t: Tensor) -> Tensor:
    """Rows that others lie between."""
    if t.dim() < 2:
        return t
    return t.new_empty(*t.shape[:-1], t.shape[-1] + 3)[..., : t.shape[-1]].copy_(t)


def _expanded(t: Tensor) -> Tensor:
    """One row for all, where they are equal."""
    equal = t.dim() > 0 and len(t) > 0 and bool((t == t[:1]).all())
    return t[:1].expand_as(t) if equal else _apart(t)


_MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": _transposed,
    "offset": _offset,
    "stepped": _stepped,
    "apart": _apart,
    "expanded": _expanded,
}
LAYOUTS = tuple(name for name in _MADE if name != "contiguous")


def relaid(t: Inputs, leaves: tuple[str, ...], layout: str) -> None:
    """Moves every tensor of a call, leaves that need gradients among them."""
    for name, value in vars(t).items():
        moved = _MADE[layout](value.detach())
        setattr(t, name, moved.requires_grad_() if name in leaves else moved)
