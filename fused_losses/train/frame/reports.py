"""What a run leaves to be read: JSON, figures where matplotlib is there, and a last word."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_losses.base.files import write_text
from fused_losses.train.frame.progress import Progress


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    """What a record says of the software."""
    return {"torch": torch.__version__, "python": platform.python_version()}


def drawn(draw: Callable[[], None]) -> list[str]:
    """Draws; what could not be drawn, and why."""
    try:
        draw()
    except ImportError:
        return ["no figures: matplotlib is missing (pip install 'fused-losses[train]')"]
    return []


def blank(width: float = 6.4, height: float = 4.4) -> Any:
    """An empty figure of matplotlib, without its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def chart(title: str, across: str, up: str) -> tuple[Any, Any]:
    """A figure of one pair of axes, and these."""
    figure = blank()
    axes = figure.add_subplot(title=title, xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    return figure, axes


def tell(
    progress: Progress, folder: Path, files: Sequence[str], missing: list[str], table: str
) -> None:
    """The end of a run: what is missing, its figures, and where they lie."""
    for trouble in missing:
        progress.say(trouble)
    progress.say(table)
    progress.say(f"written to {folder}: {', '.join(files)}")
