"""The recorded run: portions of draws by seed, kept as lines of JSON, and the table made of them.

python tests/fuzz/record.py run --seed 1000 --draws 20 --minutes 6    goes on where it stopped
python tests/fuzz/record.py run --kinds "NaN and inf" tangents          of these kinds alone
python tests/fuzz/record.py table --seeds 1000 1001                    what these portions found
python tests/fuzz/record.py again                                      judges what was outside anew

Two processes side by side take two seeds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import subprocess
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from draws import Draw, any_draw
from kinds_of_draws import KINDS
from places import ROOT

RUNS = ROOT / "runs" / "fuzz"


def judged(kind: str, name: str, seed: int, number: int) -> tuple[int, list[dict[str, Any]]]:
    """How many calls were judged, and those outside of their bound."""
    choice = random.Random(f"{kind}/{name}/{seed}/{number}")
    draw = any_draw(choice)
    calls, outside = 0, []
    try:
        for call, within, parts in KINDS[kind].judge(name, draw, choice):
            calls += 1
            if not within:
                outside.append(_told(kind, name, seed, number, draw, call, parts))
    except Exception as error:
        calls += 1
        outside.append(_told(kind, name, seed, number, draw, "raised", repr(error)))
    return calls, outside


def _told(
    kind: str, name: str, seed: int, number: int, draw: Draw, call: Any, parts: Any
) -> dict[str, Any]:
    told = asdict(draw) | {"dtype": str(draw.dtype)}
    return dict(
        kind=kind, name=name, seed=seed, number=number, draw=told, call=call, found=repr(parts)
    )


def commit() -> str:
    """Of the checkout, with a plus where tracked files are changed."""

    def git(*words: str) -> str:
        told = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return told.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--short", "-uno"))


def run(kinds: list[str], seed: int, draws: int, minutes: float) -> None:
    """Every function of every kind in turn, a line each, until the time is over."""
    RUNS.mkdir(parents=True, exist_ok=True)
    path, end, of = RUNS / f"{seed}.jsonl", time.monotonic() + 60 * minutes, commit()
    torch.set_num_threads(1)
    with path.open("a") as out:
        # a second process on the same seed would judge the same draws
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a process that was ended may have left a part of a line
        out.truncate(path.read_bytes().rfind(b"\n") + 1)
        done = {(line["kind"], line["name"]) for line in _lines(path)}
        every = [(kind, name) for kind in kinds for name in KINDS[kind].names]
        for kind, name in (one for one in every if one not in done):
            if time.monotonic() > end:
                return
            calls, outside, start = 0, [], time.process_time()
            for number in range(0, draws, KINDS[kind].one_in):
                more, found = judged(kind, name, seed, number)
                calls, outside = calls + more, outside + found
            seconds = round(time.process_time() - start, 2)
            line = dict(kind=kind, name=name, seed=seed, commit=of, draws=draws, calls=calls)
            line |= dict(seconds=seconds, outside=outside)
            out.write(json.dumps(line) + "\n")
            out.flush()


def _lines(path: Path) -> list[dict[str, Any]]:
    told = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in told if line.endswith("\n")]  # one may be on its way


def _all(seeds: list[int] | None) -> list[dict[str, Any]]:
    every = [line for path in sorted(RUNS.glob("*.jsonl")) for line in _lines(path)]
    return [line for line in every if seeds is None or line["seed"] in seeds]


def table(seeds: list[int] | None) -> None:
    """Calls of each kind, and what was outside of its bound; over all seeds, or these."""
    lines = _all(seeds)
    print("| kind | functions and variants | calls | outside |\n|---|---|---|---|")
    for kind in KINDS:
        its = [line for line in lines if line["kind"] == kind]
        outside = sum(len(line["outside"]) for line in its)
        names, calls = {line["name"] for line in its}, sum(line["calls"] for line in its)
        print(f"| {kind} | {len(names)} | {calls:,} | {outside} |")
    seconds, calls = (sum(line[key] for line in lines) for key in ("seconds", "calls"))
    ran = sorted({(line["seed"], line.get("commit", "unknown")) for line in lines})
    told = ", ".join(f"{seed} on {of}" for seed, of in ran)
    print(f"{calls:,} calls, seeds {told}; {seconds / 60:.0f} minutes of one core")
    found = Counter((o["kind"], o["name"]) for line in lines for o in line["outside"])
    for (kind, name), count in found.most_common():
        print(f"{kind}, {name}: {count}")


def again(seeds: list[int] | None) -> None:
    """What was outside, judged by today's code."""
    lines = [o for line in _all(seeds) for o in line["outside"]]
    seen = {(o["kind"], o["name"], o["seed"], o["number"]) for o in lines}
    still = [found for one in sorted(seen) for found in judged(*one)[1]]
    for found in still:
        print(json.dumps(found))
    print(f"{len(seen)} draws were outside; {len(still)} calls are")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table", "again"))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--seeds", nargs="*", type=int, help="of table and again: these alone")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=1e6)
    given = parser.parse_args()
    if given.what == "run":
        run(given.kinds, given.seed, given.draws, given.minutes)
    else:
        {"table": table, "again": again}[given.what](given.seeds)


if __name__ == "__main__":
    main()
