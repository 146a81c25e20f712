"""What a run leaves to be read: result.json, curves.json, a figure and the table at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_losses.train.frame.files import RunFileError, read_json
from fused_losses.train.frame.reports import chart, drawn, write_json

FILES = ("result.json", "curves.json", "curves.png")
RECALLS = {
    "recall_at_1": "recall at 1",
    "recall_at_5": "recall at 5",
    "recall_at_1_of_centres": "recall at 1 of the centres",
}
COSTS = {
    "step_ms": "step (median, ms)",
    "head_ms": "of it the head (median, ms)",
    "peak_memory_mib": "peak memory (MiB)",
}
SIZES = {"classes": "classes", "queries": "queries"}


def read_figures(path: Path) -> dict[str, Any]:
    """The figures of a finished training in a JSON file; RunFileError names what is none."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise RunFileError(f"{path}: expected a JSON object, got {type(found).__name__}")
    wrong = [key for key in (*RECALLS, *COSTS, *SIZES) if not _is_number(found.get(key))]
    if wrong:
        raise RunFileError(f"{path}: expected numbers of a training; none: {', '.join(wrong)}")
    return found


def read_stage(path: Path) -> dict[str, Any]:
    """`read_figures`, with the curve and what the start was judged."""
    found = read_figures(path)
    losses, start = found.get("losses"), found.get("untrained")
    if not isinstance(losses, list) or not all(map(_is_number, losses)):
        raise RunFileError(f"{path}: expected a list of numbers 'losses'")
    if not isinstance(start, dict) or not all(map(_is_number, start.values())):
        raise RunFileError(f"{path}: expected an object of numbers 'untrained'")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def record(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """result.json: the training's figures on top, the others' under their names."""

    def figures(name: str) -> dict[str, Any] | None:
        found = results.get(name)
        return found and {
            key: value for key, value in found.items() if key not in ("losses", "untrained")
        }

    return {
        **(figures("trained") or {}),
        "untrained": results["trained"]["untrained"],
        "subset": figures("subset"),
        "reference": figures("reference"),
    }


def write(folder: Path, result: dict[str, Any], results: dict[str, dict[str, Any]]) -> list[str]:
    """Every file of the report; returns what could not be drawn, and why."""
    curves = {name: found["losses"] for name, found in results.items()}
    write_json(folder / "curves.json", {"loss": curves})
    missing = drawn(lambda: draw_curves(folder / "curves.png", curves))
    # last: where it stands, the run is complete
    write_json(folder / "result.json", result)
    return missing


def draw_curves(path: Path, curves: dict[str, list[float]]) -> None:
    """The losses over the steps, smoothed."""
    figure, axes = chart("training loss", "step", "loss (moving mean)")
    for name, losses in curves.items():
        style = "--" if name == "reference" else "-"
        axes.plot(range(1, len(losses) + 1), smoothed(losses), style, label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def smoothed(losses: list[float], share: float = 0.02) -> list[float]:
    """Each value's mean with those before it, over `share` of the curve."""
    width = max(1, round(share * len(losses)))
    out = []
    for end in range(1, len(losses) + 1):
        window = losses[max(0, end - width) : end]
        out.append(sum(window) / len(window))
    return out


def table(result: dict[str, Any]) -> str:
    """The figures side by side: the training and its start, then both heads on the subset."""
    columns = {"trained": result, "untrained": result["untrained"]}
    if result["subset"]:
        columns["subset"] = result["subset"]
        columns["reference"] = result["reference"]
    lines = [f"{'':28}" + "".join(f"{name:>14}" for name in columns)]
    for key, title in {**RECALLS, **COSTS, **SIZES}.items():
        cells = (cell(key, one.get(key)) for one in columns.values())
        lines.append(f"{title:28}" + "".join(f"{text:>14}" for text in cells))
    return "\n".join(lines)


def cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key in RECALLS:
        return f"{value:.4f}"
    return f"{value:.1f}" if key in COSTS else str(value)
