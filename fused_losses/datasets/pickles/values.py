"""Reads the plain values in a pickle without running it.

A pickle is a program. This interpreter knows the few instructions that lists, tuples, numbers,
byte strings and numpy's arrays of integers need (protocols 0 to 5, Python 2 and 3) and no other:
nothing is imported, and what can be called are the six names of arrays.py.
(A pickle.Unpickler with a strict find_class would still run the rest of the instruction set.)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from fused_losses.base.files import DataError
from fused_losses.datasets.pickles.arrays import (
    CALLS,
    Array,
    Dtype,
    Name,
    Unexpected,
    allowed_name,
    set_order,
    stored_array,
)

MAX_INTEGER_DIGITS = 20
# a picture takes some twenty instructions, and hundreds of bytes
FREE_STEPS, BYTES_A_STEP, MAX_STEPS = 1 << 17, 32, 1 << 23
ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.|$)", re.DOTALL)
ESCAPED = {b"\\": b"\\", b"'": b"'", b'"': b'"', b"n": b"\n", b"r": b"\r", b"t": b"\t"}


class _StackMark:
    """Where the values of a list or tuple start on the stack."""


MARK = _StackMark()


def read_pickled(data: bytes, file: str) -> object:
    """The value of a pickle of plain values; file: what an error names.

    Returns None, bool, int, str, bytes (so are Python 2's strings), list, tuple and `Array`. Raises
    DataError that names the offset for any other instruction or name, for damage, and for more
    instructions than pictures of this size need. Time and memory O(size): no length is believed
    before the bytes are there.
    """
    program = _Program(data)
    try:
        return program.run()
    except (Unexpected, struct.error, ValueError, IndexError, KeyError) as error:
        problem = str(error) if isinstance(error, Unexpected) else f"damaged ({error})"
        raise DataError(
            f"{file}: pickle instruction at offset {program.start}: {problem}"
        ) from None


# ---- the instructions ---------------------------------------------------------------------------


class _Program:
    """A pickle's stack, memo and place."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = self.start = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.made = 0  # bytes copied by calls: a pickle can call one thing again and again

    def run(self) -> object:
        most = min(MAX_STEPS, FREE_STEPS + len(self.data) // BYTES_A_STEP)
        steps = 0
        while (code := self.take(1)) != b".":
            steps += 1
            if steps > most:
                raise Unexpected(f"expected at most {most} instructions, got more")
            step = STEPS.get(code)
            if step is None:
                raise Unexpected(f"expected an instruction of plain values, got {code!r}")
            step(self)
            self.start = self.at
        if len(self.stack) != 1:
            raise Unexpected(f"expected one value at the end, got {len(self.stack)}")
        return self.pop()

    def take(self, length: int) -> bytes:
        if not 0 <= length <= len(self.data) - self.at:
            raise Unexpected(f"expected {length} bytes, got {len(self.data) - self.at}")
        self.at += length
        return self.data[self.at - length : self.at]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise Unexpected("expected a line, the file ends")
        text = self.take(end - self.at)
        self.at += 1
        return text

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def counted(self, form: str) -> bytes:
        return self.take(self.number(form))

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack or self.stack[-1] is MARK:
            raise Unexpected("expected a value on the stack, got none")
        return self.stack.pop()

    def popped(self, count: int) -> list[object]:
        return [self.pop() for _ in range(count)][::-1]

    def to_mark(self) -> list[object]:
        values = []
        while self.stack and self.stack[-1] is not MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise Unexpected("expected a mark on the stack, got none")
        self.stack.pop()
        return values[::-1]

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Unexpected(f"expected a {kind.__name__} on the stack")
        return self.stack[-1]

    def remember(self, place: int) -> None:
        self.memo[place] = self.top(object)

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise Unexpected(f"expected a remembered value, got number {place}")
        self.push(self.memo[place])


def _frame(p: _Program) -> None:
    length = p.number("<Q")
    if length > len(p.data) - p.at:
        raise Unexpected(f"expected a frame of {length} bytes, got {len(p.data) - p.at}")


def _protocol(p: _Program) -> None:
    if (protocol := p.number("<B")) > 5:
        raise Unexpected(f"expected protocol 0 to 5, got {protocol}")


def _integer(text: bytes) -> int:
    digits = text.removesuffix(b"L")
    if len(digits) > MAX_INTEGER_DIGITS:
        raise Unexpected(f"expected an integer of at most {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _integer_line(p: _Program) -> None:
    text = p.line()
    p.push(text == b"01" if text in (b"00", b"01") else _integer(text))


def _long(p: _Program) -> None:
    p.push(int.from_bytes(p.take(p.number("<B")), "little", signed=True))


def _quoted(p: _Program) -> None:
    text = p.line()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise Unexpected(f"expected a quoted string, got {text[:40]!r}")
    p.push(ESCAPE.sub(_unescaped, text[1:-1]))


def _unescaped(found: re.Match[bytes]) -> bytes:
    """What Python 2's repr wrote with a backslash."""
    code = found[1]
    if code[:1] == b"x" and len(code) == 3:
        return bytes([int(code[1:], 16)])
    if code not in ESCAPED:
        raise Unexpected(f"expected an escape of a byte string, got {found[0]!r}")
    return ESCAPED[code]


def _append(p: _Program) -> None:
    value = p.pop()
    p.top(list).append(value)


def _appends(p: _Program) -> None:
    values = p.to_mark()
    p.top(list).extend(values)


def _global(p: _Program) -> None:
    module, name = p.line(), p.line()
    p.push(allowed_name(module.decode("latin-1"), name.decode("latin-1")))


def _stack_global(p: _Program) -> None:
    module, name = p.popped(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise Unexpected("expected a module and a name")
    p.push(allowed_name(module, name))


def _reduce(p: _Program) -> None:
    called, arguments = p.popped(2)
    if not isinstance(called, Name) or not isinstance(arguments, tuple):
        raise Unexpected("expected a name and its arguments")
    if called.path not in CALLS:
        raise Unexpected(f"expected a function, got {called.path}")
    try:
        value = CALLS[called.path](*arguments)
    except TypeError:
        raise Unexpected(f"expected the arguments of {called.path}, got {len(arguments)}") from None
    if isinstance(value, bytes):
        p.made += len(value)
        if p.made > len(p.data):
            raise Unexpected(f"expected at most the file's {len(p.data)} bytes, made {p.made}")
    p.push(value)


def _build(p: _Program) -> None:
    state = p.pop()
    target = p.top(object)
    if isinstance(target, Dtype) and isinstance(state, tuple):
        set_order(target, state)
        return
    if not isinstance(target, Array) or not isinstance(state, tuple) or len(state) != 5:
        raise Unexpected(f"expected an array's state, got {type(state).__name__}")
    made = stored_array(state[2], state[1], state[4])
    vars(target).update(vars(made))


def _pushed(read: Callable[[_Program], object]) -> Callable[[_Program], None]:
    return lambda p: p.push(read(p))


STEPS: dict[bytes, Callable[[_Program], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": lambda p: p.stack.append(MARK),
    b"N": _pushed(lambda p: None),
    b"\x88": _pushed(lambda p: True),
    b"\x89": _pushed(lambda p: False),
    b"I": _integer_line,
    b"L": _pushed(lambda p: _integer(p.line())),
    b"J": _pushed(lambda p: p.number("<i")),
    b"K": _pushed(lambda p: p.number("<B")),
    b"M": _pushed(lambda p: p.number("<H")),
    b"\x8a": _long,
    b"S": _quoted,
    b"T": _pushed(lambda p: p.counted("<i")),
    b"U": _pushed(lambda p: p.counted("<B")),
    b"B": _pushed(lambda p: p.counted("<I")),
    b"C": _pushed(lambda p: p.counted("<B")),
    b"\x8e": _pushed(lambda p: p.counted("<Q")),
    b"\x96": _pushed(lambda p: p.counted("<Q")),
    b"V": _pushed(lambda p: p.line().decode("raw-unicode-escape")),
    b"X": _pushed(lambda p: p.counted("<I").decode("utf-8", "surrogatepass")),
    b"\x8c": _pushed(lambda p: p.counted("<B").decode("utf-8", "surrogatepass")),
    b"\x8d": _pushed(lambda p: p.counted("<Q").decode("utf-8", "surrogatepass")),
    b"]": _pushed(lambda p: []),
    b"l": _pushed(lambda p: p.to_mark()),
    b"a": _append,
    b"e": _appends,
    b")": _pushed(lambda p: ()),
    b"t": _pushed(lambda p: tuple(p.to_mark())),
    b"\x85": _pushed(lambda p: tuple(p.popped(1))),
    b"\x86": _pushed(lambda p: tuple(p.popped(2))),
    b"\x87": _pushed(lambda p: tuple(p.popped(3))),
    b"p": lambda p: p.remember(_integer(p.line())),
    b"q": lambda p: p.remember(p.number("<B")),
    b"r": lambda p: p.remember(p.number("<I")),
    b"\x94": lambda p: p.remember(len(p.memo)),
    b"g": lambda p: p.recall(_integer(p.line())),
    b"h": lambda p: p.recall(p.number("<B")),
    b"j": lambda p: p.recall(p.number("<I")),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": _build,
}
