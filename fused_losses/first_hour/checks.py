"""Units that are right or wrong: ops against float64, sanitizers, graphs, a second device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.examples import EXACT, TABLE, Example, ExampleInputs
from fused_losses.bench.micro.cases import short
from fused_losses.first_hour.record import FAILED, PASSED, SKIPPED, Outcome
from fused_losses.first_hour.setting import HourUnit, Setting, sizes, wait
from fused_losses.verify import table
from fused_losses.verify.forms import forms
from fused_losses.verify.table import Chosen, Row, Truth, VerifyStep, outcome

FIRST = (torch.float32, torch.bfloat16)
SANITIZED = ("linear_cross_entropy", "info_nce, symmetric", "topk, dot", "distances, cityblock",
             "batch_hard_triplet", "maxsim", "distillation", "SFace")  # fmt: skip
# of the functions that docs/gpu.md lists: a capture cannot hold what waits for the host
WAITS = frozenset(
    "all_triplets angular class_aware_alignment coding_rate gated_contrastive "
    "gaussian_cross_entropy gaussian_scores kmeans leanvec lifted_structure maxsim "
    "median_bandwidth mine_pairs mine_triplets pairwise_distance pairwise_topk pnp "
    "radius_search smooth_ap".split()
)
SANITIZER, TOOLS, SANITIZER_SECONDS = "compute-sanitizer", ("memcheck", "racecheck"), 150
SEGMENTED = (7, 50, 12)  # of a rehearsal: classes or columns for several segments
WARM_UP = 3  # calls before a capture: kernels are compiled, workspaces made


def verify_units(setting: Setting) -> list[HourUnit]:
    """Each example once at a small shape, float32 and bfloat16, on every backend that can."""
    device = torch.device(setting.device)
    steps = [VerifyStep(e, device, setting.small, FIRST) for e in setting.examples()]
    return [HourUnit(f"verify/{s.example.name}", lambda s=s: judged(s)) for s in steps]


def more_units(setting: Setting) -> list[HourUnit]:
    """The rest of the table: other dtypes, larger shapes, forms that only these reach."""
    shapes = [setting.small] if setting.rehearsed else None
    found = []
    steps = table.steps([setting.device], shapes, Chosen(setting.ops))
    for step in [*steps, *(_with_little_room(setting) if setting.rehearsed else [])]:
        if step.shape == setting.small and step.room is None:
            # what has been checked before
            step = step._replace(dtypes=tuple(t for t in step.dtypes if t not in FIRST))
        at = "x".join(map(str, step.shape))
        name = f"more/{step.example.name}/{at}"
        if step.backends != table.BACKENDS:  # a form's own
            name += f"/{'/'.join(step.backends)}/{short(step.dtypes[0])}"
        if step.room is not None:  # two forms may differ in nothing else
            name += f"/{step.room.name.lower()}"
        found.append(HourUnit(name, lambda step=step: judged(step)))
    return found


def _with_little_room(setting: Setting) -> list[VerifyStep]:
    """Merges over segments, which interpreted kernels reach at small shapes, too."""
    device, found = torch.device(setting.device), []
    for form in forms(1):
        if form.room is not None and Chosen(setting.ops).takes(form.example):
            example, dtypes = TABLE[form.example], (form.dtype,)
            found.append(VerifyStep(example, device, SEGMENTED, dtypes, form.room, (form.backend,)))
    return found


def device_units(setting: Setting) -> list[HourUnit]:
    """Each function on the second device, while the first one is current."""
    if setting.device != "cuda" or torch.cuda.device_count() < 2:
        told = f"this machine has {torch.cuda.device_count()} CUDA devices"
        return [HourUnit("devices/all", lambda: Outcome(SKIPPED, told=told))]
    steps = [
        VerifyStep(e, torch.device("cuda", 1), setting.small, (torch.float32,))
        for e in setting.functions()
    ]
    return [HourUnit(f"devices/{s.example.name}", lambda s=s: judged(s)) for s in steps]


def judged(step: VerifyStep) -> Outcome:
    """The rows of a step of verify. Raises `DeviceLost`."""
    rows = list(table.of(step))
    if not rows:
        return Outcome(SKIPPED, told="no backend here takes it")
    failed = [row for row in rows if not row.passed]
    told = "; ".join(f"{r.backend} {r.dtype}: {r.note or 'beyond its bound'}" for r in failed[:3])
    return Outcome(FAILED if failed else PASSED, tuple(map(row_entry, rows)), told)


def row_entry(row: Row) -> dict[str, Any]:
    return asdict(row) | {"passed": row.passed}


# ---- sanitizers ---------------------------------------------------------------------------------


def sanitizer_units(setting: Setting) -> list[HourUnit]:
    """A few ops under compute-sanitizer, where it is installed."""
    program = shutil.which(SANITIZER)
    if program is None:
        why = f"{SANITIZER} is not on the path"
        return [HourUnit("sanitizer/all", lambda: Outcome(SKIPPED, told=why))]
    names = [name for name in SANITIZED if Chosen(setting.ops).takes(name)]
    run = partial(sanitized, setting, program)
    calls = [(tool, name) for tool in TOOLS for name in names]
    return [HourUnit(f"sanitizer/{'/'.join(call)}", partial(run, *call)) for call in calls]


def sanitized(setting: Setting, program: str, tool: str, name: str) -> Outcome:
    """`fused-losses verify` of one op in float32, under one of the sanitizer's tools."""
    shape = ",".join(map(str, setting.small))
    command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable]
    command += ["-m", "fused_losses.cli", "verify", "--device", setting.device, "--op", name]
    command += ["--dtype", "float32", "--shape", shape]
    command += [part for backend in ("triton", "cuda") for part in ("--backend", backend)]
    environment = os.environ | setting.environment
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=SANITIZER_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return Outcome(SKIPPED, told=f"took longer than {SANITIZER_SECONDS} s")
    except OSError as error:
        return Outcome(FAILED, told=f"{SANITIZER} does not start: {error}")
    said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    summary = [line for line in said if "SUMMARY" in line or " passed, " in line] or said[-3:]
    told = "; ".join(line.strip() for line in summary)[:500]
    state = PASSED if run.returncode == 0 else FAILED
    return Outcome(state, ({"tool": tool, "op": name, "status": run.returncode},), told)


