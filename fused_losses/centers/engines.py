"""The kernels under a chunk of a shard's rows: its statistics, and its gradients by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import class_gradients, class_statistics
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS
from fused_losses.primitives.row_statistics.bend import steepest_bend
from fused_losses.primitives.row_statistics.inputs import Inputs, kept_row
from fused_losses.primitives.row_statistics.op import ROW_STATISTICS

Rows = Tensor | slice


class Sums(NamedTuple):
    """Of each row over some classes: what merges over chunks and shards."""

    statistics: Tensor  # [S, B] float64, of the classes that are not the row's own
    targets: Tensor  # [B, L] float64, cosines with the row's own classes that live here, else 0
    best: Tensor  # [B] the highest score of another class, -inf without


class Gradients(NamedTuple):
    """Of the loss, in what `Sums` has of it."""

    statistics: Tensor  # [S, B]
    targets: Tensor  # [B, L]

    def times(self, factor: float) -> Gradients:
        """Before the sweep: the rows' gradient is in the table's type, which may overflow."""
        if factor == 1:
            return self
        return Gradients(self.statistics * factor, self.targets * factor)


class Chunk(NamedTuple):
    """What one call of a kernel is given."""

    rows: Rows  # of the shard
    weight: Tensor  # the view, or the table that `ids` reads
    labels: Tensor  # [B, L] rows of `weight`, -1: not in this chunk
    ids: Tensor | None
    chance: float


class SlopesEngine(Protocol):
    """The kernels under a chunk, backward; x [B, D] unit rows."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """How each statistic merges."""
        ...

    @property
    def pooling(self) -> float:
        """A bound on the slope of a class's cosine in that of one of its centres."""
        ...

    def steepest(self, values: Tensor | None) -> Tensor | float:
        """A bound on the slope of each statistic's terms in a class's cosine, [B] or of all."""
        ...

    def backward(
        self,
        grad: Gradients,
        statistics: Tensor,
        x: Tensor,
        chunk: Chunk,
        values: Tensor | None,
        need_x: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx [B, D] and dweight [rows of weight or K, D]."""
        ...


class Engine(SlopesEngine, Protocol):
    """And forward."""

    def forward(self, x: Tensor, chunk: Chunk, values: Tensor | None) -> Sums: ...


@dataclass(frozen=True)
class SoftmaxEngine:
    """lse of scale psi(cos) over the other classes, by the compiled row statistics.

    with_sum: and the sum of these scores.
    """

    scale: float
    normalize: bool
    precision: str
    backend: str | None
    with_sum: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("lse", "sum") if self.with_sum else ("lse",)

    @property
    def pooling(self) -> float:
        return 1.0

    def steepest(self, values: Tensor | None) -> Tensor | float:
        return steepest_bend(values) * self.scale

    def _inputs(self, x: Tensor, chunk: Chunk, values: Tensor | None) -> tuple[str, Inputs]:
        weight = chunk.weight
        name, _ = backends.choose(
            self.backend, x.device, weight.dtype, self.precision, "row_statistics", x.shape[1]
        )
        scaled = x * self.scale
        if name in ("triton", "cuda") and scaled.dtype != weight.dtype:
            scaled = scaled.to(weight.dtype)
        bend = None if values is None else self._scaled_bend(values).to(x.dtype)
        return name, Inputs(
            scaled,
            weight,
            chunk.labels[:, 0].contiguous(),
            chunk.ids,
            normalize=self.normalize,
            weighted=self.with_sum,
            precision=self.precision,
            bend=bend,
        )

    def _scaled_bend(self, values: Tensor) -> Tensor:
        """From cosines to scores: s psi(z / s)."""
        s = self.scale
        factors = torch.tensor([s, s, 1.0, 1 / s], dtype=values.dtype, device=values.device)
        return values * factors[:, None]

    def forward(self, x: Tensor, chunk: Chunk, values: Tensor | None) -> Sums:
        name, p = self._inputs(x, chunk, values)
        lse, target, total, _, best, _ = ROW_STATISTICS.op(name)(*p, 0)
        wide = torch.float64
        targets = (target.to(wide) / self.scale)[:, None]
        found = torch.stack([lse.to(wide), total.to(wide)]) if self.with_sum else lse.to(wide)[None]
        return Sums(found, targets, best.to(wide) / self.scale)

    def backward(
        self,
        grad: Gradients,
        statistics: Tensor,
        x: Tensor,
        chunk: Chunk,
        values: Tensor | None,
        need_x: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        name, p = self._inputs(x, chunk, values)
        lse = statistics[0]
        kept = x.new_empty((0, kept_row(x.shape[0])), dtype=accumulate_dtype(p.weight.dtype))
        dx, dweight, _ = ROW_STATISTICS.op(name, "_backward")(
            grad.statistics[0].contiguous(),
            (grad.targets[:, 0] / self.scale).contiguous(),
            grad.statistics[1].to(x.dtype).contiguous() if self.with_sum else None,
            *p[:6],
            lse.contiguous(),
            kept,
            *p[6:],
            p.classes is not None,
            need_x,
            need_weight,
            False,
        )
        return dx * self.scale if need_x else None, dweight if need_weight else None


@dataclass(frozen=True)
class RuleEngine:
    """Any rule of `primitives.class_rules`, by tiles; sub-centres and several labels a row."""

    rule: str
    params: tuple[float, ...]
    softness: float
    normalize: bool
    precision: str
    backend: str | None

    @property
    def kinds(self) -> tuple[str, ...]:
        return CLASS_FOLDS[self.rule].kinds

    @property
    def pooling(self) -> float:
        # of softmax(c / softness) c: a share, and what moves it
        return 1 + 2 / self.softness if self.softness else 1.0

    def steepest(self, values: Tensor | None) -> Tensor | float:
        rule = CLASS_FOLDS[self.rule]
        return rule.times(values) * rule.steepest(list(self.params))

    def _inputs(self, x: Tensor, chunk: Chunk, values: Tensor | None) -> ClassInputs:
        weight = chunk.weight
        return ClassInputs(
            x,
            weight.reshape(-1, weight.shape[-1]),
            chunk.labels,
            chunk.ids,
            values,
            rule=self.rule,
            params=self.params,
            centers=weight.shape[1] if weight.dim() == 3 else 1,
            softness=self.softness,
            normalize=self.normalize,
            precision=self.precision,
        )

    def forward(self, x: Tensor, chunk: Chunk, values: Tensor | None) -> Sums:
        inputs = self._inputs(x, chunk, values)
        found = class_statistics(inputs, backend=self.backend)
        wide = torch.float64
        return Sums(found.statistics.to(wide), found.targets.to(wide), found.hardest_score.to(wide))

    def backward(
        self,
        grad: Gradients,
        statistics: Tensor,
        x: Tensor,
        chunk: Chunk,
        values: Tensor | None,
        need_x: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        dx, dweight = class_gradients(
            self._inputs(x, chunk, values),
            statistics,
            grad.statistics,
            grad.targets,
            compact=True,
            need_x=need_x,
            need_weight=need_weight,
            backend=self.backend,
        )
        if need_weight and chunk.weight.dim() == 3:
            dweight = dweight.view(-1, *chunk.weight.shape[1:])
        return dx if need_x else None, dweight if need_weight else None
