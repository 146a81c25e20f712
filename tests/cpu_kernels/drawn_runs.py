"""Drawn calls of the package on the extension that faults are planted in: mutants' second look.

A call whose results have the bits that they have without a fault needs no verdict; any other is
judged as `tests/fuzz` does, by literal float64 formulas and bounds made at its inputs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import planted
from calls import same
from draws import CASES, Call, Draw, answered, any_draw, calls, chooses, inputs, judge, unjudged
from pair_cases import Case, in_dtype
from torch import Tensor

DRAWS = 6  # a function or variant, and half as many with NaN and inf among its rows
ONLY = ("cpu",)
# draws that are judged: a fault that leaves so many within their bounds is of a rounding's size
MOST = 12
_judged = itertools.count()


class Drawn(NamedTuple):
    """The calls of one draw, and their results without a fault."""

    case: Case
    draw: Draw
    calls: list[Call]
    results: list[list[Tensor]]

    @classmethod
    def of(cls, case: Case, draw: Draw) -> Drawn:
        which = calls(case, draw, ONLY)
        return cls(case, draw, which, _results(case, draw, which))

    def same(self) -> bool:
        return all(map(same, _results(self.case, self.draw, self.calls), self.results))

    def judge(self) -> None:
        for verdict in judge(self.case, self.draw, self.calls):
            assert verdict.share <= 1, verdict


class Planted(NamedTuple):
    """The same with NaN and inf among the rows: values alone."""

    case: Case
    draw: Draw
    result: list[Tensor]

    @classmethod
    def of(cls, case: Case, draw: Draw) -> Planted:
        return cls(case, draw, _planted(case, draw))

    def same(self) -> bool:
        return same(_planted(self.case, self.draw), self.result)

    def judge(self) -> None:
        for _, faults in planted.judge(self.case, self.draw, ONLY):
            assert not faults, faults


def _results(case: Case, draw: Draw, which: list[Call]) -> list[list[Tensor]]:
    exact = inputs(case, draw)
    return [answered(case, exact, draw, call)[0] for call in which]


def _planted(case: Case, draw: Draw) -> list[Tensor]:
    exact = inputs(case, draw)
    bad = planted.planted(exact, planted.places(case, exact, draw))
    t = in_dtype(case, bad, draw.dtype)
    return [case.call(t, backend=ONLY[0]).detach().double()]


def checks(name: str, blas: Callable[[bool], object]) -> Callable[[], None]:
    """All draws of one function as one check, so that a fault is tried on few runs.

    blas: sets whether losses over classes multiply by the host's products; every second draw's do.
    """
    case, choice = CASES[name], random.Random(name)
    draws = [draw for draw in (any_draw(choice) for _ in range(DRAWS)) if chooses(ONLY[0], draw)]
    kinds = [(Drawn, draw) for draw in draws if not unjudged(case, draw)]
    if name in planted.PLANTED and name not in planted.OPEN:
        kinds += [(Planted, draw) for draw in draws[: DRAWS // 2]]
    made: list[Drawn | Planted] = []
    for number, (kind, draw) in enumerate(kinds):
        blas(number % 2 == 1)
        made.append(kind.of(case, draw))

    def check() -> None:
        for number, one in enumerate(made):
            blas(number % 2 == 1)
            # within one process, which tries one fault
            if not one.same() and next(_judged) < MOST:
                one.judge()

    return check
