"""Whether a momentum has begun is of the whole table, as torch has it: dampening counts after that.

A buffer of zeros does not say: rows that have taken no part, or a gradient of 0, leave it so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from class_center_cases import D, head
from torch import Tensor

from fused_losses.centers import ClassCenters, carry_over
from fused_losses.centers.checkpoint import Checkpoints
from fused_losses.centers.insightface import import_checkpoints

GROUP = dict(lr=0.3, momentum=0.9, dampening=0.4)
X = torch.eye(D, dtype=torch.float64)
Y = torch.arange(D)


def made(**options: Any) -> ClassCenters:
    return head(optimizer="sgd", optimizer_options={**GROUP, **options}, max_grad_norm=1.0)


def without_gradient() -> ClassCenters:
    """A head whose one step had momentum and a gradient of 0."""
    found = made()
    (found(X, Y) * 0).backward()
    assert not bool(found.row_states()["momentum_buffer"].any()) and found.step_count == 1
    return found


def by_state_dict(old: ClassCenters, new: ClassCenters, _: Path) -> None:
    new.load_state_dict(copy.deepcopy(old.state_dict()))


def by_assignment(old: ClassCenters, new: ClassCenters, _: Path) -> None:
    new.load_state_dict(copy.deepcopy(old.state_dict()), assign=True)


def by_the_optimiser(old: ClassCenters, new: ClassCenters, _: Path) -> None:
    new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))


def by_torchs_optimiser(old: ClassCenters, new: ClassCenters, _: Path) -> None:
    weight = old.weight.clone().requires_grad_()
    theirs = torch.optim.SGD([weight], **GROUP)
    weight.grad = torch.zeros_like(weight)
    theirs.step()
    new.optimizer.load_state_dict(theirs.state_dict())


def by_a_checkpoint(old: ClassCenters, new: ClassCenters, folder: Path) -> None:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save({"head": old.state()}, 1)
        checkpoints.load({"head": new.state()})
    new.load()


def by_carry_over(old: ClassCenters, new: ClassCenters, _: Path) -> None:
    carry_over(old, new)


def by_insightfaces_files(old: ClassCenters, new: ClassCenters, folder: Path) -> None:
    buffer = old.row_states()["momentum_buffer"].float()
    torch.save(old.weight.detach().float(), folder / "rank_0_softmax_weight.pt")
    torch.save(buffer, folder / "rank_0_softmax_weight_mom.pt")
    import_checkpoints(folder, new)


WAYS: list[Callable[[ClassCenters, ClassCenters, Path], None]] = [
    by_state_dict, by_assignment, by_the_optimiser, by_torchs_optimiser, by_a_checkpoint,
    by_carry_over, by_insightfaces_files,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_buffer_of_zeros_has_begun(way: Any, momentum: float, tmp_path: Path) -> None:
    """momentum: that the new head is made with; a schedule sets it afterwards."""
    old, new = without_gradient(), made(momentum=momentum)
    if momentum == 0 and way is by_insightfaces_files:
        pytest.skip("import leaves out what the head does not have")
    way(old, new, tmp_path)
    new.optimizer.param_groups[0]["momentum"] = 0.9
    rows = new.weight.detach().clone().requires_grad_()
    torch.testing.assert_close(rows.detach(), old.weight.detach(), rtol=1e-6, atol=1e-6)
    theirs = torch.optim.SGD([rows], **GROUP)
    theirs.state[rows]["momentum_buffer"] = torch.zeros_like(rows)
    rows.grad = table_gradient(new)
    theirs.step()
    new(X, Y).backward()
    torch.testing.assert_close(new.weight, rows.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", [by_state_dict, by_the_optimiser, by_a_checkpoint, by_carry_over])
def test_a_buffer_before_the_first_step_has_not(way: Any, tmp_path: Path) -> None:
    old, new = made(), without_gradient()
    way(old, new, tmp_path)
    assert bool(new.optimizer.state_dict()["state"][0]["momentum_begun"]) is False
    rows = new.weight.detach().clone().requires_grad_()
    theirs = torch.optim.SGD([rows], **GROUP)
    rows.grad = table_gradient(new)
    theirs.step()
    new(X, Y).backward()
    torch.testing.assert_close(new.weight, rows.detach(), rtol=1e-10, atol=1e-10)


def table_gradient(found: ClassCenters) -> Tensor:
    """Of the loss, clipped as the head does."""
    other = head()
    with torch.no_grad():
        other.weight.copy_(found.weight)
    other(X, Y).backward()
    torch.nn.utils.clip_grad_norm_([other.weight], 1.0)
    assert other.weight.grad is not None
    return other.weight.grad


def test_older_checkpoints_tell_it_by_a_buffer_that_is_not_zero(tmp_path: Path) -> None:
    old = made()
    old(X, Y).backward()
    told = copy.deepcopy(old.state_dict())
    told["_extra_state"] = told["_extra_state"][:1]
    of_optimizer = copy.deepcopy(old.optimizer.state_dict())
    del of_optimizer["state"][0]["momentum_begun"]
    with Checkpoints(tmp_path) as checkpoints:
        kept = {name: t for name, t in old.state().items() if name != "momentum_begun"}
        checkpoints.save({"head": kept}, 1)
        found = [made(), made(), made(momentum=0.0)]
        found[0].load_state_dict(told)
        found[1].load_state_dict({"weight": told["weight"]}, strict=False)
        found[1].optimizer.load_state_dict(of_optimizer)
        checkpoints.load({"head": found[2].state()})
        found[2].load()
    found[2].optimizer.param_groups[0]["momentum"] = 0.9
    old(X, Y).backward()
    for new in found:
        new(X, Y).backward()
        assert torch.equal(new.weight, old.weight)
