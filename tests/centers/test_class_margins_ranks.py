"""Margins of classes over ranks: each keeps those of its own classes, and the loss is that of one.

One that learns is whole on every rank, with one gradient.
"""

from __future__ import annotations

import copy
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from rank_heads import SGD, C, D, batch, make, own
from torch import Tensor, nn

from fused_losses import class_losses, margins
from fused_losses.centers import ClassCenters, carry_over

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def delta(classes: int = C) -> Tensor:
    """In an order that is not that of the classes."""
    values = torch.linspace(0.1, 0.5, classes, dtype=torch.float64)
    return values[torch.arange(classes) * 10 % classes]


def made(name: str) -> Any:
    return {
        "value": lambda: margins.CosFace(delta()),
        "inside another": lambda: margins.InterclassFilter(margins.ArcFace(delta()), 0.3),
        "module": lambda: margins.AdaFace(delta().float()),
        "bent": lambda: margins.CurricularFace(delta()),
        "loss": lambda: class_losses.Softmax(margins.CosFace(delta()), scale=16.0),
        "two": lambda: margins.CombinedMargin(1.0, delta().float(), delta() / 4),
    }[name]()


NAMES = ("value", "inside another", "module", "bent", "loss", "two")


def lengths(margin: Any) -> list[int]:
    """Of all vectors that a margin keeps, however deep."""
    if isinstance(margin, Tensor):
        return [len(margin)] if margin.dim() else []
    inner = [*vars(margin).values()] if hasattr(margin, "__dict__") else []
    return [n for value in inner if not hasattr(value, "group") for n in lengths(value)]


def steps(rank: int, head: ClassCenters, count: int = 3) -> list[float]:
    losses = []
    for step in range(count):
        x, y = own(rank, dist.get_world_size(), *batch("arcface", step))
        loss = head(x.requires_grad_(), y)
        loss.backward()
        losses.append(loss.item())
    return losses


def on_ranks(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"lengths": {}, "losses": {}}
    for name in NAMES:
        head = make("arcface", margin=made(name), **SGD)
        losses = steps(rank, head)
        head = copy.deepcopy(head)
        head.margin = head.margin  # as it is
        losses += steps(rank, head)
        head.margin = made("value")
        losses += steps(rank, head)
        head.margin = made(name)
        found["lengths"][name] = set(lengths(head.margin)), head.num_local
        found["losses"][name] = losses + steps(rank, head)
    more = make("arcface", margin=made("value"), **SGD)
    grown = ClassCenters(
        C + 9, D, dtype=torch.float64, margin=margins.CosFace(delta(C + 9)), grow_from=more, **SGD
    )
    found["losses"]["grown"] = steps(rank, grown)
    found["lengths"]["grown"] = set(lengths(grown.margin)), grown.num_local
    carry_over(grown, more)
    found["losses"]["shrunk"] = steps(rank, more)
    few = ClassCenters(2, D, dtype=torch.float64, margin=margins.CosFace(delta(2)))
    x, y = own(rank, dist.get_world_size(), *batch("arcface"))
    found["losses"]["few"] = [few(x, y.clamp(max=1)).item()]
    found["lengths"]["few"] = set(lengths(few.margin)), few.num_local
    learned = nn.Parameter(delta())
    head = make("arcface", margin=margins.CosFace(learned))
    found["losses"]["learned"] = steps(rank, head, 1)
    assert learned.grad is not None and head.margin.margin is learned
    found["learned"] = learned.grad
    return found


def test_each_rank_keeps_its_classes_margins() -> None:
    (expected,) = processes.run(1, on_ranks)
    ranks = processes.run(3, on_ranks)
    for each in ranks:
        for name, losses in expected["losses"].items():
            assert each["losses"][name] == pytest.approx(losses, rel=1e-10, abs=1e-10), name
        for name, (found, classes) in each["lengths"].items():
            assert found == {classes}, name
        torch.testing.assert_close(each["learned"], expected["learned"], rtol=1e-10, atol=1e-10)
    assert {each["lengths"]["few"][1] for each in ranks} == {0, 1}  # a shard without classes
