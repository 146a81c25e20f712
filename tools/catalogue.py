"""`python -m tools.catalogue`: the page of all losses, docs/generated/catalogue.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fused_losses import losses
from fused_losses.losses.registry import BLOCKS
from fused_losses.losses.systems import SYSTEMS

PAGE = Path(__file__).parents[1] / "docs" / "generated" / "catalogue.md"

HEAD = """# Catalogue

Every loss of `fused_losses.losses`, by block: its paper, the sweep under it, and the records of its
authors' or a peer's code that it is held to. Written by `python -m tools.catalogue` from what the
modules say of themselves; in pictures: [gallery.md](gallery.md).
"""


def text() -> str:
    """The page of what is in the registry."""
    lines = [HEAD]
    for block, about in BLOCKS.items():
        found = [e for e in losses.catalogue() if e.block == block]
        if not found:
            continue
        lines += [f"## {block}: {about}\n", "| loss | paper | year | primitive | golden |"]
        lines += ["|---|---|---|---|---|"]
        for e in found:
            golden = ", ".join(f"`{name}`" for name in e.golden)
            lines.append(f"| `{e.name}` | {e.paper} | {e.year} | {e.primitive} | {golden} |")
        lines.append("")
    return "\n".join([*lines, *_systems()])


def _systems() -> list[str]:
    """The papers, with what of the package each is built of."""
    lines = ["## Systems of papers\n", "| paper | year | losses | functions | recipe |"]
    lines.append("|---|---|---|---|---|")
    for s in SYSTEMS:
        modules, functions = (
            ", ".join(f"`{n}`" for n in names) for names in (s.modules, s.functions)
        )
        recipe = f"[{s.recipe}](../recipes.md#{_anchor(s.recipe)})" if s.recipe else ""
        lines.append(f"| {s.title} | {s.year} | {modules} | {functions} | {recipe} |")
    return [*lines, ""]


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def main() -> int:
    """Writes the page."""
    PAGE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
