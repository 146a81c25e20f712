"""A softmax of each of a row's labels against all other classes, the other labels among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.base.numerics import over_last
from fused_losses.functions.class_values import MergedRows, Softmax, label_ends


@dataclass(frozen=True)
class LabelsTogether(Softmax):
    """Margin softmax of each label, whose denominator keeps the row's other labels.

        mean over the row's labels p of  -log(e^{z_p} / (e^{z_p} + sum_{j != p} e^{s c_j}))
        z_p = s margin(c_p)

    `Softmax` leaves the other labels out. With one label a row they are the same. A label given
    twice counts twice, in the other's denominator, too. margin, scale, gradient, z_loss, softcap:
    as in `Softmax`. Time beyond the sweep and memory O(N L^2) of L labels a row.
    """

    def denominators(self, rows: MergedRows) -> Tensor:
        z = self._capped(self._scaled(rows.targets))
        n, several = z.shape
        others = rows.present[:, None] & ~torch.eye(several, dtype=torch.bool, device=z.device)
        lse = rows.statistics[0].to(z.dtype)
        every = torch.cat(
            [z[:, None].expand(n, several, several), lse[:, None, None].expand(n, several, 1)], 2
        )
        kept = torch.cat([others, torch.ones_like(others[..., :1])], 2)
        return over_last(every, kept)

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        rest = self.denominators(rows)
        return label_ends(z.flatten()[:, None], rest.flatten(), self.end).view_as(z)
