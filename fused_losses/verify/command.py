"""The command `fused-losses verify`: arguments, the table on the screen and in files."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fused_losses import backends
from fused_losses.base.examples import TABLE
from fused_losses.base.files import write_text
from fused_losses.base.records import BY_CTRL_C, JsonLines, StatusLine, one_of
from fused_losses.verify import table
from fused_losses.verify.table import ALL, BACKENDS, DTYPES, Chosen, DeviceLost, Row, VerifiedShape
from fused_losses.version import __version__

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def machine(on: Sequence[str]) -> str:
    """What the table was made on."""
    gpu = torch.cuda.get_device_name() if "cuda" in on else platform.machine()
    return f"fused_losses {__version__}, torch {torch.__version__}, {gpu}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all that are here")
    parser.add_argument(
        "--op",
        type=op_name,
        action="append",
        metavar="NAME",
        help="a row's name, or a function's for all its rows; may be repeated (default: all)",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,C,D",
        help="rows, classes, width; may be repeated (default: 37,173,72, on a GPU also larger "
        "ones, which reach further forms of the kernels)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a line of JSON for each row as it is known in FILE, with the ending .jsonl, and at "
        "the end a table in Markdown beside it (default: no file)",
    )


def op_name(text: str) -> str:
    """A row's or function's name of the table; raises for another."""
    names = {name for name, example in TABLE.items() if table.judged(example)}
    return one_of(names | {name.partition(", ")[0] for name in names}, "row of the table")(text)


def _shape(text: str) -> VerifiedShape:
    try:
        n, c, d = (int(part) for part in text.split(","))
    except ValueError:
        n = c = d = 0
    if min(n, c, d) < 1:
        raise argparse.ArgumentTypeError(f"expected three sizes N,C,D from 1 on, got {text!r}")
    return n, c, d


def chosen(args: argparse.Namespace) -> Chosen:
    """What the options leave of the table."""
    return Chosen(
        tuple(args.op) if args.op else None,
        tuple(args.backend) if args.backend else None,
        tuple(DTYPE_NAMES[name] for name in args.dtype) if args.dtype else None,
    )


def run(
    say: Callable[[str], None] = print,
    device: str | None = None,
    shapes: list[VerifiedShape] | None = None,
    out: Path | None = None,
    chosen: Chosen = ALL,
) -> int:
    """Print the table; 0 if every row passes, 1 if one does not, none ran or there is no device.

    A call that raises is a row that failed. Ctrl-C ends it with what was checked so far, and 130.
    """
    on = (device,) if device else table.devices()
    if not set(on) <= set(table.devices()):
        say(f"--device {device}: torch {torch.__version__} sees no {device} device")
        return 1
    lines = None if out is None else JsonLines(out.with_suffix(".jsonl"))
    if lines is not None:
        lines.clear()
        lines.add({"machine": machine(on)})
    say(machine(on))
    say(
        f"{'op':36s} {'backend':16s} {'dtype/precision':18s} {'shape':>14s} {'max error':>10s} "
        f"{'bound':>10s}"
    )
    found: list[Row] = []
    status = StatusLine()

    def add(row: Row) -> None:
        found.append(row)
        if lines is not None:
            lines.add(asdict(row) | {"passed": row.passed})
        status.show("")
        shape = "x".join(map(str, row.shape))
        note = f" {row.note}" if row.note else ""
        say(
            f"{row.op:36s} {row.backend:16s} {row.dtype:18s} {shape:>14s} {row.error:10.1e} "
            f"{row.bound:10.1e} {_verdict(row)}{note}"
        )

    ended = ""
    code = 0
    try:
        for row in table.rows(on=on, shapes=shapes, chosen=chosen, say=status.show):
            add(row)
    except KeyboardInterrupt:  # what was checked stands
        ended = "stopped by Ctrl-C: what comes after these rows was not checked"
        code = BY_CTRL_C
    except DeviceLost as lost:
        add(lost.row)
        ended, code = f"{lost}; what comes after this row was not checked", 1
    status.show("")
    missing = [f"{name}: {state}" for name, state in backends.available().items() if state != "ok"]
    for line in missing:
        say(f"not checked: {line}")
    failed = sum(not row.passed for row in found)
    if lines is not None:
        end = {"passed_rows": len(found) - failed, "failed_rows": failed, "ended": ended or "whole"}
        lines.add(end)
        markdown_file = lines.path.with_suffix(".md")
        write_text(markdown_file, "\n".join([*markdown(found, on, missing), ended]) + "\n")
    say(f"{len(found) - failed} passed, {failed} failed")
    if ended:
        say(ended)
    return code or int(bool(failed or not found))


def _verdict(row: Row) -> str:
    return "pass" if row.passed else "FAIL"


def markdown(found: list[Row], on: Sequence[str], missing: list[str]) -> list[str]:
    """The table in short: the worst row of each op on a backend in a dtype, over the shapes."""
    failed = [row for row in found if not row.passed]
    lines = [f"{machine(on)}: {len(found)} rows, {len(failed)} failed.", "", *short(found)]
    return [*lines, "", *(f"Not checked: {line}." for line in missing)]


def short(found: list[Row]) -> list[str]:
    """A line of Markdown for each op, backend and dtype."""
    lines = [
        "| op | backend | dtype/precision | worst error | bound | at | |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.op, row.backend, row.dtype), []).append(row)
    for (op, backend, dtype), members in groups.items():
        # the row nearest to its bound, or beyond it; NaN is beyond
        worst = max(members, key=lambda r: (not r.passed, r.error - r.bound))
        shape = "x".join(map(str, worst.shape))
        note = f" {worst.note}".replace("|", "\\|") if worst.note else ""
        lines.append(
            f"| {op} | {backend} | {dtype} | {worst.error:.1e} | {worst.bound:.1e} | {shape} "
            f"| {_verdict(worst)}{note} |"
        )
    return lines
