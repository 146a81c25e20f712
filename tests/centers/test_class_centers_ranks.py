"""The sharded head over processes: loss, dX, dW, updates and traffic against one process."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fused_losses import class_losses, margins
from fused_losses.centers import ClassCenters, step_traffic
from fused_losses.losses.adaptive_scale import AdaptiveScale
from fused_losses.losses.margin_softmax import margin_softmax
from fused_losses.losses.unpg import UNPG

pytestmark = [pytest.mark.slow, pytest.mark.processes]

C, D = 23, 6
COUNTS = {1: [9], 2: [4, 5], 3: [5, 0, 4], 4: [2, 3, 0, 4]}  # rows of each rank: uneven, empty

PLAIN: dict[str, Any] = {"margin": None, "normalize": False, "bias": True}
HEADS: dict[str, dict[str, Any]] = {
    "arcface": {},
    "adaface": {"margin": "AdaFace"},
    "magface": {"margin": margins.MagFace(l_a=0.5, u_a=4.0)},
    "elastic": {"margin": margins.ElasticArcFace(0.4, 0.1)},
    "curricular": {"margin": "CurricularFace"},
    "mv-softmax": {"margin": "MVSoftmax"},
    "filter": {"margin": "InterclassFilter"},
    "sampled": {"sample_rate": 0.4},
    "sampled, corrected": {"sample_rate": 0.4, "log_q": True},
    "sub-centres": {"sub_centers": 3},
    "sub-centres, sampled": {"sub_centers": 2, "sample_rate": 0.5, "log_q": True},
    "sface": {"margin": class_losses.SFace()},
    "sphereface2": {"margin": class_losses.SphereFace2(0.3)},
    "sphereface2, sampled": {
        "margin": class_losses.SphereFace2(0.3), "sample_rate": 0.5, "log_q": True,
    },
    "several labels": {"margin": class_losses.MLCD(16.0), "labels": 3},
    "adaptive scale": {"margin": AdaptiveScale(smallest=2.0)},
    "scale that learns, smoothed": {"scale": 7.0, "label_smoothing": 0.1},
    "smoothed, a sample": {"label_smoothing": 0.2, "sample_rate": 0.4},
    "smoothed sub-centres, sampled": {
        "label_smoothing": 0.2, "sub_centers": 2, "sample_rate": 0.5, "log_q": True,
    },
    "its sample": {"scale": 7.0, "sample_rate": 0.4, "log_q": True},
    "shared negatives": {"batch_negatives": UNPG(1.0)},
    "margins of classes": {"margin": margins.ArcFace(torch.linspace(0.1, 0.6, C))},
    "their sample, several centres": {
        "margin": margins.CosFace(torch.linspace(0, 0.5, C)), "sample_rate": 0.5, "sub_centers": 2,
    },
    "bias, a scale that learns": {**PLAIN, "scale": 2.0},
    "bias, sampled": {**PLAIN, "sample_rate": 0.4, "log_q": True},
}  # fmt: skip


def make(name: str, **more: Any) -> ClassCenters:
    options = {k: v for k, v in HEADS[name].items() if k != "labels"}
    if isinstance(options.get("margin"), str):
        kind = getattr(margins, options["margin"])
        inner = (margins.ArcFace(),) if options["margin"] == "InterclassFilter" else ()
        options["margin"] = kind(*inner)
    if "scale" in options:
        options["scale"] = nn.Parameter(torch.tensor(options["scale"], dtype=torch.float64))
    defaults = dict(dtype=torch.float64, scale=16.0, chunk_bytes=4 * D * 8, seed=1)
    return ClassCenters(C, D, **{**defaults, **options, **more})


def batch(name: str, step: int = 0) -> tuple[Tensor, Tensor]:
    """The whole batch of a step, one row of it ignored."""
    generator = torch.Generator().manual_seed(100 + step)
    n = sum(COUNTS[1])
    x = torch.randn(n, D, dtype=torch.float64, generator=generator)
    width = HEADS[name].get("labels")
    y = torch.randint(0, C, (n, width) if width else (n,), generator=generator)
    y[2] = -100
    return x, y


def own(rank: int, world: int, *rows: Tensor) -> list[Tensor]:
    start = sum(COUNTS[world][:rank])
    return [t[start : start + COUNTS[world][rank]].clone() for t in rows]


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


# ---- updates over ranks -------------------------------------------------------------------------


def train(rank: int, options: dict[str, Any], steps: int) -> dict[str, Any]:
    world = dist.get_world_size()
    head = make("arcface", **options)
    losses, gradients = [], []
    for step in range(steps):
        x, y = own(rank, world, *batch("arcface", step))
        x.requires_grad_()
        loss = head(x, y)
        loss.backward()
        head.optimizer.step()
        losses.append(loss.item())
        gradients.append(x.grad / world)
    head.settle()
    return {"losses": losses, "weight": head.weight.clone(), "dx": gradients}


SGD = dict(optimizer="sgd", optimizer_options=dict(lr=0.3, momentum=0.9, weight_decay=0.01))
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


# ---- with a backbone ----------------------------------------------------------------------------


def backbone() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, D)).double()


def pictures(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(COUNTS[1]), 8, dtype=torch.float64, generator=generator)


CLIP = 0.05  # of a joint norm of about 1


def clip_together(net: nn.Module, head: ClassCenters) -> None:
    """As docs/class_centers.md has it."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of FSDP's shards
        norm = norm.full_tensor()
    norm = torch.hypot(norm, norm.new_tensor(head.grad_norm()))
    nn.utils.clip_grads_with_norm_(net.parameters(), CLIP, norm)
    head.scale_grad(min(1.0, CLIP / (float(norm) + 1e-6)))


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
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
        x, y = own(rank, world, pictures(step), batch("arcface", step)[1])
        optimizer.zero_grad()
        head(net(x), y).backward()
        if name == "apart":
            clip_together(net, head)
        optimizer.step()
        head.optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return [p.detach().clone() for p in whole] + [head.weight.clone()]


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
    *expected, table = processes.run(1, with_backbone, "")[0][1]
    net = backbone()
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
        assert nn.utils.clip_grad_norm_([*net.parameters(), weight], CLIP) > 2 * CLIP
        for optimizer in optimizers:
            optimizer.step()
    found = [p.detach() for p in net.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weight.detach(), table, rtol=1e-10, atol=1e-10)


