"""Small files of a run that people and crashes touch: read whole, or refused with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RunFileError(ValueError):
    """A file of a run is damaged; the text names it and the place in it."""


def read_json(path: Path) -> Any:
    """What a JSON file says; `RunFileError` where it is none."""
    return parse_json(read_utf8(path), str(path))


def read_utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RunFileError(f"{path}: no UTF-8 at byte {error.start}") from None


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text; the error names the place, and where in it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise RunFileError(f"{place}: {where}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"{place}: no JSON ({error})") from None
