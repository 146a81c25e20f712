"""Third-order attention within windows and by groups of heads, for the draws: literal formulas."""

from __future__ import annotations

from typing import Any

import torch
from pair_cases import Case
from pair_rows import Inputs, trilinear
from torch import Tensor

import fused_losses.functional as fl

LEAVES = ("x", "few", "z", "few_values", "w")
Window = tuple[int | None, int | None]


def seen(queries: int, keys: int, width: int | None, causal: bool) -> Tensor:
    """[N, J] which keys a query meets."""
    back = torch.arange(queries)[:, None] - torch.arange(keys)
    kept = torch.ones(queries, keys, dtype=torch.bool)
    if causal or width is not None:
        kept &= back >= 0
    return kept if width is None else kept & (back < width)


def within(q: Tensor, *rest: Tensor, window: Window = (None, None), causal: bool = False) -> Tensor:
    """All scores of one head and their masks; a query that meets nothing gets 0."""
    k1, k2, v1, v2 = rest
    scores = torch.einsum("nd,jd,ld->njl", q, k1, k2) / max(q.shape[1], 1) ** 0.5
    one, other = (
        seen(len(q), len(k), width, causal) for k, width in zip((k1, k2), window, strict=True)
    )
    kept = (one[:, :, None] & other[:, None]).flatten(1)
    some = kept.any(dim=1, keepdim=True)
    z = scores.flatten(1).masked_fill(~kept, -torch.inf)
    weight = torch.where(some, z, 0).softmax(dim=1) * some
    return weight @ (v1[:, None] * v2).flatten(0, 1)


def rows_of(t: Inputs) -> list[Tensor]:
    return [getattr(t, name) for name in LEAVES]


def windowed(t: Inputs, *, backend: str | None = None, **more: Any) -> Tensor:
    # in PyTorch alone: kernels refuse it, which `test_trilinear_windows` says
    more.pop("precision", None)
    python = backend if backend in (None, "reference") else "bounded"
    return fl.trilinear_attention(*rows_of(t), backend=python, **more)


def heads(t: Inputs) -> list[Tensor]:
    q, *keys = rows_of(t)
    return [torch.stack([q, -q]), *(k[None] for k in keys)]


OPTIONS: dict[str, dict[str, Any]] = {
    "windows": dict(window=(5, 3)),
    "one_window": dict(window=(None, 2)),
    "causal": dict(window=(4, None), causal=True),
}
DRAWN = [
    *(
        Case(
            f"trilinear_attention_{name}",
            trilinear,
            lambda t, options=options, **more: windowed(t, **options, **more),
            lambda t, options=options: within(*rows_of(t), **options),
            LEAVES,
            function=fl.trilinear_attention,
        )
        for name, options in OPTIONS.items()
    ),
    Case(
        "trilinear_attention_groups",
        trilinear,
        lambda t, **more: fl.trilinear_attention(*heads(t), groups=2, **more),
        lambda t: torch.stack([within(q, *(k[0] for k in heads(t)[1:])) for q in heads(t)[0]]),
        LEAVES,
        function=fl.trilinear_attention,
    ),
]