# ---- traffic ------------------------------------------------------------------------------------


def counted(rank: int, classes: int, rows: int) -> dict[str, float]:
    """Bytes that each collective of a training step brings this rank, seen from outside."""
    world, seen = dist.get_world_size(), {"gathered": 0.0, "reduced": 0.0, "scattered": 0.0}
    size = lambda t: t.numel() * t.element_size()

    def watched(name: str, count: Any) -> None:
        real = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            count(*args)
            return real(*args, **options)

        setattr(dist, name, call)

    def add(kind: str, bytes_: float) -> None:
        seen[kind] += bytes_

    new = hasattr(dist, "all_gather_single")  # torch 2.13's names
    gather = "all_gather_single" if new else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if new else "reduce_scatter_tensor"
    watched(gather, lambda out, own: add("gathered", size(out) - size(own)))
    watched("all_reduce", lambda t, *_: add("reduced", 2 * (world - 1) / world * size(t)))
    watched(scatter, lambda out, t: add("scattered", size(t) - size(out)))
    for name in ("all_gather", "all_to_all", "all_to_all_single", "broadcast", "reduce", "send"):
        watched(name, lambda *_: pytest.fail("a collective that the formula does not have"))
    head = ClassCenters(classes, D, optimizer="sgd", sample_rate=0.5)
    x = torch.randn(rows, D, requires_grad=True)
    head(x, torch.randint(0, classes, (rows,))).backward()
    return seen


@pytest.mark.parametrize("world", [2, 3])
def test_traffic_is_the_formulas_and_knows_no_classes(world: int) -> None:
    for rows in (5, 8):
        told = step_traffic(world, rows, D)._asdict()
        for classes in (30, 3000):
            for seen in processes.run(world, counted, classes, rows):
                assert seen == pytest.approx(told)


# ---- who says no --------------------------------------------------------------------------------


