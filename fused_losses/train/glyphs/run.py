"""A whole run: the set of glyphs, the training, the two heads on a subset, and the record."""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from fused_losses.base.files import write_atomically
from fused_losses.datasets.glyphs import Glyphs, Split, hold_out, load_glyphs
from fused_losses.train.faces.run import LOCK, StopSignals, locked
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.progress import Progress
from fused_losses.train.glyphs import report
from fused_losses.train.glyphs.config import GlyphConfig
from fused_losses.train.glyphs.loop import GlyphTraining, some_classes, warm_up

CONFIG, CHECKPOINT, STAGES = "config.json", "checkpoint.pt", "stages"
# what --overwrite deletes, so that it never takes a file of the user's
WRITTEN = (CONFIG, CHECKPOINT, STAGES, *report.FILES)
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
    with locked(folder):
        config = _prepare(config, folder, resume=resume, overwrite=overwrite)
        threads = torch.get_num_threads()
        torch.set_num_threads(config.threads)
        try:
            with StopSignals().watching() as stop:
                return _train(config, folder, stop, quiet, glyphs)
        finally:
            torch.set_num_threads(threads)


def _prepare(config: GlyphConfig, folder: Path, *, resume: bool, overwrite: bool) -> GlyphConfig:
    """The configuration to run, recorded in the folder; a folder in the wrong state is refused."""
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    saved = GlyphConfig.load(folder / CONFIG) if (folder / CONFIG).exists() else None
    if saved is not None and resume:
        # the split over threads orders sums: equal losses need the same number
        config = config.with_changes(threads=config.threads or saved.threads)
        for f in fields(GlyphConfig):
            had, asked = getattr(saved, f.name), getattr(config, f.name)
            if had != asked and f.name != "checkpoint_every":
                raise ValueError(
                    f"{folder}: cannot resume; {f.name}: the run has {had!r}, asked for {asked!r}"
                )
        return config
    left = [path for path in folder.iterdir() if path.name != LOCK]
    if saved is not None and not overwrite:
        raise ValueError(f"{folder}: holds a run; go on with --resume, or start with --overwrite")
    if saved is None and left:
        raise ValueError(f"{folder}: holds files that are not a run; choose another name")
    for path in left:
        if path.name in WRITTEN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = config.with_changes(threads=config.threads or torch.get_num_threads())
    write_atomically(folder / CONFIG, lambda file: file.write(config.to_json().encode()))
    return config


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
            report.write_json(path, found)
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
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "wall_s": round(time.monotonic() - start, 2),
    }
    for trouble in report.write(folder, record, results):
        progress.say(trouble)
    progress.say(report.table(record))
    progress.say(f"written to {folder}: {', '.join(report.FILES)}")
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
    if path.exists():
        state = checkpoint.load(path)
        # the checkpoint of a finished stage outlives it until the next one's first
        if state["name"] == name:
            training.load(state)
            progress.skip(training.done)
    training.run(
        path, stop=stop, after_step=lambda loss: progress.step(f"{name:9}", loss), memory=memory
    )
    return {**training.result(), "untrained": untrained, "memory_by": memory.method}
