"""`python -m fused_losses.bench.heads`: writes the model's page, simulation.md, and its plot."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_losses.bench.heads.calibration import PARTIAL_FC, PARTIAL_FC_BATCH, Published, compared
from fused_losses.bench.heads.model import (
    FAR_HOP,
    GIB,
    GPUS,
    HOP,
    LINK_SHARE,
    MEMORY_SHARE,
    PRODUCT_SHARE,
    Profile,
    Step,
    gpu_profile,
    memory,
    phase_seconds,
    phases,
    step_seconds,
)
from fused_losses.bench.plots import plotted

CLASSES = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
WORLDS = (1, 8, 64, 512)
RATES = (1.0, 0.1)


class TableFormat(NamedTuple):
    """How a table is held, as the page shows it."""

    title: str
    precision: str
    weight_bytes: int
    state_bytes: int
    embedding_bytes: int


TABLES = (
    TableFormat("bfloat16 table and momentum, 16-bit products", "half", 2, 2, 2),
    TableFormat("float32 table and momentum, float32 products", "split", 4, 4, 4),
)


def _step(table: TableFormat, classes: int, world: int, rate: float) -> Step:
    return Step(
        classes,
        world=world,
        sample_rate=rate,
        weight_bytes=table.weight_bytes,
        state_bytes=table.state_bytes,
        embedding_bytes=table.embedding_bytes,
    )


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def prediction_lines(table: TableFormat, gpu: str = "H100") -> list[str]:
    """Step time and memory of a GPU, by classes and GPUs. What does not fit is in brackets."""
    profile = gpu_profile(gpu, table.precision)
    titles = ["classes", "GPUs", "memory, GiB"]
    for rate in RATES:
        titles += [f"r = {rate:g}: step, ms", "of it between GPUs, ms"]
    lines = [_row(titles), "|" + " ---: |" * len(titles)]
    for classes in CLASSES:
        for world in WORLDS:
            held = sum(memory(_step(table, classes, world, 1.0)).values())
            gib = _three(held / GIB)
            cells = [f"{classes:,}", world, gib if held <= GPUS[gpu].capacity else f"({gib})"]
            for rate in RATES:
                step = _step(table, classes, world, rate)
                alone = phase_seconds(step, profile)
                talk = sum(s for name, s in alone.items() if "gather" in name or "reduce" in name)
                cells += [_three(1e3 * step_seconds(step, profile)), _three(1e3 * talk)]
            lines.append(_row(cells))
    return lines


def phase_lines(step: Step, profile: Profile) -> list[str]:
    """One step, phase by phase."""
    seconds = phase_seconds(step, profile)
    lines = [
        "| phase | GFLOP | GB of memory | MB received | ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for phase in phases(step):
        counts = (phase.flop / 1e9, phase.memory / 1e9, phase.received / 1e6)
        shown = ["" if c == 0 else _three(c) for c in counts]
        lines.append(_row([phase.name, *shown, _three(1e3 * seconds[phase.name])]))
    total = _three(1e3 * step_seconds(step, profile))
    lines.append(_row(["**step**, the gather beside the catching up", "", "", "", total]))
    return lines


def constant_lines() -> list[str]:
    lines = [
        "| constant | H100 | V100 | from |",
        "| --- | ---: | ---: | --- |",
    ]
    sheet = "maker's data sheet"
    rows = (
        ("16-bit products, TFLOP/s", "half", 1e12, sheet),
        ("float32 products, TFLOP/s", "split", 1e12, sheet + "; H100: a third of TF32"),
        ("memory, GB/s", "memory", 1e9, sheet),
        ("NVLink, GB/s received", "link", 1e9, sheet),
        ("network, GB/s into a node of 8", "node_link", 1e9, sheet),
    )
    for name, field, unit, source in rows:
        values = [_three(getattr(GPUS[gpu], field) / unit) for gpu in ("H100", "V100")]
        lines.append(_row([name, *values, source]))
    shares = (
        ("reached of products", PRODUCT_SHARE),
        ("reached of memory", MEMORY_SHARE),
        ("reached of links", LINK_SHARE),
        ("a message within a node, us", HOP * 1e6),
        ("a message between nodes, us", FAR_HOP * 1e6),
    )
    lines += [_row([name, f"{v:g}", f"{v:g}", "assumed"]) for name, v in shares]
    return lines


def measured_lines(runs: dict[str, Any]) -> list[str]:
    """The measured steps beside the model, and the prices that fit them."""
    profile, found = compared(runs["runs"], runs.get("processors"))
    lines = [
        f"{len(found)} runs on {runs['machine']}; `docs/generated/simulation_runs.json`. Fitted: "
        f"{_three(1e-9 / profile.flop) if profile.flop else 'no price of a'} GFLOP/s of a rank, "
        f"{_three(1e9 * profile.memory)} ns a byte of memory traffic, "
        f"{_three(1e9 * profile.link)} ns a byte received, {_three(1e6 * profile.hop)} us a "
        f"message, {_three(1e3 * profile.start)} ms a step. *Foretold*: by the "
        "prices that fit the other runs, without this one.",
        "",
        "| processes | classes | D | rows a process | sample rate | measured, ms | fitted, ms | "
        "foretold, ms | foretold / measured | bytes sent | of the formula |",
        "|" + " ---: |" * 11,
    ]
    for c in found:
        s = c.step
        sizes = [s.world, f"{s.classes:,}", s.dim, s.batch, f"{s.sample_rate:g}"]
        times = [_three(1e3 * t) for t in (c.seconds, c.fitted, c.foretold)]
        ratio = f"{c.foretold / c.seconds:.2f}"
        lines.append(_row([*sizes, *times, ratio, f"{c.bytes_sent:,}", f"{c.counted:,}"]))
    return lines


def partial_fc_lines() -> list[str]:
    """Growth from the smallest row of each kind: there the backbone, the same in all, cancels."""
    lines = [
        "| classes | sample rate | published: step, ms | more than the first row, ms | model, more "
        "than the first row, ms | published: MiB a GPU | more, bytes a class of the shard | "
        "model, bytes a class |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    profile = gpu_profile("V100")
    first: dict[float, Published] = {}
    for row in PARTIAL_FC:
        base = first.setdefault(row.rate, row)
        step, start = (_published_step(r) for r in (row, base))
        took = 1e3 * PARTIAL_FC_BATCH / row.images
        more = took - 1e3 * PARTIAL_FC_BATCH / base.images
        modelled = 1e3 * (step_seconds(step, profile) - step_seconds(start, profile))
        cells = [f"{row.classes / 1e6:g} M", f"{row.rate:g}", f"{took:.0f}"]
        cells += ["", ""] if row is base else [f"{more:.0f}", f"{modelled:.0f}"]
        cells.append("" if row.mebibytes is None else f"{row.mebibytes:,}")
        if row is base or row.mebibytes is None or base.mebibytes is None:
            cells += ["", ""]
        else:
            apart = step.rows - start.rows
            grown = sum(memory(step).values()) - sum(memory(start).values())
            cells.append(f"{(row.mebibytes - base.mebibytes) * 2**20 / apart:,.0f}")
            cells.append(f"{grown / apart:,.0f}")
        lines.append(_row(cells))
    return lines


def _published_step(row: Published) -> Step:
    return Step(int(row.classes), 512, PARTIAL_FC_BATCH // 8, 8, row.rate)


def page(runs: dict[str, Any] | None) -> str:
    """simulation.md. runs: {"machine", "processors", "runs": [measurement, ...]} or None."""
    example = _step(TABLES[0], 10**7, 64, 0.1)
    parts = [
        INTRODUCTION,
        "## A step, phase by phase",
        f"10 million classes on 64 H100, r = 0.1, {TABLES[0].title};\nD = 512, 128 rows a GPU.",
        "\n".join(phase_lines(example, gpu_profile("H100"))),
        COMMUNICATION,
        "## Step time and memory of a GPU",
        PREDICTIONS,
        "![step time and memory against classes](simulation.svg)",
    ]
    for table in TABLES:
        parts += [f"### {table.title}", "\n".join(prediction_lines(table))]
    parts += ["## Beside PartialFC's published figures", COMPARED, "\n".join(partial_fc_lines())]
    parts += ["## Constants", "\n".join(constant_lines())]
    if runs is not None:
        parts += ["## Against measured steps", "\n".join(measured_lines(runs)), MEASURED_SAYS]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# What a step costs, from a million classes to a hundred million

Made by `python -m fused_losses.bench.heads --out docs/generated`. **Every time of a GPU on this
page is a model**: counts of work, which are facts of the algorithm, times prices from data sheets
and assumptions, listed below. None was measured on a GPU. The backbone is not in it."""

