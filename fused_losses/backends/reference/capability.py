"""What the reference can run."""

from __future__ import annotations

import torch


def unavailable() -> str | None:
    return None


def reasons_against(device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    if precision != "fp32":
        return [f"precision={precision!r}: the reference computes in the dtype of its inputs"]
    return []
