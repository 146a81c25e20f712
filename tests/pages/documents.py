"""What people read: the pages of the repository, their blocks of code and their links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from places import ROOT

DOCS = ROOT / "docs"
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.rglob("*.md")),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code as it stands on a page."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its code, which may look like links and headings."""
    text = FENCE.sub("", page.read_text())
    return re.sub(r"(`+).+?\1", lambda found: "" if "](" in found[0] else found[0], text)


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures, without those of other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"https?:", target)]


def anchors(page: Path) -> set[str]:
    """What a link may name within a page: the headings, as GitHub and the site name them."""
    heads = re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", page.read_text()), re.MULTILINE)
    named = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
    return set(named) | {f"{name}-{n}" for name in set(named) for n in range(1, named.count(name))}
