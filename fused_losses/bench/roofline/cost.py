"""What an operation costs a GPU: seconds by the peaks, bytes through L2 and DRAM."""

from __future__ import annotations

from dataclasses import dataclass

from fused_losses.bench.roofline.cache import L2, L2_SHARE
from fused_losses.bench.roofline.operation import PLAIN, Operation
from fused_losses.bench.roofline.peaks import GAP, OWN_LAUNCH, TORCH_LAUNCH, Peak
from fused_losses.bench.roofline.trace import Trace
from fused_losses.bench.roofline.work import Work


@dataclass(frozen=True)
class Cost:
    """One way to compute an operation on a GPU: nothing of it measured."""

    seconds: float
    l2: int  # bytes between L2 and the processors
    dram: int
    flops: int
    busiest: str  # the resource that most of the time waits for
    worst: str  # the launch, or kind of launch, that takes longest
    launches: int
    host: float  # seconds of the host for its launches

    @property
    def launched(self) -> float:
        """Seconds with what launches cost: gaps between them, and a host that may be slower."""
        return max(self.seconds + self.launches * GAP, self.host)


def cost(work: list[Work], peak: Peak) -> Cost:
    """The sum over launches of the time of each one's busiest resource."""
    cache_of_l2 = L2(L2_SHARE * peak.l2_bytes)
    by_resource: dict[str, float] = {}
    by_name: dict[str, float] = {}
    total = moved = through = flops = 0
    for w in work:
        # what stays is used first, and what streams after it
        dram = sum(cache_of_l2.touch(a) for a in sorted(w.accesses, key=lambda a: a.size))
        seconds = {
            "products": w.flops / getattr(peak, w.kind) if w.kind else 0.0,
            "arithmetic": w.scalar / peak.fp32,
            "L2": w.moved() / peak.l2,
            "DRAM": dram / peak.dram,
        }
        busiest = max(seconds, key=seconds.__getitem__)
        by_resource[busiest] = by_resource.get(busiest, 0) + seconds[busiest]
        by_name[w.name] = by_name.get(w.name, 0) + seconds[busiest]
        total += seconds[busiest]
        moved, through, flops = moved + w.moved(), through + dram, flops + w.flops
    written = {a.storage._cdata for w in work[-64:] for a in w.accesses if a.write}
    through += cache_of_l2.flush(written)
    return Cost(
        total,
        moved,
        through,
        flops,
        max(by_resource, key=by_resource.__getitem__),
        max(by_name, key=by_name.__getitem__),
        len(work),
        sum(OWN_LAUNCH if w.own else TORCH_LAUNCH for w in work),
    )


def traced(op: Operation, way: str, peak: Peak) -> list[Work]:
    """What a GPU would be given; way: a backend, eager or compiled."""
    own = way not in PLAIN
    trace = Trace(peak.arch, peak.processors, compiled=way == "compiled", own=own)
    before = 0
    with trace.running():
        run = op.backends[way] if own else op.plain
        assert run is not None
        if own or op.direction == "forward":
            run()
        else:
            backward = run()
            before = len(trace.work)
            backward()
    return trace.work[before:]
