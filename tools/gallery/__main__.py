"""`python -m tools.gallery [NAME ...]`: the pictures of all losses, or of these, and their page."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

from fused_losses import losses
from tools.gallery.page import FOLDER, write
from tools.gallery.pictures import draw
from tools.gallery.problems import problem


def main(argv: list[str] | None = None) -> int:
    """Draws; returns how many could not be drawn."""
    options = argparse.ArgumentParser(prog="python -m tools.gallery", description=__doc__)
    options.add_argument("names", nargs="*", help="losses, or blocks; all without")
    options.add_argument("--missing", action="store_true", help="those alone without a picture")
    given = options.parse_args(argv)
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = 0
    for e in losses.catalogue():
        path = Path(FOLDER, f"{e.name}.png")
        asked = not given.names or e.name in given.names or e.block in given.names
        if not asked or (given.missing and path.exists()):
            continue
        try:
            told = draw(problem(e), path)
        except Exception:
            failed += 1
            print(f"{e.name}: not drawn\n{traceback.format_exc(limit=-2)}", flush=True)
            continue
        print(f"{e.name}: {path.stat().st_size / 1024:.0f} KB {'; '.join(told)}", flush=True)
    write()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
