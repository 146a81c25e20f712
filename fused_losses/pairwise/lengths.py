"""Rows whose cosines are asked for, of any length: kernels take norms below 1e-12 for zero."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base.numerics import power_of_two
from fused_losses.primitives.topk.inputs import Prepared, PrincipalRows, QuantizedRows

SHORT, LONG = 1e-12, 1e18  # of a row's largest entry


def of_some_length(
    x: Tensor, y: Tensor, y_scale: Tensor | None, screen: str | Prepared
) -> tuple[Tensor, Tensor, Tensor | None, str | Prepared]:
    """Rows by powers of two, where some are so short or long that kernels take them for zero.

    A bank of usual lengths is not copied; its largest entries are read.
    """

    def factor(rows: Tensor) -> Tensor | None:
        top = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1)
        far = ((top > 0) & (top < SHORT)) | ((top > LONG) & top.isfinite())
        known = not (torch.compiler.is_compiling() or rows.is_meta)
        return None if known and not bool(far.any()) else power_of_two(rows)

    def times(rows: Tensor, by: Tensor | None) -> Tensor:
        return rows if by is None else rows * by

    if x.shape[1] == 0:
        return x, y, y_scale, screen
    if y_scale is not None:
        # of codes only the direction counts
        return times(x, factor(x)), y, y_scale * power_of_two(y_scale[:, None])[:, 0], screen
    by = factor(y)
    if by is not None and isinstance(screen, QuantizedRows):
        of_codes = by[:, 0].float()
        screen = screen._replace(scale=screen.scale * of_codes, error=screen.error * of_codes)
    if by is not None and isinstance(screen, PrincipalRows):
        # float32 may not hold such rows' coordinates
        screen = "fp32"
    return times(x, factor(x)), times(y, by), y_scale, screen
