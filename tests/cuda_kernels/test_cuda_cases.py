"""Every CUDA kernel's host build on small ragged calls, in several orders of its threads.

`make cuda-sanitize` runs this file on a build with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os

import pytest
from conftest import require

pytest.importorskip("triton")
if os.environ.get("FUSED_LOSSES_CUDA_ON_HOST") != "1":
    pytest.skip("FUSED_LOSSES_CUDA_ON_HOST=1 runs the CUDA kernels", allow_module_level=True)

from cuda_cases import CASES, CudaCase


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case: CudaCase, monkeypatch: pytest.MonkeyPatch) -> None:
    require("cuda")
    for seed in ("1", "2"):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", seed)
        case.check()
