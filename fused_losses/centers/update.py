"""What becomes of the table's gradient: autograd gets it, or the rows step and it is gone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.centers import sparse_steps
from fused_losses.centers.agreement import FINE, NOT_FINITE, agreed, outlook
from fused_losses.centers.collectives import Ranks, Scattered
from fused_losses.centers.engines import Gradients, Rows
from fused_losses.centers.head_optimizer import HeadOptimizer
from fused_losses.centers.lazy_rows import RowOptimizer
from fused_losses.centers.shard import ClassGroup
from fused_losses.centers.step import SavedForward, accumulates
from fused_losses.centers.waiting import WaitingGradient, WaitingGradients

NONFINITE = ("raise", "skip")
LARGEST = 1024.0  # incoming gradient of a loss, not of a loss times a scaler's factor
ACCUMULATED = (
    "ClassCenters: {} backwards since the last head.optimizer.step() were as many steps of the "
    "rows, each by a part of the batch; update='step' adds them up, or every=, so many at a time"
)

LossScale = float | Callable[[], float]


class Backward(NamedTuple):
    """One, whose table's gradient can be made again."""

    saved: SavedForward
    grad: Gradients


Backwards = list[WaitingGradient[Backward]]


class AutogradUpdates:
    """Of a table that is a parameter: some other optimiser takes the steps."""

    at = "backward"
    every = 1
    optimizer = None
    loss_scale: LossScale = 1.0
    generation = skipped = 0
    begun: bool | None = None

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.max_norm: float | None = None
        self.steps = 0  # training backwards, what draws the sample
        self.states: dict[str, Tensor] = {}

    def catch_up(self, groups: list[ClassGroup], device: torch.device) -> None:
        """No row is ever behind."""

    def settle(self) -> None:
        """No row is ever behind."""

    def load(self, steps: int, *_: bool | None) -> None:
        """Goes on from this step."""
        self.steps = steps

    def fill(self, _: Mapping[str, Tensor], steps: int, *__: bool | None) -> None:
        self.steps = steps

    def backward(
        self, saved: SavedForward, grad: Gradients
    ) -> tuple[Tensor | None, Scattered | None]:
        """The gradient of every row, or of those that took part, and dX on its way."""
        table, need, dx = saved.table, saved.need_weight, _zeros_of_x(saved)
        sampled = saved.sweep.groups[0].ids is not None
        if saved.trains or sampled:  # not the forward, which a checkpoint runs twice
            self.steps += 1
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
        d_weight = sparse_steps.gradient(table, parts) if need and dense is None else dense
        if need and sampled and isinstance(leaf := getattr(saved.leaf, "variable", None), Tensor):
            sparse_steps.watch(leaf)
        return d_weight, _scattered(self.ranks, dx, saved)


