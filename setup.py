"""Builds the C++ extension, the kernels once per instruction set, and with nvcc the CUDA library.

No kernel sees torch's headers. CMake builds the same kernels with their tests.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CPU = Path("csrc/cpu")
COMMON = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fno-math-errno"]
COMMON += ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512 += ["-mprefer-vector-width=512"]
ON_X86 = platform.machine() in ("x86_64", "AMD64")
# A source built without its flags compiles to an empty table: that instruction set is left out.
FLAGS = {
    "dispatch": [],
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"] if ON_X86 else [],
    "avx512": AVX512 if ON_X86 else [],
    "avx512_bf16": [*AVX512, "-mavx512bf16"] if ON_X86 else [],
}


COMPILER = os.environ.get("CXX", "c++")


def wanted() -> bool:
    """Whether to compile; without a compiler the package runs on its pure-PyTorch path."""
    if os.environ.get("FUSED_LOSSES_NO_EXTENSION") == "1":
        return False
    if shutil.which(COMPILER) is None:
        print(f"fused_losses: no compiler {COMPILER!r}: building without kernels", file=sys.stderr)
        return False
    return True


# What the CUDA library has machine code for; the last also as PTX, for what comes after it.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
CUDA_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def nvcc() -> str | None:
    """The CUDA compiler, or None: then the package has no CUDA kernels."""
    if os.environ.get("FUSED_LOSSES_NO_CUDA") == "1":
        return None
    found = shutil.which("nvcc")
    if found is None:
        print("fused_losses: no nvcc: building without the CUDA C++ kernels", file=sys.stderr)
    return found


def told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architectures(compiler: str) -> list[str]:
    """Those that are asked for, else those of ours that this nvcc knows."""
    asked = os.environ.get("FUSED_LOSSES_CUDA_ARCHITECTURES")
    if asked:
        return asked.split(";")
    known = told(compiler, "--list-gpu-arch").split()
    return [a for a in ARCHITECTURES if f"compute_{a}" in known]


def compile_cuda(compiler: str, folder: Path, out: Path) -> None:
    """Every .cu once for all architectures, linked into one library of plain functions."""
    targets = architectures(compiler)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    flags = [*CUDA_FLAGS, f'-DFUSED_LOSSES_ARCHITECTURES="{" ".join(targets)}"', *codes]
    if "--compress-mode" in told(compiler, "--help"):
        flags.append("--compress-mode=size")  # a third of the size

    def compile_one(source: Path) -> str:
        made = str(folder / "-".join(source.with_suffix(".cuda.o").parts))
        command = [compiler, *flags, "-c", str(source), "-o", made]
        if subprocess.run(command).returncode != 0:
            hint = "FUSED_LOSSES_NO_CUDA=1 installs without the CUDA C++ kernels"
            raise RuntimeError(f"nvcc failed on {source}: C++20 needs CUDA 12 or later; {hint}")
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(Path("csrc/cuda").rglob("*.cu"))))
    out.parent.mkdir(parents=True, exist_ok=True)
    link = [compiler, "-shared", "-cudart", "static", *codes, *objects, "-o", str(out)]
    subprocess.run(link, check=True)


class Build(BuildExtension):
    def build_extensions(self) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        debug = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else []

        def compile_one(name: str) -> str:
            out = folder / f"{name}.o"
            source = str(CPU / f"{name}.cpp")
            command = [COMPILER, *COMMON, *FLAGS[name], *debug, "-c", source, "-o", str(out)]
            subprocess.run(command, check=True)
            return str(out)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.extensions[0].extra_objects = list(pool.map(compile_one, FLAGS))
        super().build_extensions()
        compiler = nvcc()
        if compiler:
            beside = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
            compile_cuda(compiler, folder, beside / "libfused_losses_cuda.so")


extension = CppExtension(
    "fused_losses._C",
    [str(p) for p in sorted(Path("csrc/bind").glob("*.cpp"))],
    include_dirs=[str(Path(__file__).parent / "csrc")],
    # torch brings the OpenMP runtime; ATen/Parallel.h is serial without this flag
    extra_compile_args=["-std=c++20", "-O2", "-fopenmp"],
    depends=[str(p) for p in sorted(Path("csrc").rglob("*.[hc]*"))],
)
setup(ext_modules=[extension] if wanted() else [], cmdclass={"build_ext": Build})
