"""What a benchmark starts from: the peaks of this machine, and floors by them."""

from __future__ import annotations

import json

import pytest
import torch
from bench_runs import PEAKS

from fused_losses import _C
from fused_losses.bench import host


@pytest.mark.parametrize("precision", ["fp32", "bf16"] if _C.has_bf16() else ["fp32"])
def test_products_in_registers_grow_with_their_steps(precision: str) -> None:
    one, many = (_C.multiply_registers(precision, steps) for steps in (1, 1000))
    assert one > 0 and many == 1000 * one


def test_products_in_registers_know_their_precisions() -> None:
    with pytest.raises(ValueError, match="precision"):
        _C.multiply_registers("fp8", 1)


def test_the_peaks_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TRIES", 1)
    threads = torch.get_num_threads()
    found = host.measured("cpu")
    assert torch.get_num_threads() == threads == found.threads
    assert found.fp32 > 0 and found.copy > 0 and found.fresh is not None
    assert (found.bf16 is None) == (not _C.has_bf16())
    state = host.state("cpu", found)
    assert state["versions"]["torch"] == torch.__version__ and len(state["load_at_start"]) == 3
    assert json.loads(json.dumps(state)) == state
    assert "GFLOP/s" in host.lines(state)[0]


def test_a_floor_is_the_larger_of_products_and_bytes() -> None:
    assert host.floor_ms(PEAKS, 10e9, 8e6, low=False) == 1000.0
    assert host.floor_ms(PEAKS, 10e9, 8e6, low=True) == 250.0
    assert host.floor_ms(PEAKS, 10e6, 8e9, low=False) == 1000.0
    assert host.in_low("info_nce, float32 inputs", "fused mixed")
    assert not host.in_low("info_nce, float32 inputs", "eager, oneDNN knob")
