"""A row with a number that is NaN or infinite is NaN, and every row by a class with one.

Scores alone do not tell: one of -inf adds nothing to a sum of exponentials, and what a kind makes
of it would be each backend's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import nan_where_infinite, row_dtype
from fused_losses.primitives.divergence.inputs import INPUTS, DivergenceInputs
from fused_losses.primitives.opaque import OpaqueOp

CHUNK_BYTES = 1 << 15  # of chosen classes, gathered to be looked at


def spoilt_by(t: Tensor, ids: Tensor | None = None) -> Tensor:
    """0, or NaN where one of the numbers (of rows ids alone) is NaN or infinite. []"""
    nothing = torch.zeros((), dtype=row_dtype(t.device), device=t.device)
    if ids is None:
        return nothing + _nothing(*torch.aminmax(t.detach())) if t.numel() else nothing
    step = max(1, CHUNK_BYTES // (t[:1].numel() * t.element_size() or 1))
    for start in range(0, len(ids), step):
        nothing = nothing + spoilt_by(t[ids[start : start + step]])
    return nothing


def _nothing(low: Tensor, high: Tensor) -> Tensor:
    return 0 * low + 0 * high


def _spoilt_rows(p: DivergenceInputs) -> Tensor:
    """The same of each row of a teacher's dense scores. [N]"""
    t, count = p.teacher, p.taking_part
    nothing = torch.zeros(len(t), dtype=row_dtype(t.device), device=t.device)
    step = count if p.classes is None else CHUNK_BYTES // (len(t) * t.element_size() or 1)
    for start in range(0, count if len(t) else 0, max(step, 1)):
        part = t if p.classes is None else t[:, p.classes[start : start + step]]
        nothing = nothing + _nothing(part.amin(dim=1), part.amax(dim=1))
    return nothing


def _faults(*arguments: Any) -> Tensor:
    """0 a row, NaN where a number of its own or of a class is NaN or infinite. [N]"""
    p = DivergenceInputs(*arguments)
    found = nan_where_infinite(p.x).to(row_dtype(p.x.device))
    for t in (p.weight, p.teacher_weight, p.bias, p.teacher_bias):
        found = found if t is None else found + spoilt_by(t, p.classes)
    if p.teacher_scale is not None:
        found = found + 0 * p.teacher_scale
    of_rows = _spoilt_rows(p) if p.teacher_weight is None else nan_where_infinite(p.teacher)
    return found + of_rows


def _like(*arguments: Any) -> Tensor:
    x = arguments[0]
    return x.new_empty(x.shape[0], dtype=row_dtype(x.device))


# of inputs without gradient, in the order of the streamed op's
FAULTS = OpaqueOp("divergence_faults", f"({INPUTS})", _faults, _like)
