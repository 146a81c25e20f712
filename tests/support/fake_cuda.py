"""Runs a file of cases in a process where CUDA tensors have devices, streams, and no values."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from places import ROOT, search_path
from torch.utils.cpp_extension import include_paths, library_paths

from fused_losses.backends.cuda import launch as cuda_launch

HOST_LIBRARY = cuda_launch.FOLDER / cuda_launch.ON_HOST


@functools.cache
def library() -> str:
    """`fake_cuda.cpp`, built against this torch."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("devices without a GPU need a C++ compiler and glibc")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this PyTorch has CUDA devices of its own")
    out = Path(tempfile.mkdtemp(prefix="fake_cuda")) / "libfake_cuda.so"
    folders = [f"-I{path}" for path in include_paths()]
    linked = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    source = str(Path(__file__).with_suffix(".cpp"))
    flags = ("-std=c++20", "-shared", "-fPIC", source, "-lc10", "-ltorch_cpu", "-o", str(out))
    subprocess.run([compiler, *folders, *flags, *linked], check=True)
    return str(out)


def passes(cases: Path) -> None:
    """Every test of the file passes where there are two such devices."""
    if not HOST_LIBRARY.is_file():  # for what the structs of its functions are
        pytest.skip("the host build of the CUDA kernels is missing; `make cuda-host` builds it")
    environment = os.environ | {
        "FUSED_LOSSES_CUDA_LIBRARY": str(HOST_LIBRARY),
        "LD_PRELOAD": library(),
        "FAKE_CUDA_LIBRARY": library(),
        "PYTHONPATH": search_path(),
        "FUSED_LOSSES_CUDA_ON_HOST": "0",
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
