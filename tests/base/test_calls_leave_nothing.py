"""What a call has taken it gives back: live bytes after many calls of each loss are those before.

A child counts every allocation, torch's, the kernels' and Python's (counted.py), and runs the
collector before it looks. FUSED_LOSSES_CALLS=10000 looks longer.
"""

from __future__ import annotations

import functools
import os

import pytest
from calls import first_of_each, runs_on
from conftest import require
from counted import COUNTER, told_by_child

from fused_losses.base.examples import TABLE

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("calls_leave")]

CALLS = int(os.environ.get("FUSED_LOSSES_CALLS", "200"))
# of all calls: a dictionary of Python's may grow by so much at once; an object that stays a call,
# 32 bytes at least, is more
STEPS = 4096
NAMES = first_of_each(name for name in TABLE if runs_on(name, "cpu"))

CHILD = (
    COUNTER
    + """
import warnings
from calls import Call

calls, names, leaking = json.loads(sys.argv[1])
warnings.simplefilter("ignore")
kept = []

def live():
    gc.collect()
    return counter.counted_live()

def grown(name):
    call = Call(name, "cpu", (6, 9, 8))
    for _ in range(20):
        call.bits()
    before = live()
    for _ in range(calls):
        found = call.bits()
        if leaking:
            kept.append(found[0].new_empty(0))
    del found
    return live() - before

torch.set_num_threads(1)
print(json.dumps({name: grown(name) for name in names}))
"""
)


@functools.cache
def measured() -> dict[str, int]:
    return told_by_child(CHILD, [CALLS, NAMES, False], seconds=300 + CALLS)  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_many_calls_leave_no_byte(name: str) -> None:
    require("cpu")
    assert measured()[name] <= STEPS


def test_one_tensor_that_stays_is_seen() -> None:
    require("cpu")
    # the control: an empty tensor a call, and nothing else
    (grown,) = told_by_child(CHILD, [200, NAMES[:1], True]).values()
    assert grown > STEPS
