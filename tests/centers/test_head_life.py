"""What becomes of a head between steps: cast, assigned, copied, pickled, saved, loaded.

After each the head goes on as torch.optim does with the whole table.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from class_center_cases import C, D, Twin, batch, head
from torch import nn

from fused_losses.centers import ClassCenters
from fused_losses.centers.checkpoint import Checkpoints

RATES = pytest.mark.parametrize("rate", [1.0, 0.3])


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Wrapped(nn.Module):
    def __init__(self, head: ClassCenters) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(2, 2), head


COPIES: dict[str, Callable[[ClassCenters], ClassCenters]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy in a model": lambda h: copy.deepcopy(Wrapped(h)).head,
    "pickle": lambda h: pickle.loads(pickle.dumps(h)),
    "torch.save in a model": lambda h: through_torch_save(Wrapped(h)).head,
}


@RATES
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_goes_on_apart(name: str, update: str, rate: float) -> None:
    twin = Twin(rate=rate, update=update)
    twin.steps(3)
    first, weight = twin.head, twin.head.weight.clone()
    twin.head = COPIES[name](first)
    twin.steps(4)
    twin.check()
    assert torch.equal(first.weight, weight) and first.step_count == 3
    group = twin.head.optimizer.param_groups[0]
    assert group["params"][0].data_ptr() == twin.head.weight.data_ptr()
    group["lr"] = 0.0
    assert first.optimizer.param_groups[0]["lr"] != 0


def test_a_copy_has_no_gradient_that_waits() -> None:
    twin = Twin(update="step")
    twin.head(*batch(0)).backward()
    other = copy.deepcopy(twin.head)
    assert other.grad_norm() == 0 != twin.head.grad_norm()
    before = other.weight.clone()
    other.optimizer.step()
    assert torch.equal(other.weight, before)


@RATES
def test_casts_take_the_optimiser_along(rate: float) -> None:
    twin = Twin(rate=rate)
    twin.steps(3)
    for cast in ("float", "double", "half", "bfloat16"):
        getattr(twin.head, cast)()
        twin.weight.data = getattr(twin.head.weight, cast)().double()
        buffer = twin.head.row_states()["momentum_buffer"]
        wide = torch.float64 if cast == "double" else torch.float32
        assert buffer.dtype == wide and twin.head.weight.dtype == twin.head._table.dtype
    twin.head.double()
    twin.optimizer.state[twin.weight]["momentum_buffer"] = twin.buffer.float().double()
    twin.steps(4)
    twin.check()
    assert twin.head.step_count == 7


@RATES
@pytest.mark.parametrize(
    "way", ["weight=", "parameter", "weight.data=", "copy_", "assign=True", "weight alone"]
)
def test_rows_that_are_written_stay_as_written(way: str, rate: float) -> None:
    """On a head whose rows are behind: the steps they missed move their momentum, not the rows."""
    twin = Twin(rate=rate)
    twin.steps(3)
    rows = torch.randn_like(twin.weight)
    found = twin.head
    if way == "weight=":
        found.weight = rows.clone()
    elif way == "parameter":
        found.weight = nn.Parameter(rows.clone())
    elif way == "weight.data=":
        found.weight.data = rows.clone()
    elif way == "copy_":
        with torch.no_grad():
            found.weight.copy_(rows)
    else:
        told = found.load_state_dict({"weight": rows}, strict=False, assign=way == "assign=True")
        assert "_extra_state" in told.missing_keys
    assert torch.equal(found.weight, rows)
    twin.weight.data.copy_(rows)
    twin.steps(4)
    twin.check()


def test_rows_written_behind_the_heads_back_are_noticed() -> None:
    twin = Twin(rate=0.3)
    held = twin.head.weight
    twin.steps(3)
    held.add_(1)
    with pytest.raises(RuntimeError, match="weight: written while rows had not caught up"):
        twin.head(*batch(3))
    rows = torch.randn_like(held)
    twin.head.weight = rows.clone()
    assert torch.equal(twin.head.weight, rows)
    twin.head(*batch(3)).backward()
    assert twin.head.step_count == 4
    for wrong, kind in ((rows[1:], ValueError), (rows.long(), ValueError), (3, TypeError)):
        with pytest.raises(kind, match="weight: expected"):
            twin.head.weight = wrong


def test_a_table_that_changed_is_not_the_backwards() -> None:
    twin = Twin(update="step")
    loss = twin.head(*batch(0))
    twin.head.weight = torch.randn_like(twin.weight)
    with pytest.raises(RuntimeError, match="updated after this forward"):
        loss.backward()
    twin.head(*batch(0)).backward()
    with torch.no_grad():
        twin.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="zero_grad"):
        twin.head.optimizer.step()
    twin.head.optimizer.zero_grad()
    twin.head.optimizer.step()
    assert twin.head.step_count == 0


# ---- saved and loaded ---------------------------------------------------------------------------


@RATES
@pytest.mark.parametrize("form", ["state_dict", "of the optimiser", "dict of older ones"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_what_is_saved_goes_on(form: str, scheduled: bool, rate: float) -> None:
    twin = Twin(rate=rate, momentum=0.0 if scheduled else 0.9)
    for optimizer in (twin.optimizer, twin.head.optimizer):
        optimizer.param_groups[0]["momentum"] = 0.9
    twin.steps(3)
    other = Twin(rate=rate, momentum=0.0 if scheduled else 0.9).head
    saved = copy.deepcopy(twin.head.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    if form == "dict of older ones":
        states = {"momentum_buffer": saved.pop("optimizer.momentum_buffer")}
        saved["_extra_state"] = {"steps": 3, "optimizer": states}
    if form == "of the optimiser":
        other.load_state_dict({"weight": saved["weight"]}, strict=False)
    else:
        other.load_state_dict(saved)
    # hyper-parameters are torch's to keep: in the optimiser's state
    other.optimizer.load_state_dict(copy.deepcopy(twin.head.optimizer.state_dict()))
    twin.head = other
    twin.steps(4)
    twin.check()
    assert twin.head.step_count == 7


def test_the_optimisers_state_is_torchs() -> None:
    twin = Twin()
    twin.steps(2)
    told, torchs = twin.head.optimizer.state_dict(), twin.optimizer.state_dict()
    torch.testing.assert_close(
        told["state"][0]["momentum_buffer"], torchs["state"][0]["momentum_buffer"]
    )
    assert told["state"][0]["step"] == 2 and told["param_groups"][0]["params"] == [0]
    twin.head.optimizer.load_state_dict(torchs)
    twin.steps(2)
    twin.check()
    for given, text in (
        (torch.optim.AdamW([twin.weight]).state_dict(), "state_dict: expected one group with"),
        ({**told, "state": {0: {"exp_avg": twin.weight}}}, "momentum_buffer"),
        ({**told, "state": {0: {"momentum_buffer": twin.weight[1:], "step": 2}}}, "shape"),
    ):
        before = copy.deepcopy(twin.head.optimizer.state_dict())
        with pytest.raises(ValueError, match=text):
            twin.head.optimizer.load_state_dict(given)
        after = twin.head.optimizer.state_dict()
        assert str(after) == str(before)
    with pytest.raises(ValueError, match="add_param_group: the head's optimiser"):
        twin.head.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_a_scheduled_momentum_is_in_a_checkpoint(tmp_path: Path) -> None:
    twin = Twin(momentum=0.0)
    for optimizer in (twin.optimizer, twin.head.optimizer):
        optimizer.param_groups[0]["momentum"] = 0.9
    twin.steps(3)
    other = Twin(momentum=0.0).head
    with pytest.raises(RuntimeError, match="load: expected state"):
        other.load()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"head": twin.head.state()}, 1)
        assert checkpoints.load({"head": other.state()}) == 1
    other.load()
    other.optimizer.param_groups[0]["momentum"] = 0.9
    twin.head = other
    twin.steps(3)
    twin.check()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="momentum_buffer"):
        checkpoints.load({"head": head(optimizer="adagrad").state()})


def test_another_optimisers_state_is_refused_whole_or_left_out_by_name() -> None:
    adam, sgd = head(optimizer="adamw", seed=1), Twin().head
    saved, before = adam.state_dict(), sgd.weight.clone()
    old = {"steps": 4, "optimizer": {"exp_avg": saved["weight"]}}
    for given in (saved, {"weight": saved["weight"], "_extra_state": old}):
        with pytest.raises(RuntimeError, match=r"expected the states \['momentum_buffer'\], got"):
            sgd.load_state_dict(given)
        assert torch.equal(sgd.weight, before) and sgd.step_count == 0
        with pytest.warns(UserWarning, match="got .*exp_avg.*left out"):
            sgd.load_state_dict(given, strict=False)
        assert torch.equal(sgd.weight, adam.weight) and sgd.step_count == 0
        sgd.weight = before.clone()
    short = {**Twin().head.state_dict(), "weight": before[1:]}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="weight: expected shape"):
            sgd.load_state_dict(short, strict=strict)
    with pytest.raises(RuntimeError, match="Unexpected key.*nobodys"):
        sgd.load_state_dict({**sgd.state_dict(), "nobodys": before})


def test_another_ranks_shard_is_refused_even_of_this_shape() -> None:
    twin, other = Twin(), Twin().head
    twin.steps(3)
    saved = twin.head.state_dict()
    of_other = {**saved, "_extra_state": torch.tensor([3, 1, 12])}
    before = other.weight.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="of rank 0 of 1, .* that begins at class 12"):
            other.load_state_dict(of_other, strict=strict)
    assert torch.equal(other.weight, before) and other.step_count == 0
    # of earlier versions: the steps alone
    other.load_state_dict({**saved, "_extra_state": torch.tensor([3])})
    assert torch.equal(other.weight, twin.head.weight) and other.step_count == 3


def test_a_table_alone_is_strictly_enough_where_nothing_is_lost() -> None:
    rows = torch.randn_like(head().weight)
    for options in ({}, dict(optimizer="sgd")):
        found = head(**options)
        found.load_state_dict({"weight": rows})
        assert torch.equal(found.weight, rows)
    for options, lost in (
        (dict(optimizer="sgd", optimizer_options=dict(momentum=0.9)), "momentum_buffer"),
        (dict(optimizer="adamw"), "exp_avg"),
        (dict(sample_rate=0.5), "_extra_state"),
    ):
        found = head(**options)
        with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
            found.load_state_dict({"weight": rows})
        assert not torch.equal(found.weight, rows)


def test_states_that_are_not_there_are_said_to_be_missing() -> None:
    """Of a head without an optimiser, or one that had taken no step: no key is unexpected."""
    twin = Twin()
    twin.steps(2)
    found, before = twin.head, twin.head.weight.clone()
    for saved in (head().state_dict(), Twin(momentum=0.0).head.state_dict()):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*momentum_buffer") as told:
            found.load_state_dict(saved)
        assert "Unexpected" not in str(told.value)
        assert torch.equal(found.weight, before)
        with pytest.warns(UserWarning, match="momentum_buffer.*left out"):
            loose = found.load_state_dict(saved, strict=False)
        assert loose.missing_keys == ["optimizer.momentum_buffer"] and not loose.unexpected_keys
        assert torch.equal(found.weight, saved["weight"])
        found.weight = before.clone()
        model = nn.ModuleDict({"head": found})
        with (
            pytest.warns(UserWarning, match="left out"),
            pytest.raises(RuntimeError, match=r"Missing key.*head.optimizer.momentum_buffer"),
        ):
            model.load_state_dict({f"head.{k}": v for k, v in saved.items()})
        found.weight = before.clone()
    sampled = head(sample_rate=0.5, seed=2)
    head(optimizer="sgd", seed=2).load_state_dict(sampled.state_dict())  # with none there is none
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*momentum_buffer") as told:
        sampled.load_state_dict(found.state_dict())
    assert "Missing" not in str(told.value)
    short = {**found.state_dict(), "optimizer.momentum_buffer": before[1:]}
    of_old = {"weight": before, "_extra_state": {"steps": 1, "optimizer": {"exp_avg": before}}}
    for other, given in ((found, short), (head(optimizer="sgd"), of_old), (head(), of_old)):
        within = {f"0.{k}": v for k, v in given.items()}
        with (
            pytest.warns(UserWarning, match="left out"),
            pytest.raises(RuntimeError, match=r"(Unexpected|Missing) key"),
        ):
            nn.Sequential(other).load_state_dict(within)


@pytest.mark.parametrize("optimizer", [None, "sgd"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_table_of_other_classes_is_told_how_to_go_over(
    assign: bool, optimizer: str | None
) -> None:
    found = head(optimizer=optimizer)
    before = found.weight.clone()
    for classes in (C - 2, C + 2):
        for given in (before.new_zeros(classes, D), before.new_zeros(classes, 2, D)):
            like = f"expected shape \\({C}, {D}\\)"
            if given.dim() == 2:
                like += (
                    f", that is {C} classes, got .* that is {classes}; .*carry_over.*resize=True"
                )
            with pytest.raises(RuntimeError, match=like) as told:
                found.load_state_dict({"weight": given}, strict=False, assign=assign)
            assert given.dim() == 2 or "carry_over" not in str(told.value)
            assert torch.equal(found.weight, before)
