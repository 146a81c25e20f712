"""Fonts: which are installed, which characters each draws, and the drawings as grey pictures.

Character maps are read by fontTools, outlines drawn by FreeType through Pillow.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
FOLDERS_VARIABLE = "FUSED_LOSSES_FONTS"
SYSTEM_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts")
USER_FOLDERS = (".fonts", ".local/share/fonts", "Library/Fonts")  # under the home folder

# Fonts of fewer characters are symbol sets, which often have letters' codes for other drawings.
LEAST_CHARACTERS = 200
# One glyph that stands for more characters than this is a placeholder, not a drawing of them.
MOST_SHARING = 8
# Controls, formats, surrogates, private use, unassigned, spaces, and marks without their letter.
NO_DRAWING = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp", "Mn", "Me"})

OUTLINES = ("glyf", "CFF ", "CFF2")
SUPERSAMPLE = 2  # drawn this much larger: no embedded bitmaps, and hinting moves edges less
BASELINE = 7 / 8  # of the picture's height, where ideographs fill their em


class SkippedFont(NamedTuple):
    """A font that gives no drawings, and why."""

    path: Path
    reason: str


class Drawings(NamedTuple):
    """Pictures of characters in one font."""

    codes: list[int]
    digests: list[int]  # 63 bits of a hash of the picture
    images: bytes  # size x size grey levels each, 255 is ink


@dataclass(frozen=True)
class Face:
    """One set of outlines: a font file, or the faces of a collection that share theirs."""

    path: Path
    family: str
    style: str
    # code point -> faces of the collection, one for each glyph that they show for it
    shown: dict[int, tuple[int, ...]]

    def __str__(self) -> str:
        return f"{self.family} {self.style} ({self.path.name})"


def font_folders() -> list[Path]:
    """The system's folders, the user's, matplotlib's own fonts, and those in FUSED_LOSSES_FONTS."""
    folders = [Path(folder) for folder in SYSTEM_FOLDERS]
    folders += [Path.home() / folder for folder in USER_FOLDERS]
    spec = importlib.util.find_spec("matplotlib")  # found without importing it
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folders.append(Path(place) / "mpl-data" / "fonts" / "ttf")
    extra = os.environ.get(FOLDERS_VARIABLE, "")
    folders += [Path(folder) for folder in extra.split(os.pathsep) if folder]
    return [folder for folder in folders if folder.is_dir()]


def find_fonts(folders: Iterable[str | Path] | None = None) -> list[Path]:
    """Font files under the folders (None: `font_folders`), each once, ordered by name.

    Of files of equal name and size (one font installed twice) the first is kept.
    Raises ValueError for a folder that is given and does not exist.
    """
    places = font_folders() if folders is None else [Path(folder) for folder in folders]
    for place in places:
        if not place.is_dir():
            raise ValueError(f"folders: expected folders of fonts, got {str(place)!r}")
    found: dict[tuple[str, int], Path] = {}
    for place in places:
        for path in sorted(place.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found.setdefault((path.name, path.stat().st_size), path)
    return [found[key] for key in sorted(found)]


def is_drawn(code: int) -> bool:
    """Whether a code point is an assigned character with a shape of its own."""
    return unicodedata.category(chr(code)) not in NO_DRAWING


def read_faces(
    path: Path, wanted: Callable[[int], bool] = is_drawn
) -> tuple[list[Face], list[SkippedFont]]:
    """The faces of a font file with the characters that each draws, and what was left out, why.

    A character is left out where its glyph is .notdef or shared by more than `MOST_SHARING`
    characters, and a face where fewer than `LEAST_CHARACTERS` are left, whatever is `wanted`.
    """
    fonts = _font_tools()
    outlines: dict[int, tuple[str, str, dict[int, dict[int, int]]]] = {}
    try:
        with fonts.TTFont(path, fontNumber=0, lazy=True) as first:
            count = getattr(first.reader, "numFonts", 1)
        for index in range(count):
            with fonts.TTFont(path, fontNumber=index, lazy=True) as font:
                tag = next((tag for tag in OUTLINES if tag in font), None)
                cmap = font["cmap"].getBestCmap() if "cmap" in font else None
                if tag is None or not cmap:
                    missing = "outlines" if tag is None else "map of Unicode characters"
                    return [], [SkippedFont(path, f"no {missing}")]
                place = font.reader.tables[tag].offset
                shown = outlines.setdefault(place, (*_names(font), {}))[2]
                for code, glyph in _glyphs(font, cmap).items():
                    shown.setdefault(code, {}).setdefault(glyph, index)
    except Exception as error:  # fontTools raises whatever a broken table leads to
        return [], [SkippedFont(path, f"cannot be read ({type(error).__name__}: {error})")]
    faces, skipped = [], []
    for family, style, shown in outlines.values():
        if len(shown) < LEAST_CHARACTERS:
            skipped.append(SkippedFont(path, f"draws fewer than {LEAST_CHARACTERS} characters"))
            continue
        kept = {code: tuple(by.values()) for code, by in shown.items() if wanted(code)}
        faces.append(Face(path, family, style, kept))
    return faces, skipped


def _font_tools() -> Any:
    try:
        from fontTools import ttLib
    except ImportError:
        raise RuntimeError(
            "reading fonts needs fontTools: pip install 'fused-losses[train]'"
        ) from None
    # it warns of every irregular table, and most large fonts have some
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)
    return ttLib


