"""Glyphs: every character of every installed font that can draw it, one class a character.

Fonts are the variation: tens of thousands of classes on any machine with CJK fonts, thousands with
matplotlib's own. Drawn once into a cache file, then read at random like any other set.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fused_losses.datasets.base import DataError, StoredFile, check_indices
from fused_losses.datasets.glyphs.fonts import (
    Drawings,
    Face,
    SkippedFont,
    draw,
    find_fonts,
    is_drawn,
    read_faces,
)

FORMAT = "fused_losses.glyphs 1"
CACHE_VARIABLE = "FUSED_LOSSES_CACHE"
CHUNK = 2048  # characters that one task draws
MANY = 20_000  # drawings from which processes are worth their start
SAMPLE = 64  # shared characters by which two faces are compared
# Two faces whose drawings of a character differ by less than this share of their ink, in the
# median, are one design. Measured: fonts known to be derived from one another 0.05 to 0.16
# (Arphic's of 1999 and UKai, UMing), unrelated ones of one style 0.22 and more.
SAME_DESIGN = 0.18
USABLE = 0.9  # of the classes: what a held-out design should leave to train on
MOST_HELD_OUT = 0.5  # of the drawings
COLUMNS = ("codes", "faces", "images")  # of the cache file, int64 [n] each


@dataclass(frozen=True)
class Font:
    """A face that drew something. Fonts of one `design` never stand on both sides of a split."""

    file: str
    family: str
    style: str
    design: int

    def __str__(self) -> str:
        return f"{self.family} {self.style}"


@dataclass(frozen=True)
class Glyphs:
    """An `ImageSet` of drawings [1, size, size] uint8, ink 255 on 0. Made by `load_glyphs`.

    Any thread may read. Memory: three int64 a drawing; pictures stay in the file.
    """

    file: StoredFile
    start: int  # of the pictures in the file, bytes
    size: int
    images: Tensor  # [n] int64, place of each drawing's picture
    labels: Tensor  # [n] int64 in [0, classes)
    faces: Tensor  # [n] int64, index into `fonts`
    names: tuple[str, ...]  # the character of each class; of look-alikes the first
    fonts: tuple[Font, ...]
    skipped: tuple[SkippedFont, ...]  # fonts that gave nothing, and why

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The pictures of B indices in [0, n). [B, 1, size, size] uint8; IndexError outside."""
        places = self.images[torch.tensor(check_indices(indices, len(self)), dtype=torch.int64)]
        length = self.size * self.size
        parts = [
            self.file.read(self.start + place * length, length, f"picture {place}")
            for place in places.tolist()
        ]
        if not parts:
            return torch.empty(0, 1, self.size, self.size, dtype=torch.uint8)
        flat = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        return flat.view(len(parts), 1, self.size, self.size)

    def designs(self) -> Tensor:
        """[n] int64: the design of each drawing's font."""
        return torch.tensor([font.design for font in self.fonts], dtype=torch.int64)[self.faces]

    def where(self, kept: Tensor) -> Glyphs:  # [n] bool
        """Only these drawings; the classes keep their numbers."""
        return replace(
            self, images=self.images[kept], labels=self.labels[kept], faces=self.faces[kept]
        )

    def of_classes(self, classes: Tensor) -> Glyphs:  # [c] int64, distinct
        """Only these classes, numbered from 0 in the order given."""
        new = torch.full((self.classes,), -1).index_put((classes,), torch.arange(len(classes)))
        labels = new[self.labels]
        kept = self.where(labels >= 0)
        names = tuple(self.names[i] for i in classes.tolist())
        return replace(kept, labels=labels[labels >= 0], names=names)

    def one_a_class(self) -> Tensor:
        """[at most classes] int64: an index for each class drawn, of its face with most classes."""
        drawn = torch.bincount(self.faces, minlength=len(self.fonts))
        rank = drawn.argsort(descending=True, stable=True).argsort()[self.faces]
        order = (self.labels * len(self.fonts) + rank).argsort(stable=True)
        labels = self.labels[order]
        first = torch.ones(len(labels), dtype=torch.bool)
        first[1:] = labels[1:] != labels[:-1]
        return order[first]


class Split(NamedTuple):
    """Training fonts and fonts held out; both count the same classes."""

    train: Glyphs
    held_out: Glyphs
    families: tuple[str, ...]  # of the fonts held out