# ---- graphs -------------------------------------------------------------------------------------


def graph_units(setting: Setting) -> list[HourUnit]:
    """Each function's step captured as a CUDA graph, and replayed on other inputs."""
    if setting.device != "cuda":
        return [HourUnit("graphs/all", lambda: Outcome(SKIPPED, told="graphs are of a GPU"))]
    return [
        HourUnit(f"graphs/{e.name}", lambda e=e: graphed(setting, e)) for e in setting.functions()
    ]


def graphed(setting: Setting, example: Example) -> Outcome:
    """Forward and backward of the backend that `auto` takes, replayed on inputs of another seed."""
    waits = example.function.__name__ in WAITS
    if waits and example.bound == EXACT:
        return Outcome(SKIPPED, told="it reads values of the device: docs/gpu.md")
    shape = sizes(example, setting.small)
    given = {"dtype": torch.float32, "device": setting.device}
    first = ExampleInputs(*shape, **given, seed=0)
    leaves = [getattr(first, name) for name in example.leaves]
    try:
        replay, out = captured(lambda: outcome(example, first, "auto"))
    except Exception as error:
        if waits:
            return Outcome(SKIPPED, told=f"it waits for the host: docs/gpu.md ({error})"[:300])
        raise
    # labels stay those of the first seed: the graph holds their addresses, too
    second = ExampleInputs(*shape, **given, seed=1)
    with torch.no_grad():
        for leaf, name in zip(leaves, example.leaves, strict=True):
            leaf.copy_(getattr(second, name))
    replay()
    wait(setting.device)
    exact = ExampleInputs(*shape, torch.float64, rounded=torch.float32, seed=0,
                          device=setting.device)  # fmt: skip
    for leaf, name in zip(leaves, example.leaves, strict=True):
        setattr(exact, name, leaf.detach().double())
    error, bound = Truth(example, exact).judge(out)
    row = Row(example.name, "auto, replayed", "float32/fp32", setting.small, error, bound)
    return Outcome(PASSED if row.passed else FAILED, (row_entry(row),))


def captured(
    step: Callable[[], list[Tensor]], graphs: Any = torch.cuda
) -> tuple[Callable[[], None], list[Tensor]]:
    """A step captured as a graph: what replays it, and the tensors that a replay fills.

    graphs: torch.cuda, or what stands for it.
    """
    side = graphs.Stream()
    side.wait_stream(graphs.current_stream())
    with graphs.stream(side):
        for _ in range(WARM_UP):
            step()
    graphs.current_stream().wait_stream(side)
    graph = graphs.CUDAGraph()
    with graphs.graph(graph):
        out = step()
    return graph.replay, out
