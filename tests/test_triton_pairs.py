"""Runs `triton_pair_cases.py` in its own process: Triton reads TRITON_INTERPRET when imported."""

from __future__ import annotations

import pytest
import triton_interpreted


def test_interpreted() -> None:
    pytest.importorskip("triton")
    triton_interpreted.passes("triton_pair_cases.py")
