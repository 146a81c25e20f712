"""`fused-losses roofline`: bytes and FLOPs of every operation against its floor, without a GPU.

The host code runs on tensors without data (`trace.Trace`); a launch takes as long as its busiest
resource at the peaks of `peaks.PEAKS`, and a call the sum of its launches. Nothing here is a
measurement: such a time is a bound that no run can beat if the peaks and the bytes are right.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_losses.base.records import one_of
from fused_losses.bench.plots import plotted
from fused_losses.bench.roofline.cost import Cost, cost, traced
from fused_losses.bench.roofline.operation import PLAIN, Operation
from fused_losses.bench.roofline.ops import ops
from fused_losses.bench.roofline.peaks import PEAKS, PEERS, Peak
from fused_losses.bench.roofline.work import Work

DRAM_LIMIT = 1.3  # of the floor

# what a backend moves beyond its floor or its best peer, and why; by operation and direction
WHY = {
    "margin_softmax, forward, triton": "On an H100 256 rows of x stay with a program "
    "(forward_resident) and W is read once for them; on the others tiles of 128 x 256 read it for "
    "128 rows, as cut-cross-entropy does. 1/|w| is one more reading of W, by one launch before "
    "the other: chunks of W that stay in L2 between both took 80 launches to spare its bytes.",
    "margin_softmax, backward, triton": "G, and dW in float32 before its norm, pass through DRAM "
    "and not L2: in chunks of 8 MiB the bytes were the floor's, and the launches 1,225, whose host "
    "side alone takes 14 ms. The chunks are as few as memory allows (`gpu/device.py`, "
    "`stored_bytes`).",
    "linear_cross_entropy, forward, triton": "Rows of D = 1024 fit in no shared memory: tiles of "
    "128 x 256.",
    "linear_cross_entropy, backward, triton": "G is a chunk of columns for all rows and passes "
    "through DRAM; x, and the float32 sums of dx, pass once for every chunk.",
    "info_nce, forward, triton": "Two classes of pairs and two sides take registers: 128 x "
    "128, which is memeff's tile, spills. y passes once for every 8,192 rows.",
    "info_nce, backward, triton": "Tiles of 128 x 64 recompute the scores (half of the bytes), "
    "and G passes through products. The float32 sums of dx pass once for every run of columns: "
    "with sums of all of dy besides they could stay, at twice the memory.",
    "sigmoid, forward, triton": "y passes once for every 8,192 rows.",
    "sigmoid, backward, triton": "As info_nce.",
    "pair_attention, forward, triton": "One sweep for the lse, one for the weights: a running "
    "rescaling of the output would be a third product in the first sweep.",
    "batch_hard, forward, triton": "One screen for positives and one for negatives, and the "
    "lists of every split; the floor is 4 MB.",
    "euclidean, backward, triton": "grad and out pass once for dx and once for dy.",
    "cityblock, backward, cuda": "grad passes once for dx and once for dy, and for every 64 "
    "coordinates.",
    "pair_attention, backward, triton": "As info_nce; two products a tile.",
}


@dataclass(frozen=True)
class WayCosts:
    """One way to compute an operation, on every GPU."""

    op: Operation
    way: str
    costs: dict[str, Cost]  # by GPU

    def over(self, gpu: str) -> float:
        return self.costs[gpu].dram / self.op.floor


def rows(names: list[str] | None = None, wanted: tuple[str, ...] = ()) -> list[WayCosts]:
    """Every way of these operations, or those that are wanted, with its costs."""
    found = []
    for op in ops():
        if names and op.name not in names:
            continue
        for way in wanted or op.ways:
            costs: dict[str, Cost] = {}
            works: dict[str, list[Work]] = {}
            for gpu, peak in PEAKS.items():
                if peak.arch not in works:
                    works[peak.arch] = traced(op, way, peak)
                costs[gpu] = cost(works[peak.arch], peak)
            found.append(WayCosts(op, way, costs))
    return found


def bound_seconds(op: Operation, peak: Peak) -> float:
    """No run is faster: the floor through DRAM, or the products."""
    return max(op.floor / peak.dram, op.flops / peak.half)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def page(found: list[WayCosts]) -> str:
    gpus = list(PEAKS)
    out = [HEAD]
    ran = dict.fromkeys((a.op.name, a.op.direction) for a in found)
    out += ["| operation | form | products, TFLOP | GB, L2 | GB, DRAM | of the floor | ms, "]
    out[-1] += " | ms, ".join(gpus) + " | launches | ms with them | busiest on H100 |"
    out.append("| --- | --- " + "| ---: " * (6 + len(gpus)) + "| --- |")
    for key in ran:
        same = [a for a in found if (a.op.name, a.op.direction) == key]
        op = same[0].op
        times = " | ".join(figure(1e3 * bound_seconds(op, PEAKS[gpu])) for gpu in gpus)
        floor = f"{figure(op.flops / 1e12)} | | {figure(op.floor / 1e9)} | 1 | {times} | | | |"
        out.append(f"| **{op.name}, {op.direction}**, {op.shape} | floor | {floor}")
        for a in same:
            c = a.costs["H100"]
            moved = f"{figure(c.flops / 1e12)} | {figure(c.l2 / 1e9)} | {figure(c.dram / 1e9)}"
            times = " | ".join(figure(1e3 * a.costs[gpu].seconds) for gpu in gpus)
            busy = f"{c.busiest}, in `{c.worst}`"
            times += f" | {c.launches:,} | {figure(1e3 * c.launched)}"
            out.append(f"| | {a.way} | {moved} | {a.over('H100'):.2f} | {times} | {busy} |")
        for peer, (moved, dram) in PEERS.get(key, {}).items():
            ratio = dram * 1e9 / op.floor
            row = f"{figure(moved)} | {figure(dram)} | {ratio:.2f} " + "| " * (len(gpus) + 3) + "|"
            out.append(f"| | *{peer}* | | {row}")
    out += ["", GAPS_HEAD, "", *gaps(found), ""]
    return "\n".join(out)


def gaps(found: list[WayCosts]) -> list[str]:
    """Where our backends move more than they should, in words."""
    out = []
    for a in found:
        if a.way in PLAIN:
            continue
        key = a.op.name, a.op.direction
        name = f"{a.op.name}, {a.op.direction}, {a.way}"
        best = min((moved for moved, _ in PEERS.get(key, {}).values()), default=None)
        wide = {gpu: a.over(gpu) for gpu in PEAKS if a.over(gpu) > DRAM_LIMIT}
        more = best is not None and a.costs["H100"].l2 > best * 1e9
        if not wide and not more:
            continue
        text = f"- **{name}**:"
        if wide:
            text += " DRAM " + ", ".join(f"{v:.1f} x on {gpu}" for gpu, v in wide.items()) + "."
        if best is not None and more:
            text += f" L2 {figure(a.costs['H100'].l2 / 1e9)} GB, the best peer {figure(best)}."
        why = WHY.get(name)
        out.append(f"{text} {why}" if why else text)
    return out


HEAD = """# Bytes, FLOPs, and how far each kernel is from its floor

