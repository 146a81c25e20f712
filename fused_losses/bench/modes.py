"""What `fused-losses bench` does besides its cases: --compare, --breakdown and --growth; the page.

The record of each lies in the folder under its own name; report.html shows all that are there.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fused_losses.base.files import write_text
from fused_losses.bench import breakdown, growth, history, host, html
from fused_losses.bench.table import CASES, Shape
from fused_losses.version import __version__

RECORDS = ("result.json", "breakdown.json", "growth.json")
STEPS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of these, which `bench` has besides its own."""
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="what got slower from run A to run B beyond the noise; a run is a result.json or its "
        "number in the history of --out, -1 the last (default: measure)",
    )
    parser.add_argument(
        "--breakdown",
        nargs="?",
        const="",
        choices=("", *CASES),
        metavar="CASE",
        help="only: the shares of products, exponentials, packing, page faults and idle threads in "
        f"a step on the CPU (default: measure; with no CASE {' and '.join(breakdown.USUAL)})",
    )
    parser.add_argument(
        "--growth",
        nargs="?",
        const="",
        choices=("", *growth.SWEEPS),
        metavar="PRIMITIVE",
        help="only: how time grows with C, N·M and D on one thread and on all, and where it jumps "
        "(default: measure; with no PRIMITIVE all)",
    )


def asked(args: argparse.Namespace) -> bool:
    """Whether any of these is."""
    return args.compare is not None or args.breakdown is not None or args.growth is not None


def write_page(out: Path) -> None:
    """report.html of the records that the folder has, those of an older format left out."""
    found = [json.loads((out / name).read_text()) for name in RECORDS if (out / name).is_file()]
    of_today = [record for record in found if record.get("format") == history.FORMAT]
    write_text(out / "report.html", html.page(of_today))


def begun(device: str, say: Callable[[str], None]) -> dict[str, Any]:
    """A record without results: version, machine and its peaks."""
    say("peaks of this machine")
    state = host.state(device, host.measured(device))
    say("")
    return {"format": history.FORMAT, "version": __version__, "host": state}


def finish(out: Path, record: dict[str, Any], name: str) -> None:
    """Writes the record under its name, a line of the history and the page."""
    record["host"]["load_at_end"] = host.load()
    write_text(out / name, json.dumps(record, indent=1) + "\n")
    history.append(out, record)
    write_page(out)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """One of them; 130 after Ctrl-C, with what was measured so far."""
    if args.compare is not None:
        return history.run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    if args.breakdown is not None:
        if args.device != "cpu":
            print(
                "fused-losses bench: --breakdown: expected --device cpu, samples are of its threads"
            )
            return 2
        status = _written(args, "breakdown", _breakdowns(args, say), [], breakdown.table, say)
    if args.growth is not None and status == 0:
        names = (args.growth,) if args.growth else tuple(growth.SWEEPS)
        found = growth.swept(args.device, names, say)
        status = _written(args, "growth", found, growth.HEAD, growth.table, say)
    return status


def _breakdowns(args: argparse.Namespace, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    def shapes(name: str) -> list[Shape]:
        entry = CASES[name]
        return getattr(args, entry.sizes) or entry.usual()[:1]

    names = (args.breakdown,) if args.breakdown else breakdown.USUAL
    return breakdown.cases(names, shapes, args.rounds, say)


def _written(
    args: argparse.Namespace,
    kind: str,
    found: Iterator[dict[str, Any]],
    head: list[str],
    table: Callable[[dict[str, Any]], list[str]],
    say: Callable[[str], None],
) -> int:
    """Prints and writes each result as it comes."""
    record: dict[str, Any] = begun(args.device, say) | {kind: []}
    text = [f"# {kind} of fused_losses {__version__}", "", *host.lines(record["host"]), "", *head]
    print("\n".join(text))
    status, last = 0, "written to"
    try:
        for result in found:
            say("")
            record[kind].append(result)
            lines = table(result)
            print("\n".join(lines))
            text += lines
            write_text(args.out / f"{kind}.json", json.dumps(record, indent=1) + "\n")
            write_text(args.out / f"{kind}.md", "\n".join(text) + "\n")
    except KeyboardInterrupt:
        status, last = 128 + signal.SIGINT, "stopped by Ctrl-C; what was measured is in"
    if record[kind]:
        finish(args.out, record, f"{kind}.json")
    print(f"\n{len(record[kind])} results of {kind}; {last} {args.out}")
    return status
