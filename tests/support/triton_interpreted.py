"""Runs files of cases in a process of their own: Triton reads TRITON_INTERPRET when imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from places import ROOT, search_path


def passes(*cases: Path) -> None:
    """Every test of the files passes in Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": search_path()}
    plugins = ("-p", "no:cacheprovider", "-p", "triton_patched_once")
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins]
    run = subprocess.run(
        [*command, *map(str, cases)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
