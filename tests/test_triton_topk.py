"""Runs `triton_topk_cases.py` in Triton's interpreter."""

from __future__ import annotations

import pytest
import triton_interpreted

pytest.importorskip("triton")


def test_interpreted() -> None:
    triton_interpreted.passes("triton_topk_cases.py")
