"""The catalogue: one entry a loss, told at its module by `entry`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import nn

from fused_losses.base.late import everything

Module = TypeVar("Module", bound=type[nn.Module])


class CatalogueEntry(NamedTuple):
    """A loss of the catalogue."""

    name: str  # the class's
    module: type[nn.Module]
    paper: str  # authors and title
    year: int
    block: str  # the idea that it belongs to, one of BLOCKS
    golden: tuple[str, ...]  # records of its authors' or a peer's code in tests/golden
    primitive: str  # the sweep under it, a folder of `primitives`; "rows": vectors alone


BLOCKS = {
    "classes": "softmax and its like over classes",
    "pairs": "pairs of a batch",
    "triplets": "triplets of a batch",
    "contrastive": "rows against their positives and many negatives",
    "proxies": "rows against learnt proxies",
    "ranking": "whole rows of distances, ranked",
    "distillation": "a teacher's scores or embeddings",
    "distributions": "sets of rows: kernels, transport, spread",
    "rows": "a term a row",
    "clusters": "rows and the clusters, neighbours or atoms that they fall to",
    "sets": "documents of many vectors",
}

_ENTRIES: dict[str, CatalogueEntry] = {}


def entry(
    paper: str,
    year: int,
    *,
    block: str,
    primitive: str,
    golden: tuple[str, ...] = (),
) -> Callable[[Module], Module]:
    """Enters a module in the catalogue; raises ValueError for an unknown block or a name twice."""

    def enter(module: Module) -> Module:
        name = module.__name__
        if block not in BLOCKS:
            raise ValueError(f"block: expected one of {', '.join(BLOCKS)}, got {block!r}")
        if name in _ENTRIES and _ENTRIES[name].module.__module__ != module.__module__:
            raise ValueError(f"{name}: stands in the catalogue already")
        _ENTRIES[name] = CatalogueEntry(name, module, paper, year, block, golden, primitive)
        return module

    return enter


def catalogue(word: str = "") -> tuple[CatalogueEntry, ...]:
    """The losses that have `word`, in any case, in what is told of them; sorted by name."""
    everything(sys.modules["fused_losses.losses"])  # what is imported enters its losses
    found = (e for _, e in sorted(_ENTRIES.items()))
    return tuple(e for e in found if word.lower() in _text(e).lower())


def _text(e: CatalogueEntry) -> str:
    return f"{e.name} {e.paper} {e.year} {e.block} {BLOCKS[e.block]} {e.primitive}"


def table(word: str = "") -> list[str]:
    """The entries as lines of text; what `fused-losses losses [WORD]` prints."""
    found = catalogue(word)
    if not found:
        return [f"no loss has {word!r} in its name, paper, year, block or primitive"]
    head = ("loss", "block", "primitive", "year", "paper")
    cells = [head, *((e.name, e.block, e.primitive, str(e.year), e.paper) for e in found)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head) - 1)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
        for row in cells
    ]
    return [*lines, f"{len(found)} losses: fused_losses.losses.<loss>"]
