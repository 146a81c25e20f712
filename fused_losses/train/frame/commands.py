"""The command line of a run: its options, its folder, and what to say when it cannot go on."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fused_losses.base.records import BY_CTRL_C
from fused_losses.train.frame.memory import is_memory
from fused_losses.train.frame.options import (
    Config,
    OptionError,
    add_options,
    check_code,
    given_options,
    words,
)
from fused_losses.train.frame.runs import CONFIG
from fused_losses.train.frame.steps import Interrupted

C = TypeVar("C", bound=Config)
TRUSTED = "trust_config"  # of a trainer that imports what a configuration names


def add_run_arguments(
    parser: argparse.ArgumentParser, kind: type[Config], *, description: str, name: str, resume: str
) -> argparse._ArgumentGroup:
    """Where and how to run, and every field of `kind` as an option; returns the group of the run.

    name, resume: what --help says of a run without --name and of --resume.
    """
    parser.description = description
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    run = parser.add_argument_group("the run")
    run.add_argument("--name", help=f"folder of the run; default: {name}, numbered if taken")
    run.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    run.add_argument("--resume", action="store_true", help=resume)
    run.add_argument("--overwrite", action="store_true", help="start anew in RUNS/NAME")
    run.add_argument("--quiet", action="store_true", help="no progress, no table")
    options = parser.add_argument_group("what is trained (--resume keeps what the run has)")
    add_options(options, kind)
    return run


def first_free(runs: Path, stem: str) -> Path:
    """RUNS/STEM, or the first of RUNS/STEM-2, -3, ... that is not taken."""
    stem = stem or "run"  # of the root of all folders
    path, number = runs / stem, 1
    while path.exists():
        number += 1
        path = runs / f"{stem}-{number}"
    return path


def status_of(
    args: argparse.Namespace,
    kind: type[C],
    *,
    folder: Callable[[dict[str, Any]], Path],
    work: Callable[[C, Path], object],
    command: str,
) -> int:
    """Run as the options say; 0, or 2 for what cannot be done, or 128 + the signal received.

    folder: the run's, of the fields that the command line set. command: what goes on with it.
    """
    given = given_options(args, kind)
    named: list[str] = []
    try:
        place = folder(given)
        saved = place / CONFIG
        start = kind()
        if args.resume and saved.exists():
            start = kind.load(saved)
            if not getattr(args, TRUSTED, False):
                check_code(start, given, saved, f"--{TRUSTED.replace('_', '-')}")
        config = start.with_changes(**given)
        named = words(config.code())
        work(config, place)
    except Interrupted as stopped:
        runs = [] if args.runs == "runs" else ["--runs", args.runs]
        again = shlex.join([*runs, "--name", place.name, "--resume", *named])
        print(f"\nstopped; go on with: {command} {again}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("\nstopped at once; what the last checkpoint holds is kept", file=sys.stderr)
        return BY_CTRL_C
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"fused-losses train: {line_of(error)}", file=sys.stderr)
        return 2
    return 0


def line_of(error: Exception) -> object:
    """The line that an error ends a run with."""
    if isinstance(error, OptionError):
        return error.flag()
    if is_memory(error):
        first = str(error).partition("\n")[0]
        return f"--batch-size, --embedding, size of the pictures: out of memory ({first})"
    return error
