"""`fused-losses train`: which recipe the command line asks for."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from fused_losses.train.faces import cli as faces
from fused_losses.train.glyphs import cli as glyphs


def recipe(argv: list[str]) -> ModuleType:
    """The module with `add_arguments` and `run` for the data set that the command line names."""
    finder = argparse.ArgumentParser(add_help=False)
    finder.add_argument("--data", default="")
    return glyphs if finder.parse_known_args(argv)[0].data == "glyphs" else faces


def main(argv: list[str] | None = None) -> int:
    """`python -m fused_losses.train`."""
    given = sys.argv[1:] if argv is None else argv
    chosen = recipe(given)
    parser = argparse.ArgumentParser(prog="fused-losses train")
    chosen.add_arguments(parser)
    return chosen.run(parser.parse_args(given))
