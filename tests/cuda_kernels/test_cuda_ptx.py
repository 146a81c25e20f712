"""Every CUDA kernel as nvcc's PTX, executed on the CPU, against float64.

For sm_90 it is that of sm_80, instruction by instruction, and executed once.

The emulator lies beside the project (../shared/ptxsim) and is not part of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cuda_ptx
import pytest
from conftest import require

pytest.importorskip("triton")
if os.environ.get("FUSED_LOSSES_CUDA_ON_HOST") != "1":
    pytest.skip("FUSED_LOSSES_CUDA_ON_HOST=1 runs the CUDA kernels", allow_module_level=True)
cuda_ptx.require()

import cuda_harness  # noqa: E402
from cuda_cases import CASES  # noqa: E402

pytestmark = pytest.mark.ptx

ARCHITECTURES = ("sm_80", "sm_90")
SOURCES = tuple(sorted((cuda_ptx.CSRC / "cuda").rglob("*.cu")))
# a shuffle that reads a lane out of its own mask is undefined; the emulator gives its value
NOT_SEEN = {"foreign lane"}


def instructions(module: cuda_ptx.Module) -> list[str]:
    """The lines of a PTX file without the target that they are for, and comments."""
    lines = (line.partition("//")[0].rstrip() for line in module.text.splitlines())
    return [line for line in lines if line and not line.startswith(".target")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the PTX is, compiled once for both tests of it."""
    return tmp_path_factory.mktemp("ptx")


@pytest.mark.slow
@pytest.mark.xdist_group("cuda_ptx")
def test_targets_have_the_same_ptx(folder: Path) -> None:
    """Where one does not, its own PTX is to be executed, too."""
    first, *others = (cuda_ptx.modules(SOURCES, arch, folder) for arch in ARCHITECTURES)
    for other in others:
        for source, one, another in zip(SOURCES, first, other, strict=True):
            assert one.entries or source.stem == "library"
            assert instructions(one) == instructions(another), source.name


@pytest.mark.slow
@pytest.mark.xdist_group("cuda_ptx")
def test_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cases in one test: at the end every kernel must have run, and most of each."""
    require("cuda")
    monkeypatch.setenv("FUSED_LOSSES_CUDA_PROCESSORS", "1")
    failed = {}
    with cuda_ptx.executing(SOURCES, ARCHITECTURES[0], folder) as ran:
        for case in CASES:
            ran.errors.clear()
            try:
                case.check()
            except Exception as error:
                failed[case.name] = str(ran.errors[0] if ran.errors else error)
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())
    little = {name: part for name, part in ran.coverage().items() if part < 0.2}
    assert not little, little


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The library of the kernels with faults in the place of the project's."""
    out = tmp_path / "libharness.so"
    cuda_harness.build([cuda_harness.KERNELS], out)
    monkeypatch.setenv("FUSED_LOSSES_CUDA_LIBRARY", str(out))
    cuda_harness.forget()
    yield tmp_path
    cuda_harness.forget()


def test_planted_faults_show(harness: Path) -> None:
    """The driver and the emulator notice what the host build does, and pass what is right."""
    unseen = []
    with cuda_ptx.executing((cuda_harness.KERNELS,), "sm_80", harness) as ran:
        for kernel in cuda_harness.KERNELS_TABLE:
            for fault in ("none", *kernel.faults):
                ran.errors.clear()
                shown = kernel.run(fault)
                if fault == "none":
                    assert shown == "", (kernel.name, ran.errors)
                elif not shown and fault not in NOT_SEEN:
                    unseen.append((kernel.name, fault))
    assert not unseen