def _names(font: Any) -> tuple[str, str]:
    """(family, style): the typographic names where the font has them."""
    names = font["name"]
    family = names.getDebugName(16) or names.getDebugName(1) or "unnamed"
    return family, names.getDebugName(17) or names.getDebugName(2) or ""


def _glyphs(font: Any, cmap: dict[int, str]) -> dict[int, int]:
    """code point -> glyph number, of the characters that are truly drawn."""
    sharing = Counter(cmap.values())
    number = font.getReverseGlyphMap()
    return {
        code: number[name]
        for code, name in cmap.items()
        if sharing[name] <= MOST_SHARING and number[name] != 0 and is_drawn(code)
    }


def draw(path: Path, shown: Sequence[tuple[int, int]], size: int) -> Drawings:
    """Pictures [size, size] of characters, given as (code point, face of the collection).

    The em is the picture's width. The advance is centred and the baseline is fixed, so that a full
    stop, a middle dot and an apostrophe differ by their place; ink that would leave the picture is
    moved inside, what is larger than the picture is reduced, and what has no ink, or more than two
    em of it, is left out. Raises OSError for what FreeType cannot draw.
    """
    from PIL import Image

    codes, digests, images = [], [], bytearray()
    for code, picture in _pictures(path, shown, size * SUPERSAMPLE):
        if picture.size == (size * SUPERSAMPLE,) * 2:
            picture = picture.reduce(SUPERSAMPLE)
        else:
            picture = picture.resize((size, size), Image.Resampling.BOX)
        pixels = picture.tobytes()
        if not any(pixels):
            continue
        codes.append(code)
        digests.append(int.from_bytes(blake2b(pixels, digest_size=8).digest()) >> 1)
        images += pixels
    return Drawings(codes, digests, bytes(images))


def _pictures(path: Path, shown: Sequence[tuple[int, int]], em: int) -> Iterator[tuple[int, Any]]:
    """(code point, square picture of the ink), of side `em` or larger where the ink is larger."""
    from PIL import Image, ImageDraw, ImageFont

    opened: dict[int, Any] = {}
    baseline = round(BASELINE * em)
    for code, index in shown:
        if index not in opened:
            opened[index] = ImageFont.truetype(
                path, em, index=index, layout_engine=ImageFont.Layout.BASIC
            )
        # an em of room on every side
        canvas = Image.new("L", (3 * em, 3 * em))
        ImageDraw.Draw(canvas).text(
            (3 * em // 2, em + baseline), chr(code), fill=255, font=opened[index], anchor="ms"
        )
        ink = canvas.getbbox()
        if ink is None or min(ink) == 0 or max(ink) == 3 * em:
            continue
        left, top, right, bottom = ink
        side = max(em, right - left, bottom - top)
        x = _window(left, right, side, (3 * em - side) // 2)
        y = _window(top, bottom, side, (3 * em - side) // 2)
        yield code, canvas.crop((x, y, x + side, y + side))


def _window(start: int, end: int, side: int, usual: int) -> int:
    """Where a window of `side` that holds [start, end) begins: as near to `usual` as can be."""
    return max(min(usual, start), end - side)
