"""The rules of the lazy optimisers over a table's rows: fused_losses.centers.lazy_rows.

"sgd" is torch.optim.SGD on a dense gradient with zeros, step for step. "adamw" is
torch.optim.SparseAdam (moments change only where the row takes part, bias is corrected by the
global step) with AdamW's eps and decoupled weight decay; "adagrad" is torch.optim.Adagrad with
decoupled weight decay. docs/row_update.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_losses.base.validation import check_choice
from fused_losses.centers.history import Factors
from fused_losses.centers.lazy_rows import Allocate, ParamGroup, RowOptimizer, at_least_0, flat
from fused_losses.primitives.row_update.op import adagrad_rows_, adamw_rows_, sgd_rows_


class RowSgd(RowOptimizer):
    """torch.optim.SGD on a dense gradient that is zero where a row takes no part, exactly.

        v = momentum v + (1 - dampening) (grad + weight_decay w);   w -= lr v
        nesterov: w -= lr (grad + weight_decay w + momentum v);   dampening not in the first step

    State: momentum_buffer, once a step has momentum.
    """

    options: ClassVar[ParamGroup] = dict(
        lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
    )
    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self._moving = False  # a step with momentum has ended: dampening counts
        if self.defaults["momentum"]:
            self._state("momentum_buffer")
        elif self.defaults["nesterov"]:
            raise ValueError("nesterov: expected a momentum, got 0")

    @property
    def begun(self) -> bool | None:
        return self._moving if "momentum_buffer" in self.states else None

    def load(self, steps: int, begun: bool | None = None) -> None:
        super().load(steps)
        # torch has no buffer before the first step with momentum, and the rows have zeros; they may
        # have them after it, too: a shard's, none of whose rows has taken part
        buffer = self.states.get("momentum_buffer")
        self._moving = buffer is not None and (bool(begun) or bool(buffer.any()))

    def begin(self, group: ParamGroup) -> None:
        super().begin(group)
        assert self._open is not None
        if self._open["momentum"]:
            self._state("momentum_buffer")  # of every shard: of rows that take no part, too

    def end(self) -> None:
        moving = self._moving or (self._open is not None and self._open["momentum"] != 0)
        super().end()
        self._moving = moving

    def _check(self, group: ParamGroup) -> None:
        super()._check(group)
        at_least_0(group, "momentum")
        if group["nesterov"] and group["dampening"] != 0:
            raise ValueError(f"dampening: expected 0 with nesterov, got {group['dampening']}")

    def _share(self, group: ParamGroup) -> float:
        return 1 - group["dampening"] if self._moving else 1.0

    def _missed(self, group: ParamGroup) -> Factors:
        lr, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
        if mu == 0:  # the buffer, if there is one, rests
            return (-lr * decay, 0.0, 0.0, 1.0)
        into = self._share(group) * decay
        if group["nesterov"]:
            return (-lr * (decay + mu * into), -lr * mu * mu, into, mu)
        return (-lr * into, -lr * mu, into, mu)

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        moving = group["momentum"] != 0
        buffer = self._state("momentum_buffer") if moving else None
        nesterov = group["nesterov"] and moving
        given = {**group, "dampening": 1 - self._share(group), "nesterov": nesterov}
        sgd_rows_(flat(self.weight), rows, grad, buffer, **given, **options)


class RowAdamw(RowOptimizer):
    """AdamW whose moments rest while a row takes no part (torch.optim.SparseAdam's meaning).

        m += (1 - beta1) (grad - m);   v = beta2 v + (1 - beta2) grad^2       where it takes part
        w = (1 - lr weight_decay) w                                           in every step
        w -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)           where it takes part

    t counts all steps. With every row in each step it is torch.optim.AdamW.
    """

    options: ClassVar[ParamGroup] = dict(
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, maximize=False
    )
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        for name in ("exp_avg", "exp_avg_sq"):
            self._state(name)

    def _check(self, group: ParamGroup) -> None:
        super()._check(group)
        at_least_0(group, "eps")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas: expected two values in [0, 1), got {group['betas']}")

    def _missed(self, group: ParamGroup) -> Factors:
        return (-group["lr"] * group["weight_decay"], 0.0, 0.0, 1.0)

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        moments = self._state("exp_avg"), self._state("exp_avg_sq")
        adamw_rows_(
            flat(self.weight), rows, grad, *moments, step=self.steps + 1, **group, **options
        )


class RowAdagrad(RowOptimizer):
    """torch.optim.Adagrad on the rows that take part, with decoupled weight decay in every step.

        lr_t = lr / (1 + (t - 1) lr_decay);   s += grad^2
        w = (1 - lr_t weight_decay) w - lr_t grad / (sqrt(s + initial_accumulator_value) + eps)

    State: sum, which is s and starts at 0.
    """

    options: ClassVar[ParamGroup] = dict(
        lr=1e-2,
        lr_decay=0.0,
        weight_decay=0.0,
        initial_accumulator_value=0.0,
        eps=1e-10,
        maximize=False,
    )
    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    def __init__(self, weight: Tensor, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self._state("sum")

    def _check(self, group: ParamGroup) -> None:
        super()._check(group)
        at_least_0(group, "lr_decay", "initial_accumulator_value", "eps")

    def _rate(self, group: ParamGroup) -> float:
        return group["lr"] / (1 + self.steps * group["lr_decay"])

    def _missed(self, group: ParamGroup) -> Factors:
        return (-self._rate(group) * group["weight_decay"], 0.0, 0.0, 1.0)

    def _step(self, rows: Tensor, grad: Tensor, group: ParamGroup, options: ParamGroup) -> None:
        given = {name: value for name, value in group.items() if name != "lr_decay"}
        given["lr"] = self._rate(group)
        adagrad_rows_(flat(self.weight), rows, grad, self._state("sum"), **given, **options)


OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    "sgd": RowSgd,
    "adamw": RowAdamw,
    "adagrad": RowAdagrad,
}


def make_row_optimizer(
    name: str,
    weight: Tensor,  # [C, ...], changed
    *,
    state_dtype: torch.dtype | None = None,
    stochastic_rounding: bool | None = None,
    seed: int = 0,
    allocate: Allocate | None = None,
    **defaults: Any,
) -> RowOptimizer:
    """The optimiser "sgd", "adamw" or "adagrad" over the rows of a table; see `RowOptimizer`."""
    check_choice("optimizer", name, tuple(OPTIMIZERS))
    return OPTIMIZERS[name](
        weight,
        state_dtype=state_dtype,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        allocate=allocate,
        **defaults,
    )


__all__ = ["OPTIMIZERS", "RowAdagrad", "RowAdamw", "RowOptimizer", "RowSgd", "make_row_optimizer"]
