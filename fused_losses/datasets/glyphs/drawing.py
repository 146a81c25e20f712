"""Drawing the characters of many fonts, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from fused_losses.datasets.glyphs.fonts import Drawings, Face, draw

CHUNK = 2048  # characters that one task draws
MANY = 20_000  # drawings from which processes are worth their start


# (face, [(code point, face of the collection)])
FaceChunks = list[tuple[int, list[tuple[int, int]]]]


def chunks(faces: list[Face], least: int) -> FaceChunks:
    """What to draw, in chunks: characters that enough faces have."""
    having: dict[int, int] = defaultdict(int)
    for face in faces:
        for code in face.shown:
            having[code] += 1
    work: FaceChunks = []
    for number, face in enumerate(faces):
        shown = [
            (code, index)
            for code in sorted(face.shown)
            if having[code] >= least
            for index in face.shown[code]
        ]
        work += [(number, shown[i : i + CHUNK]) for i in range(0, len(shown), CHUNK)]
    return work


def drawn(
    faces: list[Face], work: FaceChunks, size: int, processes: int | None, total: int
) -> Iterator[tuple[int, Drawings | str]]:
    """(face, its drawings or why they failed) for each piece of work, in order."""
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = cores or 1 if total >= MANY else 1
    jobs = [(faces[number].path, shown, size) for number, shown in work]
    if processes == 1:
        for (number, _), job in zip(work, jobs, strict=True):
            yield number, _draw(*job)
        return
    # spawned: a fork would copy the threads' locks of torch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        waiting: list[Future[Drawings | str]] = []
        for place, (number, _) in enumerate(work):
            # a few ahead: pictures wait in memory until their turn
            while len(waiting) < min(place + 2 * processes, len(jobs)):
                waiting.append(pool.submit(_draw, *jobs[len(waiting)]))
            yield number, waiting[place].result()
            waiting[place] = Future()


def _draw(path: Path, shown: list[tuple[int, int]], size: int) -> Drawings | str:
    try:
        return draw(path, shown, size)
    except (OSError, ValueError) as error:  # FreeType refuses what fontTools could read
        return f"cannot be drawn ({type(error).__name__}: {error})"
