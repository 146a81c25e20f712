"""Kernels with faults to plant (csrc/tests/cuda_harness/kernels.cu), and how each fault shows.

Both ways to execute kernels without a GPU are tried on them: the host build, and ptxsim.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from places import ROOT
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch

CSRC = ROOT / "csrc"
KERNELS = CSRC / "tests/cuda_harness/kernels.cu"
SIMULATOR = sorted((CSRC / "cuda/host").glob("*.cpp"))
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-w", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
SANITIZE = ("-g1", "-fsanitize=address,undefined,bounds-strict", "-fno-sanitize-recover=all")
FAULTS = (
    "none",
    "no barrier",
    "no step barrier",
    "no last barrier",
    "skipped barrier",
    "two barriers",
    "early exit",
    "global shift",
    "shared shift",
    "shared past end",
    "uninitialised",
    "no mask",
    "no store mask",
    "misaligned",
    "wrong buffer",
    "not atomic",
    "absent lane",
    "foreign lane",
    "own lane",
    "mixed collectives",
    "missing step",
    "no warp barrier",
    "half warp barrier",
)


@dataclass(frozen=True)
class Kernel:
    """How to call a kernel, what it should give, and how each planted fault shows.

    A fault shows as a part of the message, or "" for a wrong result (under one of a few seeds).
    """

    name: str
    shape: tuple[int, int]
    blocks: int
    inputs: Callable[[int, int], tuple[Tensor, Tensor | None]]
    out: Callable[[int, int], Tensor]
    truth: Callable[[Tensor, Tensor | None, int], Tensor]
    faults: dict[str, str] = field(default_factory=dict)

    def run(self, fault: str) -> str:
        """How the fault showed: the message, "wrong", or "" when all is right."""
        n, d = self.shape
        x, y = self.inputs(n, d)
        out = self.out(n, d)
        values = dict(n=n, d=d, blocks=self.blocks, fault=FAULTS.index(fault))
        try:
            cuda_launch.launch(f"harness_{self.name}", x=x, y=y, out=out, **values)
        except RuntimeError as error:
            return str(error)
        want = self.truth(x, y, d)
        good = torch.allclose(out, want, rtol=1e-5, atol=1e-4)
        return "" if good else "wrong"


def floats(n: int, d: int) -> tuple[Tensor, None]:
    return torch.randn(n, d), None


def masked(n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), (torch.arange(d) % 3 != 1).float()


def integers(n: int, d: int) -> tuple[Tensor, None]:
    return torch.randint(d, (n,), dtype=torch.int32), None


OUT = "out of bounds"
SHARED = "shared memory"
KERNELS_TABLE = (
    Kernel(
        "row_sums",
        (7, 300),
        2,
        floats,
        lambda n, d: torch.full((n,), torch.nan),
        lambda x, y, d: x.sum(1),
        {
            "no barrier": "",
            "no step barrier": "",
            "no last barrier": "",
            "skipped barrier": "two barriers",
            "two barriers": "two barriers",
            "early exit": "have ended",
            "global shift": OUT,
            "shared shift": SHARED,
            "uninitialised": "",
            "no mask": OUT,
        },
    ),
    Kernel(
        "row_argmax",
        (5, 77),
        2,
        floats,
        lambda n, d: torch.full((n,), -7, dtype=torch.int32),
        lambda x, y, d: x.argmax(1).int(),
        {
            "no mask": OUT,
            "absent lane": "lanes",
            "foreign lane": "reads lane",
            "own lane": "calls a collective of mask",
            "mixed collectives": "different kinds",
            "missing step": "",
        },
    ),
    Kernel(
        "transpose",
        (45, 70),
        2,
        floats,
        lambda n, d: torch.full((d, n), torch.nan),
        lambda x, y, d: x.T,
        {
            "no barrier": "",
            "no last barrier": "",
            "global shift": OUT,
            "shared shift": "",
            "no mask": OUT,
            "no store mask": OUT,
        },
    ),
    Kernel(
        "masked_sums",
        (3, 37),
        2,
        masked,
        lambda n, d: torch.full((n,), torch.nan),
        lambda x, y, d: x @ y,
        {"no mask": "", "misaligned": "misaligned", "wrong buffer": "read only"},
    ),
    Kernel(
        "masked_sums",
        (3, 264),
        2,
        masked,
        lambda n, d: torch.full((n,), torch.nan),
        lambda x, y, d: x @ y,
        {"no mask": "", "global shift": OUT, "wrong buffer": "read only"},
    ),
    Kernel(
        "histogram",
        (1000, 64),
        3,
        integers,
        lambda n, d: torch.zeros(d, dtype=torch.int32),
        lambda x, y, d: torch.bincount(x, minlength=d).int(),
        {
            "no barrier": "",
            "no last barrier": "",
            "uninitialised": "",
            "shared shift": SHARED,
            "no mask": OUT,
            "not atomic": "",
        },
    ),
    Kernel(
        "reverse_rows",
        (4, 150),
        2,
        floats,
        lambda n, d: torch.full((n, d), torch.nan),
        lambda x, y, d: x.flip(1),
        {
            "no barrier": "",
            "no last barrier": "",
            "shared shift": SHARED,
            "shared past end": "",
            "uninitialised": "",
        },
    ),
    Kernel(
        "prefix_sums",
        (6, 32),
        2,
        floats,
        lambda n, d: torch.full((n, d), torch.nan),
        lambda x, y, d: x.cumsum(1),
        {"no warp barrier": "", "no step barrier": "", "half warp barrier": "lanes"},
    ),
)


def build(sources: Iterable[Path], out: Path, *flags: str) -> None:
    """Kernel sources, built for the host."""
    files = [str(file) for file in (*sources, *SIMULATOR)]
    command = ["g++", *FLAGS, *flags, "-shared", "-xc++", *files, "-o", str(out), "-ldl"]
    subprocess.run(command, check=True)


def forget() -> None:
    """The next launch loads the library that the environment names by then."""
    cuda_launch.library.cache_clear()
    cuda_launch._function.cache_clear()


def sanitizer_library(kind: str) -> str:
    """What a process without the sanitizer has to load first."""
    command = ["g++", f"-print-file-name=lib{kind}.so"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    (chosen,) = (kernel for kernel in KERNELS_TABLE if kernel.name == sys.argv[1])
    print(chosen.run(sys.argv[2]))
