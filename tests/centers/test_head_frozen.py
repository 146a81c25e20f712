"""What must not train does not: in eval, by torch.autograd.grad, and frozen in any of the ways."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from class_center_cases import C, D, batch, head
from torch import nn

from fused_losses.centers import ClassCenters, HeadOptimizer, SphericalHead


class Wrapped(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(2, 2), head


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
def test_what_must_not_train_does_not(optimizer: str, update: str, rate: float) -> None:
    found = head(optimizer=optimizer, update=update, sample_rate=rate)
    model = Wrapped(found)
    x, y = batch(0)
    found.eval()
    expected = torch.autograd.grad(found(x, y), x)[0] if rate == 1 else None
    before = found.weight.clone()

    def nothing_moved() -> None:
        found.optimizer.step()
        assert torch.equal(found.weight, before) and found.step_count == 0

    found(x, y).backward()
    nothing_moved()
    found.train()
    for inputs in ([x], [x, *(p for p in found.parameters())]):
        dx = torch.autograd.grad(found(x, y), inputs, allow_unused=True)[0]
        assert expected is None or torch.equal(dx, expected)
        nothing_moved()
    found(x, y).backward(inputs=[x])
    nothing_moved()
    for frozen in (found, model):
        frozen.requires_grad_(False)
        found(x, y).backward()
        nothing_moved()
        with pytest.raises(RuntimeError, match="does not require grad"):
            found(x.detach(), y).backward()
        frozen.requires_grad_(True)
    found(x, y).backward()
    found.optimizer.step()
    assert found.step_count == 1 and not torch.equal(found.weight, before)


def test_a_frozen_parameter_gets_no_gradient() -> None:
    found = head().requires_grad_(False)
    x, y = batch(0)
    found(x, y).backward()
    assert found.weight.grad is None and x.grad is not None


Flag = Callable[[Any, bool], object]


def by_parameters(found: nn.Module, trains: bool) -> None:
    for parameter in Wrapped(found).parameters():
        parameter.requires_grad_(trains)


def by_the_optimizer(found: Any, trains: bool) -> None:
    """As Lightning's `toggle_optimizer` does it for the others."""
    for group in found.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad = trains


FLAGS: dict[str, Flag] = {
    "the head": lambda found, trains: found.requires_grad_(trains),
    "a model around it": lambda found, trains: Wrapped(found).requires_grad_(trains),
    "each parameter": by_parameters,
    "the table": lambda found, trains: found.weight.requires_grad_(trains),
    "the table's flag": lambda found, trains: setattr(found.weight, "requires_grad", trains),
    "the optimizer's parameters": by_the_optimizer,
}


def anew(found: ClassCenters) -> ClassCenters:
    found.weight = found.weight.clone()
    return found


def loaded(found: ClassCenters) -> ClassCenters:
    found.load_state_dict(copy.deepcopy(found.state_dict()), assign=True)
    return found


LATER: dict[str, Callable[[ClassCenters], ClassCenters]] = {
    "as it is": lambda found: found,
    "cast": lambda found: found.float().double(),
    "another table": anew,
    "loaded": loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda found: pickle.loads(pickle.dumps(found)),
    "a shallow copy gone": lambda found: copy.copy(found) and found,
}


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad", None])
@pytest.mark.parametrize("name", FLAGS)
def test_every_way_to_freeze_freezes(name: str, optimizer: str | None, update: str) -> None:
    """And to thaw; weight decay and momentum rest, too."""
    options: dict[str, Any] = {}
    if optimizer is not None:
        decay = dict(lr=0.1, weight_decay=0.1, **({"momentum": 0.9} if optimizer == "sgd" else {}))
        options = dict(optimizer=optimizer, optimizer_options=decay, update=update)
    found = head(sample_rate=0.5, **options)
    flag = FLAGS["the table" if optimizer is None and "optimizer" in name else name]
    own = torch.optim.SGD(found.parameters(), lr=0.1) if optimizer is None else found.optimizer

    def step() -> bool:
        """Whether the table moved."""
        before = found.weight.detach().clone()
        own.zero_grad()
        x, y = batch(0)
        found(x, y).backward()
        own.step()
        assert x.grad is not None and x.grad.abs().max() > 0
        return not torch.equal(found.weight.detach(), before)

    assert step()
    for thaw in (flag, FLAGS["the head"], FLAGS["the table"]):
        flag(found, False)
        assert not found.weight.requires_grad and not step()
        thaw(found, True)
        assert found.weight.requires_grad and step()
    copy.deepcopy(found.float().double())  # which a flag of the tensor itself would forbid
    group = found.optimizer.param_groups[0] if optimizer else own.param_groups[0]
    assert own.state.keys() <= set(group["params"]) and not own.state.keys() - {group["params"][0]}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("name", FLAGS)
