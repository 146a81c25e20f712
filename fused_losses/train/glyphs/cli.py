"""`fused-losses train --data glyphs`: its options, and what to say when it cannot go on."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from fused_losses.train.frame.options import add_options, given_options
from fused_losses.train.glyphs.config import GlyphConfig

DESCRIPTION = """\
Train an embedding of characters, every character of the installed fonts a class, and judge it
on fonts that it never saw. Writes config.json, result.json, curves.json and curves.png to
RUNS/NAME; with --compare it trains one head after another instead, each in its own process,
and writes compare.json, compare.md and compare.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `GlyphConfig` as an option, and where and how to run."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    run = parser.add_argument_group("the run")
    run.add_argument("--name", help="folder of the run; default: glyphs, numbered if taken")
    run.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    run.add_argument("--resume", action="store_true", help="go on with RUNS/NAME, or start it")
    run.add_argument("--overwrite", action="store_true", help="start anew in RUNS/NAME")
    run.add_argument("--quiet", action="store_true", help="no progress, no table")
    run.add_argument(
        "--compare",
        action="store_true",
        help="full and sampled heads side by side, in RUNS/glyphs-heads unless named",
    )
    options = parser.add_argument_group("what is trained (--resume keeps what the run has)")
    add_options(options, GlyphConfig)


def run(args: argparse.Namespace) -> int:
    """Train as the options say; 0, or 2 for what cannot be done, or 128 + the signal received."""
    from fused_losses.train.faces.loop import Interrupted
    from fused_losses.train.glyphs.compare import compare
    from fused_losses.train.glyphs.run import CONFIG, train

    try:
        folder = _folder(args)
        saved = folder / CONFIG
        start = GlyphConfig.load(saved) if args.resume and saved.exists() else GlyphConfig()
        config = start.with_changes(**given_options(args, GlyphConfig))
        if args.compare:
            compare(config, folder, quiet=args.quiet)
        else:
            train(config, folder, resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)
    except Interrupted as stopped:
        print(f"\nstopped; go on with --name {folder.name} --resume", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, OSError) as error:
        print(f"fused-losses train: {error}", file=sys.stderr)
        return 2
    return 0


def _folder(args: argparse.Namespace) -> Path:
    """The run's folder: the one named, or the first free one."""
    runs = Path(args.runs)
    if args.name:
        return runs / args.name
    if args.compare:
        return runs / "glyphs-heads"
    if args.resume:
        raise ValueError("name: expected the run to go on with, got none")
    number = 1
    while (runs / ("glyphs" if number == 1 else f"glyphs-{number}")).exists():
        number += 1
    return runs / ("glyphs" if number == 1 else f"glyphs-{number}")


def main(argv: list[str] | None = None) -> int:
    """`python -m fused_losses.train.glyphs`."""
    parser = argparse.ArgumentParser(prog="fused-losses train --data glyphs")
    add_arguments(parser)
    return run(parser.parse_args(argv))
