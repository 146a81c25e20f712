"""One operation of the roofline, and what its tables make of tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN = ("eager", "compiled")
HostCode = Callable[[], Any]  # of host code, on tensors without data


_place: ContextVar[str] = ContextVar("fused_losses_roofline_place", default="meta")


@contextmanager
def drawn_on(device: str) -> Iterator[None]:
    """Within, `empty` gives tensors with values on a device: operations made here can be run."""
    token = _place.set(device)
    try:
        yield
    finally:
        _place.reset(token)


def empty(
    *shape: int,
    dtype: torch.dtype = FP32,
    below: int | None = None,
    step: int = 1,
    around: float = 0.0,
) -> Tensor:
    """A tensor without data. Where it has values: normal ones `around`, or whole numbers from 0 on.

    These go up by step, and begin anew at below.
    """
    device = _place.get()
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).add_(around).to(dtype)
    counted = torch.arange(prod(shape), device=device) * step
    return (counted if below is None else counted % below).to(dtype).view(shape)


@dataclass(frozen=True)
class Operation:
    """One direction of one operation at one shape, and the ways to compute it."""

    name: str
    direction: str  # forward or backward
    shape: str
    floor: int  # bytes: each input once, each output once
    flops: int  # of products, at least
    backends: dict[str, HostCode]  # ours, by name
    # in PyTorch: the forward, or the loss of which the backward is taken
    plain: HostCode | None = None

    @property
    def ways(self) -> list[str]:
        """Our backends, and PyTorch eager and compiled."""
        return [*self.backends, *(PLAIN if self.plain else ())]


def bytes_of(*items: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in items)


def plain_backward(loss: Callable[..., Tensor], *leaves: Tensor) -> HostCode:
    def run() -> HostCode:
        """The forward; what it returns is the backward."""
        ours = [leaf.detach().requires_grad_() for leaf in leaves]
        value = loss(*ours)
        return lambda: torch.autograd.grad(value, ours)

    return run


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]
