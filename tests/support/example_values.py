"""For tables over the examples: their fields, drawn beforehand, and the numbers of a result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_losses.base.examples import EXACT, TABLE, UNJUDGED, Example, ExampleInputs

DIFFERENTIABLE = [n for n, example in TABLE.items() if example.bound not in (EXACT, UNJUDGED)]


def fields(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every field of the inputs: within a transform nothing may be drawn."""
    given = ExampleInputs(*shape, dtype)
    names = [k for k, v in vars(ExampleInputs).items() if isinstance(v, cached_property)]
    return {name: getattr(given, name).detach() for name in names}


def on_backend(example: Example, backend: str) -> dict[str, Any]:
    """What has an example run on a backend; skips where that has no kernel for it."""
    if backend in example.not_on:
        pytest.skip(f"{backend} has no kernel for {example.name}")
    return {"backend": backend} if example.takes("backend") else {}


def floats(out: Any) -> Iterator[Tensor]:
    """The floating point tensors of a result."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, tuple | list):
        for part in out:
            yield from floats(part)


def total(name: str, backend: str, shape: tuple[int, int, int], given: dict[str, Tensor]) -> Tensor:
    """One number of an example with these fields, float64."""
    example, inputs = TABLE[name], ExampleInputs(*shape)
    vars(inputs).update(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = floats(example(inputs, **on_backend(example, backend)))
        parts = [o.double() for o in found if o.requires_grad]
    parts = [torch.where(p == -torch.inf, 0, p) for p in parts]  # a sum over nothing
    return torch.stack(
        [(p * torch.linspace(0.5, 1.5, p.numel()).view_as(p)).sum() for p in parts]
    ).sum()
