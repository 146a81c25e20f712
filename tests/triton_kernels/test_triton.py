"""Where the Triton kernels cannot run, and what is said of it."""

from __future__ import annotations

import pytest

from fused_losses.backends.triton import capability as triton_capability


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(triton_capability, "find_spec", lambda name: object())
    assert "no CUDA GPU" in triton_capability.unavailable()
    monkeypatch.setattr(triton_capability, "find_spec", lambda name: None)
    assert triton_capability.unavailable() == "triton is not installed"
