"""The page of the gallery: a picture a loss, by block."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from fused_losses import losses
from fused_losses.losses.registry import BLOCKS, CatalogueEntry

DOCS = Path(__file__).parents[2] / "docs" / "generated"
FOLDER = DOCS / "gallery"

HEAD = """# Gallery

Every loss of `fused_losses.losses` on one small problem, with its paper's defaults. Written by
`make gallery`; facts in a table: [catalogue.md](catalogue.md).

Left, the loss over two cosines: of an anchor with its positive, and with the negative (or with its
own class and the next; of a student and of sets of rows, the other side stays where these cosines
are 0.7 and -0.3). Middle, how strongly each row of a batch is drawn to (filled) or driven from
(hollow) each other row, class or row of the other side, by area; lines part the classes, of two
towers the pairs. Right, rows on a circle before (inside) and after 40 steps of Adam (outside).
"""


def formula(entry: CatalogueEntry) -> str:
    """The first formula of a docstring, its first line: what is indented below the summary."""
    told = inspect.getdoc(entry.module) or ""
    before = re.split(r"\n(?:Args|loss\()", told, maxsplit=1)[0]
    indented = re.search(r"^ {4}(\S.*)$", before, re.MULTILINE)
    return (
        f"`{indented.group(1).strip()}`" if indented else told.split("\n\n")[0].replace("\n", " ")
    )


def text() -> str:
    """The page of what is in the registry."""
    lines = [HEAD]
    for block, about in BLOCKS.items():
        found = [e for e in losses.catalogue() if e.block == block]
        if found:
            lines.append(f"## {block}: {about}\n")
        for e in found:
            lines.append(f"### {e.name}\n\n{formula(e)}\n\n{e.paper}, {e.year}.\n")
            drawn = (FOLDER / f"{e.name}.png").exists()
            shown = f"![{e.name}](gallery/{e.name}.png)" if drawn else "Not drawn yet."
            lines.append(f"{shown}\n")
    return "\n".join(lines)


def write() -> None:
    """Writes the page."""
    (DOCS / "gallery.md").write_text(text(), encoding="utf-8")
