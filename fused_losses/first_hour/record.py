"""The lines of a first hour: which units are done, how they ended, and which one is running."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fused_losses.base.records import JsonLines

LINES, REPORT = "lines.jsonl", "report.md"
# how a unit ends; one that was stopped is begun again
PASSED, MEASURED, SKIPPED, FAILED = "passed", "measured", "skipped", "failed"
ENDED = (PASSED, MEASURED, SKIPPED, FAILED)
BEGUN, STOPPED = "begun", "stopped"
ATTEMPTS = 2  # a unit whose processes were cut so many times without a word has failed


class Outcome(NamedTuple):
    """How a unit ended, what it measured, and a sentence where there is something to say."""

    state: str
    rows: tuple[dict[str, Any], ...] = ()
    told: str = ""


class HourRecord:
    """The lines in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = JsonLines(folder / LINES)

    def begin(self, unit: str) -> None:
        self.lines.add({"unit": unit, "state": BEGUN, "at": round(time.time(), 3)})

    def end(self, unit: str, outcome: Outcome, seconds: float = 0.0) -> None:
        """The unit is done, or stopped."""
        self.lines.add(
            {"unit": unit, "state": outcome.state, "at": round(time.time(), 3)}
            | {"seconds": round(seconds, 3), "told": outcome.told, "rows": outcome.rows}
        )

    def note(self, **told: Any) -> None:
        """A line that is no unit's."""
        self.lines.add(told | {"at": round(time.time(), 3)})

    def entries(self) -> list[dict[str, Any]]:
        return list(self.lines)

    def ended(self) -> dict[str, dict[str, Any]]:
        """The last line of each unit that is done, in the order in which they ended."""
        return {e["unit"]: e for e in self.lines if e.get("state") in ENDED and "unit" in e}

    def running(self) -> dict[str, float]:
        """Units that were begun and have not ended, and when they were."""
        found: dict[str, float] = {}
        for entry in self.lines:
            if "unit" not in entry:
                continue
            found.pop(entry["unit"], None)
            if entry["state"] == BEGUN:
                found[entry["unit"]] = float(entry["at"])
        return found

    def cut(self) -> list[str]:
        """Units that took their process away without a word as often as is allowed."""
        begun: Counter[str] = Counter()
        for entry in self.lines:
            if "unit" not in entry:
                continue
            if entry["state"] == BEGUN:
                begun[entry["unit"]] += 1
            else:
                del begun[entry["unit"]]
        return [unit for unit, times in begun.items() if times >= ATTEMPTS]
