"""`row_statistics` on the CUDA C++ kernels."""

from __future__ import annotations

from fused_losses.backends.cuda_launch import reasons_against, unavailable

__all__ = ["reasons_against", "unavailable"]
