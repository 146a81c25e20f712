"""What the benchmarks of heads compare is the same: loss and gradient of every provider."""

from __future__ import annotations

import pytest
import torch

from fused_losses.bench.heads import cases as head_cases
from fused_losses.bench.micro.cases import eager_arcface
from fused_losses.bench.table import CASES
from fused_losses.centers import ClassCenters

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


def test_partial_fcs_way_draws_every_label() -> None:
    # first-hour's tiny size: a tenth of 24 classes is fewer than the batch has labels
    n, c, d = 8, 24, 16
    case = head_cases.class_centers(n, c, d, rivals="eager")
    (name,) = (name for name in case.providers if name.startswith("PartialFC's way"))
    case.clear()
    value, gradient = case.providers[name](), case.leaves[0].grad.clone()
    torch.manual_seed(0)  # the case's own rows, labels and table
    x = torch.nn.functional.normalize(torch.randn(n, d)).requires_grad_()
    y = torch.randint(0, c, (n,))
    assert len(y.unique()) > round(head_cases.RATE * c)
    assert torch.equal(x, case.leaves[0])
    taken, at = y.unique(return_inverse=True)
    table = ClassCenters(c, d).weight.detach()
    want = eager_arcface(x, table[taken], at)
    want.backward()
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(gradient, x.grad)
