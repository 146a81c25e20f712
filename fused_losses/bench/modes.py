"""What `fused-losses bench` does besides its cases: --compare, --breakdown and --growth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from fused_losses.base.records import one_of
from fused_losses.bench import breakdown, growth, history
from fused_losses.bench.record import BenchRecord, Found
from fused_losses.bench.table import CASES, Shape


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
        const=False,
        type=one_of(CASES, "case"),
        metavar="CASE",
        help="only: the shares of products, exponentials, packing, page faults and idle threads in "
        f"a step on the CPU (default: measure; with no CASE {' and '.join(breakdown.USUAL)})",
    )
    parser.add_argument(
        "--growth",
        nargs="?",
        const=False,
        type=one_of(growth.SWEEPS, "primitive"),
        metavar="PRIMITIVE",
        help="only: how time grows with C, N·M and D on one thread and on all, and where it jumps "
        "(default: measure; with no PRIMITIVE all)",
    )


def asked(args: argparse.Namespace) -> bool:
    """Whether any of these is."""
    return args.compare is not None or args.breakdown is not None or args.growth is not None


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """One of them; 130 after Ctrl-C, with what was measured so far."""
    if args.compare is not None:
        return history.run(args)
    status = 0
    if args.breakdown is not None:
        if args.device != "cpu":
            print(
                "fused-losses bench: --breakdown: expected --device cpu, samples are of its threads"
            )
            return 2
        found = _breakdowns(args, say)
        status = _written(args, "breakdown", found, breakdown.table, [], say)
    if args.growth is not None and status == 0:
        names = (args.growth,) if args.growth else tuple(growth.SWEEPS)
        found = growth.swept(args.device, names, say)
        status = _written(args, "growth", found, growth.table, growth.HEAD, say)
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
    results: Iterator[dict[str, Any]],
    table: Callable[[dict[str, Any]], list[str]],
    head: list[str],
    say: Callable[[str], None],
) -> int:
    """Prints and writes each result as it comes."""
    kept = BenchRecord(args.out, kind, args.device, say, head=head)

    def found() -> Iterator[Found]:
        for result in results:
            say("")
            yield table(result), [result]

    status = kept.gather(found())
    return kept.end(status, f"{len(kept.found)} results of {kind}")
