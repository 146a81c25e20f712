"""`Args: a: what. b, c: what.` of a docstring as the items of a section, for pages to list.

In the code the arguments of a module of the catalogue stand in one paragraph. It is cut at names
that begin a sentence and have a colon, and before the sentences that follow the arguments (of cost,
of what is returned and raised). Nothing is left out.
"""

from __future__ import annotations

import re

# a paragraph, to its end
PARAGRAPH = re.compile(r"^(?P<indent>[ ]*)Args: (?P<text>\S.*?)(?=\n[ ]*\n|\Z)", re.M | re.S)
NAME = r"(?:[a-z_]\w*|[A-Z]\w?)"
# names, then what they mean: after a colon, or a bound
ITEM = re.compile(rf"(?:^|(?<=[.;)] ))({NAME}(?:, {NAME})*)(?:: |(?= [<>]))")
AFTER = re.compile(r"(?<=\. )(?=(?:Time|Memory|Raises|Returns|Others)\b)")


def itemised(docstring: str) -> str:
    """The docstring with each such paragraph as a section; as it is where it begins otherwise."""

    def section(found: re.Match[str]) -> str:
        indent = found["indent"]
        text = " ".join(found["text"].split())
        told, *after = AFTER.split(text, maxsplit=1)
        cuts = list(ITEM.finditer(told))
        if not cuts or cuts[0].start():
            return found[0]
        ends = [m.start() for m in cuts[1:]] + [len(told)]
        items = [
            f"{indent}    {m[1]}: {told[m.end() : end].strip()}"
            for m, end in zip(cuts, ends, strict=True)
        ]
        return "\n".join([f"{indent}Args:", *items, *(f"\n{indent}{rest}" for rest in after)])

    return PARAGRAPH.sub(section, docstring)
