"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """Data that cannot be what it claims; the message names file, record and what was expected."""


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, alone: bool = True
) -> None:
    """After this the file holds all that `write` wrote; if anything fails, what it held before.

    alone: no other process writes this path meanwhile. Else what is written has a name of its own
    until it is whole, which a killed process leaves behind.
    """
    part = path.with_name(path.name + ".part")
    if not alone:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        os.close(handle)
        os.chmod(name, 0o644)
        part = Path(name)
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_atomically`, UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
