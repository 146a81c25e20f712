"""The steps of a head's rows: when they are taken, of what, and what waits for one."""

from __future__ import annotations

from numbers import Real

from torch import Tensor

from fused_losses.centers import arguments
from fused_losses.centers.table import TableModule
from fused_losses.centers.update import LossScale, RowUpdates


class SteppedTable(TableModule):
    """A table that tells of its steps, and is told how to take them."""

    @property
    def update_at(self) -> str:
        """When the rows step: "backward" or "step"."""
        return self._updates.at

    @property
    def every(self) -> int:
        """How many backwards make a step inside backward; what waits counts for another number."""
        return self._updates.every

    @every.setter
    def every(self, count: int) -> None:
        (count,) = arguments.counts(every=count)
        if count > 1 and (not isinstance(self._updates, RowUpdates) or self.update_at == "step"):
            raise ValueError(
                "every: expected 1 beside optimizer=None, or update='step', whose backwards add up "
                f"until optimizer.step(), got {count}"
            )
        self._updates.every = count

    @property
    def max_grad_norm(self) -> float | None:
        """What the table's gradient is scaled down to; None: it is not."""
        return self._updates.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, norm: float | None) -> None:
        self._updates.max_norm = norm

    @property
    def loss_scale(self) -> LossScale:
        """What the loss is multiplied by before backward: the rows' gradient is divided by it.

        A number, or a function of none: `head.loss_scale = scaler.get_scale`, and
        nonfinite="skip": `scaler.step(head.optimizer)` then learns of overflows. With
        update="step" it stays 1: `scaler.unscale_` and `scaler.step` know `head.optimizer`.
        """
        return self._updates.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: LossScale) -> None:
        if not isinstance(self._updates, RowUpdates) or self.update_at != "backward":
            raise RuntimeError("loss_scale: expected an optimizer with update='backward'")
        if not callable(scale) and not isinstance(scale, Real | Tensor):
            raise TypeError(f"loss_scale: expected a number or a function of none, got {scale!r}")
        self._updates.loss_scale = scale

    @property
    def skipped_steps(self) -> int:
        """Steps left out because of numbers that are not finite (nonfinite="skip")."""
        return self._updates.skipped

    @property
    def step_count(self) -> int:
        """Steps that the table has taken; without an optimiser, training backwards."""
        return self._updates.steps

    def grad_norm(self) -> float:
        """The norm of the gradient that waits for `optimizer.step()`, over all shards.

        With update="step", on every rank alike. One sweep for its scores and its gradient.
        """
        return self._waiting().norm()

    def scale_grad(self, factor: float) -> None:
        """Multiplies the gradient that waits for `optimizer.step()`, to clip or to unscale it."""
        self._waiting().scale(factor)

    def _waiting(self) -> RowUpdates:
        if not isinstance(self._updates, RowUpdates) or self.update_at != "step":
            raise RuntimeError(
                "update: expected an optimizer with update='step', whose gradient waits, so that "
                "it can be clipped with the backbone's, got 'backward': inside backward "
                "max_grad_norm clips the table's alone"
            )
        return self._updates
