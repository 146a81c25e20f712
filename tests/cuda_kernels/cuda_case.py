"""What a case of the CUDA kernels is, and how near to the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class CudaCase(NamedTuple):
    name: str
    source: str  # the .cu, or the folder of them, that it is about
    check: Callable[[], None]


def near(got: Tensor, want: Tensor, step: float, what: str) -> None:
    """Error against the largest value; infinite and NaN where the truth is."""
    assert got.shape == want.shape, what
    got, want = got.detach().double(), want.detach().double()
    finite = want.isfinite()
    assert torch.equal(got.nan_to_num(0)[~finite], want.nan_to_num(0)[~finite]), what
    assert torch.equal(got.isnan(), want.isnan()), what
    if finite.any():
        error = float((got - want)[finite].abs().max() / want[finite].abs().max().clamp_min(1e-3))
        assert error <= step, f"{what}: error {error:.3g}, allowed {step:.3g}"