Made by `fused-losses roofline --out docs/generated`; nothing on this page was measured on a GPU.

- **Bytes and FLOPs** are those of the launches that the host code makes at that shape. What a
  kernel of ours moves is a closed form of the launch's arguments and its tile; the tests hold it to
  what the kernels load, store and multiply when they are executed at small shapes, byte for byte in
  Triton's interpreter. A product of the library is taken for tiles of 128 x 256, on Hopper and
  Blackwell shared by two multiprocessors; every other PyTorch operation reads its arguments and
  writes its results.
- **GB, L2**: between L2 and the multiprocessors, as requested; **GB, DRAM**: what an L2 of
  least-recently-used lines, of three quarters of the real one's size, lets through. Both as on an
  H100. **Floor**: each input once, each output once.
- **ms**: the sum over launches of the busiest resource's time at the peaks of
  `fused_losses/bench/roofline/peaks.py`: datasheet figures, and for L2 an assumption. It is a
  bound, not a prediction of a run: nothing overlaps between launches, everything within one;
  idle multiprocessors and latencies cost nothing.
- **launches**, and **ms with them**: those milliseconds on an H100 and a gap between launches, or
  the host's time for them where that is more (`peaks.py`: the Python side of Triton's launcher was
  measured, the others are stated). A CUDA graph takes the host's part away.
- **eager**: the plain formula, each operation stored. **compiled**: pointwise results are never
  stored, but computed again by each reader; products and selections read stored operands; a softmax
  reads its argument twice.
- *In italics*: kernels written elsewhere, their bytes derived from their tiles.

![bounds on an H100](roofline.svg)
"""
GAPS_HEAD = f"""## Beyond {DRAM_LIMIT} x the floor through DRAM, or beyond the best peer in L2

Of `cuda` with products: a float32 score is stored by the library and read again, 8 to 12 bytes
beside what the product reads (the dispatch table takes this form where the sweep would read more),
and blocks go along runs of columns: rows, and float32 sums of theirs, pass once for every run.
"""

TICKS = (1, 2, 5, 10, 20, 50, 100)
COLOURS = {"triton": "#2a6f97", "cuda": "#d1495b", "eager": "#c9cdd6", "compiled": "#8d99ae"}


def plot(path: Path, found: list[WayCosts], gpu: str = "H100") -> None:
    """Times over the bound of the floor, as bars on a logarithmic axis."""

    def draw(_: Any, axes: Any) -> None:
        names: dict[str, list[int]] = {}
        for y, a in enumerate(found):
            names.setdefault(f"{a.op.name} {a.op.direction}", []).append(y + len(names))
        places = (y for ys in names.values() for y in ys)
        for y, a in zip(places, found, strict=True):
            ratio = a.costs[gpu].seconds / bound_seconds(a.op, PEAKS[gpu])
            # a bar at the bound itself is to be seen
            axes.barh(y, max(ratio, 1.02) - 1, left=1, color=COLOURS[a.way])
        for way, colour in COLOURS.items():
            axes.barh(0, 0, left=1, color=colour, label=way)
        axes.set_yticks([sum(ys) / len(ys) for ys in names.values()], names)
        axes.set(xscale="log", xlim=(1, 100), xlabel=f"time over the bound of the floor, {gpu}")
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.5)
        axes.legend()

    plotted(path, draw, figsize=(8.7, 1.5 + 0.13 * len(found)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fused-losses roofline`."""
    parser.add_argument("--out", type=Path, help="folder to write roofline.md and roofline.svg to "
                        "(default: the page is printed)")  # fmt: skip
    names = sorted({op.name for op in ops()})
    parser.add_argument("--op", type=one_of(names, "op"), action="append", metavar="OP",
                        help=f"may be repeated (default: all): {', '.join(names)}")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints the page, or writes it with its plot."""
    found = rows(args.op)
    if args.out is None:
        print(page(found))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "roofline.md").write_text(page(found))
    plot(args.out / "roofline.svg", found)
    return 0
