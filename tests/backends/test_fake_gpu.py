"""Runs `fake_gpu_cases.py` in a process of its own, which has CUDA devices without a GPU."""

from __future__ import annotations

from pathlib import Path

import fake_cuda
import pytest


@pytest.mark.slow
@pytest.mark.processes
def test_launches_and_waits_of_every_example() -> None:
    pytest.importorskip("triton")
    fake_cuda.passes(Path(__file__).with_name("fake_gpu_cases.py"))
