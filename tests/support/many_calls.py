"""What a loss's calls leave behind, over any number of them: live bytes and open files.

python -m many_calls CALLS (`make calls`) asks the first example of every loss, each in a child of
its own, and records a line a loss in runs/calls.jsonl; it goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import linear_regression
from typing import Any

from calls import first_of_each, runs_on
from counted import COUNTER, told_by_child
from places import ROOT

from fused_losses.base.examples import TABLE

# of all calls: a dictionary of Python's may grow by so much at once; an object that stays a call,
# 32 bytes at least, is more
STEPS = 4096
WARM = 20
NAMES = first_of_each(name for name in TABLE if runs_on(name, "cpu"))
RECORD = ROOT / "runs" / "calls.jsonl"
CHILD = (
    COUNTER
    + """
import array, os, warnings
from calls import Call

calls, warm, names, leaking = json.loads(sys.argv[1])
warnings.simplefilter("ignore")
# as users call: what a thread holds from one call to the next must not grow either
torch.use_deterministic_algorithms(False)
kept = []

def live():
    gc.collect()
    return counter.counted_live(), len(os.listdir("/proc/self/fd"))

def samples(name):
    call = Call(name, "cpu", (6, 9, 8))
    for _ in range(warm):
        call.bits()
    # what is there is not walked at every sample, but what calls make from here on
    gc.collect()
    gc.freeze()
    # the samples' own place is there before the first
    held, files = array.array("q", [0] * 11), array.array("q", [0] * 11)
    held[0], files[0] = live()
    for sample in range(1, 11):
        for _ in range(calls // 10):
            last = call.bits()
            if leaking:
                kept.append(last[0].new_empty(0))
        last = None
        held[sample], files[sample] = live()
    return held.tolist(), files.tolist()

torch.set_num_threads(1)
print(json.dumps({name: samples(name) for name in names}))
"""
)


def left_behind(
    names: list[str], calls: int, *, leaking: bool = False, seconds: float = 300
) -> dict[str, dict[str, float]]:
    """Of each example: bytes and files after the calls beyond those before, and bytes a call.

    leaking: the control, an empty tensor stays a call.
    """
    told = told_by_child(CHILD, [calls, WARM, names, leaking], seconds=seconds)
    found = {}
    done = [calls // 10 * sample for sample in range(11)]
    for name, (held, files) in told.items():
        found[name] = {
            "bytes": held[-1] - held[0],
            "bytes a call": round(linear_regression(done, held).slope, 4),
            "files": files[-1] - files[0],
        }
    return found


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    # one may be on its way
    return {line["name"]: line for line in (json.loads(t) for t in lines if t.endswith("\n"))}


def record(calls: int) -> int:
    """A line for each loss of which this commit has none; whether any left something."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    RECORD.parent.mkdir(exist_ok=True)
    before = _recorded(RECORD)
    with RECORD.open("a") as out:
        for name in NAMES:
            known = before.get(name, {})
            if known.get("commit") == commit and known.get("calls", 0) >= calls:
                continue
            (found,) = left_behind([name], calls, seconds=300 + calls).values()
            line = {"name": name, "commit": commit, "calls": calls, **found}
            out.write(json.dumps(line) + "\n")
            out.flush()
    now = _recorded(RECORD)
    lines = [now[name] for name in NAMES]
    left = [line for line in lines if line["bytes"] > STEPS or line["files"]]
    for line in left:
        print(json.dumps(line))
    most = max(lines, key=lambda line: line["bytes"])
    print(
        f"{len(lines)} losses, {calls:,} calls each: {len(left)} left more than {STEPS} bytes or "
        f"a file; the most is {most['bytes']} bytes ({most['name']})"
    )
    return bool(left)


if __name__ == "__main__":
    raise SystemExit(record(int(sys.argv[1])))
