"""Builds the C++ extension: the kernels once per instruction set, without torch's headers."""

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


extension = CppExtension(
    "fused_losses._C",
    ["csrc/bind.cpp", "csrc/bind_pairs.cpp", "csrc/bind_topk.cpp", "csrc/bind_distances.cpp"],
    include_dirs=[str(Path(__file__).parent / "csrc")],
    # torch brings the OpenMP runtime; ATen/Parallel.h is serial without this flag
    extra_compile_args=["-std=c++20", "-O2", "-fopenmp"],
    depends=[str(p) for p in sorted(Path("csrc").rglob("*.[hc]*"))],
)
setup(ext_modules=[extension] if wanted() else [], cmdclass={"build_ext": Build})
