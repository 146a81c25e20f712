"""What a step of `ClassCenters` costs a rank: work and bytes counted, seconds modelled.

`phases` counts FLOP, memory traffic and messages, which are facts of the algorithm; a `Profile` has
a price for each: from data sheets and assumptions (GPUs), or fitted to measured steps
(`calibration`, on CPUs). A phase takes as long as the dearer of its FLOP and its memory traffic;
phases follow one another, but the gather of the embeddings goes on beside the drawing of the sample
and its rows' catching up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

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
        Phase("gather outlooks", received=8 * others, passes=int(met)),
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
