"""The examples, in small: they learn, and end with a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))
SMALL = {
    "faces": "--steps 4 --batch 32",
    "glyph_retrieval": "--steps 8 --batch 48 --to 41",
    "own_loss": "--steps 40 --rows 96",
    "two_modalities": "--steps 30 --batch 128 --held-out 100",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, float]]:
    monkeypatch.setenv("FUSED_LOSSES_CACHE", str(tmp_path))

    def run(name: str) -> dict[str, float]:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        picture = tmp_path / "folder" / f"{name}.png"
        told = module.main([*SMALL[name].split(), "--out", str(picture)])
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return told

    return run


def test_all_examples_are_here() -> None:
    assert list(SMALL) == EXAMPLES


@pytest.mark.parametrize("name", SMALL)
def test_an_example_learns(name: str, run: Callable[[str], dict[str, float]]) -> None:
    told = run(name)
    assert told["last"] < told["first"]


def test_the_loss_of_one_s_own_is_its_formula(run: Callable[[str], dict[str, float]]) -> None:
    # 40 terms a row in float64: 1e-12 is 10^4 roundoffs
    assert run("own_loss")["error"] < 1e-12