def hold_out(glyphs: Glyphs, fonts: str | None = None, *, least: int = 2) -> Split:
    """Split by design: no font, no other weight of it and no copy of it is on both sides.

    fonts: a part of a font's name (or several, separated by commas); None: of the designs whose
    absence leaves `USABLE` of the classes with `least` drawings each, and which made at most
    `MOST_HELD_OUT` of all drawings, the one that draws most classes (where there is none such,
    the one that leaves most). The classes are those that keep `least` drawings to train on.
    Raises ValueError for a name that no font has, or where nothing is left. Time O(n designs).
    """
    designs = glyphs.designs()
    total = torch.bincount(glyphs.labels, minlength=glyphs.classes)

    def counts(held: Tensor) -> Tensor:  # [classes] drawings by these designs
        return torch.bincount(glyphs.labels[torch.isin(designs, held)], minlength=glyphs.classes)

    if fonts is None:
        ids = designs.unique()
        drawn = torch.stack([counts(one[None]) for one in ids])  # [designs, classes]
        kept = total - drawn >= least
        usable = kept.sum(1) >= USABLE * glyphs.classes
        usable &= drawn.sum(1) <= MOST_HELD_OUT * len(glyphs)
        judged = (kept & (drawn > 0)).sum(1) * usable
        held = ids[(judged if usable.any() else kept.sum(1)).argmax()][None]
    else:
        held = torch.tensor(sorted({font.design for font in _named(glyphs.fonts, fonts)}))
    classes = (total - counts(held) >= least).nonzero()[:, 0]
    split = glyphs.of_classes(classes)
    out = torch.isin(split.designs(), held)
    if len(classes) < 2 or not out.any():
        raise ValueError(
            f"fonts: expected a held-out design that leaves at least 2 classes with {least} "
            f"drawings each and draws some of them, got {len(classes)} classes of "
            f"{glyphs.classes}, {int(out.sum())} held-out drawings"
        )
    held_out = split.where(out)
    families = {glyphs.fonts[face].family for face in held_out.faces.unique().tolist()}
    return Split(split.where(~out), held_out, tuple(sorted(families)))


def _named(fonts: Sequence[Font], names: str) -> list[Font]:
    found = []
    for name in names.split(","):
        mine = [font for font in fonts if name.strip().lower() in str(font).lower()]
        if not mine:
            known = ", ".join(sorted({font.family for font in fonts}))
            raise ValueError(f"fonts: expected (parts of) names among {known}; got {name!r}")
        found += mine
    return found


# ---- making the set -----------------------------------------------------------------------------


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
    path = home / f"glyphs-{_key(paths, size, least_fonts, chosen)}.bin"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        _make(path, paths, size, least_fonts, chosen, processes, say)
    return _open(path)


def cache_folder() -> Path:
    """FUSED_LOSSES_CACHE, else fused_losses in the user's cache folder (XDG_CACHE_HOME)."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fused_losses"


def _key(paths: list[Path], size: int, least: int, characters: frozenset[int] | None) -> str:
    """Changes with everything that the set depends on, Unicode's version included."""
    fonts = [(path.name, path.stat().st_size) for path in paths]
    codes = None if characters is None else sorted(characters)
    said = repr((FORMAT, unicodedata.unidata_version, fonts, size, least, codes))
    return blake2b(said.encode(), digest_size=8).hexdigest()


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
    work = _work(faces, least)
    total = sum(len(shown) for _, shown in work)
    say(
        f"glyphs: {len(faces)} faces of {len(paths)} font files ({len(skipped)} left out), "
        f"{total} drawings to make, once"
    )
    with tempfile.TemporaryFile(dir=path.parent) as spool:
        table = _Table([], [], [])
        trouble: dict[Path, str] = {}
        told = 0
        for done, (face, drawn) in enumerate(_drawn(faces, work, size, processes, total)):
            if isinstance(drawn, str):
                trouble[faces[face].path] = drawn
                continue
            table.add(face, drawn)
            spool.write(drawn.images)
            if 10 * (done + 1) // len(work) > told:
                told = 10 * (done + 1) // len(work)
                say(f"glyphs: {len(table.codes)} of {total} drawn")
        skipped += [SkippedFont(one, reason) for one, reason in trouble.items()]
        spool.flush()
        chosen = _chosen(table, least)
        if not chosen.places:
            raise ValueError(
                f"folders: no character is drawn by {least} of the {len(faces)} faces found"
            )
        read = partial(_picture, spool.fileno(), size * size)
        designs = _designs(faces, table, read)
        head = {
            "format": FORMAT,
            "size": size,
            "fonts": [
                [face.path.name, face.family, face.style, design]
                for face, design in zip(faces, designs, strict=True)
            ],
            "skipped": [[str(one.path), one.reason] for one in skipped],
            "drawings": len(chosen.places),
        }
        _write(path, head, chosen, read)
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


Work = list[tuple[int, list[tuple[int, int]]]]  # (face, [(code point, face of the collection)])


