"""An extension that was built for another PyTorch is not loaded, and everything says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import search_path

from fused_losses.base import compiled

needs_extension = pytest.mark.skipif(
    compiled.extension() is None, reason="the extension is not built"
)


def with_version(version: bytes, to: Path) -> Path:
    """The extension as if built for another PyTorch: the bytes that say so are others."""
    content = Path(compiled.extension().__file__).read_bytes()
    before, own, after = content.rpartition(compiled.BUILT_FOR)
    told, end, rest = after.partition(b"\0")
    path = to / Path(compiled.extension().__file__).name
    path.write_bytes(before + own + version.ljust(len(told), b"\0")[: len(told)] + end + rest)
    return path


@needs_extension
def test_the_file_says_what_the_module_says(tmp_path: Path) -> None:
    built = compiled.extension()
    version = dict(built.build())["torch"]
    assert built.built_for.encode() == compiled.BUILT_FOR + version.encode()
    compiled.check_torch(Path(built.__file__))
    with pytest.raises(ImportError, match=r"_C\..*so was built for torch 2.5.1, this is torch "):
        compiled.check_torch(with_version(b"2.5.1", tmp_path))
    # a patch release has the same interface
    minor = ".".join(torch.__version__.split(".")[:2])
    compiled.check_torch(with_version(f"{minor}.9".encode(), tmp_path))


@pytest.mark.parametrize("content", [b"an extension of before", compiled.BUILT_FOR + b"\0"])
def test_a_file_that_says_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "_C.so").write_bytes(content)
    with pytest.raises(ImportError, match="_C.so was built for torch an unknown version"):
        compiled.check_torch(tmp_path / "_C.so")


CHILD = """
import sys, warnings, torch
import fused_losses
fused_losses.__path__.insert(0, sys.argv[1])
from fused_losses import backends, info
x = torch.randn(8, 4)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    ours = fused_losses.info_nce(x, x)
    fused_losses.info_nce(x, x)
torch.testing.assert_close(ours, fused_losses.info_nce(x, x, backend="reference"))
why = "was built for torch 2.5.1, this is torch " + torch.__version__
assert sum(why in str(w.message) for w in told) == 1, told
assert any(why in line for line in info.lines() if line.startswith("extension"))
assert why in backends.available()["cpu"]
try:
    fused_losses.info_nce(x, x, backend="cpu")
except RuntimeError as error:
    assert why in str(error), error
assert "fused_losses._C" not in sys.modules
print("refused")
"""


@needs_extension
@pytest.mark.processes
def test_the_package_works_without_it_and_says_so(tmp_path: Path) -> None:
    with_version(b"2.5.1", tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_LOSSES_BACKEND"}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env={**environment, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "refused\n", run.stderr
