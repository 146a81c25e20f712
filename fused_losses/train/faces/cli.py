"""`fused-losses train`: the options of a run, and what to say when it cannot go on."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.frame.options import add_options, given_options

DESCRIPTION = """\
Train a face embedding with a margin-softmax head and judge it on people that it never saw.
Writes config.json, checkpoint.pt, result.json, curves.json, curves.png and roc.png to
RUNS/NAME. Stop it at any moment (Ctrl-C, SIGTERM, kill -9) and go on with --resume: the losses
are bitwise the same. With --data glyphs the options are others: ask --data glyphs --help."""


def recipe(argv: list[str]) -> ModuleType:
    """The module with `add_arguments` and `run` for the data set that the command line names."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--data", default="")
    if finder.parse_known_args(argv)[0].data == "glyphs":
        from fused_losses.train.glyphs import cli

        return cli
    return sys.modules[__name__]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `TrainConfig` as an option, and where and how to run."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--name", help="folder of the run; default: the data's name, numbered if taken"
    )
    run.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    run.add_argument("--resume", action="store_true", help="go on with RUNS/NAME (or the latest)")
    run.add_argument("--overwrite", action="store_true", help="start anew in RUNS/NAME")
    run.add_argument("--quiet", action="store_true", help="no progress, no table")
    options = parser.add_argument_group("what is trained (--resume keeps what the run has)")
    add_options(options, TrainConfig)


def run(args: argparse.Namespace) -> int:
    """Train as the options say; 0, or 2 for what cannot be done, or 128 + the signal received."""
    from fused_losses.train.faces.loop import Interrupted
    from fused_losses.train.faces.run import CONFIG, train

    given = given_options(args, TrainConfig)
    try:
        folder = _folder(Path(args.runs), args.name, given, resume=args.resume)
        saved = folder / CONFIG
        start = TrainConfig.load(saved) if args.resume and saved.exists() else TrainConfig()
        config = start.with_changes(**given)
        train(config, folder, resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)
    except Interrupted as stopped:
        runs = "" if args.runs == "runs" else f" --runs {args.runs}"
        print(
            f"\nstopped; go on with: fused-losses train{runs} --name {folder.name} --resume",
            file=sys.stderr,
        )
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fused-losses train: {error}", file=sys.stderr)
        return 2
    return 0


def _folder(runs: Path, name: str | None, given: dict[str, Any], *, resume: bool) -> Path:
    """The run's folder: the one named, the latest to resume, or the first free one."""
    from fused_losses.train.faces.run import CONFIG

    if name:
        return runs / name
    if resume:
        found = sorted(runs.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError(f"{runs}: holds no run to resume")
        return found[-1].parent
    stem = Path(given.get("data", TrainConfig().data)).resolve().name
    number = 1
    while (runs / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return runs / (stem if number == 1 else f"{stem}-{number}")


def main(argv: list[str] | None = None) -> int:
    """`python -m fused_losses.train`."""
    given = sys.argv[1:] if argv is None else argv
    chosen = recipe(given)
    parser = argparse.ArgumentParser(prog="fused-losses train")
    chosen.add_arguments(parser)
    return chosen.run(parser.parse_args(given))
