"""The command `fused-losses`: train, bench, roofline, verify, first-hour, losses, info."""

from __future__ import annotations

import argparse
import io
import sys
from types import ModuleType

from fused_losses import info
from fused_losses.base.records import BY_CTRL_C
from fused_losses.bench import report
from fused_losses.bench.roofline import page
from fused_losses.first_hour import command as first_hour
from fused_losses.losses import registry
from fused_losses.train import cli as train_cli
from fused_losses.verify import command as checks
from fused_losses.version import __version__


def parser(recipe: ModuleType) -> argparse.ArgumentParser:
    """The command line, with the options of one recipe for `train`."""
    options = argparse.ArgumentParser(
        prog="fused-losses", description="Fused losses for representation learning."
    )
    options.add_argument("--version", action="version", version=f"fused-losses {__version__}")
    commands = options.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends, and why a backend cannot run here")
    checks.add_arguments(
        commands.add_parser("verify", help="check every op and backend against float64")
    )
    first_hour.add_arguments(
        commands.add_parser("first-hour", help="what to learn first on a GPU, in order of value")
    )
    report.add_arguments(
        commands.add_parser("bench", help="measure against eager, torch.compile and peers")
    )
    losses = commands.add_parser("losses", help="list or search the catalogue of losses")
    losses.add_argument(
        "word", nargs="?", default="", help="part of a name, paper, year or block (default: all)"
    )
    page.add_arguments(
        commands.add_parser("roofline", help="bytes, FLOPs and bounds of every op on GPUs")
    )
    recipe.add_arguments(
        commands.add_parser("train", help="train an embedding (faces, or glyphs) and evaluate it")
    )
    return options


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (130 after Ctrl-C)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a line is there once it is known, in a pipe, too
        sys.stdout.reconfigure(line_buffering=True)
    given = sys.argv[1:] if argv is None else argv
    recipe = train_cli.recipe(given)
    args = parser(recipe).parse_args(given)
    try:
        return _run(args, recipe)
    except KeyboardInterrupt:
        print("\nfused-losses: stopped by Ctrl-C", file=sys.stderr)
        return BY_CTRL_C


def _run(args: argparse.Namespace, recipe: ModuleType) -> int:
    if args.command == "train":
        return recipe.run(args)
    if args.command == "bench":
        return report.run(args)
    if args.command == "roofline":
        return page.run(args)
    if args.command == "verify":
        return checks.run(
            device=args.device, shapes=args.shape, out=args.out, chosen=checks.chosen(args)
        )
    if args.command == "first-hour":
        return first_hour.run(args)
    if args.command == "losses":
        print("\n".join(registry.table(args.word)))
        return 0
    print("\n".join(info.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
