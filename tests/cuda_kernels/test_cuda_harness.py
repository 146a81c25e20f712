"""The execution of CUDA kernels on the host notices planted faults, and only those."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_harness as harness
import pytest
from cuda_harness import KERNELS_TABLE, Kernel
from places import search_path

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cuda_harness")]

SEEDS = range(6)
PLANTED = [(k, fault) for k in KERNELS_TABLE for fault in k.faults]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("harness") / "libharness.so"
    harness.build([harness.KERNELS], out)
    return out


@pytest.fixture(autouse=True)
def _on_host(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", "1")
    monkeypatch.setenv("FUSED_LOSSES_CUDA_LIBRARY", str(library))
    harness.forget()
    yield
    harness.forget()


@pytest.mark.parametrize("kernel", KERNELS_TABLE, ids=lambda k: f"{k.name}-{k.shape[1]}")
def test_right_kernels_pass(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", str(seed))
        assert kernel.run("none") == ""


@pytest.mark.parametrize(
    "kernel, fault", PLANTED, ids=lambda v: f"{v.name}-{v.shape[1]}" if isinstance(v, Kernel) else v
)
def test_planted_faults_show(kernel: Kernel, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for seed in SEEDS:
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", str(seed))
        seen.append(kernel.run(fault))
    assert any(seen), "nothing was noticed"
    expected = kernel.faults[fault] or "wrong"
    assert any(expected in how for how in seen), seen


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sanitized") / "libharness.so"
    harness.build([harness.KERNELS], out, *harness.SANITIZE)
    return out


@pytest.mark.parametrize(
    "name, fault, expected",
    (
        ("reverse_rows", "none", ""),
        ("reverse_rows", "shared past end", "AddressSanitizer: use-after-poison"),
        ("row_sums", "shared shift", "index 128 out of bounds for type 'float [128]'"),
    ),
)
def test_sanitizers_report(name: str, fault: str, expected: str, sanitized: Path) -> None:
    """What lies beside shared memory is poisoned: also loads there are found."""
    libraries = [harness.sanitizer_library(kind) for kind in ("asan", "ubsan")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FUSED_LOSSES_CUDA_LIBRARY": str(sanitized),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search_path(),
    }
    command = [sys.executable, harness.__file__, name, fault]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(expected), done.stderr
    assert expected in done.stderr