def refused(rank: int) -> str:
    head = make("arcface")
    x = torch.randn(3, D, dtype=torch.float64)
    labels = torch.tensor([0, 1, C if rank == 1 else 2])
    try:
        head(x, labels)
    except (IndexError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_bad_label_on_one_rank_stops_all() -> None:
    first, second, third = processes.run(3, refused)
    assert second.startswith("IndexError") and f"[0, {C})" in second
    assert first == third == "RuntimeError: rank 1 refused its batch; its own error says why"


def different(rank: int) -> str:
    head = make("arcface")
    labels = torch.zeros((3, 1 + rank), dtype=torch.int64)
    try:
        head(torch.randn(3, D, dtype=torch.float64), labels)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_batches_that_do_not_fit_each_other() -> None:
    for said in processes.run(2, different):
        assert "same width, labels a row, dtype and weights or none on all ranks" in said


# ---- meshes and state ---------------------------------------------------------------------------


def on_a_mesh(rank: int) -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "classes"))
    head = make("arcface", device_mesh=mesh["classes"], **SGD)
    group = mesh["classes"].get_group()
    x, y = own(dist.get_rank(group), 2, *batch("arcface"))
    loss = head(x.requires_grad_(), y)
    loss.backward()
    other = make("arcface", device_mesh=mesh, mesh_dim="classes")
    return {
        "loss": loss.item(),
        "weight": head.weight.clone(),
        "place": (head.class_start, head.num_local, other.class_start, other.num_local),
        "shape": tuple(head.state()["weight"].full_tensor().shape),
    }


def test_a_dimension_of_a_mesh() -> None:
    expected = processes.run(1, train, SGD, 1)[0]
    found = processes.run(4, on_a_mesh)
    for first in (0, 2):
        weight = torch.cat([found[first]["weight"], found[first + 1]["weight"]])
        torch.testing.assert_close(weight, expected["weight"], rtol=1e-10, atol=1e-10)
    for rank, each in enumerate(found):
        assert each["loss"] == pytest.approx(expected["losses"][0], abs=1e-10)
        assert each["place"] == ((0, 12, 0, 12), (12, 11, 12, 11))[rank % 2]
        assert each["shape"] == (C, D)


def kept(rank: int, folder: str) -> list[float]:
    """The average that CurricularFace keeps, before a save, and in another head after a load."""
    first, second = make("curricular", **SGD), make("curricular", **SGD)
    first(*own(rank, dist.get_world_size(), *batch("curricular"))).backward()
    checkpoint.save(first.state(), checkpoint_id=folder)
    checkpoint.load(second.state(), checkpoint_id=folder)
    second.load()
    return [float(first.margin.t), float(second.margin.t)]


def test_state_has_what_a_margin_keeps(tmp_path: Any) -> None:
    for before, after in processes.run(2, kept, str(tmp_path)):
        assert before == after != 0


def saved(rank: int, folder: str, classes: int) -> None:
    head = ClassCenters(classes, D, optimizer="sgd", optimizer_options=SGD["optimizer_options"],
                        sample_rate=0.5, seed=rank * 0 + 4)  # fmt: skip
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        head(torch.randn(4, D, generator=generator), torch.tensor([0, 1, 2, 0])).backward()
    checkpoint.save(head.state(), checkpoint_id=folder)


def loaded(rank: int, folder: str, classes: int) -> dict[str, Any]:
    head = ClassCenters(classes, D, optimizer="sgd", optimizer_options=SGD["optimizer_options"],
                        sample_rate=0.5, seed=9)  # fmt: skip
    checkpoint.load(head.state(), checkpoint_id=folder)
    head.load()
    return {
        "steps": head.step_count,
        "weight": head.weight.clone(),
        "momentum": head.row_states()["momentum_buffer"].clone(),
    }


@pytest.mark.parametrize("classes", [23, 5])
def test_state_reshards(classes: int, tmp_path: Any) -> None:
    """Five classes over four ranks: one of them has none."""
    processes.run(2, saved, str(tmp_path), classes)
    wholes = []
    for world in (1, 2, 4):
        found = processes.run(world, loaded, str(tmp_path), classes)
        assert {each["steps"] for each in found} == {3}
        wholes.append([torch.cat([e[key] for e in found]) for key in ("weight", "momentum")])
    assert wholes[0][0].shape == (classes, D) and wholes[0][1].abs().max() > 0
    assert all(torch.equal(a, b) for whole in wholes for a, b in zip(whole, wholes[0], strict=True))
