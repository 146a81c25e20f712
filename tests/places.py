"""Where the tests' files lie, whichever folder asks; and how a child process finds them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
SHARED = ROOT.parent / "shared"  # the PTX emulator lies there, beside the project


def search_path(*further: Path) -> str:
    """A child's PYTHONPATH: what tests import from, as pyproject.toml has it, and more."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = settings["tool"]["pytest"]["ini_options"]["pythonpath"]
    folders = (*(ROOT / name for name in named), *further)
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
