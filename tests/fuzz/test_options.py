"""Which options of what is public the draws give another value than its default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from choice_draws import batch
from choice_option_draws import EVERY
from draws import CASES, Draw, inputs
from pair_cases import in_dtype
from seen_options import NOT_DRAWN, options_of, watched
from wild_norms import UNIT

from fused_losses import class_losses, functional, margins, metrics, miners

# drawn with every call
EVERYWHERE = {"backend", "precision", "memory_budget"}


def _public() -> list[Callable[..., Any]]:
    found = [getattr(functional, name) for name in functional.__all__]
    found += [getattr(class_losses, name) for name in class_losses.__all__]
    found += [f for f in vars(metrics).values() if inspect.isfunction(f) and _of_rows(f)]
    for module in (margins, miners):
        found += [k for k in vars(module).values() if isinstance(k, type) and _own(k, module)]
    # a class without an `__init__` of its own has no options
    return [f for f in found if not isinstance(f, type) or inspect.isfunction(f.__init__)]


def _of_rows(f: Callable[..., Any]) -> bool:
    return "embeddings" in inspect.signature(f).parameters


def _own(kind: type, module: Any) -> bool:
    return kind.__module__ == module.__name__ and not kind.__name__.startswith("_")


def test_options_that_no_draw_gives() -> None:
    public = _public()
    draw = Draw((5, 7, 4), "plain", "as they are", torch.float32, 1)
    with watched(public) as given:
        for case in (*CASES.values(), *UNIT.values()):
            case.call(in_dtype(case, inputs(case, draw), torch.float32))
        for choice in EVERY:
            for both in (False, True):
                choice.call(batch(draw, both), {})
    rest = {f.__name__: set(options_of(f)) - given[f] - EVERYWHERE for f in public}
    left = {(name, option) for name, options in rest.items() for option in options}
    told = [table.items() for table in NOT_DRAWN.values()]
    assert left == {
        (n, option) for table in told for n, options in table for option in options.split()
    }
