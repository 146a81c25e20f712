"""The pairs whose score passes an edge: all that are near enough, by a screen with a certificate.

A product in a narrow type screens every pair by s_ij of `certified`, within e_i of the real one. A
pair beyond the edge by more than that is decided; the rest are scored in float64 as the top-k's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.blocks import runs
from fused_losses.base.numerics import ROUNDOFF, no_autocast, row_dtype
from fused_losses.primitives.topk import bounds
from fused_losses.primitives.topk.certified import BLOCK_BYTES, LIVE_BLOCKS, block_bytes, prepared
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.listed import listed_forward
from fused_losses.primitives.topk.reference import allowed

EDGE_ROUNDINGS = 32  # of the edge as a key, and of what is made of a key there


class Edge(NamedTuple):
    """Where a key passes: `passes` of a key in float64 decides, `key` is where it turns."""

    key: float
    size: float  # what roundings at the edge are a part of
    passes: Callable[[Tensor], Tensor]  # NaN: no


def within(p: TopkInputs, edge: Edge, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The pairs that pass: rows and columns, int64 [P], by row and then by column; no gradient.

    Larger keys pass where p.largest, else smaller ones; p.k is not read. The sweep is PyTorch's on
    every backend but the reference, which scores every pair in float64. Time O(N M D), memory O(P)
    and a few blocks.
    """
    dtype = torch.float32 if p.x.dtype == torch.float64 else p.x.dtype
    name, _ = backends.choose(backend, p.x.device, dtype, "fp32", "topk", p.x.shape[1])
    p = p._replace(x=p.x.detach(), y=p.y.detach())
    with torch.no_grad(), no_autocast(p.x.device):
        if 0 in (p.x.shape[0], p.y.shape[0]):
            nothing = torch.zeros(0, dtype=torch.int64, device=p.x.device)
            return nothing, nothing
        return gathered(p, _all_scored(p, edge) if name == "reference" else _screened(p, edge))


def within_bytes(p: TopkInputs) -> int:
    """Beyond inputs and what is returned, at most."""
    (n, d), m = p.x.shape, p.y.shape[0]
    return LIVE_BLOCKS * block_bytes(p) + 4 * BLOCK_BYTES + 24 * n * d + 16 * m + 32 * n


Taken = Callable[[slice, slice], Tensor]  # [rows, columns] which pairs of a block pass


def gathered(p: TopkInputs, taken: Taken) -> tuple[Tensor, Tensor]:
    (n, d), m = p.x.shape, p.y.shape[0]
    wide = min(m, 4096)
    rows, columns = [], []
    for run in runs(n, max(1, BLOCK_BYTES // (8 * wide * (1 + d // 512)))):
        found = []
        for block in runs(m, wide):
            i, j = (taken(run, block) & allowed(p, run, block)).nonzero(as_tuple=True)
            found.append((i + run.start, j + block.start))
        i, j = (torch.cat(part) for part in zip(*found, strict=True))
        # blocks came one after another: of equal rows the columns rise already
        order = i.argsort(stable=True)
        rows.append(i[order])
        columns.append(j[order])
    return torch.cat(rows), torch.cat(columns)


def _scored(p: TopkInputs, edge: Edge, i: Tensor, j: Tensor) -> Tensor:
    """Whether listed pairs pass, in float64. [P]"""
    out = torch.zeros(len(i), dtype=torch.bool, device=i.device)
    for part in runs(len(i), max(1, BLOCK_BYTES // (8 * max(1, p.x.shape[1])))):
        at = j[part, None]
        keys = listed_forward(p.x[i[part]], p.y, p.y_scale, at, p.kind)
        out[part] = edge.passes(keys[:, 0])
    return out


def _all_scored(p: TopkInputs, edge: Edge) -> Taken:
    def taken(run: slice, block: slice) -> Tensor:
        size = (run.stop - run.start, block.stop - block.start)
        i, j = torch.ones(size, dtype=torch.bool, device=p.x.device).nonzero(as_tuple=True)
        return _scored(p, edge, i + run.start, j + block.start).view(size)

    return taken


def _screened(p: TopkInputs, edge: Edge) -> Taken:
    screen = prepared(p)
    turn, slack = _edge_of_rows(p, edge, screen.squares)
    slack = slack + screen.error
    multiplier, offset = screen.multiplier, screen.offset
    assert multiplier is not None and offset is not None

    def taken(run: slice, block: slice) -> Tensor:
        y = screen.rows_of(p.y[block])
        s = (screen.x[run] @ y.T * multiplier[block] + offset[block]).to(turn.dtype)
        passes = s > (turn + slack)[run, None]
        # so written, what is no number is for float64 to decide
        open_ended = ~(passes | (s < (turn - slack)[run, None]))
        i, j = (open_ended & allowed(p, run, block)).nonzero(as_tuple=True)
        passes[i, j] = _scored(p, edge, i + run.start, j + block.start)
        return passes

    return taken


def _edge_of_rows(p: TopkInputs, edge: Edge, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The edge in the screen's terms, and how far from it float64 may decide otherwise. [N]"""
    roundoff = ROUNDOFF[row_dtype(p.x.device)]
    tiny = bounds.TINY[squares.dtype]
    key = torch.full_like(squares, edge.key)
    slack = torch.full_like(squares, EDGE_ROUNDINGS * (roundoff * edge.size + tiny))
    sign = 1.0 if p.largest else -1.0
    if p.kind == "cosine":
        size = squares.sqrt()
        return sign * key * size, slack * size + tiny
    if p.kind == "dot":
        return sign * key, slack
    d, half = p.x.shape[1], squares / 2
    # a key's own rounding, and what of it moves with the key
    judged = 2 * bounds.of_distances(d, squares.dtype) * (half + key / 2) + d * tiny
    return sign * (key / 2 - half), slack / 2 + judged
