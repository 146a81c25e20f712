"""Runs `triton_distance_cases.py` in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_interpreted

pytest.importorskip("triton")


@pytest.mark.slow
def test_interpreted() -> None:
    triton_interpreted.passes(Path(__file__).with_name("triton_distance_cases.py"))
