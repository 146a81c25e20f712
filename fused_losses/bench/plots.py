"""The one plotter: matplotlib, where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# text as text; with a salt and no date an SVG has the same bytes in every run
STYLE = {"svg.fonttype": "none", "font.size": 9, "savefig.dpi": 110}


def plotted(path: Path, draw: Callable[..., None], **subplots: Any) -> None:
    """`draw(figure, *axes)` on pyplot.subplots(**subplots), written to `path`."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (extra `bench`)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = STYLE | {"svg.hashsalt": path.stem}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(squeeze=False, layout="constrained", **subplots)
        draw(figure, *axes.flat)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
