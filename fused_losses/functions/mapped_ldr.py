"""LDR-KL and ALDR-KL with the scores that their authors' code makes of z: divided by a row's mean.

A first sweep gives the row's sum, a second one the loss; both see every class (Zhu, Ying, Yang,
"Label distributionally robust losses for multi-class classification", 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base.examples import examples
from fused_losses.base.numerics import joined
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.base.validation import check_choice, check_index_vector
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.class_values import (
    ClassLoss,
    MergedRows,
    Sweep,
    check_floats,
    one_label,
)
from fused_losses.functions.difference_values import ldr
from fused_losses.primitives.class_rules.mapped import log_softplus, mapped

MAPS = ("softplus", "l1")
EPS = 1e-5  # added to each probability in ALDR's divergence, as the authors have it


@dataclass(frozen=True)
class MappedLDR(ClassLoss):
    """LDR-KL of u in the place of z = scale <x, w>, over the C classes that take part:

        u_j = softplus(z_j) / mean_k softplus(z_k)      map "softplus", LDR's
        u_j = z_j / mean_k |z_k|                        map "l1", ALDR's

    threshold, lam > 0 as in `LDR`. A row of zeros has u = 0. One label a row. Two sweeps forward,
    one backward.
    """

    threshold: float = 2.0
    lam: float = 1.0
    map: str = "softplus"
    scale: float = 1.0

    counts = True
    by_targets = True

    def __post_init__(self) -> None:
        check_floats(check_parameter, threshold=self.threshold)
        check_floats(check_above, lam=self.lam, scale=self.scale)
        check_choice("map", self.map, MAPS)

    @property
    def rule(self) -> str:
        return f"mapped_{self.map}"

    def params(self) -> list[float]:
        return [float(self.scale)]

    def swept_values(
        self, sweep: Sweep, targets: Tensor, present: Tensor, negatives: Tensor | None
    ) -> Tensor:
        one_label(self, targets)
        assert negatives is not None  # counted
        z = self.scale * targets[:, 0]
        lift = self._lift(sweep(f"row_sum_{self.map}", self.params(), None)[0], z, negatives)
        with torch.no_grad():  # detached besides: forward mode heeds no no_grad
            lams = self._lams(sweep, lift.detach(), z.detach(), present[:, 0], negatives)
        return torch.stack([lift, 1 / lams])

    def _lams(
        self,
        sweep: Sweep,  # noqa: ARG002 (of ALDR)
        lift: Tensor,
        z: Tensor,  # noqa: ARG002
        present: Tensor,  # noqa: ARG002
        negatives: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """lambda of each row. [N]"""
        return torch.full_like(lift, self.lam)

    def _lift(self, of_others: Tensor, z: Tensor, negatives: Tensor) -> Tensor:
        """The logarithm of C / the row's sum; 0 of a row of zeros. [N]"""
        count = (negatives + 1).log()
        if self.map == "softplus":
            return count - joined(log_softplus(z), of_others)
        whole = of_others + z.abs()
        return torch.where(whole == 0, 0, count - torch.where(whole == 0, 1, whole).log())

    def row_loss(self, rows: MergedRows) -> Tensor:
        assert rows.negatives is not None and rows.values is not None
        z = self.scale * rows.targets[:, 0]
        lift = self._lift(rows.statistics[-1], z, rows.negatives)
        used, sharpness = rows.values
        score, *logs, _ = rows.statistics
        # the gradient of the denominator's logarithm in l is the mean of u t; worth about 0
        alone = score == -torch.inf
        up, *down = (torch.where(alone, 0, (log.detach() - score.detach()).exp()) for log in logs)
        mean = (up - down[0] if down else up) * sharpness
        lse = score + torch.where(alone, 0, (lift - used) * mean.detach())
        own = mapped(z, lift, self.map == "softplus") * sharpness
        found = rows._replace(statistics=lse[None])
        return ldr(
            own[:, None], found, (self.threshold * sharpness)[:, None], 1 / sharpness[:, None]
        )[:, 0]


@dataclass(frozen=True)
class _Adaptive(MappedLDR):
    """ALDR-KL of rows whose lambda is known; tells the new ones before the loss is made of them."""

    alpha: float = field(default=2.0, kw_only=True)
    known: Tensor | None = field(default=None, kw_only=True)  # [N]
    update: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, kw_only=True)

    def _lams(
        self, sweep: Sweep, lift: Tensor, z: Tensor, present: Tensor, negatives: Tensor
    ) -> Tensor:
        assert self.known is not None
        known = self.known.to(lift)
        if self.update is None:
            return known
        soft, count = self.map == "softplus", negatives + 1
        values = torch.stack([lift, 1 / known])
        own = mapped(z, lift, soft) / known
        whole = joined(own, sweep(self.rule, self.params(), values)[0].detach())
        values = torch.cat([values, whole[None]])
        # as many for every row that has a label
        most = float(torch.where(present, count, 1).max()) if count.numel() else 1.0
        params = [*self.params(), EPS, most]
        others = sweep(f"divergence_{self.map}", params, values)[0].detach()
        q = ((own - whole).exp() + EPS) / (1 + most * EPS)
        divergence = others + q * (most * q).log()
        log_count = math.log(most)
        new = self.lam * (1 - divergence / (self.alpha * log_count)) if log_count else known
        return self.update(torch.where(present, new, known), present).to(lift)

    def row_loss(self, rows: MergedRows) -> Tensor:
        assert rows.negatives is not None and rows.values is not None
        away = 1 / rows.values[1].detach() - self.lam
        slack = self.alpha * (rows.negatives + 1).log() / (2 * self.lam)
        return super().row_loss(rows) - slack * away**2


