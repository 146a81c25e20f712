"""`fused-losses bench`: runs the cases and writes table.md, result.json and plots."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_losses.base.files import write_text
from fused_losses.base.records import StatusLine
from fused_losses.bench import busy, host, html, measure, modes, small
from fused_losses.bench.measure import Result
from fused_losses.bench.micro import cases
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.plots import plotted
from fused_losses.bench.table import CASES, SIZES, Shape, title
from fused_losses.version import __version__

SUITES = {"small": small.SHAPES}
BUSY = "busy"
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
        "--case", choices=CASES, action="append", help="may be repeated (default all)"
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
        choices=[*SUITES, BUSY],
        help="small: N = 32 to 1,024, and no growth; busy: N = 1,024 beside other processes "
        "(default: every case at its own shape)",
    )
    parser.add_argument(
        "--no-growth",
        action="store_true",
        help="skip the cost against C, which a --case skips, too",
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


def _planned(args: argparse.Namespace) -> Iterator[tuple[str, Shape, int, Case]]:
    """A file name, sizes, rounds and the case, made when its turn comes."""
    if args.suite:
        for name, shape in SUITES[args.suite]:
            if not args.case or name in args.case:
                case = small.chosen(CASES[name].case(shape, args.device))
                yield title(name, shape), shape, args.rounds, case
        return
    for name, entry in CASES.items():
        if args.case and name not in args.case:
            continue
        for shape in getattr(args, entry.sizes) or entry.usual():
            rounds = entry.rounds(args.rounds, shape)
            for dtype in entry.dtypes(args.device):
                yield (
                    title(name, shape, dtype),
                    shape,
                    rounds,
                    entry.case(shape, args.device, dtype),
                )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the folder; 1 if a provider failed or disagreed with ours.

    Ctrl-C leaves the cases done, and 130.
    """
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print(f"--device {args.device}: torch {torch.__version__} sees no GPU")
        return 1
    say = StatusLine().show
    if modes.asked(args):
        return modes.run(args, say)
    args.out.mkdir(parents=True, exist_ok=True)
    record = modes.begun(args.device, say) | {"machine": _machine(), "cases": []}
    text = [f"# Benchmarks of fused_losses {__version__}", "", _machine(), ""]
    text += [*host.lines(record["host"]), ""]
    print("\n".join(text))
    try:
        measured = _measure_busy if args.suite == BUSY else _measure
        failed = measured(args, text, record)
    except KeyboardInterrupt:
        if record["cases"]:
            modes.finish(args.out, record, "result.json")
        print(f"\nstopped by Ctrl-C; the {len(record['cases'])} cases done are in {args.out}")
        return 128 + signal.SIGINT
    modes.finish(args.out, record, "result.json")
    rows = [r for case in record["cases"] for r in case["results"]]
    errors = sum(r["error"] is not None for r in rows)
    counts = f"{len(record['cases'])} cases, {len(rows)} rows, {errors} failed or disagreed"
    print(f"\n{counts}; written to {args.out}")
    return int(failed)


def _measure(args: argparse.Namespace, text: list[str], record: dict[str, Any]) -> bool:
    """Every case, written as soon as it is done; whether a provider failed."""
    failed, status = False, StatusLine()
    peaks = host.Peaks(**record["host"]["peaks"])
    against_n: list[tuple[str, int, list[Result]]] = []
    for name, shape, rounds, case in _planned(args):
        results = measure.paired(case, rounds, status.show, args.device)
        failed = failed or any(r.error for r in results)
        status.show("")
        floors = _floors(case, results, peaks)
        lines = table(case, results, floors, args.device)
        print("\n".join(lines))
        text += [*lines, ""]
        record["cases"].append(_recorded(case.title, case, shape, results, floors))
        against_n.append((case.title.split(",")[0], shape[0], results))
        _plot_bars(args.out / f"{name}.png", case, results)
        _write(args.out, text, record)
        del case
        measure.give_back_memory()
    if args.suite:
        lines = small.crossings(against_n)
        print("\n".join(lines))
        text += lines
    elif not (args.no_growth or args.case):
        lines, points = growth(args.device)
        print("\n".join(lines))
        text += lines
        record["growth"] = points
        _plot_growth(args.out / "growth.png", points)
    _write(args.out, text, record)
    return failed


def _measure_busy(args: argparse.Namespace, text: list[str], record: dict[str, Any]) -> bool:
    """Losses beside other processes; whether a provider failed."""
    failed, status = False, StatusLine()
    peaks = host.Peaks(**record["host"]["peaks"])
    for name in busy.LOSSES:
        if args.case and name not in args.case:
            continue
        case = busy.chosen(CASES[name].case(busy.SHAPE, args.device))
        found = busy.measured(case, args.rounds, status.show)
        status.show("")
        lines = busy.table(case.title, found)
        print("\n".join(lines))
        text += lines
        for load, results in found.items():
            floors = _floors(case, results, peaks)
            record["cases"].append(
                _recorded(f"{case.title}, {load}", case, busy.SHAPE, results, floors)
            )
        failed = failed or any(r.error for results in found.values() for r in results)
        _write(args.out, text, record)
    return failed


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


def _write(out: Path, text: list[str], record: dict[str, Any]) -> None:
    write_text(out / "table.md", "\n".join(text) + "\n")
    write_text(out / "result.json", json.dumps(record, indent=1) + "\n")


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
        f"off: {_off(case)}.",
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


def _off(case: Case) -> str:
    if case.differ is not None:
        return "the share of results that are not the first row's"
    text = "the result and gradients from the first row's, relative L2"
    if case.truth is not None:
        text += " (from float64: the result's worst relative error, the gradients' in L2)"
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