COMMUNICATION = """Bytes that a rank receives a step, W ranks, b rows a rank, L labels a row, e
bytes an element of the embeddings (`fused_losses.centers.collectives`, counted in a test):

$$ (W - 1)\\,\\big(40 + 8 L b + e D b + 4 D b + 16 b (2 + L)\\big) $$

gathers of counts, labels, embeddings and of whether the step can be taken, the reduce-scatter of dX
in float32, and the all-reduces of a maximum and of 1 + L sums a row. It grows with the batch of all
ranks, not with the classes. A link costs its bytes at the slowest edge of a ring; a pass over W
ranks ceil(log2 W) messages."""

PREDICTIONS = """D = 512, 128 rows a GPU, SGD with momentum, 8 GPUs a node, H100. Memory is the
table, its states and the step's buffers; in brackets what does not fit in 80 GB. With a fixed batch
a GPU the batch of all ranks grows with W, so a GPU's products,
$8 \\cdot W b \\cdot r C / W \\cdot D$ FLOP, do not depend on W: more GPUs buy memory and throughput
in rows, not a shorter step. (With one GPU's 128 rows, passing the table through memory is dearer
than its products, so that eight GPUs are faster than one.) Sampling multiplies the products by r
until the labelled classes are many."""

COMPARED = """insightface's README, R50 on 8 x V100 32 GB, its own claims. Compared is **growth**: a
row less the smallest row of its sample rate, in which the backbone, the data and all that does not
depend on the number of classes cancel. The batch is not stated beside that table; 1,024 in all is,
for their other benchmark, and is taken here. The model is this head in float32 with 16-bit products
on a V100, on which its compiled kernels do not run (they need sm_80): the columns show what the
algorithm asks for, not a race. Theirs holds a dense gradient of the shard (4 of its 12 bytes an
element), the logits in several copies and a gathered copy of the sampled rows; this one 8 bytes an
element and 8 a row."""

