"""The runs so far, a line of JSON each, and what one run took more time for than another.

Two runs are held against each other by what is paired within each: our time over a rival's in the
same round, where both runs have a rival with rounds enough (the first in the case's order): a
machine that is slower today is slower for both. Without one, by times. Slower is a row whose lower
quartile in the second run lies above its upper quartile in the first, and whose median has risen by
LEAST at least: of two equal runs of seven rounds 1.5 % of the rows have such quartiles by chance.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"
FORMAT = 1  # of a record; goes up where an older one cannot be read as one of today
LEAST = 0.03
FEWEST = 5  # rounds, to have quartiles


@dataclass(frozen=True)
class Change:
    """A row of ours in both runs: `ratio` is the second's median over the first's."""

    case: str
    row: str
    against: str | None  # the rival by which both were divided; None: times
    ratio: float
    spreads: tuple[float, float]  # half the distance of the quartiles, over the median
    verdict: str  # "slower", "faster", "same" or "too few rounds"


def append(folder: Path, record: dict[str, Any]) -> None:
    """One line more."""
    with (folder / HISTORY).open("a") as out:
        out.write(json.dumps(record, separators=(",", ":")) + "\n")


def read(name: str, folder: Path) -> dict[str, Any]:
    """A run: a file that a run wrote, or its line in the folder's history (-1: the last).

    Raises ValueError if there is none.
    """
    path = Path(name)
    if path.is_file():
        return _of_today(name, path.read_text())
    kept = folder / HISTORY
    runs = kept.read_text().splitlines() if kept.is_file() else []
    try:
        line = int(name)
    except ValueError:
        raise ValueError(f"--compare: expected a file or a number, got {name!r}") from None
    index = line if line < 0 else line - 1
    if line == 0 or not -len(runs) <= index < len(runs):
        raise ValueError(f"--compare: {kept} has {len(runs)} runs, got {line}")
    return _of_today(name, runs[index])


def _of_today(name: str, text: str) -> dict[str, Any]:
    """A record; ValueError if it is none of this format."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--compare: {name}: expected a record, got {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"--compare: {name}: expected a record of format {FORMAT}")
    return record


def _rows(case: dict[str, Any]) -> dict[str, list[float]]:
    return {r["name"]: r["times_ms"] for r in case["results"] if r["times_ms"] and not r["error"]}


def _logs(times: list[float], others: list[float] | None) -> list[float]:
    """Of times, or of times over others in the same round."""
    if others is None:
        return [math.log(t) for t in times]
    return [math.log(a / b) for a, b in zip(times, others, strict=False)]


def _change(case: str, row: str, against: str | None, a: list[float], b: list[float]) -> Change:
    rise = statistics.median(b) - statistics.median(a)
    if min(len(a), len(b)) < FEWEST:
        return Change(case, row, against, math.exp(rise), (math.nan, math.nan), "too few rounds")
    (low_a, _, high_a), (low_b, _, high_b) = (statistics.quantiles(x, n=4) for x in (a, b))
    verdict = "same"
    if low_b > high_a and rise >= math.log1p(LEAST):
        verdict = "slower"
    elif high_b < low_a and -rise >= math.log1p(LEAST):
        verdict = "faster"
    spreads = (high_a - low_a) / 2, (high_b - low_b) / 2
    return Change(case, row, against, math.exp(rise), spreads, verdict)


def changes(first: dict[str, Any], second: dict[str, Any]) -> list[Change]:
    """Of every row of ours that both runs have."""
    before = {case["title"]: case for case in first.get("cases", [])}
    found = []
    for case in second.get("cases", []):
        if case["title"] not in before:
            continue
        a, b = _rows(before[case["title"]]), _rows(case)
        both = [name for name in b if name in a and name not in case["ours"]]
        for row in (name for name in case["ours"] if name in a and name in b):
            enough = (r for r in both if min(len(a[r]), len(b[r])) >= FEWEST)
            against = next(enough, None)
            logs = (_logs(x[row], None if against is None else x[against]) for x in (a, b))
            found.append(_change(case["title"], row, against, *logs))
    return found


def table(found: list[Change]) -> list[str]:
    """Markdown, what got slower first."""
    order = ("slower", "faster", "same", "too few rounds")
    lines = [
        "| | second over first | spread of each | of | case | row |",
        "|---|---|---|---|---|---|",
    ]
    for c in sorted(found, key=lambda c: order.index(c.verdict)):
        spreads = ", ".join("" if s != s else f"{s:.1%}" for s in c.spreads)
        of = "times" if c.against is None else f"time over {c.against}"
        lines.append(f"| {c.verdict} | {c.ratio:.3f}x | {spreads} | {of} | {c.case} | {c.row} |")
    return lines


def run(args: argparse.Namespace) -> int:
    """Prints both runs held against each other; 1 if a row got slower, 2 without such runs."""
    try:
        first, second = (read(name, args.out) for name in args.compare)
    except (ValueError, OSError) as error:
        print(f"fused-losses bench: {error}")
        return 2
    for name, record in zip(("first", "second"), (first, second), strict=True):
        at = record.get("host", {})
        load = ", ".join(f"{x:.2f}" for x in at.get("load_at_start", []))
        versions = ", ".join(f"{k} {v}" for k, v in at.get("versions", {}).items())
        print(f"{name}: {at.get('started', 'unknown')}, load {load or 'unknown'}; {versions}")
    found = changes(first, second)
    print("\n".join(table(found)))
    slower = sum(c.verdict == "slower" for c in found)
    print(f"\n{len(found)} rows in both runs, {slower} slower beyond the noise")
    return int(slower > 0)
