"""One operation of the roofline, and what its tables make of tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN = ("eager", "compiled")
HostCode = Callable[[], Any]  # of host code, on tensors without data


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
