"""A head inside the model that DistributedDataParallel or FSDP wrap, and copies of it on ranks."""

from __future__ import annotations

import copy
import io
import operator
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_losses.centers import ClassCenters

pytestmark = [pytest.mark.slow, pytest.mark.processes]

C, D, N, STEPS = 23, 6, 9, 4  # shards of 12 and 11 rows
SGD = dict(lr=0.3, momentum=0.9, weight_decay=0.01)


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, D)).double()
        self.head = ClassCenters(C, D, dtype=torch.float64, scale=16.0, seed=1, **options)

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.net(pictures), labels)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, C, (N,), generator=generator)


def train(model: nn.Module, head: ClassCenters, first: int = 0) -> dict[str, Any]:
    """Some steps of this rank's rows, one optimiser over all that the model shows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = slice(rank * N // world, (rank + 1) * N // world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(first, first + STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = model(x[rows], y[rows])
        loss.backward()
        optimizer.step()
        head.optimizer.step()
        losses.append(loss.item())
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "losses": losses,
        "weight": head.weight.clone(),
        "net": [p.detach().clone() for p in whole if p.numel()],
    }


OPTIONS = {
    "backward": dict(optimizer="sgd", optimizer_options=SGD),
    "sampled": dict(optimizer="sgd", optimizer_options=SGD, sample_rate=0.4),
    "step": dict(optimizer="sgd", optimizer_options=SGD, update="step"),
}


def wrapped(rank: int) -> dict[str, Any]:
    found = {}
    for name, options in OPTIONS.items():
        model = Model(**options)
        found[f"ddp, {name}"] = train(DistributedDataParallel(model), model.head)
        model = Model(**options)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
        found[f"fsdp, {name}"] = train(model, model.head)
        other = Model(**options)
        fully_shard(other, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
        set_model_state_dict(other, get_model_state_dict(model))
        assert torch.equal(other.head.weight, model.head.weight)
        assert other.head.step_count == STEPS
        for key, state in model.head.row_states().items():
            assert torch.equal(state, other.head.row_states()[key])
    found["frozen"] = all(frozen(by) for by in ("head", "head.weight"))
    found["refused"] = refused()
    found["nonfinite"] = [nonfinite(update) for update in ("backward", "step")]
    found["copies"] = copies()
    return found


def frozen(by: str) -> bool:
    """Frozen before it is wrapped; the backbone trains on."""
    model = Model(**OPTIONS["backward"])
    operator.attrgetter(by)(model).requires_grad_(False)
    before = model.head.weight.clone()
    train(DistributedDataParallel(model), model.head)
    return torch.equal(before, model.head.weight) and model.head.step_count == 0


def refused() -> str:
    """A table that is a parameter is DDP's to overwrite: 24 classes, as many on each rank."""
    model = Model(**OPTIONS["backward"])
    model.head = ClassCenters(24, D, dtype=torch.float64)
    try:
        DistributedDataParallel(model)(*batch(0))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def nonfinite(update: str) -> list[int]:
    """One rank's rows have a NaN: every rank leaves the step out, or raises."""
    told = []
    for choice in ("skip", "raise"):
        head = ClassCenters(C, D, optimizer="sgd", update=update, nonfinite=choice)
        before = head.weight.clone()
        x, y = torch.randn(3, D, requires_grad=True), torch.tensor([0, 5, 9])
        with torch.no_grad():
            x[1] = torch.nan if dist.get_rank() == 1 else 1.0
        try:
            head(x, y).backward()
            head.optimizer.step()
        except FloatingPointError:
            told.append(-1)
        head.optimizer.zero_grad()
        assert torch.equal(head.weight, before)
        told.append(head.skipped_steps)
        head(torch.randn(3, D, requires_grad=True), y).backward()
        head.optimizer.step()
        told.append(head.step_count)
    return told


def copies() -> dict[str, Any]:
    """What a copy and a pickled copy do next, and the head that they were made of."""
    model = Model(**OPTIONS["sampled"])
    train(model, model.head)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    found = {}
    for name, each in (("deepcopy", copy.deepcopy(model)), ("torch.save", loaded), ("", model)):
        found[name] = train(each, each.head, STEPS)
    part = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    alone = ClassCenters(C, D, optimizer="sgd", process_group=part)
    assert torch.equal(copy.deepcopy(alone).weight, alone.weight)
    with pytest.raises(TypeError, match="process_group: expected all ranks"):
        torch.save(alone, io.BytesIO())
    file.seek(0)
    found["file"] = file.getvalue()
    return found


def test_a_wrapped_head_is_that_of_one_process() -> None:
    found = processes.run(2, wrapped)
    for name, options in OPTIONS.items():
        model = Model(**options)
        expected = train(model, model.head)
        for way in ("ddp", "fsdp"):
            ranks = [each[f"{way}, {name}"] for each in found]
            for each in ranks:
                torch.testing.assert_close(each["losses"], expected["losses"], rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(each["net"], expected["net"], rtol=1e-9, atol=1e-9)
            whole = torch.cat([each["weight"] for each in ranks])
            torch.testing.assert_close(whole, expected["weight"], rtol=1e-9, atol=1e-9)
    for each in found:
        assert each["frozen"]
        assert each["nonfinite"] == [[1, 1, -1, 0, 1]] * 2
        assert each["refused"].startswith("weight: expected an optimizer beside a head inside")
        copied = each["copies"]
        for name in ("deepcopy", "torch.save"):
            assert copied[name]["losses"] == copied[""]["losses"]
            assert torch.equal(copied[name]["weight"], copied[""]["weight"])
    with pytest.raises(RuntimeError, match="the shard of rank 1 of 2 and is now at rank 0 of 1"):
        torch.load(io.BytesIO(found[1]["copies"]["file"]), weights_only=False)


def sent(model: Model, told: Any) -> None:
    """As torch.multiprocessing.spawn's functions get a model."""
    model.head(torch.zeros(1, D, dtype=torch.float64), torch.tensor([0])).backward()
    told.put(model.head.step_count)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_is_sent_to_another_process(name: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    told = context.Queue()
    process = context.Process(target=sent, args=(Model(**OPTIONS[name]), told))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert told.get(timeout=10) == (0 if name == "step" else 1)
