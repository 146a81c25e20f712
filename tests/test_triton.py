"""Runs `triton_cases.py` in a process of its own: Triton reads TRITON_INTERPRET when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_losses.backends import triton

HERE = Path(__file__).parent


def test_interpreted() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(HERE / "triton_cases.py")],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(triton, "find_spec", lambda name: object())
    assert "no CUDA GPU" in triton.unavailable()
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert triton.unavailable() == "triton is not installed"
