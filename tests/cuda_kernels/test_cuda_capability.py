"""Whether the CUDA kernels can run, by what stubs of the driver and the runtime say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_losses import backends
from fused_losses.backends.cuda import capability, launch
from fused_losses.backends.triton import capability as triton_capability

NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice
ERRORS = {NO_IMAGE: b"no kernel image is available for execution on the device"}
GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    asked = (launch.library, launch.unusable, launch.no_code_on, backends.unavailable)
    for function in asked:
        function.cache_clear()
    yield
    for function in asked:
        function.cache_clear()


class Library:
    """The library's C functions, of a driver, a runtime, and devices that it has code for."""

    def __init__(self, driver: int, runtime: int, devices: tuple[int, ...] = (0, 1)) -> None:
        self.driver, self.runtime, self.devices = driver, runtime, devices
        self.asked: list[int] = []

    def fused_losses_driver(self) -> int:
        return self.driver

    def fused_losses_runtime(self) -> int:
        return self.runtime

    def fused_losses_kernels_on(self, device: int) -> int:
        self.asked.append(device)
        return 0 if device in self.devices else NO_IMAGE

    def fused_losses_error(self, code: int) -> bytes:
        return ERRORS[code]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], None]:
    """A GPU machine with such a library."""

    def has(library: Any) -> None:
        file = tmp_path / "library.so"
        file.write_bytes(b"")
        monkeypatch.setenv("FUSED_LOSSES_CUDA_LIBRARY", str(file))
        monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", "0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        if library is not None:
            monkeypatch.setattr(launch, "library", cache(lambda: library))
            monkeypatch.setattr(launch, "architectures", lambda: "sm_80, sm_86")

    return has


def against(device: torch.device = GPU) -> list[str]:
    return backends.reasons_against("cuda", device, torch.float32, "fp32")


@pytest.mark.parametrize("driver", (12080, 12040, 13000))
def test_a_driver_of_its_major_version_or_a_later_one_will_do(
    driver: int, machine: Callable[[Any], None]
) -> None:
    library = Library(driver, 12080)
    machine(library)
    assert against() == [] and against() == []
    assert library.asked == [1]  # once for each device


def test_a_driver_of_an_older_major_version_is_a_reason(machine: Callable[[Any], None]) -> None:
    machine(Library(12040, 13000))
    assert "up to 12.4" in against()[0] and "13.0" in against()[0]


def test_no_driver_is_a_reason(machine: Callable[[Any], None]) -> None:
    machine(Library(0, 13000))
    assert against() == ["the CUDA C++ kernels find no driver"]


def test_no_code_for_a_device_is_a_reason_there_alone(machine: Callable[[Any], None]) -> None:
    machine(Library(13000, 13000, devices=(0,)))
    assert against(torch.device("cuda", 0)) == []
    (why,) = against()
    assert why.startswith(f"device cuda:1: {ERRORS[NO_IMAGE].decode()}")
    assert why.endswith("built for sm_80, sm_86")


def test_a_library_of_another_version_is_a_reason(machine: Callable[[Any], None]) -> None:
    machine(SimpleNamespace())
    assert "not this version's" in against()[0]


def test_a_file_that_does_not_load_is_a_reason(machine: Callable[[Any], None]) -> None:
    machine(None)
    assert "do not load" in against()[0]
    assert "does not load" in launch.built()


def test_dispatch_goes_on(machine: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(Library(12040, 13000))
    monkeypatch.setattr(triton_capability, "unavailable", lambda: "left out here")
    with backends.watched() as chosen:
        name, refused = backends.choose(None, GPU, torch.float32, "fp32", "topk")
    assert name == "bounded" and chosen
    assert "up to 12.4" in refused["cuda"][0]


def test_no_library_has_the_reason_of_its_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", "0")
    monkeypatch.delenv("FUSED_LOSSES_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    assert "no install has made them" in str(capability.unavailable())
    (tmp_path / launch.WITHOUT).write_text("PyTorch found no GPU\n")
    assert str(capability.unavailable()).endswith("not built: PyTorch found no GPU")


def test_versions_are_read_as_cuda_writes_them() -> None:
    assert launch._version(12080) == "12.8" and launch._version(13000) == "13.0"