def _work(faces: list[Face], least: int) -> Work:
    """What to draw, in chunks: characters that enough faces have."""
    having: dict[int, int] = defaultdict(int)
    for face in faces:
        for code in face.shown:
            having[code] += 1
    work: Work = []
    for number, face in enumerate(faces):
        shown = [
            (code, index)
            for code in sorted(face.shown)
            if having[code] >= least
            for index in face.shown[code]
        ]
        work += [(number, shown[i : i + CHUNK]) for i in range(0, len(shown), CHUNK)]
    return work


def _drawn(
    faces: list[Face], work: Work, size: int, processes: int | None, total: int
) -> Iterator[tuple[int, Drawings | str]]:
    """(face, its drawings or why they failed) for each piece of work, in order."""
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = cores or 1 if total >= MANY else 1
    jobs = [(faces[number].path, shown, size) for number, shown in work]
    if processes == 1:
        for (number, _), job in zip(work, jobs, strict=True):
            yield number, _draw(*job)
        return
    # spawned: a fork would copy the threads' locks of torch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        waiting: list[Future[Drawings | str]] = []
        for place, (number, _) in enumerate(work):
            # a few ahead: pictures wait in memory until their turn
            while len(waiting) < min(place + 2 * processes, len(jobs)):
                waiting.append(pool.submit(_draw, *jobs[len(waiting)]))
            yield number, waiting[place].result()
            waiting[place] = Future()


def _draw(path: Path, shown: list[tuple[int, int]], size: int) -> Drawings | str:
    try:
        return draw(path, shown, size)
    except (OSError, ValueError) as error:  # FreeType refuses what fontTools could read
        return f"cannot be drawn ({type(error).__name__}: {error})"


# ---- which drawings are kept --------------------------------------------------------------------


class _Table(NamedTuple):
    """Drawings in the order of the spool, a column each."""

    codes: list[int]
    faces: list[int]
    digests: list[int]

    def add(self, face: int, drawn: Drawings) -> None:
        self.codes.extend(drawn.codes)
        self.faces.extend([face] * len(drawn.codes))
        self.digests.extend(drawn.digests)


class _Chosen(NamedTuple):
    """Drawings that are kept, ordered by class and face."""

    codes: list[int]  # the class: the lowest code point of its look-alikes
    faces: list[int]
    places: list[int]  # in the spool


def _chosen(table: _Table, least: int) -> _Chosen:
    """The three rules of `load_glyphs`, then the classes that `least` faces still draw."""
    same = look_alikes(table.codes, table.faces, table.digests)
    codes = [same.get(code, code) for code in table.codes]
    owner: dict[int, int] = {}
    for code, digest in zip(codes, table.digests, strict=True):
        owner[digest] = code if owner.setdefault(digest, code) == code else -1
    first: set[int] = set()
    rows: list[tuple[int, int, int]] = []
    having: dict[int, set[int]] = defaultdict(set)
    for place, (code, face, digest) in enumerate(
        zip(codes, table.faces, table.digests, strict=True)
    ):
        if owner[digest] != code or digest in first:
            continue
        first.add(digest)
        rows.append((code, face, place))
        having[code].add(face)
    rows = sorted(row for row in rows if len(having[row[0]]) >= least)
    return (
        _Chosen(*(list(column) for column in zip(*rows, strict=True)))
        if rows
        else _Chosen([], [], [])
    )


def look_alikes(codes: list[int], faces: list[int], digests: list[int]) -> dict[int, int]:
    """code point -> lowest code point of its class, of the characters that are merged.

    Given the code point, face and picture of each drawing. Two characters are merged where a
    picture of one is a picture of the other in at least half of the faces that draw both; so are
    chains of such pairs. O(drawings) time and memory.
    """
    having: dict[int, int] = defaultdict(int)  # code -> a bit for each face
    sharing: dict[tuple[int, int], set[int]] = defaultdict(set)
    for code, face, digest in zip(codes, faces, digests, strict=True):
        having[code] |= 1 << face
        sharing[face, digest].add(code)
    agreeing: dict[tuple[int, int], set[int]] = defaultdict(set)
    for (face, _), group in sharing.items():
        ordered = sorted(group)
        for i, code in enumerate(ordered):
            for other in ordered[i + 1 :]:
                agreeing[code, other].add(face)
    merged = _Groups()
    for (code, other), where in agreeing.items():
        if 2 * len(where) >= (having[code] & having[other]).bit_count():
            merged.join(code, other)
    return {code: root for code in merged if (root := merged.root(code)) != code}


