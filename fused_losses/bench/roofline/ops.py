"""`fused-losses roofline`: bytes and FLOPs of every operation against its floor, without a GPU.

The host code runs on tensors without data (`traffic.Trace`); a launch takes as long as its busiest
resource at the peaks of `peaks.PEAKS`, and a call the sum of its launches. Nothing here is a
measurement: such a time is a bound that no run can beat if the peaks and the bytes are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_losses.backends import (
    cuda_topk,
    triton,
    triton_distances,
    triton_maxsim,
    triton_pairs,
    triton_topk,
)
from fused_losses.bench.roofline import cuda_forms  # noqa: F401 (its closed forms)
from fused_losses.bench.roofline.peaks import PEAKS, PEERS, Peak
from fused_losses.bench.roofline.trace import L2_SHARE, Cache, Trace, Work
from fused_losses.inputs import Inputs, Needs, RowGradients
from fused_losses.pair_inputs import PairInputs, PairNeeds
from fused_losses.selection import TopkInputs

BF16, FP32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---- what is asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """One pass of one operation at one shape, in its forms."""

    name: str
    step: str  # forward or backward
    shape: str
    floor: int  # bytes: each input once, each output once
    flops: int  # of products, at least
    forms: dict[str, Call]  # own backends by name
    plain: Call | None = None  # in PyTorch: the forward, or the loss of which the backward is taken


def bytes_of(*items: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in items)


def rows_op(
    name: str, n: int, c: int, d: int, normalize: bool, margin: bool, dtype: torch.dtype = BF16
) -> Iterator[Op]:
    x, w, labels = empty(n, d, dtype=dtype), empty(c, d, dtype=dtype), empty(n, dtype=torch.int64)
    inputs = Inputs(x, w, labels, normalize=normalize)
    shape = f"B={n:,} C={c:,} D={d} {short(dtype)}"

    def backward(module: Any) -> Call:
        return lambda: module.backward(
            inputs, empty(n), RowGradients(empty(n), empty(n), None), Needs(True, True, False)
        )

    def plain(a: Tensor = x, b: Tensor = w) -> Tensor:
        if normalize:
            a, b = F.normalize(a), F.normalize(b)
        z = a @ b.T
        if margin:
            target = z.gather(1, labels[:, None])
            z = z.scatter(1, labels[:, None], torch.cos(torch.acos(target) + 0.5)) * 64.0
        return F.cross_entropy(z.float(), labels)

    modules = {"triton": triton} | cuda_modules("cuda")
    sides = bytes_of(x, w)
    yield Op(
        name,
        "forward",
        shape,
        sides + 8 * n,
        2 * n * c * d,
        {k: lambda m=m: m.forward(inputs) for k, m in modules.items()},
        plain,
    )
    yield Op(
        name,
        "backward",
        shape,
        2 * sides + 12 * n,
        6 * n * c * d,
        {k: backward(m) for k, m in modules.items()},
        plain_backward(plain, x, w),
    )


def plain_backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Call:
    def run() -> Call:
        """The forward; what it returns is the backward."""
        ours = [leaf.detach().requires_grad_() for leaf in leaves]
        value = loss(*ours)
        return lambda: torch.autograd.grad(value, ours)

    return run


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]


def cuda_modules(name: str) -> dict[str, Any]:
    from importlib import import_module

    return {"cuda": import_module(f"fused_losses.backends.{name}")}


def pairs_op(name: str, n: int, d: int, reduction: str, cols: bool) -> Iterator[Op]:
    x, y = empty(n, d, dtype=BF16), empty(n, d, dtype=BF16)
    labels = empty(n, dtype=torch.int32)
    p = PairInputs(x, y, empty(dtype=torch.float64), x_labels=labels, y_labels=labels)
    wide = dict(dtype=torch.float64)
    stats = empty(4, 2, n, **wide), empty(4, 2, n if cols else 0, **wide)
    grads = empty(2, 2, n, **wide), empty(2, 2, n if cols else 0, **wide)
    needs = PairNeeds(True, True, True, False, False)
    modules = {"triton": triton_pairs} | cuda_modules("cuda_pairs")

    def backward(m: Any) -> Call:
        return lambda: m.statistics_backward(*grads, *stats, p, reduction, cols, needs)

    def plain(x: Tensor = x, y: Tensor = y) -> Tensor:
        z = x @ y.T * 10.0
        if reduction == "softplus":
            sign = 2 * torch.eye(n, device="meta", dtype=z.dtype) - 1
            return -F.logsigmoid(z * sign).sum()
        labels = torch.arange(n, device="meta")
        return F.cross_entropy(z.float(), labels) + F.cross_entropy(z.float().T, labels)

    shape = f"N={n:,} D={d} bf16"
    sides = bytes_of(x, y)
    forward = {k: lambda m=m: m.statistics(p, reduction, cols) for k, m in modules.items()}
    yield Op(name, "forward", shape, sides + 8 * n, 2 * n * n * d, forward, plain)
    yield Op(
        name,
        "backward",
        shape,
        2 * sides + 8 * n,
        6 * n * n * d,
        {k: backward(m) for k, m in modules.items()},
        plain_backward(plain, x, y),
    )


def attention_op(n: int, d: int, width: int) -> Iterator[Op]:
    x, y = empty(n, d, dtype=BF16), empty(n, d, dtype=BF16)
    values = empty(n, width, dtype=BF16)
    p = PairInputs(x, y, empty(dtype=torch.float64))
    grads = empty(n, width), empty(n, dtype=torch.float64)
    needs = PairNeeds(True, True, True, False, False)
    modules = {"triton": triton_pairs} | cuda_modules("cuda_pairs")

    def backward(m: Any) -> Call:
        kept = empty(n, width), empty(n, dtype=torch.float64)
        return lambda: m.attention_backward(*grads, *kept, values, p, False, True, needs)

    def plain(x: Tensor = x, y: Tensor = y, values: Tensor = values) -> Tensor:
        return (torch.softmax((x @ y.T * 10.0).float(), 1).to(BF16) @ values).float().sum()

    shape = f"N={n:,} D={d} values {width} bf16"
    sides = bytes_of(x, y, values)
    forward = {k: lambda m=m: m.attention(values, p, False) for k, m in modules.items()}
    out, pairs = 4 * n * width, n * n
    yield Op(
        "pair_attention", "forward", shape, sides + out, 2 * pairs * (d + width), forward, plain
    )
    yield Op(
        "pair_attention",
        "backward",
        shape,
        2 * sides + out,
        2 * pairs * (3 * d + 2 * width),
        {k: backward(m) for k, m in modules.items()},
        plain_backward(plain, x, y, values),
    )


def topk_op(
    name: str, n: int, m: int, d: int, k: int, match: str, dtype: torch.dtype
) -> Iterator[Op]:
    """The screen: its candidates' exact scores are n k rows, and left out."""
    x, y, offset = empty(n, d, dtype=dtype), empty(m, d, dtype=dtype), empty(m)
    labels = (empty(n, dtype=torch.int32), empty(m, dtype=torch.int32))
    keep = min(m, k + max(16, k // 2))

    def own() -> None:
        for kind in ("different", "same") if match == "both" else (match,):
            triton_topk.screen(
                x, y, offset, None, keep, *labels, kind, None, None, None, False, "fp32"
            )

    def plain() -> list[Tensor]:
        if match == "both":
            gap = torch.cdist(x, x).square()
            same = labels[0][:, None] == labels[1]
            return [gap.where(same, 0.0).max(1)[0], gap.where(~same, torch.inf).min(1)[0]]
        return [(x @ y.T).topk(k)[0]]

    def cuda() -> None:
        p = TopkInputs(
            x, y, x_labels=labels[0], y_labels=labels[1], kind="dot", k=k, match="different"
        )
        for kind in ("different", "same") if match == "both" else (match,):
            cuda_topk.screened(p._replace(match=kind))

    times = 2 if match == "both" else 1
    sides = bytes_of(x) if match == "both" else bytes_of(x, y)
    yield Op(
        name,
        "forward",
        f"N={n:,} M={m:,} D={d} k={k} {short(dtype)}",
        sides + 12 * n * k * times,
        2 * n * m * d,
        {"triton": own, "cuda": cuda},
        plain,
    )


def distance_op(n: int, d: int, kind: str) -> Iterator[Op]:
    x, y = empty(n, d), empty(n, d)
    modules = {} if kind == "cityblock" else {"triton": triton_distances}
    modules |= cuda_modules("cuda_distances")
    grad, out = empty(n, n), empty(n, n)

    def backward(m: Any) -> Call:
        return lambda: m.backward(grad, out, x, y, None, kind, 1.0, "fp32", True, True, False)

    def plain() -> Tensor:
        return torch.cdist(x, y, 1.0 if kind == "cityblock" else 2.0)

    shape = f"N={n:,} D={d} fp32"
    product = kind != "cityblock"
    yield Op(
        kind,
        "forward",
        shape,
        bytes_of(x, y, out),
        2 * n * n * d * product,
        {k: lambda m=m: m.forward(x, y, None, kind, 1.0, "fp32") for k, m in modules.items()},
        plain,
    )
    yield Op(
        kind,
        "backward",
        shape,
        2 * bytes_of(x, y) + bytes_of(grad) * (2 if product else 1),
        4 * n * n * d * product,
        {k: backward(m) for k, m in modules.items()},
    )


def maxsim_op(queries: int, documents: int, lq: int, ld: int, d: int) -> Iterator[Op]:
    x, y = empty(queries * lq, d, dtype=BF16), empty(documents * ld, d, dtype=BF16)
    offsets = empty(queries + 1, dtype=torch.int64), empty(documents + 1, dtype=torch.int64)
    scores = empty(queries, documents)
    index = empty(queries * lq, documents, dtype=torch.int32)
    modules = {"triton": triton_maxsim} | cuda_modules("cuda_maxsim")

    def backward(m: Any) -> Call:
        return lambda: m.backward(scores, index, x, y, *offsets, True, True)

    def plain(x: Tensor = x, y: Tensor = y) -> Tensor:
        z = x @ y.T
        return z.view(queries, lq, documents, ld).amax(3).float().sum(1)

    shape = f"{queries} x {lq} against {documents} x {ld} tokens, D={d} bf16"
    forward = {k: lambda m=m: m.forward(x, y, *offsets, "fp32") for k, m in modules.items()}
    sides = bytes_of(x, y)
    flops = 2 * x.shape[0] * y.shape[0] * d
    yield Op("maxsim", "forward", shape, sides + bytes_of(scores, index), flops, forward, plain)
    yield Op(
        "maxsim",
        "backward",
        shape,
        2 * sides + bytes_of(scores, index),
        0,
        {k: backward(m) for k, m in modules.items()},
        plain_backward(lambda x, y: plain(x, y).sum(), x, y),
    )


def update_op(count: int, d: int) -> Iterator[Op]:
    """sgd with momentum on the rows that took part."""
    from fused_losses.row_update import Sgd, _sgd_on_kernel

    weight, momentum = empty(1_000_000, d), empty(1_000_000, d)
    grad, rows = empty(count, d), empty(count, dtype=torch.int64)

    def own() -> None:
        _sgd_on_kernel(Sgd(weight, rows, grad, momentum, None, 0.1, 0.9, 0.0, 0.0, False, False))

    def plain() -> None:
        step = momentum[rows].mul(0.9).add(grad)
        momentum.index_copy_(0, rows, step)
        weight.index_copy_(0, rows, weight[rows].sub(step, alpha=0.1))

    floor = 5 * bytes_of(grad) + bytes_of(rows)
    shape = f"{count:,} rows of D={d} fp32"
    yield Op("sgd_rows", "forward", shape, floor, 0, {"cuda": own}, plain)


@cache
def ops() -> tuple[Op, ...]:
    return (
        *rows_op("margin_softmax", 1024, 1_000_000, 512, True, True),
        *rows_op("linear_cross_entropy", 8192, 131_072, 1024, False, False),
        *pairs_op("info_nce", 32_768, 512, "lse", True),
        *pairs_op("sigmoid", 32_768, 512, "softplus", False),
        *attention_op(16_384, 512, 512),
        *topk_op("topk", 1024, 1_000_000, 256, 10, "any", BF16),
        *topk_op("batch_hard", 8192, 8192, 128, 1, "both", FP32),
        *distance_op(8192, 512, "euclidean"),
        *distance_op(4096, 128, "cityblock"),
        *maxsim_op(64, 64, 32, 256, 128),
        *update_op(65_536, 512),
    )


# ---- what it costs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A form on a GPU: nothing of it measured."""

    seconds: float
    l2: int  # bytes between L2 and the processors
    dram: int
    flops: int
    busiest: str  # the resource that most of the time waits for
    worst: str  # the launch, or kind of launch, that takes longest


def cost(work: list[Work], peak: Peak) -> Cost:
    cache_of_l2 = Cache(L2_SHARE * peak.l2_bytes)
    by_resource: dict[str, float] = {}
    by_name: dict[str, float] = {}
    total = moved = through = flops = 0
    for w in work:
        # what stays is used first, and what streams after it
        dram = sum(cache_of_l2.touch(u) for u in sorted(w.uses, key=lambda u: u.size))
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
    written = {u.storage._cdata for w in work[-64:] for u in w.uses if u.write}
    through += cache_of_l2.flush(written)
    return Cost(
        total,
        moved,
        through,
        flops,
        max(by_resource, key=by_resource.__getitem__),
        max(by_name, key=by_name.__getitem__),
    )


def traced(op: Op, form: str, peak: Peak) -> list[Work]:
    """form: a backend, eager or compiled."""
    own = form not in ("eager", "compiled")
    trace = Trace(peak.arch, peak.processors, compiled=form == "compiled", own=own)
    before = 0
    with trace.running():
        if own or op.step == "forward":
            (op.forms[form] if own else op.plain)()
        else:
            backward = op.plain()
            before = len(trace.work)
            backward()
    return trace.work[before:]


def forms(op: Op) -> list[str]:
    return [*op.forms, *(("eager", "compiled") if op.plain else ())]


# ---- the page -----------------------------------------------------------------------------------

DRAM_LIMIT = 1.3  # of the floor

# what a form moves beyond its floor or its best peer, and why; by operation, step, backend
WHY = {
    ("margin_softmax", "forward", "triton"): "On an H100 256 rows of x stay with a program "
    "(forward_resident) and W is read once for them; on the others tiles of 128 x 256 read it for "
    "128 rows, as cut-cross-entropy does. 1/|w| is one more reading of W out of L2.",
    ("margin_softmax", "backward", "triton"): "G is stored and read by two products, whose tiles "
    "weigh more than G itself; the sums of dx pass once for every chunk that fits in L2. "
    "Rows resident as in the forward would be read anew for every chunk: no gain.",
    (
        "linear_cross_entropy",
        "forward",
        "triton",
    ): "Rows of D = 1024 fit in no shared memory: tiles of 128 x 256.",
    (
        "linear_cross_entropy",
        "backward",
        "triton",
    ): "G is a chunk of columns for 4,096 rows: x, and "
    "the float32 sums of dx, pass once for every chunk. Fewer chunks would be a larger G.",
    ("info_nce", "forward", "triton"): "Two classes of pairs and two sides take registers: 128 x "
    "128, which is memeff's tile, spills. y passes once for every 8,192 rows.",
    (
        "info_nce",
        "backward",
        "triton",
    ): "Tiles of 128 x 64 recompute the scores (half of the bytes), "
    "and G passes through products. The float32 sums of dx pass once for every run of columns: "
    "with sums of all of dy besides they could stay, at twice the memory.",
    ("sigmoid", "forward", "triton"): "y passes once for every 8,192 rows.",
    ("sigmoid", "backward", "triton"): "As info_nce.",
    (
        "pair_attention",
        "forward",
        "triton",
    ): "One sweep for the lse, one for the weights: a running "
    "rescaling of the output would be a third product in the first sweep.",
    ("batch_hard", "forward", "triton"): "One screen for positives and one for negatives, and the "
    "lists of every split; the floor is 4 MB.",
    ("euclidean", "backward", "triton"): "grad and out pass once for dx and once for dy.",
    ("cityblock", "backward", "cuda"): "grad passes once for dx and once for dy, and for every 64 "
    "coordinates.",
    ("pair_attention", "backward", "triton"): "As info_nce; two products a tile.",
}


@dataclass(frozen=True)
class Line:
    op: Op
    form: str
    costs: dict[str, Cost]  # by GPU

    def over(self, gpu: str) -> float:
        return self.costs[gpu].dram / self.op.floor


def lines(names: list[str] | None = None, wanted: tuple[str, ...] = ()) -> list[Line]:
    """Every form of these operations, or those that are wanted, on every GPU."""
    found = []
    for op in ops():
        if names and op.name not in names:
            continue
        for form in wanted or forms(op):
            costs: dict[str, Cost] = {}
            works: dict[str, list[Work]] = {}
            for gpu, peak in PEAKS.items():
                if peak.arch not in works:
                    works[peak.arch] = traced(op, form, peak)
                costs[gpu] = cost(works[peak.arch], peak)
            found.append(Line(op, form, costs))
    return found


def bound_seconds(op: Op, peak: Peak) -> float:
    """No run is faster: the floor through DRAM, or the products."""
    return max(op.floor / peak.dram, op.flops / peak.half)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def page(found: list[Line]) -> str:
    gpus = list(PEAKS)
    out = [HEAD]
    ran = dict.fromkeys((a.op.name, a.op.step) for a in found)
    out += ["| operation | form | products, TFLOP | GB, L2 | GB, DRAM | of the floor | ms, "]
    out[-1] += " | ms, ".join(gpus) + " | busiest on H100 |"
    out.append("| --- | --- " + "| ---: " * (4 + len(gpus)) + "| --- |")
    for key in ran:
        rows = [a for a in found if (a.op.name, a.op.step) == key]
        op = rows[0].op
        times = " | ".join(figure(1e3 * bound_seconds(op, PEAKS[gpu])) for gpu in gpus)
        floor = f"{figure(op.flops / 1e12)} | | {figure(op.floor / 1e9)} | 1 | {times} | |"
        out.append(f"| **{op.name}, {op.step}**, {op.shape} | floor | {floor}")
        for a in rows:
            c = a.costs["H100"]
            moved = f"{figure(c.flops / 1e12)} | {figure(c.l2 / 1e9)} | {figure(c.dram / 1e9)}"
            times = " | ".join(figure(1e3 * a.costs[gpu].seconds) for gpu in gpus)
            busy = f"{c.busiest}, in `{c.worst.split('.')[-1]}`"
            out.append(f"| | {a.form} | {moved} | {a.over('H100'):.2f} | {times} | {busy} |")
        for peer, (moved, dram) in PEERS.get(key, {}).items():
            ratio = dram * 1e9 / op.floor
            row = f"{figure(moved)} | {figure(dram)} | {ratio:.2f} " + "| " * (len(gpus) + 1) + "|"
            out.append(f"| | *{peer}* | | {row}")
    out += ["", GAPS_HEAD, "", *gaps(found), ""]
    return "\n".join(out)


def gaps(found: list[Line]) -> list[str]:
    """Where our forms move more than they should, in words."""
    out = []
    for a in found:
        if a.form in ("eager", "compiled"):
            continue
        key = a.op.name, a.op.step
        best = min((moved for moved, _ in PEERS.get(key, {}).values()), default=None)
        wide = {gpu: a.over(gpu) for gpu in PEAKS if a.over(gpu) > DRAM_LIMIT}
        more = best is not None and a.costs["H100"].l2 > best * 1e9
        if not wide and not more:
            continue
        text = f"- **{a.op.name}, {a.op.step}, {a.form}**:"
        if wide:
            text += " DRAM " + ", ".join(f"{v:.1f} x on {gpu}" for gpu, v in wide.items()) + "."
        if more:
            text += f" L2 {figure(a.costs['H100'].l2 / 1e9)} GB, the best peer {figure(best)}."
        why = WHY.get((*key, a.form))
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
  launches as such, idle multiprocessors and latencies cost nothing.
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

COLOURS = {"triton": "#2a6f97", "cuda": "#d1495b", "compiled": "#8d99ae", "eager": "#c9cdd6"}
BAR, LEFT, WIDTH = 9, 230, 560


def plot(found: list[Line], gpu: str = "H100") -> str:
    """Times over the bound of the floor, as bars on a logarithmic axis. SVG"""
    from math import log10

    groups: dict[tuple[str, str], list[Line]] = {}
    for a in found:
        groups.setdefault((a.op.name, a.op.step), []).append(a)
    height = sum(BAR * len(g) + 8 for g in groups.values()) + 60
    most = 2.0  # decades
    x = [f'<text x="{LEFT}" y="14">time over the bound of the floor, {gpu}</text>']
    for ratio in (1, 2, 5, 10, 20, 50, 100):
        at = LEFT + WIDTH * log10(ratio) / most
        x.append(f'<path d="M{at:.0f} 24V{height - 30}" stroke="#ddd"/>')
        x.append(f'<text x="{at:.0f}" y="{height - 16}" text-anchor="middle">{ratio}</text>')
    y = 30
    for (name, step), group in groups.items():
        middle = y + BAR * len(group) / 2 + 4
        x.append(f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">{name} {step}</text>')
        for a in group:
            ratio = a.costs[gpu].seconds / bound_seconds(a.op, PEAKS[gpu])
            wide = WIDTH * min(max(log10(max(ratio, 1)), 0.01), most) / most
            bar = f'x="{LEFT}" y="{y}" width="{wide:.0f}" height="{BAR - 2}"'
            x.append(f'<rect {bar} fill="{COLOURS[a.form]}"/>')
            y += BAR
        y += 8
    for i, (form, colour) in enumerate(COLOURS.items()):
        at = LEFT + 330 + 80 * i
        x.append(f'<rect x="{at}" y="6" width="9" height="9" fill="{colour}"/>')
        x.append(f'<text x="{at + 13}" y="14">{form}</text>')
    body = "\n".join(x)
    style = 'font-family="sans-serif" font-size="11"'
    size = f'width="{LEFT + WIDTH + 80}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder to write roofline.md and roofline.svg to "
                        "(default: the page is printed)")  # fmt: skip
    parser.add_argument("--op", choices=sorted({op.name for op in ops()}), action="append",
                        help="may be repeated (default all)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    found = lines(args.op)
    if args.out is None:
        print(page(found))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "roofline.md").write_text(page(found))
    (args.out / "roofline.svg").write_text(plot(found))
    return 0
