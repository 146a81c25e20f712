"""Which fonts are one design: weights of it, and fonts derived from it under other names."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.datasets.glyphs.fonts import Face
from fused_losses.datasets.glyphs.look_alikes import Groups, Spooled

SAMPLE = 64  # shared characters by which two faces are compared
# Two faces whose drawings of a character differ by less than this share of their ink, in the
# median, are one design. Measured: fonts known to be derived from one another 0.05 to 0.16
# (Arphic's of 1999 and UKai, UMing), unrelated ones of one style 0.22 and more.
SAME_DESIGN = 0.18


def designs(faces: list[Face], table: Spooled, read: Callable[[int], bytes]) -> list[int]:
    """[faces] the number of each face's design, from 0.

    Faces are of one design if they share a file or a family name, or if their drawings of the
    characters that both have differ little (a font under another name, or derived from it).
    """
    groups = Groups()
    named: dict[str, int] = {}
    for number, face in enumerate(faces):
        for name in (str(face.path), face.family.lower()):
            groups.join(named.setdefault(name, number), number)
    drawn = [_first_drawings(table, number) for number in range(len(faces))]
    for one in range(len(faces)):
        for other in range(one):
            apart = groups.root(one) != groups.root(other)
            if apart and difference(drawn[one], drawn[other], read) < SAME_DESIGN:
                groups.join(one, other)
    roots = [groups.root(number) for number in range(len(faces))]
    order = {root: i for i, root in enumerate(sorted(set(roots)))}
    return [order[root] for root in roots]


class FirstDrawings(NamedTuple):
    """One drawing for each character of a face."""

    codes: Tensor  # [m] int64, increasing
    places: Tensor  # [m] int64, of the pictures


def _first_drawings(table: Spooled, face: int) -> FirstDrawings:
    start, end = bisect_left(table.faces, face), bisect_right(table.faces, face)
    first: dict[int, int] = {}
    for place in range(start, end):
        first.setdefault(table.codes[place], place)
    codes, order = torch.tensor(list(first), dtype=torch.int64).sort()
    return FirstDrawings(codes, torch.tensor(list(first.values()), dtype=torch.int64)[order])


def difference(one: FirstDrawings, other: FirstDrawings, read: Callable[[int], bytes]) -> float:
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
