"""`explain(fn, *args, **kw)`: which backend a call would run on, why, and what it would need."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_losses import backends, functional
from fused_losses.sweep import row_statistics

EXPLAINED = (functional.margin_softmax, functional.linear_cross_entropy, row_statistics)


@dataclass(frozen=True)
class Plan:
    """How a call would run."""

    backend: str
    reasons: dict[str, list[str]]  # why the backends that were passed over cannot take the call
    peak_extra_bytes: int  # beyond inputs and gradients, forward and backward

    def __str__(self) -> str:
        passed = "".join(f"\n  not {who}: {', '.join(w)}" for who, w in self.reasons.items())
        return f"{self.backend}, at most {self.peak_extra_bytes / 2**20:.1f} MiB extra{passed}"


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """The plan of `fn(*args, **kwargs)`, which is not run.

    fn: margin_softmax, linear_cross_entropy or row_statistics. Raises RuntimeError where the call
    itself would (no backend can take it) and ValueError for another function.
    """
    if fn not in EXPLAINED:
        known = ", ".join(f.__name__ for f in EXPLAINED)
        raise ValueError(f"fn: expected one of {known}, got {getattr(fn, '__name__', fn)!r}")
    # by place or by name, as the call itself takes them
    asked = inspect.signature(fn).bind(*args, **kwargs).arguments
    rows, weight = list(asked.values())[:2]
    n, c = (1 if rows.dim() == 1 else rows.shape[0]), weight.shape[0]
    classes = kwargs.get("classes")
    taking_part = c if classes is None else classes.shape[0]
    precision = kwargs.get("precision", "fp32")
    name, refused = backends.choose(kwargs.get("backend"), weight.device, weight.dtype, precision)
    extra = _extra_bytes(name, n, taking_part, weight, precision)
    budget = kwargs.get("memory_budget", 0) if name == "cpu" else 0
    scores = n * taking_part * (8 if weight.dtype == torch.float64 else 4)
    return Plan(name, refused, extra + min(budget, scores))


def _extra_bytes(name: str, n: int, c: int, weight: Tensor, precision: str) -> int:
    d, dtype = weight.shape[1], weight.dtype
    size = 8 if dtype == torch.float64 else 4
    # rows made float, normalised, scaled, and their gradients; and slack for the [N] vectors
    around = 8 * n * d * size + (1 << 18) + 200 * n
    if name == "reference":
        return around + 8 * n * c * size + 2 * c * d * size
    return around + backends.module(name).extra_bytes(n, d, dtype, precision)
