"""The build backend: setuptools, and PyTorch only where one is compiled against and none is there.

An isolated build does not see the packages of the environment that it serves, and would download
a PyTorch of gigabytes beside the one that is there: kernels built against that might not even load.
So they are built against the environment's own. setup.py asks here, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

COMPILER = os.environ.get("CXX", "c++")
# which a wheel for others is built against: FUSED_LOSSES_BUILD_TORCH="torch==2.13.*"
TORCH = "torch>=2.11"
ASK = """
import json, sys, torch
from torch.utils.cpp_extension import include_paths, library_paths
count = torch.cuda.device_count()
gpus = [torch.cuda.get_device_capability(i) for i in range(count)]
json.dump([include_paths(), library_paths(), gpus], sys.stdout)
"""


def compiling() -> bool:
    """Whether to compile; without a compiler the package runs on its pure-PyTorch path."""
    if os.environ.get("FUSED_LOSSES_NO_EXTENSION") == "1":
        return False
    if shutil.which(COMPILER) is None:
        print(f"fused_losses: no compiler {COMPILER!r}: building without kernels", file=sys.stderr)
        return False
    return True


@cache
def torch_here() -> tuple[list[str], list[str], list[tuple[int, int]]] | None:
    """Headers, libraries and GPUs of the PyTorch that is built against; None: there is none.

    One that this build asked for, or the environment's: asked in processes of their own, the second
    without the search path by which an isolated build hides it.
    """
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    for env in (dict(os.environ), {k: v for k, v in os.environ.items() if k not in hiding}):
        command = [sys.executable, "-P", "-c", ASK]
        told = subprocess.run(command, env=env, capture_output=True, text=True)
        if told.returncode == 0:
            headers, libraries, gpus = json.loads(told.stdout.splitlines()[-1])
            return headers, libraries, [(major, minor) for major, minor in gpus]
    return None


def requirements() -> list[str]:
    """What a build needs beside setuptools."""
    if not compiling():
        return []
    asked = os.environ.get("FUSED_LOSSES_BUILD_TORCH", "")
    torch = [asked or TORCH] if asked or torch_here() is None else []
    return ["cmake>=3.22", "ninja", *torch]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements()]
