"""`fused-losses bench`: runs the cases and writes table.md, result.json and plots."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fused_losses.bench import cases, measure
from fused_losses.bench.measure import Result
from fused_losses.version import __version__

GROWTH = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder to write to")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each provider")
    parser.add_argument("--shape", type=_shape, action="append", metavar="B,C,D",
                        help="batch, classes, width; may be repeated "
                        "(default 256,100000,512 and 128,1000000,512)")  # fmt: skip
    parser.add_argument("--no-growth", action="store_true", help="skip the cost against C")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def _shape(text: str) -> tuple[int, int, int]:
    n, c, d = (int(part) for part in text.split(","))
    return n, c, d


def _say(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the folder."""
    args.out.mkdir(parents=True, exist_ok=True)
    text = [f"# Benchmarks of fused_losses {__version__}", "", _machine(), ""]
    record: dict[str, object] = {"version": __version__, "machine": _machine(), "cases": []}
    for n, c, d in args.shape or [(256, 100_000, 512), (128, 1_000_000, 512)]:
        case = cases.margin_softmax(n, c, d, args.device)
        rounds = args.rounds if n * c <= 3e7 else max(3, args.rounds // 2)
        results = measure.paired(case.providers, rounds, case.gradients_mib, case.clear, _say)
        _say("")
        lines = table(case, results)
        print("\n".join(lines))
        text += [*lines, ""]
        record["cases"].append(  # type: ignore[attr-defined]
            {"title": case.title, "shape": [n, c, d], "flops_floor": case.flops,
             "bytes_floor": case.bytes, "results": [asdict(r) for r in results]}
        )  # fmt: skip
        _plot_bars(args.out / f"B{n}_C{c}_D{d}.png", case, results)
    if not args.no_growth:
        lines, points = growth(args.device)
        print("\n".join(lines))
        text += lines
        record["growth"] = points
        _plot_growth(args.out / "growth.png", points)
    (args.out / "table.md").write_text("\n".join(text) + "\n")
    (args.out / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {args.out}")
    return 0


def _machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels "
        f"{cases.capability()}, {platform.machine()}{gpu}"
    )


def table(case: cases.Case, results: list[Result]) -> list[str]:
    """Markdown: time, memory, and for our rows the paired ratio against every rival."""
    rivals = [r for r in results if r.name not in case.ours]
    heads = "".join(f" vs {r.name} |" for r in rivals)
    lines = [
        f"## {case.title}",
        "",
        f"Floor: {case.flops / 1e9:,.0f} GFLOP of products (a quarter less with every score "
        f"kept), {case.bytes / 2**20:,.0f} MiB read and written once. Ratios are medians of "
        "paired turns, times medians.",
        "",
        f"| | ms | extra MiB |{heads}",
        "|---|---|---|" + "---|" * len(rivals),
    ]
    for r in results:
        if r.error:
            lines.append(f"| {r.name} | {r.error} | |" + " |" * len(rivals))
            continue
        row = f"| {r.name} | {r.median_ms:,.0f} | {r.extra_mib:,.1f} |"
        for rival in rivals:
            ratio = measure.paired_ratio(r, rival) if r.name in case.ours else float("nan")
            row += " |" if ratio != ratio else f" {ratio:.2f}x |"
        lines.append(row)
    return lines


def growth(device: str, n: int = 128, d: int = 512) -> tuple[list[str], list[dict[str, float]]]:
    """Our float32 time and memory against the number of classes, with a straight-line fit.

    The least of seven turns a point: page faults of the fresh gradient come on top at random.
    """
    points = []
    for c in GROWTH:
        _say(f"growth: C={c:,}")
        case = cases.margin_softmax(n, c, d, device, rivals=False)
        one = {"fused fp32": case.providers["fused fp32"]}
        result = measure.paired(one, 7, case.gradients_mib, case.clear)[0]
        points.append({"classes": c, "ms": min(result.times_ms), "extra_mib": result.extra_mib})
        del case
        measure.give_back_memory()
    _say("")
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


def _pyplot():  # noqa: ANN202
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (extra `bench`)", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _plot_bars(path: Path, case: cases.Case, results: list[Result]) -> None:
    plt = _pyplot()
    if plt is None:
        return
    done = [r for r in results if r.times_ms][::-1]
    colours = ["tab:blue" if r.name in case.ours else "tab:gray" for r in done]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.4 * len(done) + 1.5), sharey=True)
    left.barh([r.name for r in done], [r.median_ms for r in done], color=colours)
    left.set_xlabel("ms, forward + backward")
    right.barh([r.name for r in done], [r.extra_mib for r in done], color=colours)
    right.set_xlabel("MiB beyond inputs and gradients")
    right.set_xscale("log")
    figure.suptitle(case.title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_growth(path: Path, points: list[dict[str, float]]) -> None:
    plt = _pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.loglog([p["classes"] for p in points], [p["ms"] for p in points], "o-")
    axes.set_xlabel("classes")
    axes.set_ylabel("ms, forward + backward")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
