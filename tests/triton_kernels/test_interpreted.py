"""Runs the Triton kernels' cases in Triton's interpreter, in processes of their own.

Triton reads TRITON_INTERPRET when imported. Two processes: that each imports takes as long as many
cases, and there are two cores.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import triton_interpreted
from places import TESTS

HERE = Path(__file__).parent
PARTS = (
    ("triton_cases", "triton_divergence_cases", "triton_topk_cases", "triton_drawn_cases"),
    ("triton_class_cases", "triton_distance_cases", "triton_pair_cases", "triton_apart_cases",
     "triton_maxsim_cases", "triton_unit_cases", "triton_target_cases", "roofline_cases"),
)  # fmt: skip


def path(cases: str) -> Path:
    """Those of the cost model count what the kernels move."""
    return (TESTS / "bench" if cases == "roofline_cases" else HERE) / f"{cases}.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.xdist_group(f"interpreted {part[0]}"), id=part[0])
        for part in PARTS
    ],
)
def test_interpreted(part: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    triton_interpreted.passes(*map(path, part))


def test_no_cases_are_forgotten() -> None:
    assert {path(cases) for part in PARTS for cases in part} == {
        *HERE.glob("triton_*cases.py"),
        *(TESTS / "bench").glob("*_cases.py"),
    }
