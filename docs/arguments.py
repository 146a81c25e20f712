"""What mkdocstrings calls for each docstring (mkdocs.yml): arguments in one paragraph as a list."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

# the root is on no path of mkdocs'
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.one_line_args import itemised


class OneLineArgs(griffe.Extension):
    """For every function and class."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = itemised(obj.docstring.value)
