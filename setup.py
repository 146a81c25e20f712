"""Builds the C++ extension and, with nvcc, the CUDA library, by CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()
sys.path.append(str(HERE / "tools" / "packages"))
from build_backend import COMPILER, compiling, torch_here  # noqa: E402 (it lies there)

BUILD = HERE / "build" / "compiled"  # kept: what has not changed is not compiled again
CUDA_LIBRARY = "libfused_losses_cuda.so"
WITHOUT = "no_cuda_library.txt"  # beside the package: why there is none, which `info` tells


def targets(editable: bool, gpus: list[tuple[int, int]]) -> tuple[str | None, str]:
    """What the CUDA kernels are built for, "": all of ours, or None, and why.

    Of a checkout, the GPUs that are here: minutes of compiling would serve nobody without one.
    """
    if os.environ.get("FUSED_LOSSES_NO_CUDA") == "1":
        return None, "FUSED_LOSSES_NO_CUDA was 1 when this was installed"
    if shutil.which("nvcc") is None:
        return None, "nvcc was not found when this was installed"
    asked = os.environ.get("FUSED_LOSSES_CUDA_ARCHITECTURES", "")
    if asked or not editable:
        return asked, ""
    found = sorted({10 * major + minor for major, minor in gpus})
    if not found:
        hint = "FUSED_LOSSES_CUDA_ARCHITECTURES=80 builds them"
        return None, f"this is a checkout on a machine where PyTorch found no GPU; {hint}"
    return ";".join(map(str, found)), ""


def program(name: str) -> str:
    """Of the environment that runs this, which may not be an active one, or of the system."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise RuntimeError(f"fused_losses: no {name}: `pip install cmake ninja`")
    return found


def compiled(target: str) -> Path:
    """Brings a target up to date; the folder that it is in."""
    command = [program("cmake"), "--build", str(BUILD), "--parallel", "--target", target]
    subprocess.run(command, check=True)
    return BUILD


class Build(build_ext):
    def build_extension(self, extension: Extension) -> None:
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        torch = torch_here()
        if torch is None:
            raise RuntimeError("fused_losses: no PyTorch to build against: `pip install torch`")
        headers, libraries, gpus = torch
        architectures, why_none = targets(self.editable_mode, gpus)
        settings = {
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "CMAKE_CXX_COMPILER": shutil.which(COMPILER),
            # what is compiled stays the same, byte for byte of its code
            "FUSED_LOSSES_LINES": "ON" if os.environ.get("FUSED_LOSSES_LINES") == "1" else "OFF",
            "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG") == "1" else "Release",
            "FUSED_LOSSES_TORCH": ";".join([*headers, sysconfig.get_path("include")]),
            "FUSED_LOSSES_TORCH_LIBRARIES": ";".join(libraries),
            "FUSED_LOSSES_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FUSED_LOSSES_CUDA": "OFF" if architectures is None else "ON",
            "FUSED_LOSSES_CUDA_ARCHITECTURES": architectures or "",
        }
        given = [f"-D{name}={value}" for name, value in settings.items()]
        configure = [program("cmake"), "-S", str(HERE), "-B", str(BUILD), "-G", "Ninja", *given]
        subprocess.run(configure, check=True)
        shutil.copy2(compiled("fused_losses_extension") / out.name, out)
        # a library or note of an earlier build is not this build's
        for left in (CUDA_LIBRARY, WITHOUT):
            (out.parent / left).unlink(missing_ok=True)
        if architectures is None:
            print(f"fused_losses: no CUDA C++ kernels: {why_none}", file=sys.stderr)
            (out.parent / WITHOUT).write_text(f"{why_none}\n")
            return
        try:
            shutil.copy2(compiled("fused_losses_cuda") / CUDA_LIBRARY, out.parent)
        except subprocess.CalledProcessError as error:
            hint = "FUSED_LOSSES_NO_CUDA=1 installs without the CUDA C++ kernels"
            raise RuntimeError(f"nvcc failed: C++20 needs CUDA 12 or later; {hint}") from error

    def copy_extensions_to_source(self) -> None:
        """Of a checkout, which then has the CUDA library too, or the note of why not."""
        super().copy_extensions_to_source()
        for name in (CUDA_LIBRARY, WITHOUT):
            (HERE / "fused_losses" / name).unlink(missing_ok=True)
            for made in Path(self.build_lib).rglob(name):
                shutil.copy2(made, HERE / "fused_losses")


extension = Extension(
    "fused_losses._C",
    sources=[],
    depends=["CMakeLists.txt", *(str(p) for p in sorted(Path("csrc").rglob("*")) if p.is_file())],
)
setup(ext_modules=[extension] if compiling() else [], cmdclass={"build_ext": Build})
