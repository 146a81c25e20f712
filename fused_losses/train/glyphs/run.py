"""A whole run: the set of glyphs, the training, the two heads on a subset, and the record."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_losses.base.files import DataError
from fused_losses.datasets.glyphs import Glyphs, Split, hold_out, load_glyphs
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.preflight import check_backend, check_machine
from fused_losses.train.frame.progress import Progress
from fused_losses.train.frame.reports import tell, versions, write_json
from fused_losses.train.frame.runs import CHECKPOINT, Run, running
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

    resume: go on where a former process stopped; its configuration must be this one, or ask for
    more steps: then every stage goes on from its last. overwrite: delete what an earlier run left.
    glyphs: the set; None: that of this machine's fonts.
    Raises `Interrupted` after SIGINT or SIGTERM, with a checkpoint written; ValueError
    (`OptionError`, `RunFileError`) for what cannot be run, before the folder is made or changed.
    """
    with running(
        config,
        Path(folder),
        written=(STAGES, *report.FILES),
        ready=lambda chosen: _ready(chosen, glyphs, quiet),
        resume=resume,
        overwrite=overwrite,
    ) as run:
        return _train(run, quiet)


def _ready(config: GlyphConfig, glyphs: Glyphs | None, quiet: bool) -> tuple[Glyphs, Split]:
    """The set, whole and split, once nothing is left that would end the run later."""
    check_machine(config.device, config.tensorboard)
    if config.head != "reference" and config.backend == "reference":
        raise OptionError("backend", "expected --head reference for the reference's own table")
    check_backend(config.backend, config.device, "fp32", torch.float32)
    if glyphs is None:
        try:
            glyphs = load_glyphs(
                config.folders(),
                size=config.size,
                least_fonts=config.least_fonts,
                characters=config.code_points(),
                say=Progress(0, quiet=quiet).say,
            )
        except DataError:
            raise  # of the cache, whose file it names
        except ValueError as error:
            raise OptionError("fonts", str(error)) from error
    try:
        whole = hold_out(glyphs, config.held_out or None)
    except ValueError as error:
        raise OptionError("held_out", str(error)) from error
    if config.classes > whole.train.classes:
        text = (
            f"expected at most {whole.train.classes}, the classes of the set, got {config.classes}"
        )
        raise OptionError("classes", text)
    return glyphs, whole


def _train(run: Run[GlyphConfig, tuple[Glyphs, Split]], quiet: bool) -> dict[str, Any]:
    start = time.monotonic()
    config, folder, (glyphs, whole) = run.config, run.folder, run.made
    named = stages(config)
    progress = Progress(sum(one.steps for one in named.values()), quiet=quiet)
    progress.say(_described(glyphs, whole))
    (folder / STAGES).mkdir(exist_ok=True)
    warm_up(config, whole)
    results: dict[str, Any] = {}
    for name, one in named.items():
        path = folder / STAGES / f"{name}.json"
        found = _finished(path, one.steps)
        if found is None:
            split = some_classes(whole, min(one.classes, whole.train.classes), config.seed)
            found = _stage(name, one, split, run, progress)
            write_json(path, found)
        else:
            progress.skip(one.steps)
        results[name] = found
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


def _finished(path: Path, steps: int) -> dict[str, Any] | None:
    """What is kept of a stage that has taken all its steps."""
    if not path.exists():
        return None
    found = report.read_stage(path)
    return found if len(found["losses"]) >= steps else None


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
    run: Run[GlyphConfig, Any],
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
    ended = run.folder / STAGES / f"{name}.state.pt"
    training.run(run, ended, f"{name:9}", progress=progress, memory=memory)
    return {**training.result(), "untrained": untrained, "memory_by": memory.method}
