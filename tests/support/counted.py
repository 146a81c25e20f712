"""Counts every allocation of a child process, in torch or not, by count_allocations.c preloaded."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from places import search_path

MIB = 1 << 20

# of every child: extra(step) is the peak of live bytes in step() beyond those before it
COUNTER = """
import ctypes, gc, json, sys
import torch
import fused_losses
counter = ctypes.CDLL(None)
counter.counted_live.restype = counter.counted_peak.restype = ctypes.c_longlong
torch.set_num_threads(2)
# memory that is to be filled is fresh: no thread holds scratch from one call to the next, which
# would hide as much in what a call takes
torch.use_deterministic_algorithms(True, warn_only=True)

def extra(step):
    gc.collect()
    gc.freeze()  # what is there is not walked again, nor freed within a step
    before = counter.counted_live()
    counter.counted_reset()
    step()
    return counter.counted_peak() - before
"""


@functools.cache
def library() -> str:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("counting allocations needs a C compiler and glibc")
    out = Path(tempfile.mkdtemp(prefix="count_allocations")) / "count.so"
    source = Path(__file__).parent / "count_allocations.c"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", out, source], check=True)
    return str(out)


def told_by_child(
    program: str, argument: object, *, seconds: float = 300, **environment: str
) -> dict[str, tuple[int, int]]:
    """What a child that counts its allocations prints, as JSON; the argument is its sys.argv[1]."""
    told = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argument)],
        env={**os.environ, "PYTHONPATH": search_path(), "LD_PRELOAD": library(), **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)
