"""Which drawings are kept: no picture with two labels, look-alikes one class, equal ones once."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from fused_losses.datasets.glyphs.fonts import Drawings


class Spooled(NamedTuple):
    """Drawings in the order of the spool, a column each."""

    codes: list[int]
    faces: list[int]
    digests: list[int]

    def add(self, face: int, drawn: Drawings) -> None:
        self.codes.extend(drawn.codes)
        self.faces.extend([face] * len(drawn.codes))
        self.digests.extend(drawn.digests)


class Kept(NamedTuple):
    """Drawings that are kept, ordered by class and face."""

    codes: list[int]  # the class: the lowest code point of its look-alikes
    faces: list[int]
    places: list[int]  # in the spool


def kept(table: Spooled, least: int) -> Kept:
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
    return Kept(*(list(column) for column in zip(*rows, strict=True))) if rows else Kept([], [], [])


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
    merged = Groups()
    for (code, other), where in agreeing.items():
        if 2 * len(where) >= (having[code] & having[other]).bit_count():
            merged.join(code, other)
    return {code: root for code in merged if (root := merged.root(code)) != code}


class Groups(dict[int, int]):
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
