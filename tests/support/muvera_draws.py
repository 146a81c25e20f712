"""MUVERA's encodings by loops over points and partitions; and their draws."""

from __future__ import annotations

from typing import Any

import torch
from pair_cases import Case
from pair_rows import Inputs
from torch import Tensor

import fused_losses.functional as fl

PLANES = dict(repetitions=2, bits=3, seed=5)


def gray(p: int) -> str:
    return format(p ^ (p >> 1), "b")


def literal(
    points: Tensor, planes: Tensor, side: str, fill: bool, projections: Tensor | None = None
) -> Tensor:
    """One set [L, D], planes [R, D, k], projections [R, D, d]."""
    blocks = []
    for r in range(len(planes)):
        k = planes.shape[2]
        signs = [
            "".join(str(int(x.double() @ g.double() > 0)) for g in planes[r].T) for x in points
        ]
        rows = points if projections is None else points @ projections[r].to(points)
        for p in range(2**k):
            code = gray(p).zfill(k) if k else ""
            inside = [row for s, row in zip(signs, rows, strict=True) if s == code]
            total = sum(inside, start=rows.new_zeros(rows.shape[1]))
            if side == "document" and inside:
                total = total / len(inside)
            elif side == "document" and fill and len(points):
                apart = [sum(a != b for a, b in zip(s, code, strict=True)) for s in signs]
                total = rows[apart.index(min(apart))]
            blocks.append(total)
    # where nothing is a point, 0 with a gradient
    return torch.cat(blocks) + 0 * points.sum()


def drawn_planes(d: int) -> Tensor:
    return fl.muvera_planes(width=d, dtype=torch.float64, **PLANES)


def points(n: int, m: int, d: int) -> Inputs:
    return Inputs(x=torch.randn(n, d) / d**0.5)


def projections(d: int) -> Tensor:
    """Of whole numbers, which a narrow dtype has, too."""
    return (torch.arange(2 * d * 3) % 5 - 2.0).view(2, d, 3).double()


def final(rows: int) -> Tensor:
    return (torch.arange(rows * 2) % 3 - 1.0).view(rows, 2).double()


def of_query(t: Inputs) -> Tensor:
    return literal(t.x[:-1], drawn_planes(t.x.shape[1]), "query", False) + 0 * t.x[0, 0]


def of_document(t: Inputs) -> Tensor:
    d = t.x.shape[1]
    found = literal(t.x, drawn_planes(d), "document", True, projections(d))
    return found @ final(len(found)).to(found)


def query(t: Inputs, **_: Any) -> Tensor:
    kept = torch.arange(len(t.x)) < len(t.x) - 1
    return fl.muvera_encode(t.x, drawn_planes(t.x.shape[1]), side="query", mask=kept)


def document(t: Inputs, **_: Any) -> Tensor:
    n, d = t.x.shape
    more: dict[str, Any] = dict(projection=projections(d), final_projection=final(2 * 8 * 3))
    more |= dict(side="document", fill_empty=True, lengths=torch.tensor(n))
    return fl.muvera_encode(t.x, drawn_planes(d), **more)


DRAWN = [
    Case("muvera_encode_query", points, query, of_query, ("x",), function=fl.muvera_encode),
    Case(
        "muvera_encode_document", points, document, of_document, ("x",), function=fl.muvera_encode
    ),
    Case("muvera_planes", points, query, of_query, ("x",), function=fl.muvera_planes),
]
