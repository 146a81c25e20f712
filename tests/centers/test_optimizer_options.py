"""A hyper-parameter of another kind or out of its range is refused by its name, and early."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from class_center_cases import data, head, same

from fused_losses.centers.optimizers import OPTIMIZERS

NUMBERS: list[Any] = ["a", "0.1", None, True, [0.1], (), {}, 1j, torch.ones(2), math.nan, math.inf]
SWITCHES: list[Any] = ["yes", None, 1, 0.0, [], torch.ones(())]
PAIRS: list[Any] = ["ab", 0.9, None, (0.9,), (0.9, 0.9, 0.9), (0.9, "b"), (1.0, 0.9), (0.9, -0.1)]


def wrong(usual: Any) -> list[Any]:
    if isinstance(usual, bool):
        return SWITCHES
    return PAIRS if isinstance(usual, tuple) else [*NUMBERS, -1.0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_option_is_refused_by_its_name(kind: str) -> None:
    for name, usual in OPTIMIZERS[kind].options.items():
        for value in wrong(usual):
            if name == "dampening" and isinstance(value, float) and value < 0:
                continue  # as torch.optim.SGD takes it
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected "):
                head(optimizer=kind, optimizer_options={name: value})


def test_what_a_head_gives_itself_is_no_option() -> None:
    for name in ("seed", "allocate", "weight", "name", 1, None):
        told = f"optimizer_options: expected names of hyper-parameters, got {re.escape(repr(name))}"
        with pytest.raises(TypeError, match=told):
            head(optimizer="sgd", optimizer_options={name: 0})
    for name in ("state_dtype", "stochastic_rounding"):
        with pytest.raises(TypeError, match=f"^{name}: expected "):
            head(optimizer="sgd", optimizer_options={name: "bfloat16"})


def test_numbers_of_every_library_are_numbers() -> None:
    x, y = data()
    tables = []
    for real, count in itertools.product((float, np.float64, torch.tensor), (int, np.int64)):
        found = head(optimizer="sgd", optimizer_options=dict(lr=real(0.5), momentum=count(0)))
        found(x, y).backward()
        tables.append(found.weight.clone())
    same(tables[1:], tables[:1] * (len(tables) - 1))
    # a schedule may leave a tensor, and what is none is found at the step
    found.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    found(x, y).backward()
    before = found.weight.clone()
    found.optimizer.param_groups[0]["lr"] = "0.25"
    with pytest.raises(TypeError, match="^lr: expected a number, got '0.25'"):
        found(x, y).backward()
    assert torch.equal(found.weight, before)
