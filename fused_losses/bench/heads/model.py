"""What a step of `ClassCenters` costs a rank: work and bytes counted, seconds modelled.

    python -m fused_losses.bench.heads --out docs/generated

writes simulation.md and its plot. `phases` counts FLOP, memory traffic and messages, which are
facts of the algorithm; a `Profile` has a price for each: from data sheets and assumptions (GPUs),
or fitted to measured steps (`calibrate`, on CPUs). A phase takes as long as the dearer of its FLOP
and its memory traffic; phases follow one another, but the gather of the embeddings goes on beside
the drawing of the sample and its rows' catching up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_losses.bench.roofline.peaks import PEAKS
from fused_losses.centers.collectives import step_traffic
from fused_losses.centers.shard import CHUNK_BYTES

# ---- counts -------------------------------------------------------------------------------------

HASH_BYTES = 160  # of memory traffic a class: ten elementwise passes over int64, `sampling.hashed`
ROW_COPIES = 4  # of [B, D] in float32: unit rows, scaled rows, dX and a chunk's part of it


@dataclass(frozen=True)
class Step:
    """A training step of one head, as one rank sees it."""

    classes: int
    dim: int = 512
    batch: int = 128  # rows a rank
    world: int = 1
    sample_rate: float = 1.0
    weight_bytes: int = 4  # an element of the table
    state_bytes: int = 4  # an element of all optimiser states together: SGD with momentum 1, Adam 2
    embedding_bytes: int = 4  # an element as gathered
    labels: int = 1  # a row

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0 and not (field.name == "state_bytes" and value == 0):
                raise ValueError(f"{field.name}: expected a value > 0, got {value}")
        if self.sample_rate > 1:
            raise ValueError(f"sample_rate: expected a value in (0, 1], got {self.sample_rate}")

    @property
    def rows(self) -> int:
        """Rows of the table on the fullest rank."""
        return -(-self.classes // self.world)

    @property
    def gathered(self) -> int:
        """P, rows of all ranks' batches."""
        return self.world * self.batch

    @property
    def part(self) -> float:
        """Rows of the rank that take part: those drawn and those labelled, if labels are even."""
        if self.sample_rate == 1:
            return float(self.rows)
        unlabelled = math.exp(self.gathered * math.log1p(-1 / max(self.classes, 2)))
        return self.rows * (1 - (1 - self.sample_rate) * unlabelled)


class Phase(NamedTuple):
    """What one phase of a step asks of a rank."""

    name: str
    flop: float = 0.0  # of products
    memory: float = 0.0  # bytes read and written
    received: float = 0.0  # bytes from other ranks
    passes: int = 0  # over the ranks: a gather or a reduce-scatter 1, an all-reduce 2


def phases(step: Step) -> list[Phase]:
    """The phases in their order. The rows x stay in cache; the table and its states pass by."""
    elements, p = step.part * step.dim, step.gathered
    others = step.world - 1
    met = others > 0
    product = 2.0 * p * elements
    table, states = elements * step.weight_bytes, elements * step.state_bytes
    sampled = step.sample_rate < 1
    together = 2 * others * 8 * step.batch  # of an all-reduce of one float64 number a row
    return [
        Phase("gather counts", received=32 * others, passes=int(met)),
        Phase("gather labels", received=8 * step.labels * step.batch * others, passes=int(met)),
        Phase(
            "gather embeddings",
            received=step.embedding_bytes * step.dim * step.batch * others,
            passes=int(met),
        ),
        Phase("draw the sample", memory=HASH_BYTES * step.rows * sampled),
        Phase("catch up", memory=2 * (table + states) * sampled),
        Phase("forward", flop=product, memory=table),
        Phase("all-reduce maximum", received=together, passes=2 * met),
        Phase("all-reduce sums", received=together * (1 + step.labels), passes=2 * met),
        # the scores again, dX, dW; a chunk's dW is written, and read by the update
        Phase("backward", flop=3 * product, memory=3 * table),
        Phase("update", memory=3 * table + 2 * states),
        Phase(
            "reduce-scatter dX",
            received=4 * step.dim * step.batch * others,
            passes=int(met),
        ),
    ]


def memory(step: Step, chunk_bytes: int = CHUNK_BYTES) -> dict[str, float]:
    """Bytes that a rank holds at the peak of a step, the backbone apart."""
    elements = step.rows * step.dim
    return {
        "table": elements * step.weight_bytes,
        "states": elements * step.state_bytes,
        "steps of the rows": 8.0 * step.rows,
        "ids": 8.0 * step.part * (step.sample_rate < 1),
        "batch of all ranks": step.gathered * step.dim * (step.embedding_bytes + 4.0 * ROW_COPIES),
        "chunk": 2.0 * chunk_bytes,  # its gradient, and the kernels' scratch
    }


