"""Every kind of drawn check under one roof, for the recorded run: what it is asked of, and how."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import class_option_draws
import digit_draws
import interpreted_draws
import margin_option_draws
import option_draws
import pair_option_draws
import planted
import row_option_draws
import second_draws
import tangent_draws
import torch
import wild_norms
from choice_draws import answer, batch
from choice_option_draws import BY_NAME
from conftest import BACKENDS
from draws import CASES, Call, Draw, chooses, judge, unjudged
from invariants import INVARIANTS
from invariants import judge as held

# the call, whether it is within its bound, and what there is to say
Found = Iterator[tuple[Any, bool, Any]]


class Kind(NamedTuple):
    names: list[str]
    judge: Callable[[str, Draw, random.Random], Found]
    one_in: int = 1  # of how many draws one is judged: what is slow


def _wide(draw: Draw) -> Draw:
    """What asks for more digits than 16 bits have."""
    return replace(draw, dtype=torch.float32) if draw.dtype.itemsize == 2 else draw


def _hard(name: str, draw: Draw, _: random.Random) -> Found:
    if not unjudged(CASES[name], draw):
        yield from ((v.call, v.share <= 1, v.found) for v in judge(CASES[name], draw))


def _chosen(name: str, draw: Draw, choice: random.Random) -> Found:
    asked, rows = BY_NAME[name], batch(draw, choice.random() < 0.5)
    clear, right = answer(asked, draw, rows)
    for backend in BACKENDS if clear else ():
        if chooses(backend, draw):
            yield Call(backend), asked.call(rows, {"backend": backend}) == right, None


def _planted(name: str, draw: Draw, _: random.Random) -> Found:
    for backend, faults in planted.judge(CASES[name], draw):
        yield Call(backend), not faults, faults


def _triton(name: str, draw: Draw, _: random.Random) -> Found:
    yield from ((v.call, v.share <= 1, v.found) for v in interpreted_draws.judged(name, draw))


def _triton_planted(name: str, draw: Draw, _: random.Random) -> Found:
    for call, faults in interpreted_draws.of_planted(name, draw):
        yield call, not faults, faults


def _lengths(name: str, draw: Draw, choice: random.Random) -> Found:
    length = choice.choice(wild_norms.lengths(name))
    if draw.dtype == torch.float16:
        draw = replace(draw, dtype=torch.float32)
    if not unjudged(CASES[name.removesuffix("_unit")], draw):
        for call, errors, bounds in wild_norms.judge(wild_norms.JUDGED[name], draw, length):
            within = all(e <= b for e, b in zip(errors, bounds, strict=True))
            yield call, within, (length, errors, bounds)


def _tangents(name: str, draw: Draw, _: random.Random) -> Found:
    draw = _wide(draw)
    alone = name in tangent_draws.MORE_THAN_ONE and 1 in draw.shape[:2]
    if not alone and not unjudged(CASES[name], draw):
        for call, error, bound in tangent_draws.judge(CASES[name], draw):
            yield call, error <= bound, (error, bound)


def _seconds(name: str, draw: Draw, _: random.Random) -> Found:
    draw = _wide(draw)
    if second_draws.judged(name, draw):
        found = second_draws.judge(CASES[name], draw)
        yield from ((v.call, v.share <= 1, v.found) for v in found)


def _invariants(name: str, draw: Draw, _: random.Random) -> Found:
    what, _, of = name.partition(": ")
    found = held(of, INVARIANTS[what, of], draw)
    yield from ((v.call, v.share <= 1, v.found) for v in found)


def _digits(name: str, draw: Draw, choice: random.Random) -> Found:
    of, _, opposite = name.partition(", ")
    near = choice.choice(list(digit_draws.NEAR))
    torch.manual_seed(draw.seed)
    # a mean over pairs of one row is over nothing
    shape = choice.randint(2, 4), choice.randint(2, 6)
    for who, errors, bounds in digit_draws.judge(of, bool(opposite), near, shape):
        within = all(e <= b for e, b in zip(errors, bounds, strict=True))
        yield who, within, (near, shape, errors, bounds)


OF_OPTIONS = (
    option_draws,
    class_option_draws,
    margin_option_draws,
    row_option_draws,
    pair_option_draws,
)
OPTIONS = [case.name for table in OF_OPTIONS for case in table.DRAWN]
TRITON = interpreted_draws.NAMES if interpreted_draws.HERE else []
KINDS: dict[str, Kind] = {
    "hard data": Kind([name for name in CASES if name not in OPTIONS], _hard),
    "options": Kind(OPTIONS, _hard),
    "what chooses": Kind(list(BY_NAME), _chosen),
    "NaN and inf": Kind(planted.PLANTED, _planted),
    "lengths": Kind(wild_norms.NAMES, _lengths),
    "many digits": Kind([n + ", opposite" * o for n, o in digit_draws.ROWS], _digits),
    "tangents": Kind(list(CASES), _tangents),
    "second derivatives": Kind(list(CASES), _seconds),
    "invariants": Kind([f"{what}: {name}" for what, name in INVARIANTS], _invariants),
    "interpreted Triton": Kind(TRITON, _triton, 5),
    "NaN and inf in interpreted Triton": Kind(
        [name for name in TRITON if name in planted.PLANTED], _triton_planted, 5
    ),
}
