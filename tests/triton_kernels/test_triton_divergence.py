"""Runs `triton_divergence_cases.py` in its own process: Triton reads TRITON_INTERPRET early."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_interpreted


@pytest.mark.slow
def test_interpreted() -> None:
    pytest.importorskip("triton")
    triton_interpreted.passes(Path(__file__).with_name("triton_divergence_cases.py"))
