"""The k best columns from the whole matrix of scores in float64, sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import row_dtype
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.listed import scores_of


def allowed(p: TopkInputs, rows: slice | Tensor, cols: slice) -> Tensor:
    """[rows, cols] which pairs are candidates."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=p.x.device)
    i = rows[:, None]
    j = torch.arange(cols.start, cols.stop, device=p.x.device)
    mask = torch.ones((len(i), len(j)), dtype=torch.bool, device=p.x.device)
    if p.match != "any" and p.x_labels is not None:
        assert p.y_labels is not None
        same = p.x_labels[rows][:, None] == p.y_labels[cols]
        mask = mask & (same if p.match == "same" else ~same)
    if p.x_ids is not None:
        assert p.y_ids is not None
        mask = mask & (p.x_ids[rows][:, None] != p.y_ids[cols])
    if p.skip_self:
        mask = mask & (i != j)
    for column in () if p.exclude is None else p.exclude[rows].T:
        mask = mask & (column[:, None] != j)
    return mask


def wide_rows(p: TopkInputs, at: slice | Tensor) -> Tensor:
    """Rows of y in float64."""
    y = p.y[at].to(row_dtype(p.x.device))
    return y if p.y_scale is None else y * p.y_scale[at, None].to(y.dtype)


def best(keys: Tensor, index: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The first k of each row by key, equal keys by index; NaN: no candidate."""
    order = index.argsort(dim=1, stable=True)
    keys, index = keys.gather(1, order), index.gather(1, order)
    # NaN goes last
    order = (keys.neg() if largest else keys).argsort(dim=1, stable=True)
    keys, index = keys.gather(1, order), index.gather(1, order)
    short = k - keys.shape[1]
    if short > 0:
        keys = torch.nn.functional.pad(keys, (0, short), value=torch.nan)
        index = torch.nn.functional.pad(index, (0, short), value=-1)
    keys, index = keys[:, :k].contiguous(), index[:, :k].contiguous()
    return keys, torch.where(keys.isnan(), -1, index)


def select(p: TopkInputs) -> tuple[Tensor, Tensor]:
    """Every score at once."""
    n, m = p.x.shape[0], p.y.shape[0]
    x, y = p.x.to(row_dtype(p.x.device)), wide_rows(p, slice(0, m))
    keys = scores_of(x, y.expand(n, *y.shape), p.kind)
    keys = torch.where(allowed(p, slice(0, n), slice(0, m)), keys, torch.nan)
    index = torch.arange(m, device=x.device).expand(n, m)
    return best(keys, index, p.k, p.largest)
