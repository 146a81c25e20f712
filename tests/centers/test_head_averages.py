"""Averages of models over training, which walk over parameters or a state dict, and a table."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from class_center_cases import C, D, batch, head
from dense_head import MARGIN, SCALE, DenseHead
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_losses.centers.sampling import sample
from fused_losses.margins import CosFace

DECAY, RATE, SETTINGS = 0.8, 0.3, dict(lr=0.5, momentum=0.9, weight_decay=0.01)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D, bias=False, dtype=torch.float64)
        self.head = head(
            optimizer="sgd", optimizer_options=SETTINGS, sample_rate=RATE, seed=3,
            margin=CosFace(MARGIN), scale=SCALE,
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.head(self.net(x), y)


def averaged_by_torch(model: Model) -> tuple[Any, Any]:
    """As docs/class_centers.md has it: the table beside what AveragedModel sees."""
    averages: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def update() -> None:
        averages.update_parameters(model)
        with torch.no_grad():
            averages.module.head.weight.lerp_(model.head.weight, 1 - DECAY)

    return update, averages.module


def averaged_by_state_dict(model: Model) -> tuple[Any, Any]:
    """As timm's ModelEma does: every value of the two state dicts."""
    average = copy.deepcopy(model)

    def update() -> None:
        pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
        with torch.no_grad():
            for mean, value in pairs:
                mean.copy_(DECAY * mean + (1 - DECAY) * value)

    return update, average


@pytest.mark.parametrize("how", [averaged_by_torch, averaged_by_state_dict])
def test_a_table_has_an_average_of_its_own(how: Any) -> None:
    """Of rows that were behind, too: beside the whole table in float64."""
    torch.manual_seed(0)
    model = Model()
    dense = DenseHead(model.head.weight, "sgd", SETTINGS)
    net = model.net.weight.detach().clone()
    mean, mean_net = dense.weight.detach().clone(), net.clone()
    update, average = how(model)
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
        part = dense.taking_part(y, sample(0, C, RATE, seed=3, step=step))
        own = net.requires_grad_()
        loss = dense.loss(x.detach() @ own.T, y, part)
        (d_net,) = torch.autograd.grad(loss, own, retain_graph=True)
        dense.backward(loss, part)
        dense.step()
        net = (own - 0.1 * d_net).detach()
        first = how is averaged_by_torch and step == 0  # AveragedModel copies its first
        update()
        mean = DECAY * mean + (1 - DECAY) * dense.weight.detach()
        mean_net = net.clone() if first else DECAY * mean_net + (1 - DECAY) * net
        torch.testing.assert_close(average.head.weight, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(average.net.weight, mean_net, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.head.weight, dense.weight.detach(), rtol=1e-10, atol=1e-10)
    dense.weight = mean
    x, y = batch(7)
    expected = dense.loss(x @ mean_net.T, y)
    torch.testing.assert_close(average.eval()(x, y), expected, rtol=1e-10, atol=1e-10)