def test_the_flag_is_the_heads_after_what_people_do(name: str, later: str) -> None:
    options = dict(optimizer="sgd", optimizer_options=dict(lr=0.1, weight_decay=0.1))
    for early in (False, True):
        found = head(**options)
        found(*batch(0)).backward()
        if early:
            FLAGS[name](found, False)
        found = LATER[later](found)
        if not early:
            FLAGS[name](found, False)
        before = found.weight.clone()
        assert type(before) is torch.Tensor and not found.weight.requires_grad
        found(*batch(1)).backward()
        found.optimizer.step()
        assert torch.equal(found.weight, before) and found.step_count == 1


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("update", ["backward", "step"])
def test_frozen_between_forward_and_backward(update: str, name: str) -> None:
    """No gradient is added, as torch has it; one that waited from before is stepped."""
    options = dict(optimizer="sgd", optimizer_options=dict(lr=0.1), update=update)
    found, own = head(**options), head()
    theirs = torch.optim.SGD(own.parameters(), lr=0.1)
    for each in (found, own):
        if update == "step":
            each(*batch(0)).backward()
        loss = each(*batch(1))
        FLAGS[name if each is found else "the head"](each, False)
        loss.backward()
    before = found.weight.clone()
    found.optimizer.step()
    theirs.step()
    assert torch.equal(found.weight, before) == (update == "backward")
    torch.testing.assert_close(found.weight, own.weight.detach(), rtol=1e-10, atol=1e-10)


def test_the_table_is_a_plain_tensor_to_all_else() -> None:
    found = head(optimizer="sgd")
    weight = found.weight
    assert isinstance(found.optimizer, HeadOptimizer)
    for made in (weight.clone(), weight.detach(), weight * 2, weight[:3], copy.deepcopy(weight)):
        assert type(made) is torch.Tensor and not made.requires_grad
    assert type(pickle.loads(pickle.dumps(weight))) is torch.Tensor
    assert weight.numpy().shape == (C, D) and weight.is_leaf
    weight.mul_(2)
    assert torch.equal(found.weight, weight)
    weight.data = weight.data + 1
    assert torch.equal(found.weight, weight) and weight.data_ptr() == found.weight.data_ptr()
    other = head(optimizer="sgd", seed=1)
    other.weight = weight  # no gradient would reach it, and none is asked for
    del found
    gc.collect()
    assert not weight.requires_grad and other.weight.requires_grad
    weight.requires_grad_()  # of a head that is gone
    assert other.weight.requires_grad and torch.equal(other.weight, weight)


def test_a_graph_takes_the_table() -> None:
    found, x = head(optimizer="sgd"), torch.ones(2, D, dtype=torch.float64)
    compiled = torch.compile(lambda x: x @ found.weight.T, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x @ found.weight.T)


def test_an_exact_head_freezes_in_all_these_ways() -> None:
    for name, flag in FLAGS.items():
        if "table" in name:
            continue  # it has factors for one
        found = SphericalHead(C, D, lr=0.1, dtype=torch.float64)
        ids = torch.arange(C)
        for trains in (False, True):
            flag(found, trains)
            before = found.rows(ids)
            x, y = batch(0)
            found(x, y).backward()
            found.optimizer.step()
            assert torch.equal(found.rows(ids), before) != trains
            found.double()  # its buffers are others now
