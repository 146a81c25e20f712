"""`python -m tools.headline`: the README's picture, docs/generated/headline.svg.

Left the N x C matrix, of which a tile is alive at a time; right what the first table of
docs/measured.md says of it. Every number is read from that table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = DOCS / "generated" / "headline.svg"
ROWS = ("fused fp32", "torch.compile", "eager")
COLORS = {"fused fp32": "#00796b", "torch.compile": "#9e9e9e", "eager": "#616161"}
PROCESSOR = "two cores of an AMD EPYC (Zen 5)"


def measured(page: str) -> dict[str, tuple[float, float]]:
    """ms and extra MiB of a row of the first table of B=256, C=100,000."""
    table = page.partition("B=256, C=100,000")[2].partition("B=128")[0]
    assert PROCESSOR.rstrip(")") in page
    rows = re.findall(r"^\| ([^|]+) \| ([\d,.]+) \| ([\d,.]+) \|", table, re.MULTILINE)
    told = {a: (float(b.replace(",", "")), float(c.replace(",", ""))) for a, b, c in rows}
    return {name: told[name] for name in ROWS}


def _matrix(axes: Any) -> None:
    """N rows, C columns, one tile of them drawn."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((0, 0), 10, 4, fill=False, linestyle=(0, (4, 3)), edgecolor="#9e9e9e"))
    for column in range(10):
        for row in range(4):
            axes.add_patch(
                Rectangle((column, row), 1, 1, fill=False, edgecolor="#ececec", zorder=0)
            )
    axes.add_patch(Rectangle((6, 2), 1, 1, color="#00796b"))
    axes.annotate(
        "the tile that is alive",
        (6.5, 2),
        (6.5, 0.75),
        ha="center",
        color="#00796b",
        fontsize=9,
        arrowprops={"arrowstyle": "-", "color": "#00796b"},
    )
    axes.add_patch(Rectangle((-1.1, 0), 0.7, 4, color="#b2dfdb"))
    axes.add_patch(Rectangle((0, 4.4), 10, 0.7, color="#b2dfdb"))
    axes.text(-0.75, 2, "256 rows", rotation=90, ha="center", va="center", fontsize=9)
    axes.text(5, 4.75, "100,000 classes", ha="center", va="center", fontsize=9)
    axes.add_patch(Rectangle((10.3, 0), 0.25, 4, color="#00796b"))
    axes.text(10.75, 2, "a few numbers a row", rotation=90, ha="left", va="center", fontsize=9)
    axes.text(
        5, -0.7, "the N x C matrix that is not there", ha="center", fontsize=9, color="#616161"
    )
    axes.set_xlim(-1.6, 11.9)
    axes.set_ylim(-1.2, 5.4)
    axes.set_aspect("equal")
    axes.axis("off")


def _bars(axes: Any, told: dict[str, float], unit: str, title: str) -> None:
    most = max(told.values())
    for place, name in enumerate(reversed(ROWS)):
        axes.barh(place, told[name], color=COLORS[name], height=0.62)
        axes.text(
            told[name] + most * 0.03, place, f"{told[name]:,g} {unit}", va="center", fontsize=9
        )
    axes.set_yticks(range(len(ROWS)), list(reversed(ROWS)), fontsize=9)
    axes.set_xlim(0, most * 1.4)
    axes.set_xticks([])
    axes.set_title(title, fontsize=9, loc="left")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def draw(told: dict[str, tuple[float, float]], path: Path) -> None:
    """Writes the picture; the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "headline", "svg.fonttype": "path"}):
        figure: Any = plt.figure(figsize=(6.8, 4.3), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        _matrix(above.subplots())
        axes = below.subplots(1, 2, width_ratios=(1.25, 1))
        times, memory = ({name: both[i] for name, both in told.items()} for i in (0, 1))
        _bars(axes[0], times, "ms", "forward and backward")
        _bars(axes[1], memory, "MiB", "memory beyond the gradients")
        axes[1].set_yticks([])
        below.supxlabel(f"ArcFace, D=512, float32, {PROCESSOR}", fontsize=8, color="#616161")
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def main() -> int:
    """Draws it from the page."""
    draw(measured((DOCS / "measured.md").read_text(encoding="utf-8")), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
