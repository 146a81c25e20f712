"""The kernels of a divergence under a chunk of a shard's rows, beside a teacher's same classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_losses.centers.collectives import Ranks
from fused_losses.centers.engines import Chunk, Gradients, Rows
from fused_losses.centers.shard import ShardChunks, standing_for
from fused_losses.primitives.divergence import bounded
from fused_losses.primitives.divergence.inputs import DivergenceInputs
from fused_losses.primitives.divergence.op import DIVERGENCE, choose, divergence
from fused_losses.primitives.divergence.parts import (
    FOLDS,
    LSE,
    TARGET,
    TEACHER_LSE,
    Reduction,
    empty_statistics,
    joined,
)
from fused_losses.primitives.divergence.rules import DIVERGENCES


@dataclass(frozen=True)
class TeacherShard:
    """A teacher's part in the scores of all ranks' rows with the classes of this shard."""

    rows: Tensor  # [B, Dt] as multiplied, scale / T in them
    weight: Tensor  # [c, Dt]
    bias: Tensor | None  # [c], over T
    normalize: bool
    written: int | None  # version of the weight; None: it may change, along with the student's

    def of(self, chunk: Chunk, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that stand beside the chunk's, which its ids read."""
        if self.written is not None and self.weight._version != self.written:
            raise RuntimeError(
                "teacher_weight: expected the values of the forward until the rows have stepped, "
                "got a table that was changed in place since"
            )
        if chunk.ids is not None:
            return self.weight, self.bias
        return _rows(self.weight, chunk.rows, like), (
            None if self.bias is None else _rows(self.bias, chunk.rows, like)
        )


def _rows(t: Tensor, rows: Rows, like: Tensor) -> Tensor:
    part = t[rows] if isinstance(rows, slice) else t.index_select(0, rows.to(t.device))
    return part.to(like.device, non_blocking=True)


@dataclass(frozen=True)
class DivergenceEngine:
    """Statistics [4 + F, B] of a divergence (`parts`), and their gradients for the student."""

    kind: str
    params: tuple[float, ...]
    sharpness: float  # scores are this times what the rows' product is
    teacher: TeacherShard
    normalize: bool
    precision: str
    backend: str | None

    @property
    def kinds(self) -> tuple[str, ...]:
        rule = DIVERGENCES[self.kind]
        folds = ("lse", "mean") if rule.power else ("sum" if rule.term else "",) * rule.folds
        return ("lse", "lse", "target", "target", *folds)

    @property
    def pooling(self) -> float:
        return 1.0

    def steepest(self, values: Tensor | None) -> Tensor | float:
        assert values is not None
        return values

    def bounds(self, statistics: Tensor) -> Tensor:
        """`steepest`, from statistics of all shards; NaN where any of them is. [B]

        Of shares and sigmoids the slope is at most 1; q_s (gap - KL) at most 1 + 2 KL, 2 (u - v) at
        most 1 + the sum of its squares, and beta q log(q / m) at most 1 + 2 log(1 / least share).
        """
        rule, folds = DIVERGENCES[self.kind], statistics[FOLDS:]
        values = torch.ones_like(folds[0]) if rule.power else 1 + 2 * folds[0]
        if self.kind == "jensen_shannon":
            (beta,) = self.params
            values = values - 2 * min(math.log(beta), math.log1p(-beta))
        values = torch.where(statistics.isnan().any(dim=0), torch.nan, values)
        return self.sharpness * values

    def inputs(self, x: Tensor, chunk: Chunk) -> DivergenceInputs:
        weight, bias = self.teacher.of(chunk, x)
        return DivergenceInputs(
            x * self.sharpness, chunk.weight, self.teacher.rows, weight,
            chunk.labels[:, 0].contiguous(), chunk.ids, None, bias, None, self.normalize,
            self.teacher.normalize, self.kind, list(self.params), self.precision,
        )  # fmt: skip

    def statistics(self, x: Tensor, chunk: Chunk) -> Tensor:
        *vectors, folds = divergence(self.inputs(x, chunk), backend=self.backend)
        return torch.cat([torch.stack(vectors), folds]).double()

    def shares(self, x: Tensor, chunk: Chunk, statistics: Tensor) -> Tensor:
        """Folds of a kind of probabilities, whose lse are of all shards. [F, B]"""
        p = self.inputs(x, chunk)
        lse, teacher_lse = statistics[[LSE, TEACHER_LSE]].unbind()
        return bounded.shares(p, lse, teacher_lse, choose(p, self.backend)).double()

    def backward(
        self,
        grad: Gradients,
        statistics: Tensor,
        x: Tensor,
        chunk: Chunk,
        values: Tensor | None,  # noqa: ARG002 (one signature)
        need_x: bool,
        need_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        p = self.inputs(x, chunk)
        of, lse = grad.statistics, statistics[LSE:TARGET]
        saved = (*lse.unbind(), statistics[FOLDS:], p.kept(0))
        dx, dweight, *_ = DIVERGENCE.op(choose(p, self.backend), "_backward")(
            *of[:FOLDS].unbind(), of[FOLDS:], *p, *saved, True, need_x, need_weight, *(False,) * 5
        )
        return dx * self.sharpness if need_x else None, dweight if need_weight else None


class DivergenceSweep(ShardChunks[DivergenceEngine]):
    """The chunks of a shard beside a teacher's."""

    def over_shards(self, ranks: Ranks, x: Tensor) -> Tensor:
        """Statistics of each row over the classes of all ranks. [4 + F, B]

        Kinds of probabilities are swept for both lse, and again for their sums.
        """
        engine = self.engine
        over = Reduction(*(_reduction(by) for by in (ranks.maximum_, ranks.sum_)))
        if DIVERGENCES[engine.kind].shares is None:
            return joined(engine.kind, self._here(engine, x), over)
        first = replace(engine, kind="forward", params=())
        statistics = joined("forward", self._here(first, x), over)[:FOLDS]
        folds = empty_statistics(engine.kind, x)[FOLDS:]
        for chunk in self.chunks():
            own = statistics
            if chunk.chance != 1:
                own = standing_for(own, engine.kinds[:FOLDS], chunk.chance)
            folds = folds + engine.shares(x, chunk, own)
        ranks.sum_(folds)
        return torch.cat([statistics, folds])

    def _here(self, engine: DivergenceEngine, x: Tensor) -> Tensor:
        """Over this shard."""
        statistics = empty_statistics(engine.kind, x)
        for chunk in self.chunks():
            part = engine.statistics(x, chunk)
            if chunk.chance != 1:
                part = standing_for(part, engine.kinds, 1 / chunk.chance)
            statistics = joined(engine.kind, torch.stack([statistics, part]))
        return statistics


def _reduction(in_place: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    def reduce(t: Tensor) -> Tensor:
        in_place(t)
        return t

    return reduce
