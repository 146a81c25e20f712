"""setup.py: which CUDA kernels an install builds, and what it says where it builds none.

The script runs as it is; commands are noted and leave the files that they would have made.
"""

from __future__ import annotations

import importlib
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
from places import ROOT
from setuptools.dist import Distribution

SETTINGS = ("NO_CUDA", "NO_EXTENSION", "CUDA_ARCHITECTURES")


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Builds a checkout (or a wheel) on such a machine: the settings that CMake was given."""
    (tmp_path / "fused_losses").mkdir()
    monkeypatch.syspath_prepend(ROOT / "tools" / "packages")
    backend = importlib.import_module("build_backend")
    shutil.copy(ROOT / "setup.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in SETTINGS:
        monkeypatch.delenv(f"FUSED_LOSSES_{name}", raising=False)
    which = shutil.which

    def build(
        gpus: tuple[tuple[int, int], ...] = (), nvcc: bool = True, wheel: bool = False
    ) -> dict:
        settings: dict[str, str] = {}

        def run(command: list[str], **_: Any) -> None:
            settings.update(word[2:].split("=", 1) for word in command if word.startswith("-D"))
            if "--build" in command:
                folder, target = Path(command[2]), command[-1]
                folder.mkdir(parents=True, exist_ok=True)
                made = "libfused_losses_cuda.so" if target.endswith("cuda") else extension
                (folder / made).write_text(settings["FUSED_LOSSES_CUDA_ARCHITECTURES"])

        def found(name: str, **_: Any) -> str | None:
            return (f"/bin/{name}" if nvcc else None) if name == "nvcc" else which("true")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(shutil, "which", found)
        monkeypatch.setattr(backend, "torch_here", lambda: (["headers"], ["lib"], list(gpus)))
        script = runpy.run_path(str(tmp_path / "setup.py"))
        distribution = Distribution({"packages": ["fused_losses"]})
        distribution.ext_modules = [script["extension"]]
        command = script["Build"](distribution)
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.inplace, command.editable_mode = False, not wheel
        extension = Path(command.get_ext_fullpath("fused_losses._C")).name
        for ext in command.extensions:
            command.build_extension(ext)
        if not wheel:
            command.copy_extensions_to_source()
        return settings

    return build


def beside(folder: str) -> dict[str, str]:
    """What lies beside the package, of CUDA."""
    files = Path(folder, "fused_losses").glob("*cuda*")
    return {file.name: file.read_text() for file in files}


def test_a_checkout_builds_for_the_gpus_that_are_there(checkout: Callable[..., dict]) -> None:
    assert checkout(gpus=((9, 0), (8, 0), (9, 0)))["FUSED_LOSSES_CUDA"] == "ON"
    assert beside(".") == {"libfused_losses_cuda.so": "80;90"}


def test_a_checkout_without_a_gpu_says_so(checkout: Callable[..., dict]) -> None:
    checkout(gpus=((9, 0),))
    # the library of an earlier build goes, too
    assert checkout()["FUSED_LOSSES_CUDA"] == "OFF"
    assert list(beside(".")) == ["no_cuda_library.txt"]
    assert "found no GPU; FUSED_LOSSES_CUDA_ARCHITECTURES=80" in beside(".")["no_cuda_library.txt"]


def test_a_checkout_builds_what_is_asked_for(
    checkout: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout()
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ARCHITECTURES", "100")
    checkout()
    assert beside(".") == {"libfused_losses_cuda.so": "100"}
    monkeypatch.setenv("FUSED_LOSSES_NO_CUDA", "1")
    checkout()
    assert "FUSED_LOSSES_NO_CUDA was 1" in beside(".")["no_cuda_library.txt"]


def test_a_wheel_is_built_for_all_and_tells_of_a_missing_nvcc(
    checkout: Callable[..., dict],
) -> None:
    assert checkout(wheel=True)["FUSED_LOSSES_CUDA_ARCHITECTURES"] == ""
    assert beside("lib") == {"libfused_losses_cuda.so": ""}
    assert checkout(nvcc=False, wheel=True)["FUSED_LOSSES_CUDA"] == "OFF"
    assert "nvcc was not found" in beside("lib")["no_cuda_library.txt"]
    assert beside(".") == {}
