"""numpy's arrays of bytes as pickles spell them, made without numpy and without importing anything.

A pickle names functions and calls them; here six names stand for functions of this file, which only
keep what they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_DIMENSIONS = 8


class Unexpected(Exception):
    """What was expected and what came; the reader adds the file and the offset."""


@dataclass
class Array:
    """numpy's array as it was stored: uint8 or bool."""

    kind: str = ""  # "u1", "b1"
    shape: tuple[int, ...] = ()
    data: bytes = b""


@dataclass(frozen=True)
class Kind:
    """numpy's dtype."""

    name: str


@dataclass(frozen=True)
class Name:
    """module.name: what a pickle would import."""

    path: str


def describe(value: object) -> str:
    """A value in a message; never the inside of a list or tuple, which may be shared or endless."""
    if isinstance(value, int | str | bytes):
        return f"{type(value).__name__} {value if isinstance(value, int) else value[:40]!r}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _dtype(name: object, *_: object) -> Kind:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    if text not in ("u1", "b1"):
        raise Unexpected(f"expected an array of u1 or b1, got {describe(name)}")
    return Kind(text)


def stored_array(kind: object, shape: object, data: object) -> Array:
    if not isinstance(kind, Kind) or not isinstance(data, bytes):
        raise Unexpected(
            f"expected an array's type and bytes, got {describe(kind)}, {describe(data)}"
        )
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and n >= 0 for n in shape)
        or math.prod(shape) != len(data)
    ):
        raise Unexpected(f"expected a shape of {len(data)} values, got {describe(shape)}")
    return Array(kind.name, shape, data)


def _scalar(kind: object, data: object) -> int | bool:
    value = stored_array(kind, (1,), data)
    return bool(value.data[0]) if value.kind == "b1" else value.data[0]


def _from_buffer(data: object, kind: object, shape: object, *_: object) -> Array:
    return stored_array(kind, shape, data)


def _encode(text: object, coding: object) -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", b"latin1"):
        raise Unexpected(f"expected text in latin1, got {describe(text)} in {describe(coding)}")
    return text.encode("latin-1")


CALLS: dict[str, Callable[..., object]] = {
    "numpy.dtype": _dtype,
    "numpy._reconstruct": lambda *_: Array(),
    "numpy.scalar": _scalar,
    "numpy._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
}
NUMPY_MODULES = (
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
)


def allowed_name(module: str, name: str) -> Name:
    path = f"numpy.{name}" if module in NUMPY_MODULES else f"{module}.{name}"
    if path not in CALLS and path != "numpy.ndarray":
        raise Unexpected(f"expected numpy's arrays or bytes, got the name {module}.{name}"[:200])
    return Name(path)
