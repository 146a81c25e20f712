"""Calls of every example over and over: their bits, by name, backend and number of threads."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from example_values import floats
from torch import Tensor

from fused_losses.base.examples import TABLE, ExampleInputs

SHAPE = (24, 40, 16)


def runs_on(name: str, backend: str) -> bool:
    return backend not in TABLE[name].not_on


def first_of_each(names: Iterable[str]) -> list[str]:
    """One example a function."""
    seen: dict[object, str] = {}
    for name in names:
        seen.setdefault(TABLE[name].function, name)
    return list(seen.values())


class Call:
    """An example with inputs of its own, which its gradients are asked of."""

    def __init__(self, name: str, backend: str, shape: tuple[int, int, int] = SHAPE) -> None:
        self.example = TABLE[name]
        self.inputs = ExampleInputs(*shape)
        self.leaves = [getattr(self.inputs, k).requires_grad_() for k in self.example.leaves]
        takes = "backend" in inspect.signature(self.example.function).parameters
        self.options = {"backend": backend} if takes else {}

    def forward(self) -> list[Tensor]:
        torch.manual_seed(0)
        return list(floats(self.example(self.inputs, **self.options)))

    def backward(self, found: list[Tensor]) -> list[Tensor]:
        moving = [t for t in found if t.requires_grad]
        if not moving or not self.leaves:
            return []
        slopes = [torch.linspace(0.5, 1.5, t.numel()).view_as(t).to(t.dtype) for t in moving]
        grads = torch.autograd.grad(moving, self.leaves, slopes, allow_unused=True)
        return [g for g in grads if g is not None]

    def bits(self) -> list[Tensor]:
        found = self.forward()
        return [t.detach() for t in found] + self.backward(found)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal bits; a NaN is one."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(_held(a), _held(b))
        for a, b in zip(one, other, strict=True)
    )


def _held(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), 0, t)
