"""What a run of `bench` finds: on the screen and on the disk as soon as it is known.

A folder has for each kind of run a record in JSON and tables in Markdown under its name, a line of
history for every run that ended, and report.html, which shows all records that are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fused_losses.base.files import write_text
from fused_losses.base.records import BY_CTRL_C
from fused_losses.bench import history, host, html
from fused_losses.version import __version__

RECORDS = ("result.json", "breakdown.json", "growth.json")
# lines of Markdown, and what of them is kept
Found = tuple[list[str], list[dict[str, Any]]]


class BenchRecord:
    """One run: `kind` is the record's key of what is found; `name` that of its file."""

    def __init__(
        self,
        out: Path,
        kind: str,
        device: str,
        say: Callable[[str], None],
        *,
        name: str = "",
        page: str = "",
        head: Iterable[str] = (),
    ) -> None:
        """Measures the machine first. head: lines before any result."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.kind = out, kind
        self.name, self.page = f"{name or kind}.json", f"{page or kind}.md"
        say("peaks of this machine")
        state = host.state(device, host.measured(device))
        say("")
        self.record: dict[str, Any] = {"format": history.FORMAT, "version": __version__}
        self.record |= {"host": state, kind: []}
        self.text: list[str] = []
        title = f"# {kind.capitalize()} of fused_losses {__version__}"
        self.tell([title, "", *host.lines(state), "", *head])

    @property
    def found(self) -> list[dict[str, Any]]:
        return self.record[self.kind]

    def tell(self, lines: list[str]) -> None:
        """On the screen, and in the tables."""
        print("\n".join(lines), flush=True)
        self.text += lines

    def write(self) -> None:
        write_text(self.out / self.page, "\n".join(self.text) + "\n")
        write_text(self.out / self.name, json.dumps(self.record, indent=1) + "\n")

    def gather(self, results: Iterable[Found]) -> int:
        """Tells and writes each as it comes; 0, or after Ctrl-C `BY_CTRL_C`."""
        try:
            for lines, found in results:
                self.found.extend(found)
                self.tell(lines)
                self.write()
        except KeyboardInterrupt:
            return BY_CTRL_C
        return 0

    def end(self, status: int, counts: str) -> int:
        """A line of history, the page and the last line of a run; its status."""
        if self.found:
            self.record["host"]["load_at_end"] = host.load()
            self.write()
            history.append(self.out, self.record)
            write_page(self.out)
        how = f"written to {self.out}"
        if status == BY_CTRL_C:
            how = f"stopped by Ctrl-C; what was measured is in {self.out}"
        print(f"\n{counts}; {how}")
        return status


def write_page(out: Path) -> None:
    """report.html of the records that the folder has, those of an older format left out."""
    found = [json.loads((out / name).read_text()) for name in RECORDS if (out / name).is_file()]
    of_today = [record for record in found if record.get("format") == history.FORMAT]
    write_text(out / "report.html", html.page(of_today))
