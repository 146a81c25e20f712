"""`fused-losses train --data glyphs`: its options, and what to say when it cannot go on."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_losses.train.frame.commands import add_run_arguments, first_free, status_of
from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.runs import run_folder, runs_folder
from fused_losses.train.glyphs.compare import compare
from fused_losses.train.glyphs.config import GlyphConfig
from fused_losses.train.glyphs.run import train

DESCRIPTION = """\
Train an embedding of characters, every character of the installed fonts a class, and judge it
on fonts that it never saw. Writes config.json, log.jsonl, result.json, curves.json and curves.png
to RUNS/NAME; --name NAME --resume goes on with it, with --steps N to more steps. With --compare
it trains one head after another instead, each in its own process, and writes compare.json,
compare.md and compare.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `GlyphConfig` as an option, and where and how to run."""
    run = add_run_arguments(
        parser,
        GlyphConfig,
        description=DESCRIPTION,
        name="glyphs",
        resume="go on with RUNS/NAME",
    )
    run.add_argument(
        "--compare",
        action="store_true",
        help="full and sampled heads side by side, in RUNS/glyphs-heads unless named",
    )


def run(args: argparse.Namespace) -> int:
    """Train as the options say; the exit status, as of `status_of`."""

    def work(config: GlyphConfig, folder: Path) -> None:
        if args.compare:
            compare(config, folder, quiet=args.quiet)
        else:
            train(config, folder, resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)

    command = "fused-losses train --data glyphs"
    return status_of(args, GlyphConfig, folder=lambda _: _folder(args), work=work, command=command)


def _folder(args: argparse.Namespace) -> Path:
    """The run's folder: the one named, or the first free one."""
    runs = runs_folder(args.runs)
    if args.name is not None:
        return run_folder(runs, args.name, resume=args.resume and not args.compare)
    if args.compare:
        return runs / "glyphs-heads"
    if args.resume:
        raise OptionError("name", "expected the run to go on with, got none")
    return first_free(runs, "glyphs")


def main(argv: list[str] | None = None) -> int:
    """`python -m fused_losses.train.glyphs`."""
    parser = argparse.ArgumentParser(prog="fused-losses train --data glyphs")
    add_arguments(parser)
    return run(parser.parse_args(argv))
