"""The sharded head over processes: loss, dX, dW, updates and traffic against one process."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.distributed as dist
from rank_heads import COUNTS, HEADS, SGD, D, batch, make, own, train
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fused_losses.centers import clip_grad_norm_
from fused_losses.functions.margin_softmax import margin_softmax

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def loss_and_gradients(rank: int, name: str, scale: str) -> dict[str, Tensor]:
    world = dist.get_world_size()
    head = make(name, gradient_scale=scale)
    x, y = own(rank, world, *batch(name))
    x.requires_grad_()
    loss = head(x, y)
    (2 * loss).backward()  # an upstream factor goes through
    gradient = head.weight.grad
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    told = {"loss": loss.detach(), "dx": x.grad, "dw": gradient, "start": head.class_start}
    return told | ({"ds": head.scale.grad} if "scale" in HEADS[name] else {})


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_head_is_that_of_one_process(world: int) -> None:
    found = processes.run(world, all_heads)
    expected = processes.run(1, all_heads)[0]
    for name in HEADS:
        for each in (ranks[name] for ranks in found):
            for key in ("loss", "ds") if "scale" in HEADS[name] else ("loss",):
                torch.testing.assert_close(
                    each[key], expected[name][key], rtol=1e-10, atol=1e-10, msg=f"{name}: {key}"
                )
        for key in ("dx", "dw"):
            whole = torch.cat([ranks[name][key] for ranks in found])
            torch.testing.assert_close(
                whole, expected[name][key], rtol=1e-10, atol=1e-10, msg=f"{name}: {key}"
            )


def all_heads(rank: int) -> dict[str, dict[str, Tensor]]:
    return {name: loss_and_gradients(rank, name, "global_sum") for name in HEADS}


UPDATES = {
    "full": SGD,
    "sampled": {**SGD, "sample_rate": 0.3},
    "clipped": {**SGD, "sample_rate": 0.3, "max_grad_norm": 0.3},
    "apart": {**SGD, "update": "step"},
    "adamw": dict(optimizer="adamw", optimizer_options=dict(lr=0.01), sample_rate=0.5),
}


@pytest.mark.parametrize("name", UPDATES)
def test_training_is_that_of_one_process(name: str) -> None:
    options = UPDATES[name]
    expected = processes.run(1, train, options, 6)[0]
    for world in (2, 3):
        found = processes.run(world, train, options, 6)
        weight = torch.cat([each["weight"] for each in found])
        torch.testing.assert_close(weight, expected["weight"], rtol=1e-10, atol=1e-10)
        for each in found:
            torch.testing.assert_close(each["losses"], expected["losses"], rtol=1e-10, atol=1e-10)
        for step in range(6):
            dx = torch.cat([each["dx"][step] for each in found])
            torch.testing.assert_close(dx, expected["dx"][step], rtol=1e-9, atol=1e-9)


def backbone() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, D)).double()


def pictures(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(COUNTS[1]), 8, dtype=torch.float64, generator=generator)


CLIP = 0.05  # of a joint norm of about 1


def with_backbone(rank: int, wrapped: str, steps: int = 4) -> list[list[Tensor]]:
    """Steps inside backward; and apart, clipped together."""
    return [backbone_steps(rank, wrapped, steps, name) for name in ("full", "apart")]


def backbone_steps(rank: int, wrapped: str, steps: int, name: str) -> list[Tensor]:
    world = dist.get_world_size()
    net = backbone()
    if wrapped == "ddp":
        net = nn.parallel.DistributedDataParallel(net)
    elif wrapped == "fsdp":
        fully_shard(net, mesh=dist.init_device_mesh("cpu", (world,)))
    head = make("arcface", **UPDATES[name])
    optimizer, norms = torch.optim.SGD(net.parameters(), lr=0.1), []
    for step in range(steps):
        x, y = own(rank, world, pictures(step), batch("arcface", step)[1])
        optimizer.zero_grad()
        head(net(x), y).backward()
        if name == "apart":
            norms.append(clip_grad_norm_(net.parameters(), CLIP, head))
        optimizer.step()
        head.optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    told = [torch.stack(norms)] if norms else []
    return [p.detach().clone() for p in whole] + told + [head.weight.clone()]


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_a_backbone_trains_as_in_one_process(wrapped: str) -> None:
    """The default gradient scale: DDP's and FSDP's averages are one process's gradients."""
    alone = processes.run(1, with_backbone, "")[0]
    for world in (2, 4):
        found = processes.run(world, with_backbone, wrapped)
        for i, (*expected, table) in enumerate(alone):
            for *parameters, _ in (each[i] for each in found):
                torch.testing.assert_close(parameters, expected, rtol=1e-10, atol=1e-10)
            shards = torch.cat([each[i][-1] for each in found])
            torch.testing.assert_close(shards, table, rtol=1e-10, atol=1e-10)


def test_a_clipping_with_the_backbone_is_torchs() -> None:
    """Over all parameters of one process, in every step."""
    *expected, told, table = processes.run(1, with_backbone, "")[0][1]
    net, norms = backbone(), []
    weight = nn.Parameter(make("arcface").weight.detach().clone())
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.1),
        torch.optim.SGD([weight], **SGD["optimizer_options"]),
    ]
    for step in range(4):
        net.zero_grad(), optimizers[1].zero_grad()
        labels = batch("arcface", step)[1]
        loss = margin_softmax(net(pictures(step)), weight, labels, scale=16.0, backend="reference")
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_([*net.parameters(), weight], CLIP))
        assert norms[-1] > 2 * CLIP
        for optimizer in optimizers:
            optimizer.step()
    found = [p.detach() for p in net.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(norms), told, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weight.detach(), table, rtol=1e-10, atol=1e-10)
