"""The recorded run: portions of draws by seed, kept as lines of JSON, and the table made of them.

python tests/fuzz/record.py run --seed 1000 --draws 20 --minutes 6    goes on where it stopped
python tests/fuzz/record.py table                                      what all portions found
python tests/fuzz/record.py again                                      judges what was outside anew
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from choice_draws import BY_NAME, answer, batch
from conftest import BACKENDS
from draws import (
    CASES,
    DTYPES,
    KIND_NAMES,
    LABEL_NAMES,
    SIDES,
    WIDTHS,
    Call,
    Draw,
    chooses,
    judge,
    unjudged,
)
from places import ROOT

RUNS = ROOT / "runs" / "fuzz"


def drawn(name: str, seed: int, number: int) -> tuple[Draw, bool]:
    """A draw of a function, and whether what chooses meets a second set."""
    choice = random.Random(f"{name}/{seed}/{number}")
    shape = choice.choice(SIDES), choice.choice(SIDES), choice.choice(WIDTHS)
    kind, labels = choice.choice(KIND_NAMES), choice.choice(LABEL_NAMES)
    draw = Draw(shape, kind, labels, choice.choice(DTYPES), choice.randrange(2**31))
    return draw, choice.random() < 0.5


def judged(name: str, seed: int, number: int) -> tuple[int, list[dict[str, Any]]]:
    """How many calls were judged, and those outside of their bound."""
    draw, both = drawn(name, seed, number)
    found: Iterator[tuple[Any, bool, Any]]
    if name in BY_NAME:
        found = _chosen(name, draw, both)
    elif unjudged(CASES[name], draw):
        return 0, []
    else:
        found = ((v.call, v.share <= 1, v.found) for v in judge(CASES[name], draw))
    calls, outside = 0, []
    for call, within, parts in found:
        calls += 1
        if not within:
            told = asdict(draw) | {"dtype": str(draw.dtype)}
            outside.append(
                dict(name=name, seed=seed, number=number, draw=told, call=call, found=parts)
            )
    return calls, outside


def _chosen(name: str, draw: Draw, both: bool) -> Iterator[tuple[Any, bool, Any]]:
    choice, rows = BY_NAME[name], batch(draw, both)
    clear, right = answer(choice, draw, rows)
    for backend in BACKENDS if clear else ():
        if chooses(backend, draw):
            yield Call(backend), choice.call(rows, {"backend": backend}) == right, None


def run(seed: int, draws: int, minutes: float) -> None:
    """Every function in turn, a line each, until the time is over."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path, end = RUNS / f"{seed}.jsonl", time.monotonic() + 60 * minutes
    done = {line["name"] for line in _lines(path)}
    torch.set_num_threads(1)
    with path.open("a") as out:
        for name in (*CASES, *BY_NAME):
            if name in done:
                continue
            if time.monotonic() > end:
                return
            calls, outside, start = 0, [], time.process_time()
            for number in range(draws):
                more, found = judged(name, seed, number)
                calls, outside = calls + more, outside + found
            seconds = round(time.process_time() - start, 2)
            line = dict(name=name, seed=seed, calls=calls, seconds=seconds, outside=outside)
            out.write(json.dumps(line) + "\n")
            out.flush()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _all() -> list[dict[str, Any]]:
    return [line for path in sorted(RUNS.glob("*.jsonl")) for line in _lines(path)]


def table() -> None:
    """Calls by function and outside of their bound."""
    lines = _all()
    calls, outside = Counter[str](), Counter[str]()
    for line in lines:
        calls[line["name"]] += line["calls"]
        outside[line["name"]] += len(line["outside"])
    seeds = sorted({line["seed"] for line in lines})
    seconds = sum(line["seconds"] for line in lines)
    print(
        f"{calls.total():,} calls, {outside.total()} outside; {len(calls)} functions and variants"
    )
    print(f"seeds {seeds}; {seconds / 60:.0f} minutes of one core")
    for name, count in outside.most_common():
        if count:
            print(f"{name}: {count} of {calls[name]}")


def again() -> None:
    """What was outside, judged by today's code."""
    seen = {(o["name"], o["seed"], o["number"]) for line in _all() for o in line["outside"]}
    still = [
        found for name, seed, number in sorted(seen) for found in judged(name, seed, number)[1]
    ]
    for found in still:
        print(json.dumps(found))
    print(f"{len(seen)} draws were outside; {len(still)} calls are")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table", "again"))
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=1e6)
    given = parser.parse_args()
    if given.what == "run":
        run(given.seed, given.draws, given.minutes)
    else:
        {"table": table, "again": again}[given.what]()


if __name__ == "__main__":
    main()
