"""Links between the pages lead somewhere, and the site has every page."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import pytest
from places import ROOT

from tools import headline


@pytest.mark.parametrize("page", documents.PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in documents.links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in documents.anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_site_s_contents_are_all_pages() -> None:
    # the file is read by mkdocs alone, which the tests do without
    contents = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r"(\S+\.md)$", contents, re.MULTILINE))
    here = {
        str(p.relative_to(documents.DOCS))
        for p in documents.PAGES
        if p.is_relative_to(documents.DOCS)
    }
    assert named == here | {"CONTRIBUTING.md", "CHANGELOG.md", "examples.md"}


def test_the_readme_s_numbers_are_measured() -> None:
    measured = (documents.DOCS / "measured.md").read_text()
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("## Measured")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| (?!\|)[^-]", line)]
    assert len(rows) == 4
    for row in rows:
        for number in re.findall(r"[\d,.]+", " ".join(row.split("|")[2:])):
            assert re.search(rf"(?<![\d,.]){re.escape(number)}(?![\d,.]*\d)", measured), number


def test_the_picture_is_of_the_measured_numbers(tmp_path: Path) -> None:
    told = headline.measured((documents.DOCS / "measured.md").read_text())
    headline.draw(told, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == headline.PICTURE.read_bytes()
    slower = {name: (2 * ms, mib) for name, (ms, mib) in told.items()}
    headline.draw(slower, tmp_path / "other.svg")
    assert (tmp_path / "other.svg").read_bytes() != headline.PICTURE.read_bytes()
