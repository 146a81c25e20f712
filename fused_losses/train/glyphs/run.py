"""A whole run: the set of glyphs, the training, the two heads on a subset, and the record."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_losses.datasets.glyphs import Glyphs, Split, hold_out, load_glyphs
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.progress import Progress
from fused_losses.train.frame.reports import tell, versions, write_json
from fused_losses.train.frame.runs import CHECKPOINT, StopSignals, running
from fused_losses.train.glyphs import report
from fused_losses.train.glyphs.config import GlyphConfig
from fused_losses.train.glyphs.loop import GlyphTraining, some_classes, warm_up

STAGES = "stages"
# Where as many classes can't be had, the run says so: the set is meant to be large.
LARGE = 25_000


def stages(config: GlyphConfig) -> dict[str, GlyphConfig]:
    """The trainings of a run: the one asked for, then both full heads on a subset of classes."""
    named = {"trained": config}
    if config.subset:
        named["subset"] = config.subset_of("centers")
        named["reference"] = config.subset_of("reference")
    return named


def train(
    config: GlyphConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    glyphs: Glyphs | None = None,
) -> dict[str, Any]:
    """Run `config` in `folder` and return what its result.json says.

    resume: go on where a former process stopped; its configuration must be this one. overwrite:
    delete what an earlier run left. glyphs: the set; None: that of this machine's fonts.
    Raises `Interrupted` after SIGINT or SIGTERM, with a checkpoint written.
    """
    folder = Path(folder)
    files = (STAGES, *report.FILES)
    with running(config, folder, written=files, resume=resume, overwrite=overwrite) as (_, stop):
        return _train(config, folder, stop, quiet, glyphs)


def _train(
    config: GlyphConfig, folder: Path, stop: StopSignals, quiet: bool, glyphs: Glyphs | None
) -> dict[str, Any]:
    start = time.monotonic()
    named = stages(config)
    if glyphs is None:
        glyphs = load_glyphs(
            config.folders(),
            size=config.size,
            least_fonts=config.least_fonts,
            characters=config.code_points(),
            say=Progress(0, quiet=quiet).say,
        )
    whole = hold_out(glyphs, config.held_out or None)
    # its clock starts here: drawing is no step
    progress = Progress(sum(one.steps for one in named.values()), quiet=quiet)
    progress.say(_described(glyphs, whole))
    (folder / STAGES).mkdir(exist_ok=True)
    warm_up(config, whole)
    results: dict[str, Any] = {}
    for name, one in named.items():
        path = folder / STAGES / f"{name}.json"
        if path.exists():
            progress.skip(one.steps)
        else:
            split = some_classes(whole, min(one.classes, whole.train.classes), config.seed)
            found = _stage(name, one, split, folder / CHECKPOINT, stop, progress)
            write_json(path, found)
        results[name] = json.loads(path.read_text())
    (folder / CHECKPOINT).unlink(missing_ok=True)
    record = report.record(results)
    record |= {
        "data": {
            "classes": glyphs.classes,
            "drawings": len(glyphs),
            "faces": len(glyphs.fonts),
            "fonts_left_out": len(glyphs.skipped),
            "held_out": list(whole.families),
        },
        "config": asdict(config),
        "versions": versions(),
        "wall_s": round(time.monotonic() - start, 2),
    }
    missing = report.write(folder, record, results)
    tell(progress, folder, report.FILES, missing, report.table(record))
    return record


def _described(glyphs: Glyphs, split: Split) -> str:
    text = (
        f"{split.train.classes} characters, {len(split.train)} drawings to train on; held out: "
        f"{', '.join(split.families)} with {len(split.held_out)} drawings"
    )
    if glyphs.classes < LARGE:
        text += (
            f"\nthe fonts of this machine give {glyphs.classes} classes; CJK fonts give more than "
            f"{LARGE}: docs/glyphs.md names Debian's"
        )
    return text


def _stage(
    name: str,
    config: GlyphConfig,
    split: Split,
    path: Path,
    stop: StopSignals,
    progress: Progress,
) -> dict[str, Any]:
    """One training to its end, from the checkpoint where that is of this stage."""
    # a training of its own: what judging takes must not count as the training's memory
    untrained = GlyphTraining(config, split).recall()
    memory = PeakMemory(torch.device(config.device))
    training = GlyphTraining(config, split, name=name)
    # the peak is that of the steps, above what the process held without all of this
    before, memory = memory.before, PeakMemory(torch.device(config.device))
    memory.before = before
    training.run(path, f"{name:9}", stop=stop, progress=progress, memory=memory)
    return {**training.result(), "untrained": untrained, "memory_by": memory.method}
