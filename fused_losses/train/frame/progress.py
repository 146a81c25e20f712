"""One progress bar for the whole run: redrawn on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24
LOG_SECONDS = 10.0


class Progress:
    """Counts steps over all folds; the time left is that of the steps of this process."""

    def __init__(self, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.total, self.quiet = total, quiet
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.done = self.skipped = 0
        self.start = self.drawn = time.monotonic()

    def skip(self, steps: int) -> None:
        """Steps that an earlier process did."""
        self.done += steps
        self.skipped += steps

    def step(self, what: str, loss: float) -> None:
        self.done += 1
        now = time.monotonic()
        if self.quiet or now - self.drawn < (0.1 if self.live else LOG_SECONDS):
            return
        self.drawn = now
        each = (now - self.start) / (self.done - self.skipped)
        left = round(each * (self.total - self.done))
        filled = WIDTH * self.done // self.total
        line = (
            f"{what} [{'#' * filled}{'.' * (WIDTH - filled)}] {self.done}/{self.total} steps  "
            f"loss {loss:7.3f}  {1e3 * each:.0f} ms/step  {left // 60}:{left % 60:02d} left"
        )
        self._write(f"\r\x1b[2K{line}" if self.live else line + "\n")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self.quiet:
            self._write(f"\r\x1b[2K{text}\n" if self.live else text + "\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
