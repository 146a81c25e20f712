"""Executes the very PTX of distances and the top-k, sm_80 and sm_90, on the CPU.

The emulator lies beside the project (../shared/ptxsim) and is not part of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_losses.backends.triton import launch as triton_launch
from fused_losses.primitives.distances import triton as triton_distances
from fused_losses.primitives.distances.inputs import DistanceInputs
from fused_losses.primitives.topk import triton as triton_topk
from tools.gpu_static import record

pytest.importorskip("triton")
if triton_launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import triton_distance_cases as distances
import triton_topk_cases as topk

# both skip, saying why, where ptxsim is absent
from simulated import _on_the_path, simulate  # noqa: F401

pytestmark = pytest.mark.ptx

BF16, FP16 = torch.bfloat16, torch.float16
PRODUCTS = {"sm_80": ("mma.sync",), "sm_90": ("wgmma", "mma.sync")}
MULTIPLY = ("distance_tiles", "product_gradients", "best_columns", "key_tiles")


def check_reports(arch: str, reports: list[tuple[str, Any]], kernels: set[str]) -> None:
    assert {name for name, _ in reports} == kernels
    for name in kernels:
        mine = [report for other, report in reports if other == name]
        # a launch that finds no near pair executes little: one of them must execute most
        assert max(report.coverage() for report in mine) > 0.6, name
        if name in MULTIPLY:
            assert all(any(op.startswith(PRODUCTS[arch]) for op in r.opcodes()) for r in mine)


# more than one tile each way, ragged, D even and uneven for the tile
DISTANCES = [
    ("sm_80", distances.Case("euclidean", n=70, m=140, d=64, dtype=BF16)),
    ("sm_90", distances.Case("euclidean", n=70, m=140, d=64, dtype=BF16)),
    ("sm_90", distances.Case("sqeuclidean", n=70, m=90, d=40, center=3.0)),
    ("sm_80", distances.Case("euclidean", n=66, m=70, d=27, dtype=FP16)),
    ("sm_90", distances.Case("euclidean", n=66, m=70, d=32, precision="tf32")),
    ("sm_80", distances.Case("euclidean", n=66, m=70, d=32, precision="bf16")),
    ("sm_80", distances.Case("dot", n=66, m=70, d=33)),
]


@pytest.mark.parametrize("arch, case", DISTANCES, ids=str)
def test_distances(arch: str, case: distances.Case) -> None:
    reports: list[tuple[str, Any]] = []
    with record.on(arch, simulate(int(arch[3:]), reports), processors=2):
        distances.check(case)
    kernels = {"distance_tiles", "product_gradients"}
    if case.kind != "dot":
        kernels |= {"row_squares", "near_distances", "near_gradients"}
    check_reports(arch, reports, kernels)


MANY = dict(multiplier=True, ids=True, exclude=2, skip_self=True)
TOPK = [
    ("sm_80", topk.Case(keep=5, n=70, m=150, d=64, dtype=BF16, name="half")),
    ("sm_90", topk.Case(keep=20, n=70, m=300, d=64, dtype=BF16, match="same", **MANY)),
    ("sm_90", topk.Case(keep=9, n=40, m=150, d=27, integers=False, name="float32")),
    ("sm_80", topk.Case(keep=9, n=40, m=90, d=32, center=True, match="different", **MANY)),
    ("sm_80", topk.Case(keep=7, n=40, m=90, d=32, dtype=BF16, y_dtype=torch.int8, name="int8")),
    ("sm_90", topk.Case(keep=140, n=40, m=200, d=40, match="same", **MANY, name="stored")),
    ("sm_80", topk.Case(keep=140, n=40, m=200, d=64, dtype=BF16, name="stored-half")),
]


@pytest.mark.parametrize("arch, case", TOPK, ids=str)
def test_topk(arch: str, case: topk.Case) -> None:
    call, reports = topk.inputs(case), []
    with record.on(arch, simulate(int(arch[3:]), reports), processors=2):
        keys, index = triton_topk.screen(**call)
    topk.check(case, call, keys, index)
    kernel = "best_columns" if case.keep <= triton_topk.FUSED else "key_tiles"
    check_reports(arch, reports, {kernel})


def test_distances_of_no_near_pairs() -> None:
    """The kernels of near pairs find nothing to do, and leave everything as it is."""
    x, y = torch.randn(20, 64), torch.randn(40, 64)
    case = distances.Case("euclidean", n=20, m=40, d=64)
    reports: list[tuple[str, Any]] = []
    with record.on("sm_80", simulate(80, reports)):
        out = triton_distances.forward(DistanceInputs(x, y, None, case.kind, 2.0, "fp32"))
    distances.check_forward(case, x, y, out)
