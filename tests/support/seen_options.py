"""Which options the drawn calls give to a function: watched where the call begins."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

Options = dict[Any, set[str]]  # by function or class, those that a call gave another value


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Name and default of each option."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _code(function: Callable[..., Any]) -> CodeType:
    where = function.__init__ if isinstance(function, type) else inspect.unwrap(function)
    return where.__code__


def _other(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return value is not default
    return type(value) is not type(default) or value != default


@contextmanager
def watched(functions: list[Callable[..., Any]]) -> Iterator[Options]:
    """What is called inside: the options of `functions` that differ from their defaults."""
    known: dict[CodeType, list[Callable[..., Any]]] = {}  # classes may share an `__init__`
    for f in functions:
        known.setdefault(_code(f), []).append(f)
    found: Options = {f: set() for f in functions}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code not in known:
            return
        given = frame.f_locals
        for function in known[frame.f_code]:
            defaults = options_of(function).items()
            found[function] |= {n for n, d in defaults if _other(given.get(n, d), d)}
        # a loss or margin that was made before, as a table has it
        for made in list(given.values()):
            if type(made) in found and dataclasses.is_dataclass(made):
                own = options_of(type(made)).items()
                found[type(made)] |= {n for n, d in own if _other(getattr(made, n, d), d)}

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)


# no draw gives these another value, and why; tests of their own have some
NOT_DRAWN: dict[str, dict[str, str]] = {
    "refused with an error": {
        "ActivePassive": "softcap",
        "LDR": "softcap z_loss",
        "MSE": "softcap",
        "NCE": "softcap",
    },
    "of a row's features, held to the authors' numbers": {
        "BiasWeights": "alpha beta within",
        "equity_weights": "eta gamma",
    },
    "which triplets is left to chance, held by `test_listed_rows`": {
        "all_triplets": "generator per_anchor",
        "mine_triplets": "generator",
    },
    "which negative is left to chance, held by `test_distance_weighted`": {
        "DistanceWeightedMiner": "cutoff generator nonzero_loss_cutoff",
        "mine_pairs": "cutoff generator nonzero_loss_cutoff",
    },
    "held by the module's row in the catalogue": {
        "semihard_triplet": "normalize",
    },
    "of steps, each a choice after a choice, held by `test_kmeans`": {
        "kmeans": "empty generator tolerance",
    },
    "when steps end, held by `test_leanvec`": {
        "leanvec": "iterations tolerance",
    },
    "where and in what a table is kept": {
        "ALDR": "device",
        "CrossBatchMemory": "device dtype",
    },
}
