"""For tables over the examples: their fields, drawn beforehand, and the numbers of a result."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.examples import ExampleInputs


def fields(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every field of the inputs: within a transform nothing may be drawn."""
    given = ExampleInputs(*shape, dtype)
    names = [k for k, v in vars(ExampleInputs).items() if isinstance(v, cached_property)]
    return {name: getattr(given, name).detach() for name in names}


def floats(out: Any) -> Iterator[Tensor]:
    """The floating point tensors of a result."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, tuple | list):
        for part in out:
            yield from floats(part)
