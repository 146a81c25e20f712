"""The process that runs units in turn, until its time is over or its device is lost."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from fused_losses.base.files import write_text
from fused_losses.base.records import told
from fused_losses.bench.measure import give_back_memory
from fused_losses.first_hour.checks import row_entry
from fused_losses.first_hour.page import page
from fused_losses.first_hour.plan import Stage, planned
from fused_losses.first_hour.record import FAILED, REPORT, STOPPED, HourRecord, Outcome
from fused_losses.first_hour.setting import HourUnit, Setting, wait
from fused_losses.verify.table import DeviceLost

DONE, LOST, INTERRUPTED = 0, 3, 130  # how the process ends: a lost device needs a fresh process


class Clock:
    """When a call began, and when it ends."""

    def __init__(self, began: float, minutes: float) -> None:
        self.began, self.seconds, self.parent = began, 60 * minutes, os.getppid()

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of the time is gone, or who watches."""
        return os.getppid() != self.parent or time.time() >= self.began + share * self.seconds


def run(setting: Setting, clock: Clock) -> int:
    """Every unit that has not ended, in order; twice, the second time without shares."""
    record = HourRecord(setting.out)
    stages = planned(setting)
    done = set(record.ended())
    for paced in (True, False):
        for stage, units in stages:
            for unit in units:
                if unit.name in done:
                    continue
                if clock.over(stage.until if paced else 1.0):
                    break
                if not _run_one(setting, record, stage, unit):
                    return LOST
                done.add(unit.name)
    return DONE


def _run_one(setting: Setting, record: HourRecord, stage: Stage, unit: HourUnit) -> bool:
    """One unit and its line; whether the device can go on."""
    print(f"{stage.name}: {unit.name}", file=sys.stderr)
    record.begin(unit.name)
    began = time.monotonic()
    alive = True
    try:
        outcome = unit.run()
        if not (alive := _alive(setting.device)):
            lost = "; ".join(filter(None, ("the device takes no more work after it", outcome.told)))
            outcome = outcome._replace(state=FAILED, told=lost)
    except DeviceLost as lost:
        outcome, alive = Outcome(FAILED, (row_entry(lost.row),), str(lost)), False
    except KeyboardInterrupt:
        record.end(unit.name, Outcome(STOPPED, told="Ctrl-C"), time.monotonic() - began)
        raise
    except Exception as error:  # what a unit raises is its result
        outcome = Outcome(FAILED, told=told(error))
        alive = _alive(setting.device)
    record.end(unit.name, outcome, time.monotonic() - began)
    write_text(setting.out / REPORT, page(record))
    give_back_memory()
    if alive and setting.device == "cuda":
        torch.cuda.empty_cache()
    return alive


def _alive(device: str) -> bool:
    try:
        wait(device)
    except Exception:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """What `command` starts: a setting in JSON, when the call began, its minutes."""
    parser = argparse.ArgumentParser(prog="python -m fused_losses.first_hour.worker")
    parser.add_argument("setting")
    parser.add_argument("began", type=float)
    parser.add_argument("minutes", type=float)
    args = parser.parse_args(argv)
    given = json.loads(args.setting)
    given["out"] = Path(given["out"])
    for name in ("ops", "cases", "stages"):
        given[name] = None if given[name] is None else tuple(given[name])
    try:
        return run(Setting(**given), Clock(args.began, args.minutes))
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
