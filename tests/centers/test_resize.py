"""Heads of another number of classes: what both have goes on, whatever the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses.centers import ClassCenters, SubCenters, carry_over, set_rows
from fused_losses.centers.checkpoint import Checkpoints
from fused_losses.margins import AdaFace

C, D, N = 11, 4, 8
SGD = dict(optimizer="sgd", optimizer_options=dict(lr=0.3, momentum=0.9, weight_decay=0.1))
HEADS: dict[str, dict[str, Any]] = {
    "sgd": SGD,
    "sampled": dict(SGD, sample_rate=0.4, update="step"),
    "adamw": dict(optimizer="adamw", sub_centers=2),
    "a margin's averages": dict(optimizer="adagrad", margin="AdaFace"),
    "autograd": {},
}
SIZES = (11, 7, 2, 14, 31)


def head(name: str, classes: int = C, **more: Any) -> ClassCenters:
    options = dict(HEADS[name])
    if options.get("margin"):
        options["margin"] = AdaFace()
    fixed = dict(dtype=torch.float64, scale=8.0, seed=5, gradient_scale="global_sum")
    return ClassCenters(classes, D, **{**fixed, **options, **more})


def batch(step: int, classes: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(N, D, dtype=torch.float64, generator=draw)
    y = torch.randint(0, classes, (N,), generator=draw)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, y
    own = slice(0, 3) if dist.get_rank() == 0 else slice(3, 3)
    own = slice(3, N) if dist.get_rank() == 1 else own
    return x[own], y[own]


def train(made: ClassCenters, steps: range, classes: int) -> None:
    for step in steps:
        made(*batch(step, classes)).backward()
        if made.optimizer is not None:
            made.optimizer.step()


def carried(_: int) -> dict[str, Any]:
    """The tables after the change, and after two steps on."""
    found: dict[str, Any] = {}
    for name in HEADS:
        for classes in SIZES:
            old, new = head(name), head(name, classes)
            train(old, range(3), C)
            carry_over(old, new)
            grown = head(name, classes, grow_from=old)
            for key, table in local_state(grown).items():
                assert torch.equal(table, local(new.state()[key])), (name, classes, key)
            before = {key: local(t) for key, t in new.state().items()}
            train(new, range(3, 5), min(C, classes))
            after = {key: local(t) for key, t in new.state().items()}
            found[f"{name}, {classes}"] = dict(before=before, after=after, old=local_state(old))
    pairs, single = head("adamw"), head("adamw", 14, sub_centers=1)
    centers = SubCenters(pairs)
    centers.add(*batch(0, C))
    centers.carry_over(single)
    found["cleaned"] = dict(before=local_state(single), main=centers.main, old=local_state(pairs))
    means = torch.arange(12.0, dtype=torch.float64).view(3, D)
    set_rows(pairs, means, 7)
    found["set"] = local_state(pairs)
    return found


def local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def local_state(made: ClassCenters) -> dict[str, Tensor]:
    return {key: local(t) for key, t in made.state().items()}


def whole(found: list[Any], case: str, when: str) -> dict[str, Tensor]:
    """The tables of all ranks."""
    first = found[0][case][when]
    return {
        key: torch.cat([ranks[case][when][key] for ranks in found]) if t.dim() > 1 else t
        for key, t in first.items()
    }


@pytest.mark.processes
def test_rows_in_common_go_over() -> None:
    alone, ranks = processes.run(1, carried), processes.run(3, carried)
    for found in (alone, ranks):
        for name in HEADS:
            for classes in SIZES:
                case = f"{name}, {classes}"
                old, new = whole(found, case, "old"), whole(found, case, "before")
                drawn, both = head(name, classes).weight.detach(), min(C, classes)
                assert old.keys() == new.keys()
                for key, table in new.items():
                    if table.dim() < 2:
                        assert torch.equal(table, old[key]), (case, key)
                        continue
                    assert len(table) == classes and torch.equal(table[:both], old[key][:both])
                    fresh = drawn if key == "weight" else torch.zeros_like(table)
                    assert torch.equal(table[both:], fresh[both:]), (case, key)
        old, new = whole(found, "cleaned", "old"), whole(found, "cleaned", "before")
        main = torch.cat([rank["cleaned"]["main"] for rank in found])
        for key in ("weight", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            assert torch.equal(new[key][:C], old[key][torch.arange(C), main]), key
        weight = torch.cat([rank["set"]["weight"] for rank in found])
        means = torch.arange(12.0, dtype=torch.float64).view(3, 1, D)
        assert torch.equal(weight[7:10], means.expand(-1, 2, -1))
        assert torch.equal(weight[:7], old["weight"][:7]) and torch.equal(
            weight[10], old["weight"][10]
        )
    for case in alone[0]:
        if case not in ("cleaned", "set"):
            one, three = whole(alone, case, "after"), whole(ranks, case, "after")
            for key, table in one.items():
                torch.testing.assert_close(table, three[key], rtol=1e-10, atol=1e-10, msg=case)


def from_checkpoint(_: int, folder: str, save: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in HEADS:
        with Checkpoints(f"{folder}/{name}") as checkpoints:
            if save:
                old = head(name)
                train(old, range(3), C)
                checkpoints.save({"head": old.state()}, 3)
                found[name] = dict(old=local_state(old))
                continue
            for classes in SIZES:
                new = head(name, classes)
                state = {"head": new.state()}
                if classes != C:
                    with pytest.raises(ValueError, match=r"weight.*expected shape \(11,"):
                        checkpoints.load(state)
                assert checkpoints.load(state, resize=True) == 3
                new.load()
                found[f"{name}, {classes}"] = dict(new=local_state(new))
    return found


@pytest.mark.processes
def test_a_checkpoint_of_another_number_of_classes(tmp_path: Path) -> None:
    for writers, readers in ((1, 3), (3, 2)):
        folder = str(tmp_path / f"{writers}")
        saved = processes.run(writers, from_checkpoint, folder, True)
        read = processes.run(readers, from_checkpoint, folder, False)
        for name in HEADS:
            old = whole(saved, name, "old")
            for classes in SIZES:
                new, both = whole(read, f"{name}, {classes}", "new"), min(C, classes)
                drawn = head(name, classes).weight.detach()
                for key, table in new.items():
                    if table.dim() < 2:
                        assert torch.equal(table, old[key]), (name, key)
                        continue
                    fresh = drawn if key == "weight" else torch.zeros_like(table)
                    assert torch.equal(table, torch.cat([old[key][:both], fresh[both:]])), name


def test_a_head_of_equal_size_trains_on_as_the_old_one() -> None:
    for name in HEADS:
        old, new = head(name), head(name)
        train(old, range(3), C)
        carry_over(old, new)
        for made in (old, new):
            train(made, range(3, 6), C)
        for key, table in local_state(old).items():
            assert torch.equal(table, local_state(new)[key]), (name, key)


def test_heads_that_do_not_fit() -> None:
    old = head("sgd")
    for new, text in (
        (head("adamw", sub_centers=1), "momentum_buffer"),
        (head("sgd", sub_centers=2), "weight"),
    ):
        before = local_state(new)
        with pytest.raises(ValueError, match=f"new: expected .*{text}"):
            carry_over(old, new)
        for key, table in local_state(new).items():
            assert torch.equal(table, before[key])
    new = head("adamw", 14, sub_centers=1)
    carry_over(old, new, optimizer=False)
    assert torch.equal(new.weight[:C], old.weight) and new.step_count == 0
    with pytest.raises(ValueError, match="new: expected .*weight"):
        head("sgd", 14, sub_centers=2, grow_from=old)
    with pytest.raises(TypeError, match="grow_from: .*got OrderedDict; .* by a head of its number"):
        head("sgd", 14, grow_from=old.state_dict())
    with pytest.raises(RuntimeError, match=r"11 classes, got .*\(14, 4\).*grow_from=old\)"):
        head("sgd").load_state_dict(head("sgd", 14).state_dict())
    with pytest.raises(IndexError, match="first"):
        set_rows(old, torch.zeros(3, D, dtype=torch.float64), C - 2)
    with pytest.raises(ValueError, match="rows"):
        set_rows(old, torch.zeros(3, D + 1, dtype=torch.float64), 0)
