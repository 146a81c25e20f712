"""A head within what torch.compile takes: it runs between two graphs, and trains as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from class_center_cases import D, batch, head
from torch import nn

from fused_losses.centers import ClassCenters

SGD = dict(optimizer="sgd", optimizer_options=dict(lr=0.1, momentum=0.9))
OPTIONS: dict[str, dict[str, Any]] = {
    "inside backward": SGD,
    "in a step": {**SGD, "update": "step"},
    "a parameter": {},
}


class Model(nn.Module):
    def __init__(self, of: ClassCenters) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(D, D).double(), of

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * self.head(self.net(x).tanh(), y)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_compiled_model_trains_as_an_eager_one(name: str) -> None:
    """Another sample in each step: what is drawn is no constant of a graph."""
    eager = Model(head(sample_rate=0.5, **OPTIONS[name]))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager")
    for each, call in ((eager, eager), (model, compiled)):
        own = torch.optim.SGD(each.parameters(), lr=0.1)
        for step in range(4):
            own.zero_grad()
            call(*batch(step)).backward()
            own.step()
            if each.head.optimizer is not None:
                each.head.optimizer.step()
    assert model.head.step_count == eager.head.step_count == 4
    for found, expected in ((model.head, eager.head), (model.net, eager.net)):
        torch.testing.assert_close(found.weight.detach(), expected.weight.detach())
    torch._dynamo.reset()