class RowUpdates:
    """Of a table whose rows an optimiser steps inside backward, or when it is told to.

    at: "backward" or "step". every: so many backwards are a step inside backward. max_norm: the
    gradient is scaled down to it, over all shards.
    It owns what waits for a step. `rows` owns the table, its states and its steps.
    """

    def __init__(
        self, rows: RowOptimizer, ranks: Ranks, *, at: str, max_norm: float | None, nonfinite: str
    ) -> None:
        self.rows, self.ranks, self.at, self.max_norm = rows, ranks, at, max_norm
        self.nonfinite, self.every = nonfinite, 1
        self.skipped = 0  # steps, because of a number that is not finite
        self.loss_scale: LossScale = 1.0
        self._waits: WaitingGradients[Backward] = WaitingGradients()
        self._taken = 0  # steps inside backward since optimizer.step() or zero_grad()
        self._warned = False
        self.optimizer = HeadOptimizer(self)

    @property
    def probe(self) -> Tensor:
        return self._waits.probe

    @property
    def steps(self) -> int:
        return self.rows.steps

    @property
    def begun(self) -> bool | None:
        return self.rows.begun

    @property
    def generation(self) -> int:
        self.rows.check_written()
        return self.rows.generation

    @property
    def states(self) -> dict[str, Tensor]:
        self.rows.settle()
        return self.rows.states

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

    def load(self, steps: int, begun: bool | None = None) -> None:
        """Goes on from this step, after table and states were loaded in place."""
        self.forget()
        self.rows.load(steps, begun)

    def fill(self, states: Mapping[str, Tensor], steps: int, begun: bool | None = None) -> None:
        """Goes on from this step with copies of these states."""
        self.forget()
        self.rows.fill(states, steps, begun)

    def backward(
        self, saved: SavedForward, grad: Gradients
    ) -> tuple[Tensor | None, Scattered | None]:
        """The step, or its wait for `take_pending`; dX on its way."""
        dx = _zeros_of_x(saved)
        trains = saved.trains and accumulates(saved.leaf)
        scale, unscaled, worst = 1.0, grad, FINE
        if trains:
            scale, unscaled, worst = self._agreed_on(saved, grad)
        waits = trains and (self.at == "step" or self.every > 1 or len(self._waits) > 0)
        if waits:
            self._waits.add(Backward(saved, unscaled), finite=worst != NOT_FINITE)
        elif trains:
            factor = self._clipping([WaitingGradient(Backward(saved, unscaled), 1.0)], worst)
            finite = math.isfinite(factor)
            self._waits.tell(finite)
            trains = self._may_step(finite)
            if trains:
                with self._open_step():
                    for rows, d_rows in saved.gradients(unscaled, dx, need_weight=True):
                        self._update(rows, d_rows, factor)
                    if dx is not None and scale != 1:
                        dx *= scale
                    on_the_way = _scattered(self.ranks, dx, saved)
                self._taken += 1
                return None, on_the_way
        for _ in saved.gradients(grad, dx, need_weight=False):
            pass
        on_the_way = _scattered(self.ranks, dx, saved)
        if waits and self.at == "backward" and len(self._waits) >= self.every:
            self._step_inside()
        return None, on_the_way

    @torch.no_grad()
    def _step_inside(self) -> None:
        """The step of several backwards; they are gone, whatever becomes of it."""
        waiting, taken, finite = self._waits.pending(), self._taken, False
        self.forget()
        try:
            finite = self._take(waiting)
        finally:
            self._taken = taken + finite
            self._waits.tell(finite)

    @torch.no_grad()
    def take_pending(self) -> None:
        """The step with the sum of the gradients that wait."""
        waiting = self._waits.pending()
        if not waiting:
            if self._taken > 1 and not self._warned:
                self._warned = True
                warnings.warn(ACCUMULATED.format(self._taken), stacklevel=4)
            self.forget()
            return
        self._take(waiting)
        self.forget()

    def _take(self, waiting: Backwards) -> bool:
        """One step with the sum of these gradients; whether it was one."""
        for (saved, _), _ in waiting:
            self._check_turn(saved)
        outlooks = [outlook(saved, grad.times(factor)) for (saved, grad), factor in waiting]
        factor = self._clipping(waiting, agreed(self.ranks, torch.stack(outlooks).amax()))
        if not self._may_step(math.isfinite(factor)):
            return False
        with self._open_step():
            for rows, d_rows in self._summed(waiting):
                self._update(rows, d_rows, factor)
        return True

    def forget(self) -> None:
        """Nothing waits."""
        self._waits.forget()
        self._taken = 0

    def norm(self) -> float:
        """Of the gradient that waits, over all shards; 0 of none."""
        return self._norm(self._waits.pending())

    def scale(self, factor: float) -> None:
        """Multiplies the gradient that waits."""
        self._waits.scale(factor)

    # ---- a step ----

    def _check_turn(self, saved: SavedForward) -> None:
        if saved.at != self.generation:
            raise RuntimeError(
                "the class centres were updated after this forward: its backward came twice, or "
                "after another one's or a load; update='step' lets several backwards add up, and "
                "optimizer.zero_grad() forgets them"
            )

    def _agreed_on(self, saved: SavedForward, grad: Gradients) -> tuple[float, Gradients, int]:
        """The loss's scale, its gradient without it, and the worst outlook of all ranks."""
        scale, refusal = 1.0, None
        try:
            self._check_turn(saved)
            scale = self._loss_scale(saved) if self.at == "backward" else 1.0
        except (RuntimeError, ValueError) as error:
            refusal = error
        unscaled = grad.times(1 / scale)
        return scale, unscaled, agreed(self.ranks, outlook(saved, unscaled), refusal)

    def _loss_scale(self, saved: SavedForward) -> float:
        """What the loss was multiplied by; RuntimeError for a gradient that no loss has."""
        scale = self.loss_scale
        scale = float(scale() if callable(scale) else scale)
        incoming = float(saved.incoming[-1]) if saved.incoming else 1.0
        if not scale > 0:
            raise ValueError(f"loss_scale: expected a value > 0, got {scale}")
        if LARGEST < abs(incoming) / scale < math.inf:
            raise RuntimeError(
                f"backward: expected the loss's own gradient, at most {LARGEST:g}, got "
                f"{incoming / scale:g}; beside a GradScaler set head.loss_scale = "
                "scaler.get_scale, or take update='step' and scaler.step(head.optimizer)"
            )
        return scale

    def _may_step(self, finite: bool) -> bool:
        """Whether to step; FloatingPointError where a number is not finite and that is refused."""
        if finite:
            return True
        if self.nonfinite == "raise":
            raise FloatingPointError(
                "ClassCenters: the batch or its gradient is not finite, and no row was changed; "
                "nonfinite='skip' leaves such steps out"
            )
        self.skipped += 1
        return False

    @contextmanager
    def _open_step(self) -> Iterator[None]:
        """A step of the rows; broken by an exception, it leaves them fit for the next.

        Over several ranks it then counts: they cannot ask one another, and count alike.
        """
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        # hyper-parameters of now, as a schedule has left them
        self.rows.begin({k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()})
        try:
            yield
            self.rows.end()
        except BaseException:
            self.rows.abort(counts=self.ranks.world > 1)
            raise

    def _update(self, rows: Rows, d_rows: Tensor | None, factor: float) -> None:
        assert d_rows is not None
        table = self.rows.weight
        d_rows = d_rows.to(table.device)
        if factor != 1:  # a product in 16 bits would round, too
            d_rows = d_rows.to(accumulate_dtype(table.dtype)) * factor
        self.rows.update(rows.to(table.device) if isinstance(rows, Tensor) else rows, d_rows)

    def _clipping(self, backwards: Backwards, worst: int) -> float:
        """The step's factor, as clip_grad_norm_ has it; NaN where a gradient is not finite."""
        if worst == NOT_FINITE or (worst == FINE and self.max_norm is None):
            return 1.0 if worst == FINE else math.nan
        norm = self._norm(backwards)
        if not math.isfinite(norm):
            return math.nan
        return 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))

    def _norm(self, backwards: Backwards) -> float:
        square = torch.zeros((), dtype=torch.float64, device=self.rows.weight.device)
        for _, d_rows in self._summed(backwards):
            square += torch.linalg.vector_norm(d_rows, dtype=torch.float64).square().to(square)
        self.ranks.sum_(square)
        return math.sqrt(float(square))

    def _summed(self, backwards: Backwards) -> Iterator[tuple[Rows, Tensor]]:
        """The sum of some backwards' gradients, a chunk of rows at a time."""
        if not backwards:
            return
        if len(backwards) == 1:
            (saved, grad), factor = backwards[0]
            for rows, d_rows in saved.gradients(grad.times(factor), None, need_weight=True):
                assert d_rows is not None
                yield rows, d_rows
            return
        table, height = (
            backwards[0].gradient.saved.table,
            backwards[0].gradient.saved.sweep.shard.height,
        )
        for first in range(0, table.shape[0], height):
            last = min(first + height, table.shape[0])
            total = torch.zeros_like(table[first:last], dtype=accumulate_dtype(table.dtype))
            touched = torch.zeros(last - first, dtype=torch.bool, device=total.device)
            for (saved, grad), factor in backwards:
                for rows, d_rows in saved.gradients(
                    grad.times(factor), None, need_weight=True, first=first, last=last
                ):
                    assert d_rows is not None
                    d_rows = d_rows.to(total)
                    if isinstance(rows, slice):
                        total[rows.start - first : rows.stop - first] += d_rows
                        touched[rows.start - first : rows.stop - first] = True
                    else:
                        at = rows.to(total.device) - first
                        total.index_add_(0, at, d_rows)
                        touched[at] = True
            at = touched.nonzero()[:, 0]
            if at.numel():
                yield at + first, total[at]


def _zeros_of_x(saved: SavedForward) -> Tensor | None:
    """[B, D], where any rank's embeddings need a gradient."""
    return torch.zeros_like(saved.x) if saved.batch.need_x else None


def _scattered(ranks: Ranks, dx: Tensor | None, saved: SavedForward) -> Scattered | None:
    return None if dx is None else Scattered(ranks, dx, saved.batch.counts)
