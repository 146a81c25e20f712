"""What ranks tell one another: traffic, refusals, meshes, states over other shards."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from rank_heads import SGD, C, D, batch, make, own, train

from fused_losses.centers import ClassCenters, step_traffic

pytestmark = [pytest.mark.slow, pytest.mark.processes]


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
