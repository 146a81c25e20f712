"""What the mutants of the Triton kernels are made of; a sample of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants import ANY, Fault
from places import ROOT, search_path
from triton_planting import plant

pytest.importorskip("triton")  # as the cases that the mutants are tried by need it

import triton_mutants
from triton_survivors import SURVIVORS

SOURCE = '''"""A kernel, and what is none."""

import triton
import triton.language as tl


def launched(n):
    return n + 1 if n > 3 else 0


@triton.jit
def kernel(x, out, n, stride, SUM: tl.constexpr, B: tl.constexpr):
    """What is said is not planted in: a < b."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    there = at < n
    value = tl.load(x + at * stride, mask=there, other=0.0)
    value = tl.where(value == 2.0, tl.maximum(value, 1.0), value)
    if SUM:
        value -= tl.sum(value, 0)
    tl.store(out + at, value, mask=there)
'''


def test_each_kind_is_planted_in_kernels_alone() -> None:
    faults: list[Fault] = []
    text = plant(SOURCE, "source.py", faults)
    assert Counter(fault.kind for fault in faults) == {
        "factor": 2,
        "sign": 3,
        "bound": 1,
        "equal": 1,
        "unmasked": 2,
        "swapped": 1,
        "extreme": 1,
        "always": 1,
        "never": 1,
        "dropped": 2,
        "number": 1,
    }
    assert all(SOURCE.splitlines()[fault.line - 1].strip() == fault.text for fault in faults)
    compile(text, "source.py", "exec")
    assert "return n + 1 if n > 3 else 0" in text


def test_every_kernel_is_a_groups() -> None:
    folder = ROOT / "fused_losses"
    here = {path for group in triton_mutants.GROUPS.values() for path in group.sources()}
    assert {path for path in folder.rglob("*.py") if "@triton.jit" in path.read_text()} == here
    for name, survivors in SURVIVORS.items():
        faults = triton_mutants.planted(name)
        for kind, text, why in survivors:
            fitting = [f for f in faults if kind in (ANY, f.kind) and text in f.text]
            assert fitting and why, (name, kind, text)


@pytest.mark.slow
@pytest.mark.processes
def test_a_sample_is_noticed(tmp_path: Path) -> None:
    """One place in ten of one group; `make triton-mutants` tries all."""
    command = [sys.executable, triton_mutants.__file__, "vectors", "--one-in", "10"]
    environment = os.environ | {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [*command, "--runs", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert re.match(r"vectors: [1-9]\d* of \d+ faults, 1 place in 10, noticed", told.stdout)