class _Groups(dict[int, int]):
    """Disjoint sets of integers; each is known by its least member."""

    def root(self, one: int) -> int:
        self.setdefault(one, one)
        while self[one] != one:
            self[one] = self[self[one]]
            one = self[one]
        return one

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self[high] = low


def _picture(descriptor: int, length: int, place: int) -> bytes:
    return os.pread(descriptor, length, place * length)


def _designs(faces: list[Face], table: _Table, read: Callable[[int], bytes]) -> list[int]:
    """[faces] the number of each face's design, from 0.

    Faces are of one design if they share a file or a family name, or if their drawings of the
    characters that both have differ little (a font under another name, or derived from it).
    """
    groups = _Groups()
    named: dict[str, int] = {}
    for number, face in enumerate(faces):
        for name in (str(face.path), face.family.lower()):
            groups.join(named.setdefault(name, number), number)
    drawn = [_first_drawings(table, number) for number in range(len(faces))]
    for one in range(len(faces)):
        for other in range(one):
            if groups.root(one) != groups.root(other):
                if difference(drawn[one], drawn[other], read) < SAME_DESIGN:
                    groups.join(one, other)
    roots = [groups.root(number) for number in range(len(faces))]
    order = {root: i for i, root in enumerate(sorted(set(roots)))}
    return [order[root] for root in roots]


class _Drawn(NamedTuple):
    """One drawing for each character of a face."""

    codes: Tensor  # [m] int64, increasing
    places: Tensor  # [m] int64, of the pictures


def _first_drawings(table: _Table, face: int) -> _Drawn:
    start, end = bisect_left(table.faces, face), bisect_right(table.faces, face)
    first: dict[int, int] = {}
    for place in range(start, end):
        first.setdefault(table.codes[place], place)
    codes, order = torch.tensor(list(first), dtype=torch.int64).sort()
    return _Drawn(codes, torch.tensor(list(first.values()), dtype=torch.int64)[order])


def difference(one: _Drawn, other: _Drawn, read: Callable[[int], bytes]) -> float:
    """How unlike two faces draw: the median over shared characters of |a - b| / (a + b).

    0: equal to the pixel, 1: nowhere ink on ink, or fewer than `SAMPLE` characters in common.
    `read` gives the picture at a place; about `SAMPLE` of them are compared.
    """
    mine = torch.isin(one.codes, other.codes, assume_unique=True).nonzero()[:, 0]
    if len(mine) < SAMPLE:
        return 1.0
    mine = mine[:: len(mine) // SAMPLE]
    theirs = torch.searchsorted(other.codes, one.codes[mine])
    a, b = (
        torch.frombuffer(bytearray(b"".join(map(read, places.tolist()))), dtype=torch.uint8)
        .view(len(mine), -1)
        .float()
        for places in (one.places[mine], other.places[theirs])
    )
    return float(((a - b).abs().sum(1) / (a + b).sum(1)).median())


# ---- the cache file -----------------------------------------------------------------------------
#
# A JSON line, the columns of int64 one after another, the pictures; all little-endian.


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is written to the end, and never before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write(path: Path, head: dict[str, Any], chosen: _Chosen, read: Callable[[int], bytes]) -> None:
    _little_endian()
    with _whole(path) as file:
        file.write(json.dumps(head).encode() + b"\n")
        columns = (chosen.codes, chosen.faces, list(range(len(chosen.places))))
        for column in columns:
            file.write(torch.tensor(column, dtype=torch.int64).numpy().tobytes())
        for place in chosen.places:
            file.write(read(place))


def _open(path: Path) -> Glyphs:
    _little_endian()
    file = StoredFile(path)
    with open(path, "rb") as stream:
        line = stream.readline(1 << 26)
    try:
        head = json.loads(line)
        n, size = int(head["drawings"]), int(head["size"])
        fonts = tuple(Font(*font) for font in head["fonts"])
        skipped = tuple(SkippedFont(Path(one), reason) for one, reason in head["skipped"])
        if head["format"] != FORMAT:
            raise ValueError(f"format {head['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected {FORMAT!r} ({error}); delete it") from None
    start = len(line) + 8 * n * len(COLUMNS)
    if file.size != start + n * size * size:
        raise DataError(
            f"{path}: expected {start + n * size * size} bytes, got {file.size}; delete it"
        )
    flat = bytearray(file.read(len(line), 8 * n * len(COLUMNS), "columns"))
    codes, faces, images = torch.frombuffer(flat, dtype=torch.int64).view(len(COLUMNS), n)
    classes, labels = codes.unique(return_inverse=True)
    names = tuple(chr(code) for code in classes.tolist())
    return Glyphs(file, start, size, images, labels, faces, names, fonts, skipped)


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise RuntimeError("glyphs: the cache file is written on little-endian machines only")
