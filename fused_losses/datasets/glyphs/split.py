"""Fonts held out of a set: never a font, another weight of it or a copy of it on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.datasets.glyphs.set import Font, Glyphs

USABLE = 0.9  # of the classes: what a held-out design should leave to train on
MOST_HELD_OUT = 0.5  # of the drawings


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
