"""The sweep over one shard of the classes, a chunk of rows at a time.

    forward: statistics of each row's scores against the classes here that take part
    backward: the scores again, chunk by chunk; each chunk's gradient is used at once

A chunk is one call of a streamed op on a view of the table or on indirect rows of it, so beyond the
table there are the rows x, a chunk's gradient and the kernels' scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_losses.base.validation import NO_TARGET
from fused_losses.centers.engines import Chunk, Engine, Gradients, Rows, SlopesEngine, Sums
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import class_targets
from fused_losses.primitives.class_rules.rules import merge_statistics, no_classes

CHUNK_BYTES = 32 << 20  # of table rows in a chunk


class ClassGroup(NamedTuple):
    """Classes of this shard that take part with one chance."""

    ids: Tensor | None  # [K] increasing rows of the shard, None: all of them
    chance: float = 1.0  # of having been drawn, where that is corrected for


@dataclass(frozen=True)
class Shard:
    """A rank's rows of the table, and where the batch's labels stand among them."""

    weight: Tensor  # [c, D] or [c, K, D]
    labels: Tensor  # [B, L] rows of this shard, -1: elsewhere
    device: torch.device  # of the products; elsewhere than the table's, chunks move
    chunk_bytes: int = CHUNK_BYTES
    moves: bool = False  # even where the devices are the same

    @property
    def staged(self) -> bool:
        return self.moves or self.weight.device != self.device

    @property
    def height(self) -> int:
        """Rows of a chunk."""
        row = math.prod(self.weight.shape[1:]) * self.weight.element_size()
        return max(1, self.chunk_bytes // row)

    def taken(self, rows: Tensor) -> Tensor:
        """These rows as a table of their own on the products' device. [K, ...]"""
        return self.weight.index_select(0, rows.to(self.weight.device)).to(self.device)

    @torch.no_grad()
    def targets(self, x: Tensor, softness: float, normalize: bool) -> Tensor:
        """Cosines with the labels that live here, float64, 0 for the others. [B, L]

        Time O(B L K D).
        """
        weight, labels = self.weight, self.labels
        if self.staged:  # the batch's own rows alone move
            own, position = labels.clamp_min(0).unique(return_inverse=True)
            weight = self.taken(own) if weight.shape[0] else weight.to(self.device)
            labels = torch.where(labels < 0, NO_TARGET, position)
        if weight.shape[0] == 0:
            return x.new_zeros(labels.shape, dtype=torch.float64)
        inputs = ClassInputs(
            x,
            weight.reshape(-1, weight.shape[-1]),
            labels,
            centers=weight.shape[1] if weight.dim() == 3 else 1,
            softness=softness,
            normalize=normalize,
        )
        return class_targets(inputs).to(torch.float64)


SlopesT = TypeVar("SlopesT", bound=SlopesEngine)


class ShardChunks(Generic[SlopesT]):
    """The chunks of a shard that lie with some groups of its rows."""

    def __init__(self, shard: Shard, groups: list[ClassGroup], engine: SlopesT) -> None:
        self.shard, self.groups, self.engine = shard, groups, engine

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
        """The chunks, of the table's rows in [first, last) only."""
        rows, height = self.shard.weight.shape[0], self.shard.height
        last = rows if last is None else min(last, rows)
        for ids, chance in self.groups:
            begin, end = first, last
            if ids is not None and (first, last) != (0, rows):
                bounds = torch.tensor([first, last], device=ids.device)
                begin, end = torch.searchsorted(ids, bounds).tolist()
            elif ids is not None:
                end = ids.shape[0]
            for start in range(begin, end, height):
                yield self._chunk(ids, start, min(start + height, end), chance)

    def _chunk(self, ids: Tensor | None, start: int, stop: int, chance: float) -> Chunk:
        shard, labels = self.shard, self.shard.labels
        if ids is None:
            part = shard.weight[start:stop].to(shard.device, non_blocking=True)
            mine = (labels >= start) & (labels < stop)
            within = torch.where(mine, labels - start, NO_TARGET)
            return Chunk(slice(start, stop), part, within, None, chance)
        rows = ids[start:stop]
        position = torch.searchsorted(rows, labels).clamp_max(rows.shape[0] - 1)
        mine = rows[position] == labels
        if shard.staged:
            within = torch.where(mine, position, NO_TARGET)
            return Chunk(rows, shard.taken(rows), within, None, chance)
        return Chunk(rows, shard.weight, torch.where(mine, labels, NO_TARGET), rows, chance)

    def gradients(
        self,
        grad: Gradients,
        statistics: Tensor,  # [S, B], of all shards
        x: Tensor,
        values: Tensor | None,
        *,
        need_x: bool,
        need_weight: bool,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[tuple[Rows, Tensor | None, Tensor | None]]:
        """Of each chunk: its rows, its share of dx [B, D] and dweight [rows, ...]."""
        kinds = self.engine.kinds
        for chunk in self.chunks(first, last):
            lse, of, chance = statistics, grad, chunk.chance
            if chance != 1:
                # exp(z + log(1 / chance) - lse), and a sum's terms 1 / chance times
                lse = standing_for(statistics, kinds, chance, kind="lse")
                of = grad._replace(
                    statistics=standing_for(grad.statistics, kinds, 1 / chance, kind="sum")
                )
            part, dweight = self.engine.backward(of, lse, x, chunk, values, need_x, need_weight)
            yield chunk.rows, part, dweight


class ShardSweep(ShardChunks[Engine]):
    """The chunks, and the statistics of a rule's scores with them."""

    def forward(self, x: Tensor, values: Tensor | None) -> Sums:
        kinds, b = self.engine.kinds, x.shape[0]
        wide: dict[str, Any] = dict(dtype=torch.float64, device=x.device)
        statistics = no_classes(kinds, b, x.device)
        targets = torch.zeros(self.shard.labels.shape, **wide)
        best = torch.full((b,), -torch.inf, **wide)
        for chunk in self.chunks():
            found = self.engine.forward(x, chunk, values)
            part = found.statistics
            if chunk.chance != 1:
                part = standing_for(part, kinds, 1 / chunk.chance)
            statistics = merge_statistics(kinds, statistics, part)
            targets += found.targets
            best = torch.maximum(best, found.best)
        return Sums(statistics, targets, best)


def standing_for(
    statistics: Tensor, kinds: tuple[str, ...], times: float, kind: str | None = None
) -> Tensor:
    """Statistics of classes that each stand for `times` of them; of one kind only, if told."""
    out = statistics.clone()
    for row, of in zip(out, kinds, strict=True):
        if kind in (None, of):
            if of == "lse":
                row += math.log(times)
            elif of == "sum":
                row *= times
    return out
