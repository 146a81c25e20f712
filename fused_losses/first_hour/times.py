"""Units that are measured: cases against eager, compiled and peers; launches, memory; the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import backends
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.base.examples import Example, ExampleInputs
from fused_losses.base.records import told
from fused_losses.bench import measure
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.roofline.cost import cost, traced
from fused_losses.bench.roofline.operation import PLAIN, Operation, drawn_on
from fused_losses.bench.roofline.ops import TABLE, OpSizes
from fused_losses.bench.roofline.page import bound_seconds
from fused_losses.bench.roofline.peaks import PEAKS
from fused_losses.bench.roofline.trace import holders
from fused_losses.bench.table import CASES, SIZES, title
from fused_losses.explain import explain
from fused_losses.first_hour.probe import clocks
from fused_losses.first_hour.record import FAILED, MEASURED, Outcome
from fused_losses.first_hour.setting import HourUnit, Setting, sizes, wait
from fused_losses.verify.table import outcome

# of the performance table, the most telling first; then what is left of it
HEADS = ("margin_softmax", "info_nce", "topk", "distillation", "maxsim", "siglip", "attention",
         "batch_hard_mining", "supervised_contrastive")  # fmt: skip
TINY = {
    "shape": (8, 24, 16),
    "head": (8, 24, 16),
    "pairs": (16, 16),
    "tokens": (2, 3, 4, 5, 16),
    "distances": (16, 8),
    "bank": (8, 40, 16, 4),
    "batch": (16, 8),
}
ROUNDS, TURNS, WARM_UP = 5, 10, 3
REHEARSED_AS = "H100"  # whose bounds stand beside a rehearsal's times


# ---- cases against rivals -----------------------------------------------------------------------


def head_units(setting: Setting) -> list[HourUnit]:
    """Each case of `fused-losses bench` at its shapes and dtypes."""
    found = []
    for name in dict.fromkeys((*HEADS, *CASES)):
        entry = CASES[name]
        if not setting.wants(name):
            continue
        for shape in [TINY[entry.sizes]] if setting.rehearsed else entry.usual():
            # the peers' kernels take 16-bit rows
            for dtype in reversed(entry.dtypes(setting.device)):
                unit = f"heads/{title(name, shape, dtype)}"
                found.append(HourUnit(unit, lambda a=(name, shape, dtype): head(setting, *a)))
    return found


def head(setting: Setting, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Outcome:
    """Ours and the rivals in turn; clocks before and after."""
    entry = CASES[name]
    if setting.rehearsed:  # compiling the rivals takes minutes
        case = entry.make(*shape, device=setting.device, rivals="eager")
    else:
        case = entry.case(shape, setting.device, dtype)
    rounds = 1 if setting.rehearsed else ROUNDS
    before = clocks()
    results = measure.paired(case, rounds, device=setting.device)
    after = clocks()
    rows = [
        asdict(r) | {"case": case.title, "ours": r.name in case.ours}
        | {"us": 1e3 * r.median_ms, "ratios": _ratios(case, r, results)}
        for r in results
    ]  # fmt: skip
    sizes_told = f"{SIZES[entry.sizes].letters} = {','.join(map(str, shape))}"
    said = [sizes_told, *([f"clocks {before}; after it {after}"] if before else [])]
    failed = [f"{r.name}: {r.error}" for r in results if r.error]
    ours_failed = any(r.error for r in results if r.name in case.ours)
    state = FAILED if ours_failed else MEASURED
    return Outcome(state, tuple(rows), "; ".join(said + failed))


def _ratios(case: Case, result: measure.Result, results: list[measure.Result]) -> dict[str, float]:
    """Each rival's time over ours, by paired turns."""
    if result.name not in case.ours:
        return {}
    rivals = (r for r in results if r.name not in case.ours and r.times_ms)
    return {r.name: measure.paired_ratio(result, r) for r in rivals}


# ---- launches and memory ------------------------------------------------------------------------


def launch_units(setting: Setting) -> list[HourUnit]:
    """Each function's step, forward and backward, as `auto` runs it."""
    return [HourUnit(f"launches/{e.name}", lambda e=e: launched(setting, e))
            for e in setting.functions()]  # fmt: skip


@dataclass
class Launches:
    """What a step asked for."""

    ours: dict[str, int] = field(default_factory=dict)  # kernels of ours by name
    operators: int = 0  # PyTorch's


