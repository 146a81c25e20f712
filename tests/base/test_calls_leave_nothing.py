"""What a call has taken it gives back: live bytes and files after many are those before.

A child counts every allocation, torch's, the kernels' and Python's (counted.py), and runs the
collector before it looks. A third of the losses are asked here, drawn by their names;
FUSED_LOSSES_CALLS=10000 asks all, for longer; `make calls` records it.
"""

from __future__ import annotations

import functools
import os
import zlib

import pytest
from conftest import require
from many_calls import NAMES, STEPS, left_behind

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("calls_leave")]

CALLS = int(os.environ.get("FUSED_LOSSES_CALLS", "200"))
EACH = 1 if "FUSED_LOSSES_CALLS" in os.environ else 3
ASKED = [name for name in NAMES if zlib.crc32(name.encode()) % EACH == 0]


@functools.cache
def measured() -> dict[str, dict[str, float]]:
    return left_behind(ASKED, CALLS, seconds=900 + CALLS)


@pytest.mark.parametrize("name", ASKED)
def test_many_calls_leave_no_byte_and_no_file(name: str) -> None:
    require("cpu")
    assert measured()[name]["bytes"] <= STEPS
    assert measured()[name]["files"] == 0


def test_one_tensor_that_stays_is_seen() -> None:
    require("cpu")
    (found,) = left_behind(NAMES[:1], 200, leaking=True).values()
    assert found["bytes"] > STEPS and found["bytes a call"] > 32
