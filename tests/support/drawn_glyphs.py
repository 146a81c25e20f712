"""matplotlib's fonts, which are the same on every machine, and a set of glyphs drawn by some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("PIL.Image", reason="drawing needs Pillow")
pytest.importorskip("fontTools.ttLib", reason="reading fonts needs fontTools")
matplotlib = pytest.importorskip("matplotlib", reason="its fonts are always the same")

from fused_losses.datasets.glyphs import CACHE_VARIABLE, Glyphs, load_glyphs  # noqa: E402
from fused_losses.train.glyphs import GlyphConfig  # noqa: E402

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LATIN_GREEK_CYRILLIC = "21-17f,391-3c9,410-44f"


def characters(ranges: str) -> list[int]:
    found = GlyphConfig(characters=ranges).code_points()
    assert found
    return found


def copied(folder: Path, *patterns: str) -> Path:
    """A folder of some fonts: reading all of matplotlib's takes most of a small set's time."""
    for pattern in patterns:
        for path in FONTS.glob(pattern):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for a file of tests, in the child processes, too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("fonts"), "DejaVu*.ttf", "STIXGeneral*.ttf")


@pytest.fixture(scope="module")
def glyphs(cache: Path, fonts: Path) -> Glyphs:
    return load_glyphs([fonts], characters=characters(LATIN_GREEK_CYRILLIC), processes=1)
