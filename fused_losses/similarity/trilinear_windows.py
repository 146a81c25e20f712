"""Third-order attention within windows: a query meets the keys of its own place and before it.

A key of a window is told by how many steps it lies back, so that nothing is computed but what takes
part: of B queries the keys [B, T, D] are those of B + T - 1 places. In PyTorch, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base import plans
from fused_losses.base.blocks import runs
from fused_losses.base.numerics import accumulate_dtype

# what a query sees of one side, where it is no window's length
ALL = -1  # every key
CAUSAL = 0  # every key up to its own place
BLOCK_BYTES = 2 << 20  # of a block's scores, and of what is multiplied to them
COLUMNS = 256  # second keys of a block, at most


class KeyPart(NamedTuple):
    """Some keys of each query of a run, with their values."""

    keys: Tensor  # [B, T, D], or [1, T, D]: of all queries alike
    values: Tensor  # [B, T, Dv]
    kept: Tensor | None  # [B, T] which there are; None: all
    places: slice  # where the keys stand in their side
    before: int  # places in front of these, where no key is

    def scatter(self, total: Tensor, grad: Tensor) -> None:
        """Adds a gradient [B, T, D] of the part to that of its side."""
        rows = grad[0] if grad.shape[0] == 1 else _overlapped(grad)
        count = self.places.stop - self.places.start
        total[self.places] += rows[self.before : self.before + count]


class KeySide(NamedTuple):
    """Keys and values of one of the two sides, and which of them a query sees."""

    keys: Tensor  # [J, D]
    values: Tensor  # [J, Dv]
    window: int  # ALL, CAUSAL, or how many: i - window < j <= i

    def most(self, queries: int) -> int:
        """How many keys one of so many queries may see."""
        count = self.keys.shape[0] if self.window == ALL else queries
        return max(1, min(count, self.window) if self.window > 0 else count)

    def parts(self, queries: slice, size: int) -> Iterator[KeyPart]:
        """What a run of queries sees, so many keys a query at a time."""
        count = self.keys.shape[0]
        if self.window == ALL:
            for run in runs(count, size):
                yield KeyPart(self.keys[run][None], self.values[run][None], None, run, 0)
            return
        a, b = queries.start, queries.stop
        # steps back, from the first that any query of the run has a key at
        first, end = max(0, a - count + 1), min(b, self.window or b)
        for start in range(first, end, size):
            yield self._back(a, b, start, min(start + size, end))

    def _back(self, a: int, b: int, start: int, stop: int) -> KeyPart:
        """The keys that lie start to stop - 1 steps back from each query of a to b - 1."""
        low, high = a - stop + 1, b - start
        places = slice(max(0, low), min(high, self.keys.shape[0]))
        pad = (0, 0, places.start - low, high - places.stop)
        length = stop - start
        keys, values = (
            F.pad(t[places], pad).unfold(0, length, 1).mT.contiguous()
            for t in (self.keys, self.values)
        )
        kept = None
        if pad[2] or pad[3]:
            ticks = torch.arange(low, high, device=keys.device)
            there = (ticks >= 0) & (ticks < self.keys.shape[0])
            kept = there.unfold(0, length, 1)
        return KeyPart(keys, values, kept, places, pad[2])


def _overlapped(x: Tensor) -> Tensor:
    """Sums [B, T, D] over where b + t is alike. [B + T - 1, D]"""
    x = x if x.shape[0] <= x.shape[1] else x.transpose(0, 1)
    short, long, d = x.shape
    # with `short` more places a row, and read one place shorter, each row begins one place later
    padded = F.pad(x, (0, 0, 0, short)).flatten(0, 1)
    return padded[: padded.shape[0] - short].view(short, long + short - 1, d).sum(dim=0)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """[B, n, D] times [B, D, m], or times one [1, D, m] for all."""
    if y.shape[0] == 1:
        return (x.flatten(0, 1) @ y[0]).unflatten(0, x.shape[:2])
    return x @ y


def _gathered(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """sum_n x[b, n, m] y[b, n, d], [B, m, d]; also over b where `like` is one for all."""
    if like.shape[0] == 1:
        return (x.flatten(0, 1).mT @ y.flatten(0, 1))[None]
    return x.mT @ y


class _WindowSweep:
    """Queries [N, G, D], G of them at a place, against both sides; all finite or NaN."""

    def __init__(
        self, tensors: tuple[Tensor, ...], scale: float, first: int, second: int, groups: int
    ) -> None:
        self.dtype = accumulate_dtype(tensors[0].dtype)
        # inf would be NaN in one sum and inf in another
        q, k1, k2, v1, v2 = (t + 0 * t for t in (t.to(self.dtype) for t in tensors))
        self.q = q.unflatten(0, (groups, q.shape[0] // groups)).transpose(0, 1)
        self.scale = scale
        self.first, self.second = KeySide(k1, v1, first), KeySide(k2, v2, second)
        n, room = self.q.shape[0], BLOCK_BYTES // self.dtype.itemsize
        width = q.shape[1] + v1.shape[1]
        self.columns = min(self.second.most(n), COLUMNS)
        each = groups * (self.columns + width)
        self.rows = min(self.first.most(n), max(1, room // each))
        step = max(1, room // (self.rows * each + (self.rows + self.columns) * width))
        self.queries = list(runs(n, step))
        # all are alike, but for the last; one is there yet while the next is made
        self.queries = self.queries[-3:] if plans.explaining() else self.queries

    def parts(self, queries: slice) -> Iterator[tuple[KeyPart, KeyPart]]:
        both = (
            (one, other)
            for one in self.first.parts(queries, self.rows)
            for other in self.second.parts(queries, self.columns)
        )
        return islice(both, 4) if plans.explaining() else both

    def scores(self, q: Tensor, one: KeyPart, other: KeyPart) -> tuple[Tensor, Tensor]:
        """[B, G, S, T], and the products of queries and first keys, [B, G S, D]."""
        products = (q[:, :, None] * one.keys[:, None]).flatten(1, 2)
        scores = _times(products, other.keys.mT).mul(self.scale)
        scores = scores.unflatten(1, (q.shape[1], one.keys.shape[1]))
        if one.kept is not None:
            scores = scores.masked_fill(~one.kept[:, None, :, None], -torch.inf)
        if other.kept is not None:
            scores = scores.masked_fill(~other.kept[:, None, None], -torch.inf)
        return scores, products

    def attended(self, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """out [B, G, Dv], the largest score [B, G] (0: there is none), and the mass beside it."""
        q = self.q[queries]
        out = q.new_zeros((*q.shape[:2], self.first.values.shape[1]))
        top, mass = q.new_full(q.shape[:2], -torch.inf), q.new_zeros(q.shape[:2])
        shift = torch.zeros_like(mass)
        for one, other in self.parts(queries):
            scores, _ = self.scores(q, one, other)
            new = torch.maximum(top, scores.detach().amax(dim=(2, 3)))
            shift = torch.where(new == -torch.inf, 0, new)
            fade, top = (top - shift).exp(), new
            weight = (scores - shift[:, :, None, None]).exp()
            mass = mass * fade + weight.sum(dim=(2, 3))
            mixed = _times(weight.flatten(1, 2), other.values).unflatten(1, weight.shape[1:3])
            out = out * fade[:, :, None] + (mixed * one.values[:, None]).sum(dim=2)
        mass = torch.where(mass == 0, 1, mass)
        return out / mass[:, :, None], shift, mass

    def restored(self, x: Tensor) -> Tensor:
        """[N, G, .] -> [G N, .]"""
        return x.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def forward(
    tensors: tuple[Tensor, ...], scale: float, first: int, second: int, groups: int
) -> Tensor:
    """out [G N, Dv] in the accumulation dtype of q [G N, D], k1, k2, v1 and v2."""
    sweep = _WindowSweep(tensors, scale, first, second, groups)
    found = [sweep.attended(queries)[0] for queries in sweep.queries]
    left = sweep.q.shape[0] - sum(len(part) for part in found)  # no rows, or those not explained
    found.append(sweep.q.new_empty((left, groups, tensors[3].shape[1])))
    return sweep.restored(torch.cat(found))


@torch.no_grad()
def backward(
    grad: Tensor, tensors: tuple[Tensor, ...], scale: float, first: int, second: int, groups: int
) -> tuple[Tensor, ...]:
    """Gradients of q, k1, k2, v1 and v2."""
    sweep = _WindowSweep(tensors, scale, first, second, groups)
    grad = grad.to(sweep.dtype).unflatten(0, (groups, sweep.q.shape[0])).transpose(0, 1)
    totals = [torch.zeros_like(t, dtype=sweep.dtype) for t in tensors[1:]]
    dk1, dk2, dv1, dv2 = totals
    dq = torch.zeros_like(sweep.q)
    for queries in sweep.queries:
        q, g = sweep.q[queries], grad[queries]
        out, shift, mass = sweep.attended(queries)
        mean = (g * out).sum(dim=2)[:, :, None, None]
        for one, other in sweep.parts(queries):
            scores, products = sweep.scores(q, one, other)
            weight = (scores - shift[:, :, None, None]).exp() / mass[:, :, None, None]
            flat = weight.flatten(1, 2)
            mixed = _times(flat, other.values).unflatten(1, weight.shape[1:3])
            one.scatter(dv1, _summed((g[:, :, None] * mixed).sum(dim=1), one))
            to_mixed = (g[:, :, None] * one.values[:, None]).flatten(1, 2)
            other.scatter(dv2, _gathered(flat, to_mixed, other.values))
            slope = _times(to_mixed, other.values.mT).view_as(weight)
            slope = ((slope - mean) * weight).mul(scale).flatten(1, 2)
            other.scatter(dk2, _gathered(slope, products, other.keys))
            to_products = _times(slope, other.keys).unflatten(1, weight.shape[1:3])
            dq[queries] += (to_products * one.keys[:, None]).sum(dim=2)
            one.scatter(dk1, _summed((to_products * q[:, :, None]).sum(dim=1), one))
    return tuple(
        t.to(like.dtype) for t, like in zip([sweep.restored(dq), *totals], tensors, strict=True)
    )


def _summed(grad: Tensor, part: KeyPart) -> Tensor:
    """Over the queries, where a part is one for all."""
    return grad.sum(dim=0, keepdim=True) if part.keys.shape[0] == 1 else grad
