"""Mutated files of every kind: data or DataError, within bounds of memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import search_path

TRIES = int(os.environ.get("FUSED_LOSSES_HOSTILE_FILES", "60"))  # of each kind


@pytest.mark.processes
@pytest.mark.slow
def test_mutated_files_give_data_or_a_data_error() -> None:
    """In a process of its own, which may take a gigabyte more than its imports."""
    ended = subprocess.run(
        [sys.executable, "-m", "hostile_files", str(TRIES), "0"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": search_path()},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts = json.loads(ended.stdout)
    assert len(counts) >= 20
    for name, (tried, refused) in counts.items():
        assert tried == TRIES
        # a damaged side file is made anew; one with a right checksum may name another record
        most = {"side file": 0, "side file, checksum": TRIES // 10}.get(name, TRIES)
        # most of a picture's bytes are pixels
        least = 0 if name.startswith("side file") else TRIES // 10
        assert least <= refused <= most, name
