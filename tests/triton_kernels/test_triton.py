"""Runs `triton_cases.py` in a process of its own: Triton reads TRITON_INTERPRET when imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_interpreted

from fused_losses.backends.triton import capability as triton_capability


@pytest.mark.slow
def test_interpreted() -> None:
    pytest.importorskip("triton")
    triton_interpreted.passes(Path(__file__).with_name("triton_cases.py"))


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(triton_capability, "find_spec", lambda name: object())
    assert "no CUDA GPU" in triton_capability.unavailable()
    monkeypatch.setattr(triton_capability, "find_spec", lambda name: None)
    assert triton_capability.unavailable() == "triton is not installed"
