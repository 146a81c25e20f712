"""`fused-losses bench`: runs the cases and writes table.md, result.json and plots."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_losses.base.records import StatusLine, one_of
from fused_losses.bench import busy, host, html, measure, modes, small
from fused_losses.bench.measure import Result
from fused_losses.bench.micro import cases, peers
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.plots import plotted
from fused_losses.bench.record import BenchRecord, Found
from fused_losses.bench.table import CASES, SIZES, SUITES, Shape, title

SMALL, BUSY = "small", "busy"
GROWTH = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-losses bench`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="folder to write to (default: runs/bench)",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed turns of each provider (default: 7)"
    )
    parser.add_argument(
        "--case",
        type=one_of(CASES, "case"),
        action="append",
        metavar="CASE",
        help=f"may be repeated (default: all): {', '.join(CASES)}",
    )
    for option, sizes in SIZES.items():
        usual = [",".join(map(str, shape)) for shape in sizes.usual]
        usual += [
            f"{name}: {','.join(map(str, entry.own))}"
            for name, entry in CASES.items()
            if entry.sizes == option and entry.own
        ]
        parser.add_argument(
            f"--{option}",
            type=_sizes(len(sizes.letters.split(","))),
            action="append",
            metavar=sizes.letters,
            help=f"{sizes.what}; may be repeated (default {'; '.join(usual)})",
        )
    parser.add_argument(
        "--suite",
        type=one_of((*SUITES, SMALL, BUSY), "suite"),
        metavar="SUITE",
        help=f"cases of one kind, which --case narrows: {', '.join(SUITES)}; small: N = 32 to "
        "1,024; busy: N = 1,024 beside other processes (default: every case at its own shape)",
    )
    parser.add_argument(
        "--no-growth",
        action="store_true",
        help="skip the cost against C, which --case and --suite skip, too",
    )
    modes.add_arguments(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda (default: cuda where there is a GPU)")  # fmt: skip


def _sizes(count: int) -> Callable[[str], tuple[int, ...]]:
    def sizes(text: str) -> tuple[int, ...]:
        try:
            found = tuple(int(part) for part in text.split(","))
        except ValueError:
            found = ()
        if len(found) != count or min(found) < 1:
            raise argparse.ArgumentTypeError(f"expected {count} sizes from 1 on, got {text!r}")
        return found

    return sizes


def _wanted(args: argparse.Namespace) -> list[str]:
    """The cases that the options leave; ValueError where a --case is none of the suite's."""
    of_suite = {SMALL: list(dict(small.SHAPES)), BUSY: list(busy.LOSSES), None: list(CASES)}
    names = SUITES[args.suite] if args.suite in SUITES else of_suite[args.suite]
    for name in args.case or ():
        if name not in names:
            raise ValueError(
                f"--case {name}: expected one of --suite {args.suite}: {', '.join(names)}"
            )
    return [name for name in names if not args.case or name in args.case]


