"""What the benchmarks of heads compare is the same: loss and gradient of every provider."""

from __future__ import annotations

import pytest
import torch

from fused_losses.bench.table import CASES

MAKERS = {name: entry.make for name, entry in CASES.items() if entry.sizes == "head"}


@pytest.mark.parametrize("name", MAKERS)
def test_providers_agree(name: str) -> None:
    case = MAKERS[name](16, 300, 12, rivals="eager")
    found = {}
    for provider, run in case.providers.items():
        if provider in case.unlike:
            continue
        for _ in range(2):  # a step leaves the tables as they were
            case.clear()
            value = run()
        found[provider] = value, case.leaves[0].grad.clone()
    assert len(found) >= 2
    assert set(case.ours) < set(case.providers)
    value, grad = found.pop(next(name for name in found if name.startswith("eager")))
    for provider, (other, gradient) in found.items():
        near = 2e-2 if "bf16" in provider else 1e-5
        assert abs(float(other) - float(value)) <= near * abs(float(value)), provider
        assert torch.linalg.norm(gradient - grad) <= near * torch.linalg.norm(grad), provider
