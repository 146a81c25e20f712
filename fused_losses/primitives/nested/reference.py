"""The truth of the sweep over widths: the statistics of each width's own score matrix.

Memory O(W N M); any device, float64, derivatives of any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.products import product
from fused_losses.primitives.nested.inputs import NestedInputs
from fused_losses.primitives.pairs import reference as pairs


def statistics(p: NestedInputs, cols: bool) -> tuple[Tensor, Tensor]:
    """rows [W, 4, 2, N] and columns [W, 4, 2, M or 0]."""
    of_pairs = p.pairs()
    masks = pairs.classes(of_pairs)
    found: list[tuple[Tensor, Tensor]] = []
    total = None
    for w, part in enumerate(p.parts()):
        here = product(p.x[:, part], p.y[:, part])
        if total is not None:
            if p.x_shrink is not None and p.y_shrink is not None:
                total = total * p.x_shrink[w, :, None].to(here) * p.y_shrink[w].to(here)
            here = total + here
        total, scored = here, here
        if p.x_factor is not None and p.y_factor is not None:
            scored = scored * p.x_factor[w, :, None].to(here) * p.y_factor[w].to(here)
        scored = scored * p.scale.to(here.dtype)
        found.append(pairs.statistics_of(of_pairs, scored, masks, "lse", cols))
    rows, columns = zip(*found, strict=True)
    return torch.stack(rows), torch.stack(columns)
