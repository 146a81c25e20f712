"""A loss as a picture of three panels: PNG of a small palette."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from tools.gallery.measures import TICKS, Embedding, Weights, embedding, surface, weights
from tools.gallery.problems import Problem

INNER = 0.62  # of the ring of rows as they were
MARKERS = "o^sDvP"
# apart in lightness, too
COLORS = ("#08306b", "#d95f02", "#8fc5de", "#7a0177")


def draw(problem: Problem, path: Path) -> list[str]:
    """Writes the picture; what is dull in it."""
    # optional packages
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.15, top=0.91, wspace=0.12)
    left, middle, right = figure.subplots(1, 3)
    told = [
        *_surface(left, surface(problem)),
        *_weights(middle, weights(problem)),
        *_embedding(right, embedding(problem)),
    ]
    held = io.BytesIO()
    canvas.print_png(held)
    held.seek(0)
    image = Image.open(held).convert("RGB")
    small = image.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return told


def _quiet(axes: Any) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, labelsize=7)


def _surface(axes: Any, values: Any) -> list[str]:
    _quiet(axes)
    finite = values[values.isfinite()]
    if not len(finite):
        return ["nowhere finite"]
    low, high = float(finite.min()), float(finite.max())
    axes.set_title(f"loss: {low:.3g} (dark) to {high:.3g}", fontsize=8)
    axes.set_xlabel("cosine of the positive", fontsize=8)
    axes.set_ylabel("cosine of the negative", fontsize=8)
    axes.set_aspect("equal")
    if not high - low > 1e-9 * max(1.0, abs(high)):
        axes.set_xlim(-1, 1)
        axes.set_ylim(-1, 1)
        return ["a flat surface"]
    ticks = TICKS.numpy()
    drawn = axes.contourf(ticks, ticks, values.numpy(), levels=12, cmap="cividis")
    axes.contour(drawn, colors="white", linewidths=0.4)
    axes.set_xticks([-0.5, 0, 0.5])
    axes.set_yticks([-0.5, 0, 0.5])
    return [] if len(finite) == values.numel() else ["a surface with holes"]


def _weights(axes: Any, w: Weights) -> list[str]:
    _quiet(axes)
    n, m = w.matrix.shape
    largest = float(w.matrix.abs().max())
    axes.set_xlim(-0.5, m - 0.5)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="box")
    axes.set_title("weights: filled draws, hollow drives away", fontsize=8)
    axes.set_ylabel("rows", fontsize=8)
    start = 0
    names = []
    for name, size in w.columns:
        names.append(name)
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=1)
        start += size
    axes.set_xlabel(" | ".join(names), fontsize=8)
    for i in range(1, n):
        if w.rows[i] != w.rows[i - 1]:
            axes.axhline(i - 0.5, color="0.75", linewidth=0.6)
            if w.columns[0][0] == "rows":
                axes.plot([i - 0.5, i - 0.5], [-0.5, n - 0.5], color="0.75", linewidth=0.6)
    if not largest > 0:
        return ["no weight on any pair"]
    share = (w.matrix / largest).numpy()
    # a square's side is the root of what it weighs; 72 points an inch, an axis as long as it is
    inches = min(2.4 / n, 2.6 / m)
    y, x = np.nonzero(abs(share) > 2e-3)
    side = 0.9 * 72 * inches * abs(share[y, x]) ** 0.5
    faces = np.where(share[y, x] > 0, "black", "white")
    axes.scatter(x, y, s=side**2, marker="s", c=faces, edgecolors="black", linewidths=0.6)
    return [] if w.missed < 1e-4 else [f"{w.missed:.0%} of the gradient along no column"]


def _embedding(axes: Any, e: Embedding) -> list[str]:
    _quiet(axes)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(-1.15, 1.15)
    axes.set_ylim(-1.15, 1.15)
    axes.set_title(f"before (inside) and after: {e.losses[0]:.3g} to {e.losses[1]:.3g}", fontsize=8)
    turns = np.linspace(0, 2 * np.pi, 100)
    for radius in (INNER, 1):
        ring = radius * np.cos(turns), radius * np.sin(turns)
        axes.plot(*ring, color="0.9", linewidth=0.8, zorder=0)
    for k in range(int(e.labels.max()) + 1):
        own = e.labels == k
        inner, outer = INNER * e.before[own].numpy(), e.after[own].numpy()
        for a, b in zip(inner, outer, strict=True):
            axes.plot([a[0], b[0]], [a[1], b[1]], color="0.8", linewidth=0.6, zorder=1)
        style = dict(marker=MARKERS[k % len(MARKERS)], color=COLORS[k % len(COLORS)], zorder=2)
        axes.scatter(inner[:, 0], inner[:, 1], s=14, linewidths=0, **style)
        axes.scatter(outer[:, 0], outer[:, 1], s=32, edgecolors="white", linewidths=0.5, **style)
    moved = float((e.after - e.before).norm(dim=1).max())
    return [] if moved > 0.02 else ["rows that do not move"]
