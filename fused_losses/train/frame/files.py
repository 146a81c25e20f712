"""Small files of a run that people and crashes touch: read whole, or refused with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON = 1 << 26  # bytes of a file that is one value


class RunFileError(ValueError):
    """A file of a run is damaged; the text names it and the place in it."""


def read_json(path: Path) -> Any:
    """What a JSON file says; `RunFileError` where it is none."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise RunFileError(f"{path}: expected at most {MAX_JSON} bytes, got more")
    return parse_json(data, str(path))


def parse_json(data: bytes, place: str) -> Any:
    """The value of a JSON text; the error names the place, and where in it."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise RunFileError(f"{place}: no UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise RunFileError(f"{place}: {where}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise RunFileError(f"{place}: no JSON ({error})") from None