class ALDR(nn.Module):
    """ALDR-KL: LDR-KL whose lambda is each sample's own, larger where its softmax is flat.

        lam_i <- lam (1 - KL(q_i || 1/C) / (alpha log C)),  q_i of softmax(u / lam_i), 1e-5 added
        loss_i = LDR-KL of u with lam_i - alpha log C / (2 lam) (lam_i - lam)^2

    u as in `MappedLDR`; C classes take part. lam_i has no gradient.

    Args:
        num_samples: how many samples the table has: those of this process. With a sampler that
            gives each rank its own part of the data, each rank has a table of that part.
        threshold, lam > 0: of the loss. alpha > 1: at 1 a lambda could reach 0.
        map: "l1" or "softplus". scale: > 0, of the scores.
        device: of the table, float64 whatever the module is cast to.

    The table is state: it is saved, loaded, copied and moved with the module. A training forward
    with gradients changes the lambdas of its rows, before it uses them; in eval mode and without
    gradients nothing changes. A sample that is in a batch twice gets the mean. Not in
    `ClassCenters`, which takes `MappedLDR`: over ranks, have the whole weight on each, as
    DistributedDataParallel keeps it, and save each rank's table beside its sampler's state.
    """

    lams: Tensor
    asks_for = (
        "is called with samples' ids, loss(embeddings, weight, labels, samples): on each rank with "
        "the whole weight and a table of the rank's own samples"
    )

    def __init__(
        self,
        num_samples: int,
        *,
        threshold: float = 1.0,
        lam: float = 1.0,
        alpha: float = 2.0,
        map: str = "l1",
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples: expected an integer >= 1, got {num_samples!r}")
        self._loss = MappedLDR(threshold, lam, map, scale)
        check_floats(check_parameter, alpha=alpha)
        if not alpha > 1:
            raise ValueError(f"alpha: expected a value > 1, got {alpha}")
        self.alpha = float(alpha)
        full = torch.full((num_samples,), float(lam), dtype=torch.float64, device=device)
        self.register_buffer("lams", full)

    def forward(
        self, embeddings: Tensor, weight: Tensor, labels: Tensor, samples: Tensor, **options: Any
    ) -> Tensor:
        """As `class_loss`, with its options; samples [N] int64 in [0, num_samples).

        Labels are one a row. Raises ValueError, TypeError, IndexError. Time: four sweeps forward in
        training, two in eval mode.
        """
        check_index_vector("samples", samples, embeddings.shape[0], embeddings)
        self._check_range(samples)
        trains = self.training and torch.is_grad_enabled()
        p = self._loss
        loss = _Adaptive(
            p.threshold, p.lam, p.map, p.scale,
            alpha=self.alpha,
            known=self.lams[samples],
            update=(lambda new, present: self._written(samples, new, present)) if trains else None,
        )  # fmt: skip
        return class_loss(embeddings, weight, labels, loss, **options)

    def _check_range(self, samples: Tensor) -> None:
        count = len(self.lams)
        if samples.device.type != "cpu" or torch.compiler.is_compiling() or not samples.numel():
            return
        low, high = int(samples.min()), int(samples.max())
        if low < 0 or high >= count:
            got = low if low < 0 else high
            raise IndexError(f"samples: expected ids in [0, {count}), got {got}")

    @torch.no_grad()
    def _written(self, samples: Tensor, new: Tensor, present: Tensor) -> Tensor:
        """The new lambdas as they stand in the table. [N]"""
        new = new.to(self.lams)
        ids, place = samples.unique(return_inverse=True)
        count = torch.zeros(len(ids), dtype=new.dtype, device=new.device)
        count = count.index_add(0, place, present.to(new.dtype))
        total = torch.zeros_like(count).index_add(0, place, torch.where(present, new, 0))
        self.lams[ids] = torch.where(count > 0, total / count.clamp_min(1), self.lams[ids])
        return self.lams[samples]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ALDR:
        """A cast leaves the table float64: a lambda of 8 bits would be another loss."""
        former = self.lams
        super()._apply(fn, recurse)
        if self.lams.dtype != torch.float64:
            self.lams = former.to(self.lams.device)
        return self

    def extra_repr(self) -> str:
        p = self._loss
        return (
            f"{len(self.lams)}, threshold={p.threshold}, lam={p.lam}, alpha={self.alpha}, "
            f"map={p.map!r}, scale={p.scale}"
        )


for _map in MAPS:
    examples(
        class_loss,
        lambda f, t: f(t.x, t.w, t.targets),
        {"": {"loss": MappedLDR(map=_map, scale=8.0)}},
        name=f"MappedLDR {_map}",
    )
