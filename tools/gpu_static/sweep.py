"""Compiles many kernels in a pool of processes and reads their figures."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tools.gpu_static import machine_code
from tools.gpu_static.machine_code import Figures, TileLoad
from tools.gpu_static.record import Compilation

CHUNK = 12  # kernels that are read at once, by one process


def _some(job: tuple[str, list[Compilation]]) -> list[Figures]:
    return machine_code.figures(*job)


def workers() -> int:
    return min(2, os.cpu_count() or 1)


def sweep(found: Mapping[str, Mapping[Compilation, str]]) -> list[tuple[str, Figures]]:
    """The figures of every target's kernels: (call, figures)."""
    jobs, names = [], []
    for arch, calls in found.items():
        names += calls.values()
        keys = list(calls)
        jobs += [(arch, keys[i : i + CHUNK]) for i in range(0, len(keys), CHUNK)]
    # spawned: a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers(), context) as pool:
        figures = [one for some in pool.map(_some, jobs) for one in some]
    return list(zip(names, figures, strict=True))


def save(path: Path, found: list[tuple[str, Figures]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([[call, asdict(figures)] for call, figures in found]))


def load(path: Path) -> list[tuple[str, Figures]]:
    out = []
    for call, fields in json.loads(path.read_text()):
        fields["tile_loads"] = [TileLoad(**one) for one in fields["tile_loads"]]
        out.append((call, Figures(**fields)))
    return out
