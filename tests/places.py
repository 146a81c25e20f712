"""Where the tests' files lie, whichever folder asks; and how a child process finds them."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
SHARED_FOLDERS = ("support", "cuda_kernels", "triton_kernels")
SHARED = ROOT.parent / "shared"  # the PTX emulator lies there, beside the project


def search_path(*further: Path) -> str:
    """A child's PYTHONPATH: the package, what tests import (as pyproject.toml has it), and more."""
    folders = (ROOT, TESTS, *(TESTS / name for name in SHARED_FOLDERS), *further)
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
