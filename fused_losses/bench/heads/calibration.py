"""The model's prices from measured steps, and measured steps beside the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from fused_losses.bench.heads.model import Profile, Step, step_seconds, traffic

PRICED = ("flop", "memory", "link", "hop", "start")
MEASURED = ("world", "classes", "dim", "batch", "sample_rate", "seconds", "bytes_sent")


def step_of(measurement: dict[str, Any]) -> Step:
    """The step that was measured; beside MEASURED a run may have fields of `Step`."""
    missing = [key for key in MEASURED if key not in measurement]
    if missing:
        raise ValueError(f"measurements: expected {', '.join(MEASURED)}, missing {missing}")
    if not measurement["seconds"] > 0:
        raise ValueError(f"measurements: expected seconds > 0, got {measurement['seconds']}")
    known = {f.name for f in fields(Step)}
    return Step(**{key: value for key, value in measurement.items() if key in known})


def calibrate(
    measurements: Sequence[dict[str, Any]], processors: int | None = None, name: str = "measured"
) -> Profile:
    """Prices that fit measured steps best, of the fields of `Profile` in PRICED.

    Least squares of the relative errors, prices >= 0. processors: what all ranks share (None: each
    has its own), so that W ranks of one thread each do their work W / processors times slower.
    A CPU's thread does one thing at a time: memory traffic adds to the products. Raises ValueError
    for fewer than five runs.
    """
    least = len(PRICED)
    if len(measurements) < least:
        raise ValueError(f"measurements: expected at least {least} runs, got {len(measurements)}")
    none = Profile(name, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, processors=processors, overlapped=False)
    singles = [replace(none, **{price: 1.0}) for price in PRICED]
    steps = [step_of(m) for m in measurements]
    seconds = torch.tensor([m["seconds"] for m in measurements], dtype=torch.float64)
    counts = torch.tensor(
        [[step_seconds(step, p) for p in singles] for step in steps], dtype=torch.float64
    )
    prices = _nonnegative(counts / seconds[:, None], torch.ones_like(seconds))
    found = replace(none, **dict(zip(PRICED, prices.tolist(), strict=True)))
    return replace(found, far_link=found.link, far_hop=found.hop)


def _nonnegative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """argmin |a x - b|, x >= 0, by trying which of a's few columns take part."""
    size = a.norm(dim=0)
    best, least = torch.zeros(a.shape[1], dtype=a.dtype), b.norm()
    columns = [i for i in range(a.shape[1]) if size[i] > 0]
    for count in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, count):
            some = list(chosen)
            x = torch.linalg.lstsq(a[:, some] / size[some], b).solution
            error = (a[:, some] / size[some] @ x - b).norm()
            if (x >= 0).all() and error < least:
                best, least = torch.zeros_like(best), error
                best[some] = x / size[some]
    return best


class Comparison(NamedTuple):
    """A measured step beside the model."""

    step: Step
    seconds: float
    fitted: float  # by prices fitted to all runs
    foretold: float  # by prices fitted to the runs of other worlds and sizes
    bytes_sent: float
    counted: int  # bytes of the formula


def compared(
    measurements: Sequence[dict[str, Any]], processors: int | None = None
) -> tuple[Profile, list[Comparison]]:
    """Every run beside the fit, and beside what the other runs foretell of it."""
    profile = calibrate(measurements, processors)
    found = []
    for i, measured in enumerate(measurements):
        step = step_of(measured)
        others = [m for j, m in enumerate(measurements) if j != i]
        foretold = calibrate(others, processors) if len(others) >= len(PRICED) else profile
        found.append(
            Comparison(
                step,
                measured["seconds"],
                step_seconds(step, profile),
                step_seconds(step, foretold),
                measured["bytes_sent"],
                traffic(step),
            )
        )
    return profile, found


# ---- PartialFC's published figures --------------------------------------------------------------


class Published(NamedTuple):
    """A row of insightface's README (arcface_torch), R50 on 8 x V100 32 GB: its own claims."""

    classes: float
    rate: float  # 1: model parallel
    images: float  # a second
    mebibytes: int | None  # a GPU


PARTIAL_FC = (
    Published(1.4e6, 1.0, 3043, 11178),
    Published(5.5e6, 1.0, 1389, 32188),
    Published(1.4e6, 0.1, 4738, 6056),
    Published(5.5e6, 0.1, 3975, 9854),
    Published(8e6, 0.1, 3565, None),
    Published(16e6, 0.1, 2679, None),
    Published(29e6, 0.1, 1855, 32324),
)
PARTIAL_FC_BATCH = 1024  # of all GPUs: what their docs/speed_benchmark.md states for its own runs
