"""What people do with a head between steps, in any order, against a dense model of torch.optim.

FUSED_LOSSES_WALKS=2000 walks so many sequences instead of those of `make test`.
"""

from __future__ import annotations

import os
from typing import Any

import processes
import pytest
from head_walk import HeadWalk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from walks import START, STEPS, walk

WALKS = int(os.environ.get("FUSED_LOSSES_WALKS", "100"))


def _strategies(choices: dict[str, Any]) -> dict[str, Any]:
    return {name: st.sampled_from(values) for name, values in choices.items()}


class HeadMachine(RuleBasedStateMachine):
    """`HeadWalk`, whose every method is a rule."""

    @initialize(**_strategies(START))
    def begin(self, **start: Any) -> None:
        self.walk = HeadWalk(**start)

    def teardown(self) -> None:
        self.walk.check()


def _rule(name: str) -> Any:
    def step(self: HeadMachine, **given: Any) -> None:
        getattr(self.walk, name)(**given)

    step.__name__ = name
    return rule(**_strategies(STEPS[name]))(step)


for _name in STEPS:
    setattr(HeadMachine, _name, _rule(_name))


BATCH = dict(ignored=False, factor=1.0)
MOMENTUM = dict(kind="momentum", update="backward", centers=1)
REST = dict(lr=0.2, momentum=0.0)
EMPTY = dict(seed=15, **BATCH)  # no rows
FOUND: dict[str, tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]] = {
    "a copy of a head whose rows are behind": (
        dict(MOMENTUM, rate=0.4),
        [
            ("train_step", dict(seed=1, **BATCH)),
            ("copy", dict(way="deepcopy", seed=2)),
            ("train_step", dict(seed=3, **BATCH)),
            ("copy", dict(way="pickle", seed=2)),
        ],
    ),
    "loaded before the first step with momentum": (
        dict(MOMENTUM, rate=1.0),
        [
            ("set_options", REST),
            ("train_step", dict(seed=1, **BATCH)),
            ("save_and_load", dict(strict=True)),
            ("set_options", dict(momentum=0.9)),
            ("train_step", dict(seed=2, **BATCH)),
        ],
    ),
    "a factor after zero_grad, and before a further backward": (
        dict(MOMENTUM, update="step", rate=1.0),
        [
            ("accumulate", dict(seed=1, **BATCH)),
            ("scale_grad", dict(factor=2.0)),
            ("accumulate", dict(seed=2, **BATCH)),
            ("scale_grad", dict(factor=0.5)),
            ("zero_grad", {}),
            ("train_step", dict(seed=3, **BATCH)),
        ],
    ),
    "a shard of which no row has taken part when momentum has begun": (
        dict(MOMENTUM, update="step", rate=0.4),
        [
            ("resize", dict(classes=7)),
            ("accumulate", dict(seed=437786, ignored=True, factor=1.0)),
            ("optimizer_step", {}),
            ("resize", dict(classes=14)),  # of two ranks one has the new classes alone
            ("clip", dict(norm=0.1)),
            ("accumulate", dict(seed=374345, **BATCH)),
            ("cast", {}),
            ("schedule", dict(seed=861562)),
            ("train_step", dict(seed=134937, **BATCH)),
            ("train_step", dict(seed=446146, ignored=True, factor=0.5)),
            ("other_world", {}),
        ],
    ),
    "a first step with momentum that has no gradient": (
        dict(MOMENTUM, rate=0.4),
        [
            ("set_options", dict(momentum=0.9, weight_decay=0.0)),
            ("train_step", EMPTY),
            ("save_and_load", dict(strict=True)),
            ("train_step", dict(seed=1, **BATCH)),
            ("optimizer_state", {}),
            ("other_world", {}),
        ],
    ),
    "interrupts before and amid the rows of a step, of two ranks on either": (
        dict(MOMENTUM, update="step", rate=0.4),
        [
            ("fault", dict(seed=1, at=1)),
            ("train_step", dict(seed=2, **BATCH)),
            ("fault", dict(seed=5, at=2)),
            ("train_step", dict(seed=3, **BATCH)),
            ("fault", dict(seed=4, at=3)),
            ("train_step", dict(seed=6, **BATCH)),
        ],
    ),
    "several backwards a step, and then another number of them": (
        dict(MOMENTUM, rate=0.4, every=3),
        [
            ("accumulate", dict(seed=1, **BATCH)),
            ("accumulate", dict(seed=2, **BATCH)),
            ("set_every", dict(count=2)),
            ("accumulate", dict(seed=3, **BATCH)),
            ("accumulate", dict(seed=4, **BATCH)),
            ("copy", dict(way="deepcopy", seed=5)),
            ("train_step", dict(seed=6, **BATCH)),
            ("accumulate", dict(seed=7, **BATCH)),
            ("fault", dict(seed=8, at=2)),
            ("save_and_load", dict(strict=True)),
            ("accumulate", dict(seed=9, **BATCH)),
            ("accumulate", dict(seed=10, **BATCH)),
        ],
    ),
    "thawed by the optimizer's parameters, cast and copied": (
        dict(MOMENTUM, rate=0.4),
        [
            ("freeze", dict(frozen=False, way="optimizer")),
            ("train_step", dict(seed=1, **BATCH)),
            ("cast", {}),
            ("copy", dict(way="deepcopy", seed=2)),
            ("freeze", dict(frozen=True, way="table")),
            ("train_step", dict(seed=3, **BATCH)),
            ("freeze", dict(frozen=False, way="head")),
            ("train_step", dict(seed=4, **BATCH)),
        ],
    ),
    "momentum that begins while rows take no part": (
        dict(MOMENTUM, kind="scheduled", rate=0.4),
        [
            ("resize", dict(classes=7)),
            ("train_step", EMPTY),
            ("train_step", EMPTY),
            ("set_options", dict(momentum=0.9, weight_decay=0.05)),
            ("train_step", EMPTY),  # of two ranks one draws none
            ("tensors", {}),
            ("train_step", dict(seed=1, **BATCH)),
            ("resize", dict(classes=14)),
            ("train_step", dict(seed=3, **BATCH)),
            ("other_world", {}),
            ("train_step", dict(seed=4, **BATCH)),
        ],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    found(name)


def found(name: str) -> None:
    start, steps = FOUND[name]
    done = HeadWalk(**start)
    for step, given in steps:
        getattr(done, step)(**given)
    done.check()


@pytest.mark.slow
def test_any_order_on_one_rank() -> None:
    run_state_machine_as_test(
        HeadMachine,
        settings=settings(
            max_examples=WALKS,
            stateful_step_count=20,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.processes
def test_any_order_on_two_ranks() -> None:
    processes.run(2, walks, WALKS * 2 // 5, seconds=600)


def walks(_: int, count: int) -> None:
    for name in FOUND:
        found(name)
    for seed in range(count):
        walk(seed)
