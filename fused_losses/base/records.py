"""What commands share: lines of JSON on the disk at once, a line of status, names that are near."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

MOST_TOLD = 60  # names in an error
BY_CTRL_C = 128 + signal.SIGINT  # the status of a command that Ctrl-C ended


class JsonLines:
    """A file of one JSON object a line; what a killed process leaves of a line is none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """An empty file, in its folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends an object; it is on the disk when this returns."""
        text = json.dumps(_plain(entry), allow_nan=False) + "\n"
        # read and write: whether the last line is whole is asked first
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects, in the order in which they came."""
        if not self.path.is_file():
            return
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                yield entry


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN: they are strings, which `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class StatusLine:
    """What is being done now: redrawn on a terminal, nothing anywhere else."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()

    def show(self, text: str) -> None:
        """Replaces the line; empty: takes it away."""
        if self.live:
            self.stream.write(f"\r\x1b[2K{text}")
            self.stream.flush()


def one_of(names: Iterable[str], what: str) -> Callable[[str], str]:
    """An option's type: one of these names; another is refused with those that are near."""
    known = sorted(names)

    def name(text: str) -> str:
        if text in known:
            return text
        near = [
            *difflib.get_close_matches(text, known, 3),
            *(n for n in known if text and text in n),
        ]
        hint = ""
        if near:
            hint = f"; did you mean {' or '.join(map(repr, dict.fromkeys(near[:4])))}?"
        elif len(known) <= MOST_TOLD:
            hint = f"; expected {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"no {what} is named {text!r}{hint}")

    return name


def told(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
