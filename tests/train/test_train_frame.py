"""What the trainers share: learning rates, checkpoints that a crash can't spoil, configurations."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from fused_losses.train import TrainConfig
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.steps import learning_rate_factor


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(steps=20, warmup=0.25)
    factors = [learning_rate_factor(step, config) for step in range(20)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True) and 0 < factors[-1] < 0.02


def test_a_crash_while_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def half_written(tree: object, file: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", half_written)
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 2}


def test_checkpoints_keep_every_tensor(tmp_path: Path) -> None:
    state = {
        "large": torch.randn(600, 600),
        "turned": torch.randn(4, 3, 2).transpose(0, 2),
        "half": [torch.randn(5).bfloat16(), torch.tensor(3)],
        "empty": torch.empty(0, 4),
        "plain": {"a": (1, 2.5, None), 7: "text"},
    }
    checkpoint.save(tmp_path / "c.pt", state)
    found = checkpoint.load(tmp_path / "c.pt")
    for name in ("large", "turned", "empty"):
        assert torch.equal(found[name], state[name])
    assert torch.equal(found["half"][0], state["half"][0]) and found["half"][1] == 3
    assert found["plain"] == state["plain"]
    assert checkpoint.state_bytes(state) == 4 * (600 * 600 + 24) + 2 * 5 + 8


def test_small_states_are_written_every_step_and_large_ones_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = checkpoint.Schedule(0)
    large = checkpoint.SMALL_STATE + 1
    assert schedule.due(1, checkpoint.SMALL_STATE) and not schedule.due(1, large)
    monkeypatch.setattr(checkpoint, "LARGE_STATE_SECONDS", 0.0)
    assert schedule.due(2, large)
    assert [checkpoint.Schedule(3).due(step, large) for step in (2, 3, 6)] == [False, True, True]


def test_random_state_round_trips() -> None:
    state = checkpoint.random_state()
    drawn = torch.rand(3), random.random()
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"margin": "arc"}, "margin: expected one of arcface"),
        ({"image_size": "56"}, "image_size: expected HEIGHTxWIDTH"),
        ({"backbone_args": "[1]"}, "backbone_args: expected a JSON object"),
        ({"warmup": 2.0}, "warmup: expected 0 to 1, got 2.0"),
        ({"channels": 2}, "channels: expected one of 0, 1, 3, got 2"),
        ({"margin": "none", "margin_value": 0.1}, "takes no value"),
    ],
)
def test_bad_configurations_are_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainConfig(**changes)
