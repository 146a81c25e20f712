"""Mutated files of every kind: data or the reader's error, within bounds of memory and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from places import search_path

TRIES = int(os.environ.get("FUSED_LOSSES_HOSTILE_FILES", "20"))  # of each kind


@pytest.mark.processes
@pytest.mark.slow
def test_mutated_files_give_data_or_an_error() -> None:
    """In a process of its own, which may take a gigabyte more than its imports."""
    ended = subprocess.run(
        [sys.executable, "-m", "hostile_files", str(TRIES), "0"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": search_path()},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts = json.loads(ended.stdout)
    assert len(counts) >= 45 and all(tried == TRIES for tried, _ in counts.values())
    # most of a picture's bytes are pixels; a damaged side file is made anew
    for name, (_, refused) in counts.items():
        assert "side file" not in name or refused <= TRIES // 5, name
    assert sum(refused for _, refused in counts.values()) > 0.3 * TRIES * len(counts)
