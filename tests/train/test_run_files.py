"""What hostile and damaged files of a run come to: one error that names them, within bounds."""

from __future__ import annotations

import copy
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch_files import DEEP, LONG, rewritten

from fused_losses.base import saved
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.loop import check_result
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.files import RunFileError
from fused_losses.train.frame.log import MAX_LINE, read_log
from fused_losses.train.frame.steps import Training
from fused_losses.train.glyphs.report import read_stage


def test_a_configuration_or_log_of_a_tebibyte_is_not_read(tmp_path: Path) -> None:
    for name, read, told in (
        ("config.json", TrainConfig.load, r"config\.json: expected at most 67108864 bytes"),
        ("log.jsonl", read_log, r"log\.jsonl: line 1: expected at most 65536 bytes"),
    ):
        path = tmp_path / name
        path.touch()
        os.truncate(path, 1 << 40)
        with pytest.raises(RunFileError, match=told):
            read(path)


def test_the_last_line_may_end_in_the_middle_of_a_letter(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b'{"step": 0}\n{"step": 1, "name": "\xc3\xa9"}\n'
    path.write_bytes(whole + b'{"step": 2, "name": "\xc3')
    assert [line["step"] for line in read_log(path)] == [0, 1]
    path.write_bytes(whole + b"\0" * MAX_LINE)  # as a file system leaves it after a power cut
    assert [line["step"] for line in read_log(path)] == [0, 1]
    path.write_bytes(b'{"step": 0, "name": "\xc3"}\n' + whole)
    with pytest.raises(RunFileError, match=r"log\.jsonl: line 1: no UTF-8 at byte 21"):
        read_log(path)


def test_a_checkpoint_is_looked_through_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "MAX_STEPS", 2000)
    path = tmp_path / "checkpoint.pt"
    for harm, told in (
        (lambda: rewritten(path, DEEP), "tuples of at most 4194304 parts"),
        (lambda: rewritten(path, LONG), "at most 2000 instructions"),
        (lambda: rewritten(path, b"}.", packed=True), "a stored part, not a packed one"),
        (lambda: rewritten(path, b"\x80\x02(t"), "not a file of tensors"),
        (
            lambda: torch.save({"losses": torch.zeros(1).expand(1 << 40)}, path),
            r"losses: expected a tensor of the bytes that are stored, 4, got shape \(1099511627776",
        ),
    ):
        checkpoint.save(path, {"losses": torch.zeros(3)})
        harm()
        with pytest.raises(RunFileError, match=rf"checkpoint\.pt: damaged \(.*{told}"):
            checkpoint.load(path)
    # entries that share their bytes say more than the file has
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"}." + bytes(998))
        archive.infolist().extend(archive.infolist() * 9)
    with pytest.raises(RunFileError, match="expected parts of the file's size"):
        checkpoint.load(path)


class Curve(Training[TrainConfig]):
    def update(self, step: int) -> float:
        return 1.0


STATE = {
    "losses": torch.ones(2, dtype=torch.float64),
    "step_ms": torch.ones(2, dtype=torch.float64),
    "peak_mib": 3.0,
}
LIES = {
    "losses": [3, None, torch.ones(2), torch.ones(1, 2).double(), torch.tensor([1, torch.nan] * 2)],
    "step_ms": [torch.ones(3).double(), torch.ones(0).double()],
    "peak_mib": ["3", None, torch.inf, [3.0]],
}


def test_a_state_with_other_curves_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trained.state.pt"
    training = Curve(TrainConfig(), name="x")
    for key, values in LIES.items():
        for value in values:
            checkpoint.save(path, {**STATE, "name": "x", key: value})
            with pytest.raises(RunFileError, match=rf"state\.pt: no state .*{key}: expected "):
                training._go_on(path)
            assert training.losses == []
    checkpoint.save(path, ["name"])
    with pytest.raises(RunFileError, match=r"state\.pt: no state of this training \(TypeError"):
        training._go_on(path)
    checkpoint.save(path, {**STATE, "name": "x"})
    assert training._go_on(path) and training.losses == [1.0, 1.0]


def test_an_optimiser_with_other_options_or_shapes_keeps_its_own() -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())

    def step() -> None:
        net(torch.ones(4, 3)).sum().backward()
        optimizer.step()

    step()
    saved = copy.deepcopy(optimizer.state_dict())
    lies: list[tuple[Callable[[dict], object], str]] = [
        (
            lambda one: one["param_groups"][0].update(weight_decay="x"),
            "weight_decay: expected 0.01",
        ),
        (lambda one: one["param_groups"][0].update(betas=[0.9, 0.99]), "betas: expected"),
        (lambda one: one["state"][0].update(exp_avg=None), "exp_avg: expected a tensor of shape"),
        (lambda one: one["state"][0].update(exp_avg=torch.ones(3)), r"exp_avg: .* \(2, 3\)"),
        (lambda one: one["state"][1].pop("exp_avg"), "expected states exp_avg, exp_avg_sq, st"),
        (lambda one: one["param_groups"].append({}), "different number of parameter groups"),
    ]
    for lie, told in lies:
        one = copy.deepcopy(saved)
        lie(one)
        with pytest.raises(ValueError, match=told):
            checkpoint.load_optimizer(optimizer, one)
        step()
    checkpoint.load_optimizer(optimizer, saved)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 1


def test_a_fold_that_is_none_is_named() -> None:
    whole = {
        **STATE,
        "memory_by": "rss",
        "embeddings": torch.ones(4, 3),
        "labels": torch.arange(4),
        "training": None,
        "backbone": {},
    }
    check_result(whole)
    check_result({**whole, "training": [STATE["losses"], STATE["losses"]]})
    lies = LIES | {
        "embeddings": [None, torch.ones(4), torch.ones(4, 3).long()],
        "labels": [None, torch.arange(3), torch.ones(4)],
        "training": [3, [torch.ones(2)], [STATE["losses"]], [STATE["losses"]] * 4],
        "peak_mib": [],
    }
    for key, values in lies.items():
        for value in values:
            with pytest.raises((TypeError, ValueError)):
                check_result({**whole, key: value})


def test_a_stage_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trained.json"
    names = "recall_at_1 recall_at_5 recall_at_1_of_centres step_ms head_ms peak_memory_mib classes"
    whole = dict.fromkeys([*names.split(), "queries"], 1)
    whole |= {"losses": [1.0, 2.0], "untrained": {"recall_at_1": 0.5}}
    path.write_text(json.dumps(whole))
    assert read_stage(path) == whole
    changes: list[tuple[Callable[[dict], object], str]] = [
        (lambda one: one.pop("step_ms"), "none: step_ms"),
        (lambda one: one.update(classes="3"), "none: classes"),
        (lambda one: one.update(losses=[None]), "'losses'"),
        (lambda one: one.update(untrained=[1]), "'untrained'"),
    ]
    for change, told in changes:
        one = dict(whole)
        change(one)
        path.write_text(json.dumps(one))
        with pytest.raises(RunFileError, match=rf"trained\.json: expected .*{told}"):
            read_stage(path)
    path.write_text("[]")
    with pytest.raises(RunFileError, match=r"trained\.json: expected a JSON object, got list"):
        read_stage(path)