# ---- prices -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Seconds for each thing that `phases` counts, on a machine."""

    name: str
    flop: float  # seconds a FLOP
    memory: float  # a byte of memory traffic
    link: float  # a byte received, within a node
    hop: float  # a message, within a node
    far_link: float  # the same where ranks span nodes
    far_hop: float
    node: int = 1 << 30  # ranks a node
    processors: int | None = None  # that all ranks share; None: each has its own
    start: float = 0.0  # seconds of every step, whatever is in it
    overlapped: bool = True  # products run beside memory traffic, and work beside messages


def phase_seconds(step: Step, profile: Profile) -> dict[str, float]:
    """Each phase's time, as if alone."""
    crowding = max(1.0, step.world / (profile.processors or step.world))
    nodes = -(-step.world // profile.node)
    hops = profile.hop * _doublings(min(step.world, profile.node))
    hops += profile.far_hop * _doublings(nodes)
    link = profile.link if nodes == 1 else profile.far_link
    together = max if profile.overlapped else lambda a, b: a + b * crowding
    return {
        phase.name: together(phase.flop * profile.flop * crowding, phase.memory * profile.memory)
        + phase.received * link
        + phase.passes * hops
        for phase in phases(step)
    }


def _doublings(ranks: int) -> int:
    return math.ceil(math.log2(ranks)) if ranks > 1 else 0


def step_seconds(step: Step, profile: Profile) -> float:
    """The step; where work overlaps, the embeddings' gather beside the sample's catching up."""
    seconds = phase_seconds(step, profile)
    beside = min(seconds["gather embeddings"], seconds["draw the sample"] + seconds["catch up"])
    return profile.start + sum(seconds.values()) - (beside if profile.overlapped else 0.0)


# ---- GPUs: data sheets and assumptions ----------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight, by its maker's figures; none of them measured here."""

    half: float  # FLOP/s of 16-bit products
    split: float  # FLOP/s of float32 products
    memory: float  # bytes/s
    capacity: int  # bytes
    link: float  # bytes/s to its node's other GPUs, one direction
    node_link: float  # bytes/s into a node from others


GB, GIB = 10**9, 2**30
GPUS = {
    # NVIDIA's data sheets (SXM, dense) as in roofline/peaks.py; float32 in three TF32 products.
    # NVLink 4: 900 GB/s both directions together. DGX H100: 8 network cards of 400 Gbit/s
    "H100": Gpu(
        PEAKS["H100"].half, PEAKS["H100"].tf32 / 3, PEAKS["H100"].dram, 80 * GB, 450e9, 400e9
    ),
    # NVIDIA's V100 SXM2 data sheet: 125 and 15.7 TFLOP/s, 900 GB/s; NVLink 2: 300 GB/s both
    # directions together. DGX-1: 4 network cards of 100 Gbit/s
    "V100": Gpu(125e12, 15.7e12, 0.9e12, 32 * GB, 150e9, 50e9),
}
# Assumptions. The kernels' own bound is 0.65 of the peak of products (docs/generated/roofline.md:
# forward and backward on an H100, 16-bit, 4.24 ms of 6.48)
PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.7
HOP, FAR_HOP = 5e-6, 15e-6  # seconds a message, with its share of a launch


def gpu_profile(name: str, precision: str = "half") -> Profile:
    """A GPU's prices; precision "half" or "split" (float32 accuracy)."""
    if name not in GPUS:
        raise ValueError(f"name: expected one of {', '.join(GPUS)}, got {name!r}")
    if precision not in ("half", "split"):
        raise ValueError(f"precision: expected 'half' or 'split', got {precision!r}")
    gpu = GPUS[name]
    return Profile(
        f"{name}, {precision}",
        flop=1 / (PRODUCT_SHARE * getattr(gpu, precision)),
        memory=1 / (MEMORY_SHARE * gpu.memory),
        link=1 / (LINK_SHARE * gpu.link),
        hop=HOP,
        # rings over all of a node's cards: what enters a node is what each of its GPUs receives
        far_link=1 / (LINK_SHARE * min(gpu.link, gpu.node_link)),
        far_hop=FAR_HOP,
        node=8,
    )


# ---- CPUs: measured steps -----------------------------------------------------------------------

PRICED = ("flop", "memory", "link", "hop", "start")
MEASURED = ("world", "classes", "dim", "batch", "sample_rate", "seconds", "bytes_sent")


def step_of(measurement: dict[str, Any]) -> Step:
    """The step that was measured; beside MEASURED a run may have fields of `Step`."""
    missing = [key for key in MEASURED if key not in measurement]
    if missing:
        raise ValueError(f"measurements: expected {', '.join(MEASURED)}, missing {missing}")
    if not measurement["seconds"] > 0:
        raise ValueError(f"measurements: expected seconds > 0, got {measurement['seconds']}")
    known = {f.name for f in fields(Step)}
    return Step(**{key: value for key, value in measurement.items() if key in known})


def calibrate(
    measurements: Sequence[dict[str, Any]], processors: int | None = None, name: str = "measured"
) -> Profile:
    """Prices that fit measured steps best, of the fields of `Profile` in PRICED.

    Least squares of the relative errors, prices >= 0. processors: what all ranks share (None: each
    has its own), so that W ranks of one thread each do their work W / processors times slower.
    A CPU's thread does one thing at a time: memory traffic adds to the products. Raises ValueError
    for fewer than five runs.
    """
    least = len(PRICED)
    if len(measurements) < least:
        raise ValueError(f"measurements: expected at least {least} runs, got {len(measurements)}")
    none = Profile(name, *[0.0] * 6, processors=processors, overlapped=False)
    singles = [replace(none, **{price: 1.0}) for price in PRICED]
    steps = [step_of(m) for m in measurements]
    seconds = torch.tensor([m["seconds"] for m in measurements], dtype=torch.float64)
    counts = torch.tensor(
        [[step_seconds(step, p) for p in singles] for step in steps], dtype=torch.float64
    )
    prices = _nonnegative(counts / seconds[:, None], torch.ones_like(seconds))
    found = replace(none, **dict(zip(PRICED, prices.tolist(), strict=True)))
    return replace(found, far_link=found.link, far_hop=found.hop)


def _nonnegative(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """argmin |a x - b|, x >= 0, by trying which of a's few columns take part."""
    size = a.norm(dim=0)
    best, least = torch.zeros(a.shape[1], dtype=a.dtype), b.norm()
    columns = [i for i in range(a.shape[1]) if size[i] > 0]
    for count in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, count):
            some = list(chosen)
            x = torch.linalg.lstsq(a[:, some] / size[some], b).solution
            error = (a[:, some] / size[some] @ x - b).norm()
            if (x >= 0).all() and error < least:
                best, least = torch.zeros_like(best), error
                best[some] = x / size[some]
    return best


class Check(NamedTuple):
    """A measured step beside the model."""

    step: Step
    seconds: float
    fitted: float  # by prices fitted to all runs
    foretold: float  # by prices fitted to the runs of other worlds and sizes
    bytes_sent: float
    counted: int  # bytes of the formula


def checks(
    measurements: Sequence[dict[str, Any]], processors: int | None = None
) -> tuple[Profile, list[Check]]:
    """Every run beside the fit, and beside what the other runs foretell of it."""
    profile = calibrate(measurements, processors)
    found = []
    for i, measured in enumerate(measurements):
        step = step_of(measured)
        others = [m for j, m in enumerate(measurements) if j != i]
        foretold = calibrate(others, processors) if len(others) >= len(PRICED) else profile
        found.append(
            Check(
                step,
                measured["seconds"],
                step_seconds(step, profile),
                step_seconds(step, foretold),
                measured["bytes_sent"],
                traffic(step),
            )
        )
    return profile, found


def traffic(step: Step) -> int:
    """Bytes that a rank receives (and, in a ring, sends) in a step."""
    return step_traffic(
        step.world,
        step.batch,
        step.dim,
        labels=step.labels,
        element_bytes=step.embedding_bytes,
        reduced_numbers=2 + step.labels,
    ).total


# ---- PartialFC's published figures --------------------------------------------------------------


class Published(NamedTuple):
    """A row of insightface's README (arcface_torch), R50 on 8 x V100 32 GB: its own claims."""

    classes: float
    rate: float  # 1: model parallel
    images: float  # a second
    mebibytes: int | None  # a GPU


PARTIAL_FC = (
    Published(1.4e6, 1.0, 3043, 11178),
    Published(5.5e6, 1.0, 1389, 32188),
    Published(1.4e6, 0.1, 4738, 6056),
    Published(5.5e6, 0.1, 3975, 9854),
    Published(8e6, 0.1, 3565, None),
    Published(16e6, 0.1, 2679, None),
    Published(29e6, 0.1, 1855, 32324),
)
PARTIAL_FC_BATCH = 1024  # of all GPUs: what their docs/speed_benchmark.md states for its own runs


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
        if row is base or row.mebibytes is None:
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


# ---- the page -----------------------------------------------------------------------------------

CLASSES = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
WORLDS = (1, 8, 64, 512)
RATES = (1.0, 0.1)


class Kind(NamedTuple):
    """How a table is held, as the page shows it."""

    title: str
    precision: str
    weight_bytes: int
    state_bytes: int
    embedding_bytes: int


KINDS = (
    Kind("bfloat16 table and momentum, 16-bit products", "half", 2, 2, 2),
    Kind("float32 table and momentum, float32 products", "split", 4, 4, 4),
)


def _step(kind: Kind, classes: int, world: int, rate: float) -> Step:
    return Step(
        classes,
        world=world,
        sample_rate=rate,
        weight_bytes=kind.weight_bytes,
        state_bytes=kind.state_bytes,
        embedding_bytes=kind.embedding_bytes,
    )


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def prediction_lines(kind: Kind, gpu: str = "H100") -> list[str]:
    """Step time and memory of a GPU, by classes and GPUs. What does not fit is in brackets."""
    profile = gpu_profile(gpu, kind.precision)
    titles = ["classes", "GPUs", "memory, GiB"]
    for rate in RATES:
        titles += [f"r = {rate:g}: step, ms", "of it between GPUs, ms"]
    lines = [_row(titles), "|" + " ---: |" * len(titles)]
    for classes in CLASSES:
        for world in WORLDS:
            held = sum(memory(_step(kind, classes, world, 1.0)).values())
            gib = _three(held / GIB)
            cells = [f"{classes:,}", world, gib if held <= GPUS[gpu].capacity else f"({gib})"]
            for rate in RATES:
                step = _step(kind, classes, world, rate)
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
    profile, found = checks(runs["runs"], runs.get("processors"))
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


def page(runs: dict[str, Any] | None) -> str:
    """simulation.md. runs: {"machine", "processors", "runs": [measurement, ...]} or None."""
    example = _step(KINDS[0], 10**7, 64, 0.1)
    parts = [
        INTRODUCTION,
        "## A step, phase by phase",
        f"10 million classes on 64 H100, r = 0.1, {KINDS[0].title};\nD = 512, 128 rows a GPU.",
        "\n".join(phase_lines(example, gpu_profile("H100"))),
        COMMUNICATION,
        "## Step time and memory of a GPU",
        PREDICTIONS,
        "![step time and memory against classes](simulation.svg)",
    ]
    for kind in KINDS:
        parts += [f"### {kind.title}", "\n".join(prediction_lines(kind))]
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

$$ (W - 1)\\,\\big(32 + 8 L b + e D b + 4 D b + 16 b (2 + L)\\big) $$

gathers of counts, labels and embeddings, the reduce-scatter of dX in float32, and the all-reduces
of a maximum and of 1 + L sums a row. It grows with the batch of all ranks, not with the classes.
A link costs its bytes at the slowest edge of a ring; a pass over W ranks ceil(log2 W) messages."""

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
    """Step time and memory against classes, as SVG with the same bytes in every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "simulation", "svg.fonttype": "none", "font.size": 9}
    kind = KINDS[0]
    profile = gpu_profile(gpu, kind.precision)
    with matplotlib.rc_context(style):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for colour, world in zip(("C0", "C1", "C2", "C3"), WORLDS, strict=True):
            for rate, line in zip(RATES, ("-", "--"), strict=True):
                steps = [_step(kind, c, world, rate) for c in CLASSES]
                ms = [1e3 * step_seconds(s, profile) for s in steps]
                left.loglog(CLASSES, ms, line, color=colour, label=f"{world} GPU, r = {rate:g}")
            held = [sum(memory(_step(kind, c, world, 1.0)).values()) / GIB for c in CLASSES]
            right.loglog(CLASSES, held, color=colour, label=f"{world} GPU")
        right.axhline(GPUS[gpu].capacity / GIB, color="black", linewidth=0.8, linestyle=":")
        figure.suptitle(f"{gpu}, {kind.title} (a model; dotted: 80 GB)")
        left.set(xlabel="classes", ylabel="step, ms")
        right.set(xlabel="classes", ylabel="memory of a GPU, GiB")
        for axes in (left, right):
            axes.legend(fontsize=7)
            axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def read_runs(path: Path) -> dict[str, Any] | None:
    """simulation_runs.json (the runs, or what `page` takes), or None where there is none."""
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return stored if isinstance(stored, dict) else {"machine": "one machine", "runs": stored}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
