"""The file of a set that was drawn: where it lies, how it is written and read.

A JSON line, the columns of int64 one after another, the pictures; all little-endian.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fused_losses.base.files import DataError, write_atomically
from fused_losses.datasets.decoding import MAX_SIDE
from fused_losses.datasets.files import StoredFile
from fused_losses.datasets.glyphs.fonts import SkippedFont
from fused_losses.datasets.glyphs.look_alikes import Kept
from fused_losses.datasets.glyphs.set import Font, Glyphs
from fused_losses.datasets.side_files import within

FORMAT = "fused_losses.glyphs 1"
CACHE_VARIABLE = "FUSED_LOSSES_CACHE"
MAX_DRAWINGS = 1 << 26
COLUMNS = ("codes", "faces", "images")  # of the file, int64 [n] each


def cache_folder() -> Path:
    """FUSED_LOSSES_CACHE, else fused_losses in the user's cache folder (XDG_CACHE_HOME)."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fused_losses"


def key(paths: list[Path], size: int, least: int, characters: frozenset[int] | None) -> str:
    """Changes with everything that the set depends on, Unicode's version included."""
    fonts = [(path.name, path.stat().st_size) for path in paths]
    codes = None if characters is None else sorted(characters)
    said = repr((FORMAT, unicodedata.unidata_version, fonts, size, least, codes))
    return blake2b(said.encode(), digest_size=8).hexdigest()


def write(path: Path, head: dict[str, Any], drawings: Kept, read: Callable[[int], bytes]) -> None:
    _little_endian()
    columns = (drawings.codes, drawings.faces, list(range(len(drawings.places))))

    def fill(file: BinaryIO) -> None:
        file.write(json.dumps(head).encode() + b"\n")
        for column in columns:
            file.write(torch.tensor(column, dtype=torch.int64).numpy().tobytes())
        for place in drawings.places:
            file.write(read(place))

    # two processes may draw one set at the same time
    write_atomically(path, fill, alone=False)


def read(path: Path) -> Glyphs:
    _little_endian()
    file = StoredFile(path)
    with open(path, "rb") as stream:
        line = stream.readline(1 << 26)
    try:
        head = json.loads(line)
        n, size = int(head["drawings"]), int(head["size"])
        fonts = tuple(_font(*font) for font in head["fonts"])
        skipped = tuple(SkippedFont(Path(one), str(reason)) for one, reason in head["skipped"])
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']!r}")
        if not 1 <= n <= MAX_DRAWINGS or not 1 <= size <= MAX_SIDE:
            raise ValueError(f"{n} drawings of {size} x {size}")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: expected {FORMAT!r} ({error}); delete it") from None
    start = len(line) + 8 * n * len(COLUMNS)
    if file.size != start + n * size * size:
        raise DataError(
            f"{path}: expected {start + n * size * size} bytes, got {file.size}; delete it"
        )
    flat = bytearray(file.read(len(line), 8 * n * len(COLUMNS), "columns"))
    codes, faces, images = torch.frombuffer(flat, dtype=torch.int64).view(len(COLUMNS), n)
    stops = (sys.maxunicode + 1, len(fonts), n)
    for column, values, stop in zip(COLUMNS, (codes, faces, images), stops, strict=True):
        if not within(values, 0, stop):
            raise DataError(f"{path}: expected {column} in [0, {stop}), got others; delete it")
    classes, labels = codes.unique(return_inverse=True)
    names = tuple(chr(code) for code in classes.tolist())
    return Glyphs(file, start, size, images, labels, faces, names, fonts, skipped)


def _font(file: Any, family: Any, style: Any, design: Any) -> Font:
    if {type(file), type(family), type(style)} != {str} or type(design) is not int:
        raise TypeError("a font is three names and a number")
    if not 0 <= design < MAX_DRAWINGS:
        raise ValueError(f"the design {design}")
    return Font(file, family, style, design)


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise RuntimeError("glyphs: the cache file is written on little-endian machines only")
