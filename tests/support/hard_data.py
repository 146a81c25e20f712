"""Rows and labels that trouble a loss: what users' reports are made of.

Each kind takes rows [n, d] of norm about 1 and a generator, and returns others of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Kind = Callable[[Tensor, torch.Generator], Tensor]


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _draw(rows: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows.shape, generator=generator, dtype=rows.dtype)


def _sides(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A sign a row, [n, 1]."""
    drawn = torch.randint(0, 2, (len(rows), *[1] * (rows.dim() - 1)), generator=generator)
    return (2 * drawn - 1).to(rows)


def clusters(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Two clusters far apart and narrow: the products of their rows are large and nearly equal."""
    return 100 * _sides(rows, generator) + 0.01 * _draw(rows, generator)


def unit_clusters(rows: Tensor, generator: torch.Generator) -> Tensor:
    """On the sphere: opposite directions, each with a spread of 1e-3."""
    direction = _unit(torch.randn(rows.shape[-1], generator=generator, dtype=rows.dtype))
    return _unit(_sides(rows, generator) * direction + 1e-3 * _draw(rows, generator))


def near_duplicates(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Unit rows, the second half those of the first and a little."""
    half = len(rows) // 2
    out = _unit(rows).clone()
    out[half : 2 * half] = _unit(out[:half] + 3e-4 * _draw(out[:half], generator))
    return out


def duplicates(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Every row is one of three."""
    return rows[torch.randint(0, min(3, len(rows)), (len(rows),), generator=generator)]


def constant(rows: Tensor, generator: torch.Generator) -> Tensor:
    """All rows are one."""
    return rows[:1].expand_as(rows).clone()


def far(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows that are far from the origin, together."""
    return rows + 1000


def sparse(rows: Tensor, generator: torch.Generator) -> Tensor:
    """What a ReLU leaves; some rows are zero."""
    return (rows - 0.05).clamp_min(0)


def outlier(rows: Tensor, generator: torch.Generator) -> Tensor:
    """One coordinate is a thousand times the others, and the same in all rows."""
    out = rows.clone()
    out[..., 0] = 30 + out[..., 0]
    return out


def decaying(rows: Tensor, generator: torch.Generator) -> Tensor:
    """A spectrum that falls by a factor of 2 a coordinate."""
    steps = torch.arange(rows.shape[-1], dtype=rows.dtype)
    return 2 * rows * 2.0 ** -steps.clamp_max(40)


def integers(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Small whole numbers, with ties."""
    return (2 * _draw(rows, generator)).round().clamp(-3, 3)


def tiny(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Norms from 1e-4 to 1e-3."""
    return rows * 10 ** (-3 - torch.rand(len(rows), generator=generator, dtype=rows.dtype)).view(
        -1, *[1] * (rows.dim() - 1)
    )


def large(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Norms from 1 to 30."""
    return rows * 30 ** torch.rand(len(rows), generator=generator, dtype=rows.dtype).view(
        -1, *[1] * (rows.dim() - 1)
    )


KINDS: dict[str, Kind] = {
    "plain": lambda rows, generator: rows,
    "clusters": clusters,
    "unit clusters": unit_clusters,
    "near duplicates": near_duplicates,
    "duplicates": duplicates,
    "constant": constant,
    "far": far,
    "sparse": sparse,
    "outlier": outlier,
    "decaying": decaying,
    "integers": integers,
    "tiny": tiny,
    "large": large,
}


# the sign of x beside its class: a loss near zero, and one as large as it gets
ALIGNED = {"aligned": 1.0, "anti-aligned": -1.0}


def aligned(name: str, rows: Tensor, made: dict[str, Tensor], sign: float, seed: int) -> Tensor:
    """Rows on the unit direction of their class and a little: x by `sign`, all others by 1.

    made: the fields of the call, of which labels tell the classes; without, a row is its own.
    """
    if name not in ("x", "y", "w"):
        return rows
    own = torch.arange(len(rows))
    labels = {"x": made.get("labels", made.get("targets", own)), "y": made.get("y_labels", own)}
    at = labels.get(name, own)[: len(rows)]
    at = own if len(at) < len(rows) else at.reshape(len(rows), -1)[:, 0] % 997
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(997, rows.shape[-1], generator=generator, dtype=rows.dtype)
    place = _unit(directions)[at].view(len(rows), *[1] * (rows.dim() - 2), -1)
    return (sign if name == "x" else 1.0) * place + 0.01 * rows


LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda labels: labels,
    "one class": torch.zeros_like,
    "all distinct": lambda labels: torch.arange(len(labels)),
    "skewed": lambda labels: torch.where(torch.arange(len(labels)) % 5 == 0, labels, 0),
}
