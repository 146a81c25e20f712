"""`python -m tools.errors`: every error that the package can raise, from its code.

What a message is made of at run time stands as `…`. docs/errors.md groups the messages by patterns;
without arguments this prints those that no pattern has and patterns that no message has, and exits
with 1 if there are any. `--list` prints all messages.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
GAP = "…"
# classes whose text is (name of a field, text)
NAMED = ("OptionError",)
LEAST = 4  # characters: what says less fits only what it is itself
# the package's own classes: their pattern may be a gap, for the class says where an error belongs
OWN = {"DataError", "NotCovered", "OptionError", "RankFailure", "RunError", "RunFileError"}
# what a caller never sees: caught where it is raised, or the exit of a command
INTERNAL = ("StopIteration", "SystemExit", "KeyboardInterrupt", "Interrupted", "Unexpected")


class Raised(NamedTuple):
    """One `raise` or refusal of the code."""

    place: str  # file, below the root
    kind: str  # of the exception; "warning", "assertion" (on a device)
    text: str  # GAP for what is made at run time


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _constants() -> dict[str, str]:
    """Messages that stand as a module's constant, by name."""
    found = {}
    for path in (ROOT / "fused_losses").rglob("*.py"):
        for node in _tree(path).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, texts = node.targets[0].id, _texts(node.value, {})
                if name.isupper() and texts != [GAP]:
                    found[name] = texts[0]
    return found


def _texts(node: ast.expr, constants: dict[str, str]) -> list[str]:
    """What an expression of a message may read as."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Name):
        return [constants.get(node.id, GAP)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left, constants) for b in _texts(node.right, constants)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, constants) + _texts(node.orelse, constants)
    return [GAP]


def _called(node: ast.Call) -> tuple[str, list[ast.expr]]:
    """The kind of error that a call makes, and what its text is made of; "" for any other call."""
    name = ast.unparse(node.func)
    arguments = [a for a in node.args if not isinstance(a, ast.Starred)]
    if name == "warnings.warn":
        return "warning", arguments[:1]
    if name.endswith("assert_async"):
        return "assertion", arguments[1:2]
    if re.fullmatch(r"\w+Error|RankFailure|NotCovered", name) and name not in INTERNAL:
        return name, arguments
    return "", []


def _python(path: Path, constants: dict[str, str]) -> Iterator[Raised]:
    place = str(path.relative_to(ROOT))
    for node in ast.walk(_tree(path)):
        # an error that is returned, or kept for a rank, is raised by who asked for it
        kind, told = _called(node) if isinstance(node, ast.Call) else ("", [])
        if not told:
            continue
        texts = _texts(told[0], constants)
        if kind in NAMED and len(told) > 1:
            texts = [f"{a}: {b}" for a in texts for b in _texts(told[1], constants)]
        for text in texts:
            yield Raised(place, kind, text)


CHECK = re.compile(r"TORCH_CHECK(_VALUE|_TYPE|_INDEX|_NOT_IMPLEMENTED)?\(", re.ASCII)
KINDS = {"_VALUE": "ValueError", "_TYPE": "TypeError", "_INDEX": "IndexError"}


def _arguments(text: str, at: int) -> list[str]:
    """The arguments of a call in C++ whose parenthesis opens before `at`."""
    found, depth, begin, quoted = [], 0, at, False
    while True:
        c = text[at]
        if quoted:
            at += c == "\\"
            quoted = c != '"'
        elif c == '"':
            quoted = True
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            if depth == 0:
                return [*found, text[begin:at].strip()]
            depth -= 1
        elif c == "," and depth == 0:
            found.append(text[begin:at].strip())
            begin = at + 1
        at += 1


def _compiled(path: Path) -> Iterator[Raised]:
    text = path.read_text(encoding="utf-8")
    for found in CHECK.finditer(text):
        if text.rfind("#define", text.rfind("\n", 0, found.start()) + 1, found.start()) >= 0:
            continue
        parts = [
            "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', part)) if part.startswith('"') else GAP
            for part in _arguments(text, found.end())[1:]
        ]
        told = re.sub(f"{GAP}+", GAP, "".join(parts))
        kind = KINDS.get(found[1] or "", "RuntimeError")
        yield Raised(str(path.relative_to(ROOT)), kind, told)


def raised() -> list[Raised]:
    """All of the package, and of its extension."""
    found, constants = [], _constants()
    for path in sorted((ROOT / "fused_losses").rglob("*.py")):
        found += _python(path, constants)
    for path in sorted((ROOT / "csrc").rglob("*.[ch]*")):
        found += _compiled(path)
    return found


class Pattern(NamedTuple):
    """A line of the page: the kinds that it is for (none: any) and its text with gaps."""

    kinds: tuple[str, ...]
    text: str

    @property
    def told(self) -> int:
        """How much it says: of patterns that fit, the one that says most is an error's."""
        return len(self.text.replace(GAP, ""))

    def has(self, error: Raised) -> bool:
        if self.kinds and error.kind not in self.kinds:
            return False
        if self.told < LEAST and not set(self.kinds) & OWN:
            return error.text == self.text
        parts = [re.escape(part) for part in self.text.split(GAP)]
        return re.fullmatch(".*".join(parts), error.text, re.DOTALL) is not None


def patterns(page: str) -> list[Pattern]:
    """The page's patterns in its order: items of a kind, or several, and a text in backticks."""
    return [
        Pattern(tuple(filter(None, re.split(r"[,\s]+", kinds or ""))), text)
        for kinds, text in re.findall(r"^\* (?:([\w, ]+): )?`(.+)`$", page, re.MULTILINE)
    ]


def gaps(page: str, errors: list[Raised]) -> tuple[list[Raised], list[Pattern]]:
    """Errors that no pattern has; patterns that are the best for no error."""
    known = patterns(page)
    missing, used = [], set()
    for error in errors:
        best = max((p for p in known if p.has(error)), key=lambda p: p.told, default=None)
        if best is None:
            missing.append(error)
        used.add(best)
    return missing, [p for p in known if p not in used]


def main(argv: list[str] | None = None) -> int:
    """Prints what the page lacks; the exit status says whether it does."""
    options = argparse.ArgumentParser(
        prog="tools.errors", description=(__doc__ or "").splitlines()[0]
    )
    options.add_argument("--list", action="store_true", help="print every message with its place")
    if options.parse_args(argv).list:
        print("\n".join(f"{e.place}\t{e.kind}\t{e.text}" for e in raised()))
        return 0
    missing, unused = gaps(PAGE.read_text(encoding="utf-8"), raised())
    for error in missing:
        print(f"not on the page: {error.place}: {error.kind}: {error.text}")
    for pattern in unused:
        print(f"no such error: {', '.join(pattern.kinds)}: {pattern.text}")
    return 1 if missing or unused else 0


if __name__ == "__main__":
    sys.exit(main())
