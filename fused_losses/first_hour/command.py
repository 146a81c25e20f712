"""The command `fused-losses first-hour`: starts the process that runs units, and watches it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from fused_losses.base.files import write_text
from fused_losses.base.records import BY_CTRL_C, StatusLine, one_of
from fused_losses.bench.roofline.ops import ops
from fused_losses.bench.table import CASES
from fused_losses.first_hour.page import page
from fused_losses.first_hour.plan import NAMES
from fused_losses.first_hour.probe import identity
from fused_losses.first_hour.record import FAILED, LINES, REPORT, STOPPED, HourRecord, Outcome
from fused_losses.first_hour.setting import Setting, rehearsal_environment
from fused_losses.first_hour.worker import DONE, LOST
from fused_losses.verify.command import op_name

UNIT_SECONDS = 300.0  # a unit that takes longer hangs, or compiles for ever: it has failed
POLL_SECONDS = 0.1
FRESH_AT_ONCE = 20  # processes in a row that end without a unit's end: the machine is at fault


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a rehearsal at small shapes, kernels interpreted or executed on the host "
        "(default: cuda)",
    )
    parser.add_argument("--minutes", type=_minutes, default=25.0, help="when to stop (default: 25)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/first-hour"),
        help=f"folder for {LINES} and {REPORT}; a second call goes on there "
        "(default: runs/first-hour)",
    )
    parser.add_argument(
        "--op", type=op_name, action="append", metavar="NAME",
        help="a row's or function's name as for verify; may be repeated (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--case", type=one_of({*CASES, *(op.name for op in ops())}, "case"), action="append",
        metavar="NAME", help="of bench or roofline; may be repeated (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--stage",
        type=one_of(NAMES, "stage"),
        action="append",
        metavar="STAGE",
        help=f"{', '.join(NAMES)}; may be repeated (default: all)",
    )
    parser.add_argument(
        "--unit-seconds", type=_minutes, default=UNIT_SECONDS,
        help="one unit may take so long (default: 300)",
    )  # fmt: skip


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """0 if no unit failed, 1 if one did or the folder is another machine's.

    130 after Ctrl-C, 143 after SIGTERM.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        say(f"--device cuda: torch {torch.__version__} sees no GPU; --device cpu rehearses")
        return 1
    setting = Setting(
        args.device,
        args.out,
        tuple(args.op) if args.op else None,
        tuple(args.case) if args.case else None,
        tuple(args.stage) if args.stage else None,
        rehearsal_environment(args.device),
    )
    record = HourRecord(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    mine, theirs = identity(setting), [e["identity"] for e in record.lines if "identity" in e]
    if theirs and theirs[0] != mine:
        say(f"--out {args.out}: its lines are of {theirs[0]}, this machine is {mine}")
        return 1
    record.note(identity=mine, minutes=args.minutes)
    code = watched(setting, record, args.minutes, args.unit_seconds, say)
    write_text(args.out / REPORT, page(record))
    found = Counter(entry["state"] for entry in record.ended().values())
    say(f"{', '.join(f'{n} {state}' for state, n in sorted(found.items())) or 'nothing done'}; "
        f"{args.out / REPORT}")  # fmt: skip
    return code or int(bool(found[FAILED] or not found))


def watched(
    setting: Setting,
    record: HourRecord,
    minutes: float,
    unit_seconds: float,
    say: Callable[[str], None],
) -> int:
    """Processes of units, one after the other, until all have ended or the time is over."""
    began, status = time.time(), StatusLine()
    ends, idle = began + 60 * minutes, 0
    while idle < FRESH_AT_ONCE:
        for unit in record.cut():
            record.end(unit, Outcome(FAILED, told="its processes were cut without a word"))
        before = len(record.ended())
        process: subprocess.Popen | None = None
        try:
            with _terminated_like_ctrl_c():  # from the start on: nobody else ends the process
                process = start(setting, began, minutes)
                why = _wait(process, record, setting, ends, unit_seconds, status)
        except KeyboardInterrupt as stop:
            if process is not None:
                _end(process)
            status.show("")
            name = "SIGTERM" if isinstance(stop, Terminated) else "Ctrl-C"
            _close(record, STOPPED, name)
            say(f"stopped by {name}: what was measured so far is kept, and a second call goes on")
            return BY_CTRL_C if name == "Ctrl-C" else 128 + signal.SIGTERM
        status.show("")
        if why == "over":
            _close(record, STOPPED, f"the {minutes:g} minutes were over")
            say(f"the {minutes:g} minutes are over; a second call goes on")
            return 0
        if why:
            _close(record, FAILED, why)
        elif process.returncode == DONE:
            if time.time() >= ends:
                say(f"the {minutes:g} minutes are over; a second call goes on")
            return 0
        elif process.returncode != LOST:
            # a crash: what it was doing has failed
            _close(record, FAILED, f"the process ended with status {process.returncode}")
        idle = 0 if len(record.ended()) > before else idle + 1
        if idle >= 2 and not record.running():
            break
    say("the process of the units ends before it does any")
    return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a limit of time on a command ends it."""


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start(setting: Setting, began: float, minutes: float) -> subprocess.Popen:
    """A process of units; what it writes goes to worker.log."""
    given = json.dumps(asdict(setting), default=str)
    command = [sys.executable, "-m", "fused_losses.first_hour.worker", given]
    with open(setting.out / "worker.log", "a") as log:
        return subprocess.Popen(
            [*command, str(began), str(minutes)],
            env=os.environ | setting.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us, who pass it on
        )


def _wait(
    process: subprocess.Popen,
    record: HourRecord,
    setting: Setting,
    ends: float,
    unit_seconds: float,
    status: StatusLine,
) -> str:
    """Until the process ends, by itself or by us; why we ended it, or nothing."""
    size = -1
    running: dict[str, float] = {}
    lines = setting.out / LINES
    while process.poll() is None:
        if lines.stat().st_size != size:
            size = lines.stat().st_size
            running = record.running()
            status.show(f"{len(record.ended())} units done; {', '.join(running)}")
        now = time.time()
        if now >= ends:
            _end(process)
            return "over"
        if any(now - began > unit_seconds for began in running.values()):
            _kill(process)
            return f"took longer than {unit_seconds:g} s"
        time.sleep(POLL_SECONDS)
    return ""


def _end(process: subprocess.Popen) -> None:
    """A process that does not listen to SIGINT is killed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """The process and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _close(record: HourRecord, state: str, why: str) -> None:
    for unit in record.running():
        record.end(unit, Outcome(state, told=why))
