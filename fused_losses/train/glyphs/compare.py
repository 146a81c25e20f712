"""Heads side by side on the same pictures: accuracy, time and memory, each in its own process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fused_losses.train.frame.reports import blank, drawn, write_json
from fused_losses.train.frame.runs import CONFIG, StopSignals
from fused_losses.train.frame.steps import Interrupted
from fused_losses.train.glyphs import report
from fused_losses.train.glyphs.config import GlyphConfig

COMPARED: dict[str, dict[str, Any]] = {
    "full": {},
    "r=0.3": {"sample_rate": 0.3},
    "r=0.3 logQ": {"sample_rate": 0.3, "log_q": True},
    "r=0.1": {"sample_rate": 0.1},
    "r=0.1 logQ": {"sample_rate": 0.1, "log_q": True},
    "reference": {"head": "reference"},
}
FILES = ("compare.json", "compare.md", "compare.png")


def compare(
    config: GlyphConfig,
    folder: str | Path,
    *,
    quiet: bool = False,
    heads: Iterable[str] = tuple(COMPARED),
) -> dict[str, dict[str, Any]]:
    """Train each head as `config` says otherwise, in `folder`/heads, and write `FILES`.

    Heads that are done are kept, one that was stopped goes on. Returns the figures of each.
    Raises RuntimeError where a training fails, `Interrupted` after SIGINT or SIGTERM, when the head
    under way has written its checkpoint.
    """
    folder = Path(folder)
    found: dict[str, dict[str, Any]] = {}
    for name in heads:
        run = folder / "heads" / name.replace(" ", "-").replace("=", "")
        result = run / "result.json"
        changed = {"subset": 0, "sample_rate": 1.0, "log_q": False, "head": "centers"}
        asked = config.with_changes(**{**changed, **COMPARED[name]})
        # what is there is resumed: the child refuses a run of another configuration
        _run(asked, run, quiet)
        found[name] = report.read_figures(result)
    write(folder, found)
    if not quiet:
        print(markdown(found), f"\nwritten to {folder}: {', '.join(FILES)}")
    return found


def _run(config: GlyphConfig, run: Path, quiet: bool) -> None:
    command = [sys.executable, "-m", "fused_losses.train.glyphs"]
    command += ["--runs", str(run.parent), "--name", run.name, *options(config)]
    command += ["--quiet"] * quiet + ["--resume"] * (run / CONFIG).exists()
    with StopSignals().watching() as stop, subprocess.Popen(command) as child:
        while (status := _status(child)) is None:
            if stop() is not None:
                child.send_signal(signal.SIGTERM)  # it saves; a terminal's Ctrl-C came there, too
                status = child.wait()
                break
    if (received := stop()) is not None:
        raise Interrupted(received)
    if status:
        raise RuntimeError(f"compare: the training in {run} ended with status {status}")


def _status(child: subprocess.Popen[bytes]) -> int | None:
    """The exit status, if it comes within a moment."""
    try:
        return child.wait(0.2)
    except subprocess.TimeoutExpired:
        return None


def options(config: GlyphConfig) -> list[str]:
    """The command line of a configuration."""
    words = []
    for f in fields(GlyphConfig):
        flag, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            words += [flag, str(value)]
    return words


def write(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    write_json(folder / "compare.json", found)
    (folder / "compare.md").write_text(markdown(found) + "\n")
    drawn(lambda: draw(folder / "compare.png", found))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """One row a head."""
    titles = {**report.RECALLS, **report.COSTS}
    lines = ["| head | " + " | ".join(titles.values()) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, one in found.items():
        cells = [report.cell(key, one[key]) for key in titles]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Bars of recall, time and memory."""
    figure = blank(10.0, 3.6)
    shown = ("recall_at_1", "step_ms", "peak_memory_mib")
    titles = {**report.RECALLS, **report.COSTS}
    for axes, key in zip(figure.subplots(1, len(shown)), shown, strict=True):
        values = [one[key] for one in found.values()]
        bars = axes.barh(list(found), values)
        axes.bar_label(bars, [report.cell(key, value) for value in values], padding=2)
        axes.set_title(titles[key])
        axes.set_xlim(0, 1.4 * max(values))
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
