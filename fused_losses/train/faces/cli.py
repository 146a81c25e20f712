"""`fused-losses train`: the options of a run, and what to say when it cannot go on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.run import train
from fused_losses.train.frame.commands import TRUSTED, add_run_arguments, first_free, status_of
from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.runs import CONFIG, run_folder, runs_folder

DESCRIPTION = """\
Train a face embedding with a margin-softmax head and judge it on people that it never saw.
Writes config.json, log.jsonl, checkpoint.pt, result.json, curves.json, curves.png and roc.png to
RUNS/NAME. Stop it at any moment (Ctrl-C, SIGTERM, kill -9) and go on with --resume: the losses
are bitwise the same. --resume --steps N goes on to more steps, of a finished run, too. With
--data glyphs the options are others: ask --data glyphs --help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `TrainConfig` as an option, and where and how to run."""
    run = add_run_arguments(
        parser,
        TrainConfig,
        description=DESCRIPTION,
        name="the data's name",
        resume="go on with RUNS/NAME (or the latest)",
    )
    run.add_argument(
        f"--{TRUSTED.replace('_', '-')}",
        action="store_true",
        help="--resume imports the backbone that the run's config.json names, unasked",
    )


def run(args: argparse.Namespace) -> int:
    """Train as the options say; the exit status, as of `status_of`."""

    def folder(given: dict[str, Any]) -> Path:
        return _folder(runs_folder(args.runs), args.name, given, resume=args.resume)

    def work(config: TrainConfig, folder: Path) -> None:
        train(config, folder, resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)

    return status_of(args, TrainConfig, folder=folder, work=work, command="fused-losses train")


def _folder(runs: Path, name: str | None, given: dict[str, Any], *, resume: bool) -> Path:
    """The run's folder: the one named, the latest to resume, or the first free one."""
    if name is not None:
        return run_folder(runs, name, resume=resume)
    if resume:
        found = sorted(runs.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise OptionError("resume", f"expected a run to go on with, {runs} holds none")
        return found[-1].parent
    return first_free(runs, Path(given.get("data", TrainConfig().data)).resolve().name)
