"""What a run leaves to be read: result.json, curves.json, two figures and the table at its end."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.evaluation import FIGURES, ROC_FARS
from fused_losses.train.frame.reports import chart, drawn, versions, write_json

FILES = ("result.json", "curves.json", "curves.png", "roc.png")
TITLES = {
    "verification_accuracy": "verification accuracy",
    "tar_at_far_1e-2": "TAR at FAR 1e-2",
    "tar_at_far_1e-3": "TAR at FAR 1e-3",
    "recall_at_1": "recall at 1, one shot",
    "step_ms": "step (median, ms)",
    "peak_memory_mib": "peak memory (MiB)",
}
COLORS = {"trained": "C0", "reference": "C1", "untrained": "0.6"}


def record(
    config: TrainConfig,
    judged: dict[str, dict[str, Any]],
    finished: dict[str, list[dict[str, Any]]],
    *,
    backends_run: dict[str, str],
) -> dict[str, Any]:
    """result.json: the trained head's figures on top, the others' under their names."""

    def one(name: str) -> dict[str, Any]:
        keys = (*FIGURES, "spread", "folds", "threshold_from")
        figures = {key: judged[name][key] for key in keys}
        results = finished.get(name, [])
        steps = [ms for result in results for ms in result["step_ms"].tolist()]
        # no step was taken for the untrained one: 0, so that the keys are the same everywhere
        figures["step_ms"] = round(statistics.median(steps), 3) if steps else 0.0
        peak = max((result["peak_mib"] for result in results), default=0.0)
        figures["peak_memory_mib"] = round(peak, 1)
        figures["backend"] = backends_run.get(name)
        return figures

    same = "trained" if "reference" not in judged and config.backend == "reference" else "reference"
    return {
        **one("trained"),
        "reference": one(same) if same in judged else None,
        "untrained": one("untrained"),
        "peak_memory_by": finished["trained"][0]["memory_by"],
        "config": asdict(config),
        "versions": versions(),
    }


def write(
    folder: Path,
    result: dict[str, Any],
    judged: dict[str, dict[str, Any]],
    finished: dict[str, list[dict[str, Any]]],
) -> list[str]:
    """Every file of the report; returns what could not be drawn, and why."""
    curves = {
        "loss": {
            name: [fold["losses"].tolist() for fold in folds] for name, folds in finished.items()
        },
        "far": ROC_FARS.tolist(),
        "tar": {name: one["roc"] for name, one in judged.items()},
    }
    write_json(folder / "curves.json", curves)
    missing = drawn(lambda: draw(folder, curves))
    # last: where it stands, the run is complete
    write_json(folder / "result.json", result)
    return missing


def draw(folder: Path, curves: dict[str, Any]) -> None:
    """curves.png and roc.png: the mean over folds, and a band of one standard deviation."""

    def band(axes: Any, x: list[float], rows: list[list[float]], name: str) -> None:
        values = torch.tensor(rows, dtype=torch.float64)
        mean, spread = values.mean(0), values.std(0, correction=0)
        style = "--" if name == "reference" else "-"
        axes.plot(x, mean, style, color=COLORS[name], label=name)
        axes.fill_between(x, mean - spread, mean + spread, color=COLORS[name], alpha=0.2, lw=0)

    figure, axes = chart("training loss, mean and spread over folds", "step", "loss")
    for name, rows in curves["loss"].items():
        band(axes, [float(i + 1) for i in range(len(rows[0]))], rows, name)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)

    figure, axes = chart("verification of held-out people", "false accept rate", "true accept rate")
    for name, rows in curves["tar"].items():
        band(axes, curves["far"], rows, name)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right")
    figure.savefig(folder / "roc.png", dpi=120)


def table(result: dict[str, Any]) -> str:
    """The figures of all heads side by side."""
    heads = {f"trained ({result['backend']})": result}
    if result["reference"]:
        heads["reference"] = result["reference"]
    heads["untrained"] = result["untrained"]
    lines = [f"{'':24}" + "".join(f"{name:>20}" for name in heads)]
    for key, title in TITLES.items():
        cells = []
        for name, one in heads.items():
            if key in one["spread"]:
                cells.append(f"{one[key]:.3f} +- {one['spread'][key]:.3f}")
            else:
                cells.append("-" if name == "untrained" else f"{one[key]:.1f}")
        lines.append(f"{title:24}" + "".join(f"{cell:>20}" for cell in cells))
    folds = len(result["folds"])
    lines.append(
        f"(mean +- standard deviation over {folds} fold{'s' if folds > 1 else ''} of people)"
    )
    return "\n".join(lines)
