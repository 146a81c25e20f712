"""The extreme column of equal label and that of another label, of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.compiled import helpers
from fused_losses.base.numerics import nan_where_infinite
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.op import best_screen, select


class Extremes(NamedTuple):
    """Two columns of each row, as listed pairs: N lines of positives, then N of negatives."""

    rows: Tensor  # [2 N] int64
    columns: Tensor  # [2 N] int64, 0 where there is none
    found: Tensor  # [N] bool: a row has both
    all_found: bool  # known to be so of every row
    mark: Tensor | None  # 0, NaN where an entry of y is not finite; None: it is 0


def extremes(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D], may be x
    x_labels: Tensor,  # [N] int32
    y_labels: Tensor,  # [M] int32
    *,
    kind: str,
    largest: tuple[bool, bool],
    skip_self: bool = False,
    backend: str | None = None,
) -> Extremes:
    """Of `select` with k = 1 and match="same", then "different"; largest: of either.

    A NaN counts as 0 here: the mark says that there was one. Of no columns the columns are no rows
    of y. Time O(N M D), memory O(N + M) D and a few blocks.
    """
    same = y is x
    symmetric = same and x_labels is y_labels
    screen = best_screen(x, backend)
    compiled = helpers(x, y, x_labels, y_labels)
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    precision = "bf16" if screen == "bf16" else "fp32"
    name, _ = backends.choose(backend, x.device, dtype, precision, "topk", x.shape[1])
    if compiled is not None and name == "cpu" and y.shape[0]:
        # the same kernels
        other = None if same else y
        options = (kind, *largest, skip_self, symmetric, screen)
        found = compiled.extreme_columns(x, other, x_labels, y_labels, *options)
        rows, columns, both, all_found, finite = found
        mark = None if finite else nan_where_infinite(y).sum()
        return Extremes(rows, columns, both, all_found, mark)
    mark = nan_where_infinite(y).sum()
    x = x.detach().nan_to_num(0, torch.inf, -torch.inf)
    y = x if same else y.detach().nan_to_num(0, torch.inf, -torch.inf)
    given = TopkInputs(
        x,
        y,
        x_labels=x_labels,
        y_labels=y_labels,
        kind=kind,
        skip_self=skip_self,
        symmetric=symmetric,
        screen=screen,
    )
    index = [
        select(given._replace(match=match, largest=far), backend)[1][:, 0]
        for match, far in zip(("same", "different"), largest, strict=True)
    ]
    return Extremes(*listed_columns(*index), False, mark)


def listed_columns(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows, columns and found of `Extremes`, of columns [N] that are -1 over none."""
    rows = torch.arange(positive.shape[0], device=positive.device)
    columns = torch.cat([positive, negative]).clamp_min(0)
    return torch.cat([rows, rows]), columns, (positive >= 0) & (negative >= 0)
