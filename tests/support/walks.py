"""Walks over a head: what they begin with, what their steps may be given, and a drawn one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from dense_head import FORMS
from head_walk import KINDS, HeadWalk

SEEDS = range(1_000_000)
# what a walk is begun with, and what each of its steps may be given
START: dict[str, Sequence[Any]] = {
    "kind": tuple(KINDS),
    "update": ("backward", "step"),
    "rate": (1.0, 0.4),
    "centers": (1, 2),
    "clip": (None, 0.5),
    "nonfinite": ("raise", "skip"),
    "form": FORMS,
    "every": (1, 1, 3),
}
BATCH: dict[str, Sequence[Any]] = {"seed": SEEDS, "ignored": (False, True), "factor": (1.0, 0.5)}
STEPS: dict[str, dict[str, Sequence[Any]]] = {
    "train_step": BATCH,
    "accumulate": BATCH,
    "forward_alone": {"seed": SEEDS},
    "evaluate": {"seed": SEEDS},
    "optimizer_step": {},
    "zero_grad": {},
    "scale_grad": {"factor": (0.5, 2.0, -1.0)},
    "schedule": {"seed": SEEDS},
    "clip": {"norm": (None, 0.1, 1.0)},
    "set_every": {"count": (1, 2, 3)},
    "settle": {},
    "save_and_load": {"strict": (False, True)},
    "tensors": {},
    "optimizer_state": {},
    "others_state": {"strict": (False, True)},
    "copy": {"way": ("deepcopy", "pickle"), "seed": SEEDS},
    "freeze": {"frozen": (False, True), "way": ("head", "table", "parameters", "optimizer")},
    "only_dx": {"seed": SEEDS},
    "cast": {},
    "move": {},
    "fault": {"seed": SEEDS, "at": (1, 2, 3)},
    "not_finite": {"seed": SEEDS},
    "resize": {"classes": (7, 11, 14)},
    "other_world": {},
    "check": {},
}


def walk(seed: int, steps: int = 20) -> None:
    """A walk that is drawn by its seed: alike on every rank."""
    draw = random.Random(seed)
    start = {name: draw.choice(choices) for name, choices in START.items()}
    done = HeadWalk(**start)
    taken: list[str] = []
    try:
        for _ in range(steps):
            name = draw.choice((*STEPS, "train_step", "accumulate"))
            given = {key: draw.choice(choices) for key, choices in STEPS[name].items()}
            taken.append(f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})")
            getattr(done, name)(**given)
        done.check()
    except BaseException as error:
        error.add_note(f"walk {seed}, {start}: {'; '.join(taken)}")
        raise
