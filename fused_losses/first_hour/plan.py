"""The order of the units, and how much of the time each stage may take before the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fused_losses.first_hour import checks, probe, times
from fused_losses.first_hour.setting import HourUnit, Setting


class Stage(NamedTuple):
    """Units of one kind; until: the share of all time by which the next stage begins."""

    name: str
    what: str
    units: Callable[[Setting], list[HourUnit]]
    until: float


# so that a cut leaves the most valuable; what a stage leaves is taken up after the last one
STAGES = (
    Stage("probe", "versions, devices, peers", probe.units, 0.05),
    Stage("verify", "each op at a small shape against float64", checks.verify_units, 0.35),
    Stage("sanitizer", "a few ops under compute-sanitizer", checks.sanitizer_units, 0.43),
    Stage("heads", "cases against eager, compiled and peers", times.head_units, 0.70),
    Stage("launches", "launches, host time, peak memory", times.launch_units, 0.78),
    Stage("graphs", "a step of each function as a CUDA graph", checks.graph_units, 0.85),
    Stage("devices", "each function on a second GPU", checks.device_units, 0.88),
    Stage("model", "times against the model's bounds", times.model_units, 0.95),
    Stage("more", "the rest of verify's table", checks.more_units, 1.0),
)
NAMES = tuple(stage.name for stage in STAGES)


def planned(setting: Setting) -> list[tuple[Stage, list[HourUnit]]]:
    """The stages that are asked for, with their units."""
    wanted = setting.stages or NAMES
    return [(stage, stage.units(setting)) for stage in STAGES if stage.name in wanted]
