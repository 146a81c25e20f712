"""numpy's arrays of integers as pickles spell them, made without numpy and without any import.

A pickle names functions and calls them; here six names stand for functions of this file, which only
keep what they are given.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

MAX_DIMENSIONS = 8
# numpy's names of kinds -> struct's letters
KINDS = dict(b1="?", u1="B", i1="b", u2="H", i2="h", u4="I", i4="i", u8="Q", i8="q")


class Unexpected(Exception):
    """What was expected and what came; the reader adds the file and the offset."""


@dataclass
class Array:
    """numpy's array as it was stored."""

    kind: str = ""  # of KINDS
    shape: tuple[int, ...] = ()
    data: bytes = b""
    order: str = "<"  # or ">"

    def flat(self) -> bool:
        """Whether only one side is longer than 1: [n], [n, 1], [1, n]."""
        return sum(side != 1 for side in self.shape) <= 1

    def values(self) -> list[int | bool]:
        letter = KINDS[self.kind]
        count = len(self.data) // struct.calcsize(f"={letter}")
        return list(struct.unpack(f"{self.order}{count}{letter}", self.data))


@dataclass
class Dtype:
    """numpy's dtype."""

    name: str
    order: str = "<"


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


def _dtype(name: object, *_: object) -> Dtype:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    if not isinstance(text, str) or text not in KINDS:
        raise Unexpected(f"expected an array of {', '.join(KINDS)}, got {describe(name)}")
    return Dtype(text)


def set_order(kind: Dtype, state: tuple[object, ...]) -> None:
    """From a dtype's state (version, order, ...); | stands where there is no order."""
    order = state[1] if len(state) > 1 else None
    text = order.decode("latin-1") if isinstance(order, bytes) else order
    if text not in ("<", ">", "|"):
        raise Unexpected(f"expected an order of bytes <, > or |, got {describe(order)}")
    kind.order = ">" if text == ">" else "<"


def stored_array(kind: object, shape: object, data: object) -> Array:
    if not isinstance(kind, Dtype) or not isinstance(data, bytes):
        raise Unexpected(
            f"expected an array's type and bytes, got {describe(kind)}, {describe(data)}"
        )
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and n >= 0 for n in shape)
        or math.prod(shape) * struct.calcsize(f"={KINDS[kind.name]}") != len(data)
    ):
        raise Unexpected(
            f"expected a shape of {len(data)} bytes of {kind.name}, got {describe(shape)}"
        )
    return Array(kind.name, shape, data, kind.order)


def _scalar(kind: object, data: object) -> int | bool:
    return stored_array(kind, (1,), data).values()[0]


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
