"""Labels before a sweep over classes, and losses and slopes after it, by one launch each."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.gpu import rehearsal
from fused_losses.backends.gpu.tiles import Tile
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.base import checked_labels
from fused_losses.base import target_loss as ends
from fused_losses.base.compiled import transformed
from fused_losses.base.target_loss import TargetEnd

# rows of one program: of more, launches are the smaller part of a step
MOST_ROWS = 1 << 15
TILE = Tile(1024, 0, 0, 8, 1)


def _takes(vector: Tensor) -> bool:
    if vector.dim() != 1 or vector.stride(0) != 1 or not 0 < vector.numel() <= MOST_ROWS:
        return False
    if transformed() or not rehearsal.launchable():
        return False
    asked = backends.requested(None) in ("auto", "triton")
    return asked and not backends.reasons_against("triton", vector.device, torch.float32, "fp32")


def takes_labels(labels: Tensor) -> bool:
    """Whether the kernel has these labels, and nothing asks for PyTorch's operators."""
    return labels.dtype == torch.int64 and _takes(labels)


def label_names(
    labels: Tensor, classes: int, ignored: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """-1 for what is ignored, -2 for a -1 that is not, [N]; whether all are in range, [1] bool."""
    out = torch.empty(labels.shape, dtype=dtype, device=labels.device)
    fine = torch.empty(1, dtype=torch.int8, device=labels.device)
    given = (labels, out, fine, labels.numel(), classes, ignored)
    _launch("target_labels", given)
    return out, fine.view(torch.bool)


def takes_losses(lse: Tensor, end: TargetEnd) -> bool:
    """Whether the kernel has this margin and these rows."""
    fits = lse.dtype == torch.float64 and 1e-30 < abs(end.scale) < 1e30
    return fits and end.is_closed() and _takes(lse)


def losses(lse: Tensor, target: Tensor, labels: Tensor, end: TargetEnd) -> tuple[Tensor, Tensor]:
    """The loss [] in float32, and its slopes [2, N] in lse and target."""
    n, moved = lse.numel(), end.moved
    loss = torch.empty((), dtype=torch.float32, device=lse.device)
    slopes = torch.empty((2, n), dtype=torch.float64, device=lse.device)
    m2, m3, beyond = (0.0, 0.0, "none") if moved is None else moved
    margin = "none" if moved is None else "angle" if m2 != 0 else "minus"
    # passed as float32, a number loses half of its digits
    numbers = (end.scale, math.cos(m2), math.sin(m2), m2 * math.sin(m2), m3)
    pairs = [part for number in numbers for part in _in_two(number)]
    given = (lse, target.contiguous(), labels.contiguous(), loss, slopes, *pairs, n)
    _launch("target_losses", given, MARGIN=margin, BEYOND=beyond, MEAN=end.mean)
    return loss, slopes


def _in_two(number: float) -> tuple[float, float]:
    (high,) = struct.unpack("f", struct.pack("f", number))
    return high, number - high


def _launch(name: str, given: tuple, **constants: object) -> None:
    kernel = triton_launch.shared_kernel(f"triton_target.{name}")
    triton_launch.launch(kernel, 1, given, constants | dict(BM=TILE.rows), TILE)


checked_labels.FORMS.append(checked_labels.LabelForm(takes_labels, label_names))
ends.FORMS.append(ends.TargetForm(takes_losses, losses))
