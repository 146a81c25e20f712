"""Modules of sets beyond what all of the catalogue is asked: goldens, calls of their own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import losses

GOLDEN = Path(__file__).parents[1] / "golden" / "pairs"


@pytest.mark.parametrize("exact", ["reference", "bounded", "cpu"])
def test_conditional_divergence_is_the_authors(exact: str) -> None:
    with np.load(GOLDEN / "cs_div.npz") as record:
        t = {name: torch.from_numpy(record[name]) for name in record.files}
    x, predicted = t["x"].requires_grad_(), t["y2"].requires_grad_()
    module = losses.CauchySchwarzDivergenceLoss(backend=require(exact))
    # theirs is in bits
    loss = module(x, t["y1"], predicted) / math.log(2)
    torch.testing.assert_close(loss.detach(), t["loss"].reshape(()))
    slopes = torch.autograd.grad(loss, (x, predicted))
    for got, name in zip(slopes, ("grad_x", "grad_y2"), strict=True):
        torch.testing.assert_close(got, t[name])


def test_a_bandwidth_is_a_number_a_tensor_or_the_median() -> None:
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    width = fl.median_bandwidth(x), fl.median_bandwidth(y)
    for module in (losses.HSICLoss, losses.CSQMILoss):
        got, want = module("median", "median")(x, y), module(*width)(x, y)
        torch.testing.assert_close(got, want)
    learnt = torch.tensor(1.5, requires_grad=True)
    losses.MMDLoss(bandwidth=learnt)(x, x + 1).backward()
    assert learnt.grad is not None and learnt.grad != 0
    with pytest.raises(ValueError, match="bandwidth: expected a number, a tensor or 'median'"):
        losses.MMDLoss(bandwidth="mean")(x, x)
    with pytest.raises(ValueError, match="bandwidth: expected a value > 0, got 0.0"):
        losses.MMDLoss(bandwidth="median")(x * 0, x * 0)


def test_memberships_of_parts_are_labels() -> None:
    x, labels = torch.randn(12, 4), torch.arange(12) % 3
    loss = losses.CodingRateLoss()
    shares = torch.nn.functional.one_hot(labels).float()
    torch.testing.assert_close(loss(x, labels), loss(x, membership=shares))
    for given in ({}, dict(labels=labels, membership=shares)):
        with pytest.raises(ValueError, match="labels, membership: expected one of them"):
            loss(x, **given)


def fitted(module: torch.nn.Module, x: Tensor, labels: Tensor) -> list[float]:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    found = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = module(x, labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_naive_bayes_learns_its_classes() -> None:
    labels = torch.arange(60) % 3
    x = torch.randn(60, 4) * 0.3 + 2 * torch.nn.functional.one_hot(labels, 4)
    module = losses.GaussianNaiveBayesLoss(3, 4)
    found = fitted(module, x, labels)
    assert found[-1] < 0.1 * found[0]
    scores = fl.gaussian_scores(x, module.means, variance=module.log_variance.exp())
    assert (scores.argmax(dim=1) == labels).float().mean() > 0.95