def _planned(args: argparse.Namespace) -> Iterator[tuple[str, Shape, int, Case]]:
    """A file name, sizes, rounds and the case, made when its turn comes."""
    wanted = _wanted(args)
    if args.suite == SMALL:
        for name, shape in small.SHAPES:
            if name in wanted:
                case = small.chosen(CASES[name].case(shape, args.device))
                yield title(name, shape), shape, args.rounds, case
        return
    for name in wanted:
        entry = CASES[name]
        for shape in getattr(args, entry.sizes) or entry.usual():
            rounds = entry.rounds(args.rounds, shape)
            for dtype in entry.dtypes(args.device):
                case = entry.case(shape, args.device, dtype)
                yield title(name, shape, dtype), shape, rounds, case


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the folder; 1 if a provider failed or disagreed.

    Ctrl-C leaves the cases done, and 130; options that do not go together: 2.
    """
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print(f"--device {args.device}: torch {torch.__version__} sees no GPU")
        return 1
    say = StatusLine().show
    if modes.asked(args):
        return modes.run(args, say)
    try:
        _wanted(args)
    except ValueError as error:
        print(f"fused-losses bench: {error}", file=sys.stderr)
        return 2
    head = [_machine(), ""]
    kept = BenchRecord(args.out, "cases", args.device, say, name="result", page="table", head=head)
    kept.record["machine"] = _machine()
    measured = _busy if args.suite == BUSY else _measured
    status = kept.gather(measured(args, kept, say))
    absent = [f"Without {name}: {why}." for name, why in sorted(peers.ABSENT.items())]
    if absent:
        kept.record["without"] = dict(peers.ABSENT)
        kept.tell([*absent, ""])
    rows = [row for case in kept.found for row in case["results"]]
    errors = sum(row["error"] is not None for row in rows)
    counts = f"{len(kept.found)} cases, {len(rows)} rows, {errors} failed or disagreed"
    return kept.end(status or int(errors > 0), counts)


def _measured(
    args: argparse.Namespace, kept: BenchRecord, say: Callable[[str], None]
) -> Iterator[Found]:
    """Every case; then how the small ones cross, or the cost against C."""
    peaks = host.Peaks(**kept.record["host"]["peaks"])
    against_n: list[tuple[str, int, list[Result]]] = []
    for name, shape, rounds, case in _planned(args):
        results = measure.paired(case, rounds, say, args.device)
        say("")
        floors = _floors(case, results, peaks)
        lines = [*table(case, results, floors, args.device), ""]
        yield lines, [_recorded(case.title, case, shape, results, floors)]
        against_n.append((case.title.split(",")[0], shape[0], results))
        _plot_bars(args.out / f"{name}.png", case, results)
        del case
        measure.give_back_memory()
    if args.suite == SMALL:
        yield small.crossings(against_n), []
    elif not (args.no_growth or args.case or args.suite):
        lines, points = growth(args.device)
        kept.record["growth"] = points
        yield lines, []
        _plot_growth(args.out / "growth.png", points)


def _busy(
    args: argparse.Namespace, kept: BenchRecord, say: Callable[[str], None]
) -> Iterator[Found]:
    """Losses beside other processes."""
    peaks = host.Peaks(**kept.record["host"]["peaks"])
    for name in _wanted(args):
        case = busy.chosen(CASES[name].case(busy.SHAPE, args.device))
        found = busy.measured(case, args.rounds, say)
        say("")
        entries = []
        for load, results in found.items():
            floors = _floors(case, results, peaks)
            told = f"{case.title}, {load}"
            entries.append(_recorded(told, case, busy.SHAPE, results, floors))
        yield busy.table(case.title, found), entries


def _recorded(
    title: str,
    case: Case,
    shape: Shape,
    results: list[Result],
    floors: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    return {
        "title": title,
        "shape": list(shape),
        "flops_floor": case.flops,
        "bytes_floor": case.bytes,
        "ours": case.ours,
        "results": [asdict(r) | floors[r.name] for r in results],
    }


def _machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels "
        f"{cases.capability()}, {platform.machine()}{gpu}"
    )


def _floors(
    case: Case, results: list[Result], peaks: host.Peaks
) -> dict[str, dict[str, float | None]]:
    """Of each row the least time that this machine could take, and its share of the median."""
    found: dict[str, dict[str, float | None]] = {}
    for r in results:
        floor = host.floor_ms(peaks, case.flops, case.bytes, host.in_low(case.title, r.name))
        share = floor / r.median_ms if r.times_ms else None
        found[r.name] = {"floor_ms": floor, "share_of_floor": share}
    return found


def table(
    case: Case,
    results: list[Result],
    floors: dict[str, dict[str, float | None]] | None = None,
    device: str = "cpu",
) -> list[str]:
    """Markdown: time (on a GPU in µs), memory, and for our rows the ratio against every rival."""
    unit, times = ("µs", 1e3) if torch.device(device).type == "cuda" else ("ms", 1.0)
    rivals = [r for r in results if r.name not in case.ours]
    heads = "".join(f" vs {r.name} |" for r in rivals)
    lines = [
        f"## {case.title}",
        "",
        f"Floor: {case.flops / 1e9:,.0f} GFLOP of {case.flops_of}, "
        f"{case.bytes / 2**20:,.0f} MiB read and written once. Ratios are medians of paired turns, "
        "times medians and quartiles; of floor: the floor by this machine's peaks over the time; "
        f"off: {_off(case, results)}.",
        "",
        f"| | {unit} | of floor | extra MiB | off |{heads}",
        "|---|---|---|---|---|" + "---|" * len(rivals),
    ]
    for r in results:
        if r.error:
            lines.append(f"| {r.name} | {r.error} | | | |" + " |" * len(rivals))
            continue
        off = "" if r.difference is None else f"{r.difference:.0e}"
        if r.errors is not None:
            off += " (" + ", ".join(f"{error:.0e}" for error in r.errors) + ")"
        share = floors[r.name]["share_of_floor"] if floors else None
        reached = "" if share is None else f"{share:.0%}"
        spread = " to ".join(html.digits(times * q) for q in html.quartiles(r.times_ms))
        time = f"{html.digits(times * r.median_ms)} ({spread})"
        row = f"| {r.name} | {time} | {reached} | {r.extra_mib:,.1f} | {off} |"
        for rival in rivals:
            ratio = measure.paired_ratio(r, rival) if r.name in case.ours else float("nan")
            row += " |" if ratio != ratio else f" {ratio:.2f}x |"
        lines.append(row)
    return lines


def _off(case: Case, results: list[Result]) -> str:
    judges = list(dict.fromkeys(r.held_to for r in results if r.held_to))
    if case.differ is not None:
        return f"the share of results that are not those of {' and '.join(judges) or 'any'}"
    text = f"the result and gradients from {' and '.join(judges) or 'nothing'}, relative L2"
    if case.tells_errors:
        text += " (the result's worst relative error, the gradients' in L2)"
    return text


def growth(device: str, n: int = 128, d: int = 512) -> tuple[list[str], list[dict[str, float]]]:
    """Our float32 time and memory against the number of classes, with a straight-line fit.

    The least of seven turns a point: page faults of the fresh gradient come on top at random.
    """
    points, status = [], StatusLine()
    for c in GROWTH:
        status.show(f"growth: C={c:,}")
        case = cases.margin_softmax(n, c, d, device, rivals="none")
        case.providers = {"fused fp32": case.providers["fused fp32"]}
        result = measure.paired(case, 7, device=device)[0]
        points.append({"classes": c, "ms": min(result.times_ms), "extra_mib": result.extra_mib})
        del case
        measure.give_back_memory()
    status.show("")
    x, y = [p["classes"] for p in points], [p["ms"] for p in points]
    fit = statistics.linear_regression(x, y)
    r2 = statistics.correlation(x, y) ** 2
    lines = [
        f"## Cost against C, fused fp32, B={n} D={d}",
        "",
        f"ms = {fit.slope * 1e5:.1f} per 100,000 classes + {fit.intercept:.1f}; R^2 = {r2:.5f}",
        "",
        "| C | ms | ms per 100,000 classes | extra MiB |",
        "|---|---|---|---|",
    ]
    for p in points:
        each = p["ms"] / p["classes"] * 1e5
        lines.append(f"| {p['classes']:,} | {p['ms']:,.1f} | {each:.1f} | {p['extra_mib']:.1f} |")
    return lines, points


def _plot_bars(path: Path, case: Case, results: list[Result]) -> None:
    done = [r for r in results if r.times_ms][::-1]
    colours = ["tab:blue" if r.name in case.ours else "tab:gray" for r in done]

    def draw(figure: Any, left: Any, right: Any) -> None:
        left.barh([r.name for r in done], [r.median_ms for r in done], color=colours)
        left.set_xlabel("ms, forward + backward")
        right.barh([r.name for r in done], [r.extra_mib for r in done], color=colours)
        right.set_xlabel("MiB beyond inputs and gradients")
        right.set_xscale("log")
        figure.suptitle(case.title)

    plotted(path, draw, ncols=2, figsize=(11, 0.4 * len(done) + 1.5), sharey=True)


def _plot_growth(path: Path, points: list[dict[str, float]]) -> None:
    def draw(_: Any, axes: Any) -> None:
        axes.loglog([p["classes"] for p in points], [p["ms"] for p in points], "o-")
        axes.set_xlabel("classes")
        axes.set_ylabel("ms, forward + backward")

    plotted(path, draw, figsize=(6, 4))
