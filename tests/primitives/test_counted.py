"""What counts allocations sees a small call's scratch at every call, which its thread may hold."""

from __future__ import annotations

import pytest
from conftest import require
from counted import COUNTER, MIB, told_by_child

CHILD = (
    COUNTER
    + """
x, y = torch.randn(2, 160, 64)

def step():
    fused_losses.logsumexp_similarity(x, y, backend="cpu")

def peaks():
    for _ in range(2):  # threads, lazy imports, and what a thread holds
        step()
    return [extra(step) for _ in range(3)]

seen = peaks()
torch.use_deterministic_algorithms(False)
print(json.dumps(dict(seen=seen, held=peaks())))
"""
)


@pytest.mark.processes
def test_scratch_that_a_thread_holds_is_counted() -> None:
    require("cpu")
    told = told_by_child(CHILD, None)
    # against a control where threads hold scratch: there most of the call is counted no more
    hidden = min(told["seen"]) - max(told["held"])
    assert MIB // 16 < hidden < MIB
    assert max(told["held"]) < min(told["seen"]) / 2
