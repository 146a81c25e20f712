"""One name, one meaning: a class or a type of the package has a home of its own."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

PACKAGE = ROOT / "fused_losses"
TYPE = re.compile(r"_?[A-Z][a-z]\w*")  # Words = ...: constants are in capitals


def named(source: str) -> Iterator[str]:
    """The classes and types that a module defines at its top."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            targets = [t.id for t in node.targets if isinstance(t, ast.Name)]
            yield from (name for name in targets if TYPE.fullmatch(name))


def homes(package: Path) -> dict[str, list[str]]:
    found = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        for name in named(path.read_text()):
            found[name.lstrip("_")].append(str(path.relative_to(package)))
    return found


def test_no_two_modules_define_a_class_of_one_name() -> None:
    doubled = {name: where for name, where in homes(PACKAGE).items() if len(where) > 1}
    assert doubled == {}


def test_a_second_home_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class Block: ...\nSIZE = 3\n")
    (tmp_path / "b.py").write_text("_Block = tuple[int, int]\nSIZE = 4\n")
    assert homes(tmp_path) == {"Block": ["a.py", "b.py"]}
