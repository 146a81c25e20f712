"""Runs `triton_drawn_cases.py` in a process of its own: TRITON_INTERPRET is read at import."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_interpreted


@pytest.mark.slow
def test_interpreted() -> None:
    pytest.importorskip("triton")
    triton_interpreted.passes(Path(__file__).with_name("triton_drawn_cases.py"))
