"""What MkDocs calls while it builds the site (mkdocs.yml): pages from above docs/, and formulas."""

from __future__ import annotations

import ast
import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ABOVE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages of the site that lie above docs/
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def examples() -> str:
    """The page of the examples: what each says of itself, and its code."""
    parts = [
        "# Examples\n\nEach takes about a minute of CPU time or less, and ends with a picture.\n"
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        told = ast.get_docstring(ast.parse(text)) or ""
        parts.append(f"## {path.stem}\n\n{told}\n\n```python\n{text}```\n")
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made, or lie elsewhere."""
    for name in ABOVE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "examples.md", content=examples()))
    return files


def moved(target: str, anchor: str, source: str) -> str | None:
    """Where a link of the repository leads on the site; None: to nothing there."""
    above = source in ABOVE
    here = ROOT if above else (DOCS / source).parent
    path = (here / target).resolve()
    if path.is_relative_to(DOCS) and path.is_file():
        name = str(path.relative_to(DOCS))
    elif path.parent == ROOT and path.name in ABOVE:
        name = path.name
    elif path.is_relative_to(ROOT / "examples"):
        name, anchor = "examples.md", f"#{path.stem}" if path.suffix else ""
    else:
        return None
    return os.path.relpath(name, Path(source).parent) + anchor


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads links to where the site has their pages; of others the text stays."""
    source = page.file.src_uri

    def lead(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if re.match(r"\w+:", target):
            return found[0]
        link = moved(target, anchor, source)
        return f"]({link})" if link else f"](UNLINKED{target})"

    parts = CODE.split(markdown)
    # code stands at the odd places: what looks like a link there is none
    text = "".join(part if i % 2 else LINK.sub(lead, part) for i, part in enumerate(parts))
    return re.sub(r"\[([^\]]+)\]\(UNLINKED([^)]*)\)", r"\1", text)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves."""

    def formula(found: re.Match[str]) -> str:
        kind, latex = found[1], html.unescape(found[2])
        block = kind == "div"
        try:
            return convert(latex.strip(), display="block" if block else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: formula {latex!r}: {error!r}") from error

    pattern = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)
