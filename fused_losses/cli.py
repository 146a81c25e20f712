"""The command `fused-losses`: train, bench, roofline, verify, info."""

from __future__ import annotations

import argparse
import sys

from fused_losses import info
from fused_losses import verify as checks
from fused_losses.bench import report
from fused_losses.bench.roofline import page
from fused_losses.train import cli as train_cli


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fused-losses", description="Fused losses for representation learning."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends, and why a backend cannot run here")
    verify = commands.add_parser("verify", help="check every op and backend against float64")
    bench = commands.add_parser("bench", help="measure against eager, torch.compile and peers")
    roofline = commands.add_parser("roofline", help="bytes, FLOPs and bounds of every op on GPUs")
    train = commands.add_parser(
        "train", help="train an embedding (faces, or glyphs) and evaluate it"
    )
    given = sys.argv[1:] if argv is None else argv
    recipe = train_cli.recipe(given)
    checks.add_arguments(verify)
    report.add_arguments(bench)
    page.add_arguments(roofline)
    recipe.add_arguments(train)
    args = parser.parse_args(given)
    if args.command == "train":
        return recipe.run(args)
    if args.command == "bench":
        return report.run(args)
    if args.command == "roofline":
        return page.run(args)
    if args.command == "verify":
        return checks.run(device=args.device, shapes=args.shape, out=args.out)
    print("\n".join(info.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