class _Operators(TorchDispatchMode):
    def __init__(self, found: Launches) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.found.operators += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Launches]:
    """Counts launches of our kernels within, and PyTorch's operators outside of our ops."""
    found = Launches()

    def add(name: str) -> None:
        found.ours[name] = found.ours.get(name, 0) + 1

    def triton(kernel: Any, *args: Any) -> None:
        add(kernel.fn.__name__)
        real_triton(kernel, *args)

    def cuda(name: str, **arguments: Any) -> None:
        add(name)
        real_cuda(name, **arguments)

    real_triton, real_cuda = triton_launch.launch, cuda_launch.launch
    doubles = {real_triton: triton, real_cuda: cuda}
    held = [place for value in doubles for place in holders(value)]
    try:
        for module, key, value in held:
            setattr(module, key, doubles[value])
        with _Operators(found):
            yield found
    finally:
        for module, key, value in held:
            setattr(module, key, value)


def launched(setting: Setting, example: Example) -> Outcome:
    """Launches, time on the host and on the device, and the peak beside what `explain` tells.

    A rehearsal runs what it can of a GPU's kernels.
    """
    shape = sizes(example, setting.middle)
    inputs = ExampleInputs(*shape, device=setting.device)
    on_host = setting.rehearsed and "cuda" not in example.not_on
    backend = "cuda" if on_host and backends.unavailable("cuda") is None else "auto"
    step = lambda: outcome(example, inputs, backend)
    for _ in range(1 if setting.rehearsed else WARM_UP):
        step()
    with counted() as found:
        step()
    wait(setting.device)
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    wait(setting.device)
    whole = statistics.median(measure.timed_ms(step, setting.device) for _ in range(WARM_UP))
    peak = measure.peak_mib(step, setting.device)
    args, options = example.arguments(inputs)
    try:
        plan = explain(example.function, *args, **options, backend=backend)
        planned: float | str = plan.peak_extra_bytes / 2**20
    except Exception as error:  # what it cannot tell is told
        planned = told(error)
    row: dict[str, Any] = {"op": example.name, "shape": "x".join(map(str, shape))}
    row |= {"kernels": sum(found.ours.values()), "by_kernel": found.ours}
    row |= {"operators": found.operators, "host_us": 1e6 * host, "us": 1e3 * whole}
    row |= {"peak_mib": peak, "told_mib": planned}
    if setting.device == "cuda":
        row["on_device"] = _on_device(step)
    return Outcome(MEASURED, (row,))


def _on_device(step: Callable[[], object]) -> int:
    """Kernels, copies and fills that the profiler saw on the GPU in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in seen.events() or ())


# ---- the model ----------------------------------------------------------------------------------


def model_units(setting: Setting) -> list[HourUnit]:
    """Every form of every operation of the roofline, timed, and its bound."""
    found = []
    for entry in TABLE:
        given = entry.tiny if setting.rehearsed else entry.sizes
        for i, op in enumerate(entry.make(*given)):
            if not setting.wants(op.name):
                continue
            for way in op.backends:
                unit = f"model/{op.name}/{op.direction}/{way}"
                found.append(HourUnit(unit, lambda a=(entry, i, way): modelled(setting, *a)))
    return found


def modelled(setting: Setting, entry: OpSizes, index: int, way: str) -> Outcome:
    """One form's time against the model's bound and against the floor's."""
    given = entry.tiny if setting.rehearsed else entry.sizes
    flat = list(entry.make(*given))[index]
    name = torch.cuda.get_device_name() if setting.device == "cuda" else REHEARSED_AS
    gpu = next((gpu for gpu in PEAKS if gpu in name), None)
    with drawn_on(setting.device):
        op = list(entry.make(*given))[index]
    us = 1e6 * seconds_of(op, way, setting)
    row: dict[str, Any] = {"op": f"{op.name}, {op.direction}", "way": way, "shape": op.shape}
    row |= {"us": us, "gpu": name if gpu is None else gpu}
    if gpu is None:
        told = f"no peaks of {name} are known: bench/roofline/peaks.py"
        return Outcome(MEASURED, (row,), told)
    peak = PEAKS[gpu]
    model = cost(traced(flat, way, peak), peak)
    row |= {"model_us": 1e6 * model.seconds, "floor_us": 1e6 * bound_seconds(flat, peak)}
    row |= {"over": us / (1e6 * model.seconds), "busiest": model.busiest}
    return Outcome(MEASURED, (row,))


def seconds_of(op: Operation, way: str, setting: Setting) -> float:
    """The median of some runs on the device, warm."""
    assert way not in PLAIN
    run = op.backends[way]
    turns = 1 if setting.rehearsed else TURNS
    with torch.no_grad():
        for _ in range(0 if setting.rehearsed else WARM_UP):
            run()
        return statistics.median(measure.timed_ms(run, setting.device) for _ in range(turns)) / 1e3
