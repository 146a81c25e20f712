"""What becomes of the table's gradient: autograd gets it, or the rows step and it is gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.centers.collectives import Ranks, Scattered
from fused_losses.centers.optimizers import RowOptimizer
from fused_losses.centers.shard import ClassGroup, Gradients, Rows
from fused_losses.centers.step import SavedForward

Backward = tuple[SavedForward, Gradients]


class HeadOptimizer(torch.optim.Optimizer):
    """The head's updates behind torch's interface: hyper-parameters for learning-rate schedules.

    With update="backward" a step has been taken when backward returns, with the hyper-parameters
    that stood then, and `step` does nothing; with update="step" it is taken here.
    """

    def __init__(self, updates: RowUpdates, weight: Tensor, defaults: dict[str, Any]) -> None:
        self._updates = updates
        super().__init__([weight], dict(defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updates.take_pending()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 (torch's signature)
        """Forgets the backwards since the last step (update="step")."""
        self._updates.pending.clear()


class AutogradUpdates:
    """Of a table that is a parameter: some other optimiser takes the steps."""

    at = "backward"
    optimizer = None

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.max_norm: float | None = None
        self.steps = 0  # training forwards, what draws the sample
        self.states: dict[str, Tensor] = {}

    def count_forward(self) -> None:
        """A training forward is done."""
        self.steps += 1

    def catch_up(self, groups: list[ClassGroup], device: torch.device) -> None:
        """No row is ever behind."""

    def settle(self) -> None:
        """No row is ever behind."""

    def load(self, steps: int) -> None:
        """Goes on from this step."""
        self.steps = steps

    def backward(
        self, saved: SavedForward, grad: Gradients
    ) -> tuple[Tensor | None, Scattered | None]:
        """The gradient of every row, or of those that took part, and dX on its way."""
        table, need, dx = saved.table, saved.need_weight, _zeros_of_x(saved)
        sampled = saved.sweep.groups[0].ids is not None
        dense = torch.zeros_like(table) if need and not sampled else None
        parts: list[tuple[Tensor, Tensor]] = []
        for rows, d_rows in saved.gradients(grad, dx, need_weight=need):
            if not need or d_rows is None:
                continue
            if dense is not None:
                dense[rows] = d_rows.to(dense.device)
            else:
                assert isinstance(rows, Tensor)
                parts.append((rows.to(table.device), d_rows.to(table.device)))
        d_weight = _sparse(table, parts) if need and dense is None else dense
        return d_weight, _scattered(self.ranks, dx, saved)


class RowUpdates:
    """Of a table whose rows an optimiser steps inside backward, or when it is told to.

    at: "backward" or "step". max_norm: the gradient is scaled down to it, over all shards.
    """

    def __init__(
        self, rows: RowOptimizer, weight: Tensor, ranks: Ranks, *, at: str, max_norm: float | None
    ) -> None:
        self.rows, self.ranks, self.at, self.max_norm = rows, ranks, at, max_norm
        self.pending: list[Backward] = []  # since the last step
        self.factor = 1.0  # of the gradient that waits
        self.optimizer = HeadOptimizer(self, weight, rows.defaults)

    @property
    def steps(self) -> int:
        return self.rows.steps

    @property
    def states(self) -> dict[str, Tensor]:
        return self.rows.states

    def count_forward(self) -> None:
        """The steps alone count."""

    def catch_up(self, groups: list[ClassGroup], device: torch.device) -> None:
        """These rows stand at the latest step."""
        for ids, _ in groups:
            if ids is None:
                self.rows.settle()
            else:
                self.rows.catch_up(ids.to(device))

    def settle(self) -> None:
        """Every row stands at the latest step."""
        self.rows.settle()

    def load(self, steps: int) -> None:
        """Goes on from this step, after table and states were loaded in place."""
        self.pending.clear()
        self.factor = 1.0
        self.rows.load(steps)

    def backward(
        self, saved: SavedForward, grad: Gradients
    ) -> tuple[Tensor | None, Scattered | None]:
        """The step, or its wait for `take_pending`; dX on its way."""
        if saved.at != self.steps:
            raise RuntimeError(
                "the class centres were updated after this forward: its backward came twice, or "
                "after another one's; update='step' lets several backwards add up"
            )
        dx = _zeros_of_x(saved)
        if self.at == "step":
            self.pending.append((saved, grad))
            for _ in saved.gradients(grad, dx, need_weight=False):
                pass
            return None, _scattered(self.ranks, dx, saved)
        factor = self._clipped(1.0, [(saved, grad)])
        self.rows.begin(self._hyper_parameters())
        for rows, d_rows in saved.gradients(grad, dx, need_weight=True):
            self._update(saved.table.device, rows, d_rows, factor)
        on_the_way = _scattered(self.ranks, dx, saved)
        self.rows.end()
        return None, on_the_way

    @torch.no_grad()
    def take_pending(self) -> None:
        """The step with the sum of the gradients that wait."""
        if not self.pending:
            return
        factor = self._clipped(self.factor, self.pending)
        self.rows.begin(self._hyper_parameters())
        device = self.pending[0][0].table.device
        for rows, d_rows in self._summed(self.pending):
            self._update(device, rows, d_rows, factor)
        self.rows.end()
        self.pending.clear()
        self.factor = 1.0

    def norm(self) -> float:
        """Of the gradient that waits, over all shards."""
        return abs(self.factor) * self._norm(self.pending)

    def scale(self, factor: float) -> None:
        """Multiplies the gradient that waits."""
        self.factor *= factor

    def _hyper_parameters(self) -> dict[str, Any]:
        """Those of now, as a schedule has left them."""
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        return {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()}

    def _update(
        self, device: torch.device, rows: Rows, d_rows: Tensor | None, factor: float
    ) -> None:
        assert d_rows is not None
        d_rows = d_rows.to(device)
        if factor != 1:
            d_rows = d_rows * factor
        self.rows.update(rows.to(device) if isinstance(rows, Tensor) else rows, d_rows)

    def _clipped(self, factor: float, backwards: list[Backward]) -> float:
        """The gradient's factor after clipping, as torch.nn.utils.clip_grad_norm_ has it."""
        if self.max_norm is None:
            return factor
        norm = abs(factor) * self._norm(backwards)
        return factor * min(1.0, self.max_norm / (norm + 1e-6))

    def _norm(self, backwards: list[Backward]) -> float:
        square = torch.zeros((), dtype=torch.float64, device=backwards[0][0].table.device)
        for _, d_rows in self._summed(backwards):
            square += torch.linalg.vector_norm(d_rows, dtype=torch.float64).square().to(square)
        self.ranks.sum_(square)
        return math.sqrt(float(square))

    def _summed(self, backwards: list[Backward]) -> Iterator[tuple[Rows, Tensor]]:
        """The sum of some backwards' gradients, a chunk of rows at a time."""
        if len(backwards) == 1:
            saved, grad = backwards[0]
            for rows, d_rows in saved.gradients(grad, None, need_weight=True):
                assert d_rows is not None
                yield rows, d_rows
            return
        table, height = backwards[0][0].table, backwards[0][0].sweep.shard.height
        for first in range(0, table.shape[0], height):
            last = min(first + height, table.shape[0])
            total = torch.zeros_like(table[first:last], dtype=accumulate_dtype(table.dtype))
            touched = torch.zeros(last - first, dtype=torch.bool, device=total.device)
            for saved, grad in backwards:
                for rows, d_rows in saved.gradients(
                    grad, None, need_weight=True, first=first, last=last
                ):
                    assert d_rows is not None
                    if isinstance(rows, slice):
                        total[rows.start - first : rows.stop - first] += d_rows.to(total)
                        touched[rows.start - first : rows.stop - first] = True
                    else:
                        at = rows.to(total.device) - first
                        total.index_add_(0, at, d_rows.to(total))
                        touched[at] = True
            at = touched.nonzero()[:, 0]
            if at.numel():
                yield at + first, total[at].to(table.dtype)


def _zeros_of_x(saved: SavedForward) -> Tensor | None:
    """[B, D], where any rank's embeddings need a gradient."""
    return torch.zeros_like(saved.x) if saved.batch.need_x else None


def _scattered(ranks: Ranks, dx: Tensor | None, saved: SavedForward) -> Scattered | None:
    return None if dx is None else Scattered(ranks, dx, saved.batch.counts)


def _sparse(table: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of some rows, in parts, as a sparse tensor of the table's shape."""
    ids, values = torch.empty(0, dtype=torch.int64), table.new_empty((0, *table.shape[1:]))
    if parts:
        ids, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=False)
