"""Runs files of cases in processes of their own, which have CUDA devices without a GPU."""

from __future__ import annotations

from pathlib import Path

import fake_cuda
import pytest


@pytest.mark.slow
@pytest.mark.processes
def test_launches_and_waits_of_every_example() -> None:
    pytest.importorskip("triton")
    fake_cuda.passes(Path(__file__).with_name("fake_gpu_cases.py"))


@pytest.mark.slow
@pytest.mark.processes
def test_launches_and_compilations_of_a_step() -> None:
    pytest.importorskip("triton")
    fake_cuda.passes(Path(__file__).with_name("launch_cases.py"))


@pytest.mark.slow
@pytest.mark.processes
def test_a_warmed_up_call_compiles_nothing() -> None:
    pytest.importorskip("triton")
    fake_cuda.passes(Path(__file__).with_name("warm_up_cases.py"))
