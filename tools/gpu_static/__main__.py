"""`make gpu-static`: compiles, writes the page, and fails on what the gate forbids."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fused_losses.backends.cuda import launch as cuda_launch
from tools.gpu_static import cuda_library, page, sweep
from tools.gpu_static.calls import compilations
from tools.gpu_static.record import AMD, NVIDIA

SAVED = Path("build/gpu_static")  # each target's figures, as last compiled


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_static", description=__doc__)
    parser.add_argument(
        "--target",
        action="append",
        choices=(*NVIDIA, *AMD),
        help="compile for this one alone (repeatable); the others' figures are those last saved",
    )
    parser.add_argument("--saved", action="store_true", help="compile nothing: all as last saved")
    parser.add_argument("--page", type=Path, default=Path("docs/generated/gpu_static.md"))
    parser.add_argument("--library", type=Path, default=cuda_launch.FOLDER / cuda_launch.ON_DEVICE)
    given = parser.parse_args()
    found = []
    for arch in NVIDIA + AMD:
        saved = SAVED / f"{arch}.json"
        if not given.saved and arch in (given.target or (arch,)):
            sweep.save(saved, sweep.sweep({arch: compilations(arch)}))
        if saved.is_file():
            found += sweep.load(saved)
            print(f"{arch}: {len(found)} kernels so far", flush=True)
    cuda = []
    if given.library.is_file():
        cuda = cuda_library.sweep(given.library)
    else:
        print(f"{given.library.name} is missing: the CUDA C++ kernels are left out")
    wrong = page.write(given.page, found, cuda, shutil.which("nvcc"))
    print(*wrong, sep="\n")
    print(f"{given.page}: {len(found) + len(cuda)} kernels, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
