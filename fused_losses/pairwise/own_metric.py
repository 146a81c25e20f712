"""A metric of your own: a function of two sets of rows, called a block of pairs at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype, recomputed
from fused_losses.base.validation import describe

# [n, D], [m, D] -> [n, m]: of each pair a number that depends on its two rows alone
OwnMetric = Callable[[Tensor, Tensor], Tensor]

BLOCK_ROWS = 256
BLOCK_ELEMENTS = 1 << 21  # of all differences of a block, should the function make them


def check_alone(**options: Any) -> None:
    """What the named metrics take, a function may hold itself."""
    for name, value in options.items():
        if value is not None and not (name == "p" and value == 2.0):
            raise ValueError(f"{name}: expected no value beside a metric of your own")


def check_backend(backend: str | None, x: Tensor) -> None:
    """The function is PyTorch's operators, and its tiles are on every backend but the kernels'."""
    name = backends.requested(backend)
    if name in ("triton", "cuda"):
        raise RuntimeError(
            f"backend={name!r} cannot run a metric of your own, a Python function: use "
            "backend='auto' or backend='bounded', which call it a block of pairs at a time"
        )
    dtype = torch.float32 if x.dtype == torch.bool else x.dtype
    backends.choose(backend, x.device, dtype, "fp32", "distance_sums")


def own_values(metric: OwnMetric, x: Tensor, y: Tensor) -> Tensor:
    """metric(x [n, D], y [m, D]), checked; rows of 16 bits in float32. [n, m]"""
    if x.is_floating_point():
        x, y = (r.to(accumulate_dtype(r.dtype)) for r in (x, y))
    found = metric(x, y)
    expected = f"a function of x [n, D] and y [m, D] that returns [n, m], here {len(x), len(y)}"
    if not isinstance(found, Tensor):
        raise TypeError(f"metric: expected {expected}, got {type(found).__name__}")
    if tuple(found.shape) != (x.shape[0], y.shape[0]) or found.is_complex():
        raise ValueError(f"metric: expected {expected}, got {describe(found)}")
    return found.to(accumulate_dtype(x.dtype))


def own_distances(metric: OwnMetric, x: Tensor, y: Tensor) -> Tensor:
    """[..., N, M]; a backward calls the function again, block by block."""
    if x.dim() == 2 and y.dim() == 2:
        return _matrix(metric, x, y)
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    flat = [t.expand(*lead, *t.shape[-2:]).flatten(0, -3) for t in (x, y)]
    found = [_matrix(metric, *items) for items in zip(*flat, strict=True)]
    shape = (*lead, x.shape[-2], y.shape[-2])
    if not found:
        return _nothing(x, y, shape)
    return torch.stack(found).reshape(shape)


def _matrix(metric: OwnMetric, x: Tensor, y: Tensor) -> Tensor:
    (n, d), m = x.shape, y.shape[0]
    if not n or not m:
        return _nothing(x, y, (n, m))
    high = min(n, BLOCK_ROWS)
    wide = max(1, BLOCK_ELEMENTS // (high * max(d, 1)))
    lines = [
        torch.cat(
            [recomputed(own_values, metric, x[rows], y[columns]) for columns in runs(m, wide)], 1
        )
        for rows in runs(n, high)
    ]
    return torch.cat(lines)


def _nothing(x: Tensor, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """No pairs, which are still a function of both."""
    dtype = accumulate_dtype(x.dtype)
    return (x[..., :0].sum() + y[..., :0].sum()).to(dtype).expand(shape)


def listed_values(
    metric: OwnMetric, x: Tensor, bank: Tensor, index: Tensor, dtype: torch.dtype
) -> Tensor:
    """Of each row the columns [n, k] that are listed, by one call a row. [n, k]"""
    lines = [
        own_values(metric, row.to(dtype), bank[at].to(dtype)).squeeze(0)
        for row, at in zip(x.split(1), index, strict=True)
    ]
    return torch.stack(lines) if lines else _nothing(x, bank, tuple(index.shape))