MEASURED_SAYS = """The processes share one machine's processors and talk through its memory, so that
these prices say nothing about GPUs or a network; what is checked is that work and traffic are
counted right and that a step is their sum."""


def plot(path: Path, gpu: str = "H100") -> None:
    """Step time and memory against classes."""
    table = TABLES[0]
    profile = gpu_profile(gpu, table.precision)

    def draw(figure: Any, left: Any, right: Any) -> None:
        for colour, world in zip(("C0", "C1", "C2", "C3"), WORLDS, strict=True):
            for rate, line in zip(RATES, ("-", "--"), strict=True):
                steps = [_step(table, c, world, rate) for c in CLASSES]
                ms = [1e3 * step_seconds(s, profile) for s in steps]
                left.loglog(CLASSES, ms, line, color=colour, label=f"{world} GPU, r = {rate:g}")
            held = [sum(memory(_step(table, c, world, 1.0)).values()) / GIB for c in CLASSES]
            right.loglog(CLASSES, held, color=colour, label=f"{world} GPU")
        right.axhline(GPUS[gpu].capacity / GIB, color="black", linewidth=0.8, linestyle=":")
        figure.suptitle(f"{gpu}, {table.title} (a model; dotted: 80 GB)")
        left.set(xlabel="classes", ylabel="step, ms")
        right.set(xlabel="classes", ylabel="memory of a GPU, GiB")
        for axes in (left, right):
            axes.legend(fontsize=7)
            axes.grid(alpha=0.3)

    plotted(path, draw, ncols=2, figsize=(9, 3.6))


def read_runs(path: Path) -> dict[str, Any] | None:
    """simulation_runs.json (the runs, or what `page` takes), or None where there is none."""
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return stored if isinstance(stored, dict) else {"machine": "one machine", "runs": stored}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/generated"), help="folder to write to"
    )
    parser.add_argument(
        "--runs", type=Path, help="measured steps (default OUT/simulation_runs.json)"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = read_runs(options.runs or options.out / "simulation_runs.json")
    (options.out / "simulation.md").write_text(page(runs))
    plot(options.out / "simulation.svg")
