"""Compiles many kernels in a pool of processes and reads their figures."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tools.gpu_static import machine_code
from tools.gpu_static.calls import compilations
from tools.gpu_static.machine_code import Figures, TileLoad
from tools.gpu_static.record import Compilation


def _one(job: tuple[str, Compilation]) -> Figures:
    return machine_code.figures(*job)


def workers() -> int:
    return min(2, os.cpu_count() or 1)


def sweep(archs: Iterable[str], tested: bool = False) -> list[tuple[str, Figures]]:
    """The figures of every kernel of the calls: (call, figures); `tested`: the tests' selection."""
    jobs, names = [], []
    for arch in archs:
        for key, call in compilations(arch, tested).items():
            jobs.append((arch, key))
            names.append(call)
    # spawned: a fork of a process with threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers(), context) as pool:
        return list(zip(names, pool.map(_one, jobs, chunksize=4), strict=True))


def save(path: Path, found: list[tuple[str, Figures]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([[call, asdict(figures)] for call, figures in found]))


def load(path: Path) -> list[tuple[str, Figures]]:
    out = []
    for call, fields in json.loads(path.read_text()):
        fields["tile_loads"] = [TileLoad(**one) for one in fields["tile_loads"]]
        out.append((call, Figures(**fields)))
    return out
