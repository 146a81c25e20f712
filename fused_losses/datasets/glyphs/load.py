"""Making a set of the fonts of this machine: drawn once, then read from the cache.

Fonts are the variation: tens of thousands of classes on any machine with CJK fonts, thousands with
matplotlib's own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from fused_losses.datasets.glyphs.cache import FORMAT, cache_folder, key, read, write
from fused_losses.datasets.glyphs.designs import designs
from fused_losses.datasets.glyphs.drawing import chunks, drawn
from fused_losses.datasets.glyphs.fonts import Face, SkippedFont, find_fonts, is_drawn, read_faces
from fused_losses.datasets.glyphs.look_alikes import Spooled, kept
from fused_losses.datasets.glyphs.set import Glyphs


def load_glyphs(
    folders: Iterable[str | Path] | None = None,
    *,
    size: int = 32,
    least_fonts: int = 3,
    characters: Iterable[int] | None = None,
    cache: str | Path | None = None,
    processes: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Glyphs:
    """The set of these fonts, from the cache or drawn now.

    Args:
        folders: where fonts are looked for; None: `fonts.font_folders`.
        size: side of the pictures, 8 to 256.
        least_fonts: faces that must draw a character, at least 1.
        characters: code points to be drawn; None: all that have a shape of their own.
        cache: folder of the drawn sets; None: FUSED_LOSSES_CACHE, else the user's cache folder.
        processes: that draw; None: one a core where there is much to draw.
        say: told what happens.

    What would be wrong labels is taken out:
      1. characters whose drawings agree to the pixel in at least half of the faces that draw both
         (Latin A and Greek Alpha, compatibility ideographs) are one class;
      2. a picture that still belongs to two classes is dropped from both;
      3. of equal pictures in one class the first is kept.
    Raises ValueError for arguments out of range and where no class is left. Some tens of thousands
    of drawings a core and minute at size 32; memory O(drawings), pictures go by a chunk at a time.
    """
    for name, value, low, high in (("size", size, 8, 256), ("least_fonts", least_fonts, 1, 10**6)):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {value}")
    chosen = None if characters is None else frozenset(characters)
    paths = find_fonts(folders)
    if not paths:
        raise ValueError("folders: found no fonts (.ttf, .otf, .ttc); see docs/glyphs.md")
    home = Path(cache) if cache is not None else cache_folder()
    path = home / f"glyphs-{key(paths, size, least_fonts, chosen)}.bin"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        _make(path, paths, size, least_fonts, chosen, processes, say)
    return read(path)


def _make(
    path: Path,
    paths: list[Path],
    size: int,
    least: int,
    characters: frozenset[int] | None,
    processes: int | None,
    say: Callable[[str], None],
) -> None:
    """Draw, choose, write: the file appears when it is whole."""
    faces, skipped = _faces(paths, characters)
    work = chunks(faces, least)
    total = sum(len(shown) for _, shown in work)
    say(
        f"glyphs: {len(faces)} faces of {len(paths)} font files ({len(skipped)} left out), "
        f"{total} drawings to make, once"
    )
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        table = Spooled([], [], [])
        trouble: dict[Path, str] = {}
        told = 0
        for done, (face, drawings) in enumerate(drawn(faces, work, size, processes, total)):
            if isinstance(drawings, str):
                trouble[faces[face].path] = drawings
                continue
            table.add(face, drawings)
            spool.write(drawings.images)
            if 10 * (done + 1) // len(work) > told:
                told = 10 * (done + 1) // len(work)
                say(f"glyphs: {len(table.codes)} of {total} drawn")
        skipped += [SkippedFont(one, reason) for one, reason in trouble.items()]
        spool.flush()
        chosen = kept(table, least)
        if not chosen.places:
            raise ValueError(
                f"folders: no character is drawn by {least} of the {len(faces)} faces found"
            )
        picture = partial(_picture, spool.fileno(), size * size)
        numbers = designs(faces, table, picture)
        head = {
            "format": FORMAT,
            "size": size,
            "fonts": [
                [face.path.name, face.family, face.style, design]
                for face, design in zip(faces, numbers, strict=True)
            ],
            "skipped": [[str(one.path), one.reason] for one in skipped],
            "drawings": len(chosen.places),
        }
        write(path, head, chosen, picture)
    say(f"glyphs: {len(set(chosen.codes))} classes, {len(chosen.places)} drawings in {path}")


def _faces(
    paths: list[Path], characters: frozenset[int] | None
) -> tuple[list[Face], list[SkippedFont]]:
    wanted = is_drawn if characters is None else characters.__contains__
    faces: list[Face] = []
    skipped: list[SkippedFont] = []
    for path in paths:
        mine, left_out = read_faces(path, wanted)
        faces += [face for face in mine if face.shown]
        skipped += left_out
    return faces, skipped


def _picture(descriptor: int, length: int, place: int) -> bytes:
    return os.pread(descriptor, length, place * length)
