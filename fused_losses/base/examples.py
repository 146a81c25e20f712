"""The table of examples: one way to call a function a row, told where the function is defined.

`verify`, the tests and the benchmarks draw on it. A row says nothing of sizes: it takes any object
with the fields of `ExampleInputs`, so that a test may bring its own labels, ties or far rows.
"""

from __future__ import annotations

import inspect
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor


class ExampleInputs:
    """What the examples are called with: n rows of norm about 1 and what goes with them.

    Each field is made when it is first asked for, from the seed and its name alone. Where rounded
    is given, values are those of that dtype, held in dtype.
    """

    def __init__(
        self,
        n: int,
        m: int,
        d: int,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rounded: torch.dtype | None = None,
    ) -> None:
        self.n, self.m, self.d = n, m, d
        self.dtype, self.rounded = dtype, rounded or dtype
        self.seed, self.device = seed, torch.device(device)

    def _held(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.rounded).to(self.dtype)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))

    def _rows(self, name: str, *shape: int) -> Tensor:
        """Rows of norm about 1."""
        drawn = torch.randn(*shape, generator=self._generator(name), dtype=torch.float64)
        return self._held(drawn / shape[-1] ** 0.5)

    def _integers(self, name: str, high: int, *shape: int, low: int = 0) -> Tensor:
        drawn = torch.randint(low, max(high, low + 1), shape, generator=self._generator(name))
        return drawn.to(self.device)

    def _number(self, value: float) -> Tensor:
        return self._held(torch.tensor(value, dtype=torch.float64))

    @cached_property
    def x(self) -> Tensor:
        """[n, d]"""
        return self._rows("x", self.n, self.d)

    @cached_property
    def y(self) -> Tensor:
        """[m, d]; of two towers the first n belong to the rows of x"""
        return self._rows("y", self.m, self.d)

    @cached_property
    def z(self) -> Tensor:
        """[m, d]"""
        return self._rows("z", self.m, self.d)

    @cached_property
    def v(self) -> Tensor:
        """[m, d], a value a row of y"""
        return self._rows("v", self.m, self.d)

    @cached_property
    def other(self) -> Tensor:
        """[m, d], a second sample"""
        return self._rows("other", self.m, self.d)

    @cached_property
    def few(self) -> Tensor:
        """[8, d]"""
        return self._rows("few", 8, self.d)

    @cached_property
    def few_values(self) -> Tensor:
        """[8, d]"""
        return self._rows("few_values", 8, self.d)

    @cached_property
    def w(self) -> Tensor:
        """[m, d], one row a class, of norm about sqrt(d)"""
        return self._rows("w", self.m, self.d) * self.d**0.5

    @cached_property
    def targets(self) -> Tensor:
        """[n] of m classes"""
        return self._integers("targets", self.m, self.n)

    @cached_property
    def labels(self) -> Tensor:
        """[n], about four rows a label"""
        return self._integers("labels", self.n // 4 + 1, self.n)

    @cached_property
    def y_labels(self) -> Tensor:
        """[m], some of which no row of x has; the first are those of x"""
        more = self._integers("y_labels", self.n // 4 + 3, max(self.m - self.n, 0))
        return torch.cat([self.labels[: self.m], more])

    @cached_property
    def ids(self) -> Tensor:
        """[n], about two rows an id"""
        return self._integers("ids", self.n // 2 + 1, self.n)

    @cached_property
    def y_ids(self) -> Tensor:
        """[m]"""
        return self._integers("y_ids", self.n // 2 + 1, self.m)

    @cached_property
    def exclude(self) -> Tensor:
        """[n, 3], columns of y or -1"""
        return self._integers("exclude", self.m, self.n, 3, low=-1)

    @cached_property
    def first_bank(self) -> Tensor:
        """[m, d]"""
        return self._rows("first_bank", self.m, self.d)

    @cached_property
    def second_bank(self) -> Tensor:
        """[3, d]"""
        return self._rows("second_bank", 3, self.d)

    @cached_property
    def first_labels(self) -> Tensor:
        """[m]"""
        return self._integers("first_labels", self.n // 4 + 3, self.m)

    @cached_property
    def second_labels(self) -> Tensor:
        """[3]"""
        return torch.arange(3, device=self.device)

    @cached_property
    def negatives(self) -> Tensor:
        """[n, 4, d], a row of x's own"""
        return self._rows("negatives", self.n, 4, self.d)

    @cached_property
    def temperature(self) -> Tensor:
        """A learnable number."""
        return self._number(0.25)

    @cached_property
    def scale(self) -> Tensor:
        """A learnable number."""
        return self._number(1.5)

    @cached_property
    def bias(self) -> Tensor:
        """A learnable number."""
        return self._number(-2.0)

    @cached_property
    def width(self) -> Tensor:
        """A learnable bandwidth."""
        return self._number(1.25)

    @cached_property
    def beta(self) -> Tensor:
        """A learnable boundary, a distance."""
        return self._number(1.125)

    @cached_property
    def class_beta(self) -> Tensor:
        """[labels], one a label"""
        drawn = torch.rand(self.n // 4 + 1, generator=self._generator("class_beta")).double()
        return self._held(1 + drawn / 3)


def few(integers: Tensor, like: Tensor) -> Tensor:
    """Small whole numbers as rows of four, whose products nothing rounds."""
    at = integers[:, None] % 4 == torch.arange(4, device=integers.device)
    return at.to(like.dtype) * (1 + integers % 3)[:, None].to(like.dtype)


ROUNDED, EXACT, UNJUDGED = "rounded", "exact", "unjudged"
PRECISIONS = ("fp32", "tf32", "mixed", "bf16")
Call = Callable[[Callable[..., Any], Any], Any]  # (function, inputs)
Options = dict[str, Any]


class _Seen:
    """Inputs that remember which of their fields were asked for."""

    def __init__(self, inputs: Any) -> None:
        self._inputs, self._fields = inputs, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        return self._fields.setdefault(name, getattr(self._inputs, name))


@dataclass(frozen=True)
class Example:
    """One way to call a function, of any shape, dtype and device.

    bound says how `verify` judges a backend's numbers. "rounded": by what roundings do to them;
    "exact": one right answer, without gradients; "unjudged": a rounding may choose other rows, so
    that only a formula on the same choice can judge (the tests' tables do).
    """

    name: str
    function: Callable[..., Any]
    call: Call
    options: Options | Callable[[Any], Options]
    bound: str = ROUNDED
    value: Callable[[Any], Tensor] | None = None  # of what is returned, what is compared
    precisions: tuple[str, ...] = PRECISIONS
    not_on: tuple[str, ...] = ()  # backends that have no kernel for it

    def __call__(self, inputs: Any, **more: object) -> Any:
        """The function's result; more options (backend, precision) are the caller's."""
        return self._with(partial(self.function, **more), inputs)

    def _with(self, function: Callable[..., Any], inputs: Any) -> Any:
        options = self.options if isinstance(self.options, dict) else self.options(inputs)
        return self.call(partial(function, **options), inputs)

    def arguments(self, inputs: Any) -> tuple[tuple[Any, ...], Options]:
        """What the function would be called with."""
        return self._with(lambda *args, **options: (args, options), inputs)

    def takes(self, option: str) -> bool:
        return option in inspect.signature(self.function).parameters

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The floating fields that the call uses: those that may get gradients."""
        seen = _Seen(ExampleInputs(8, 40, 8))
        self.arguments(seen)
        return tuple(
            name
            for name, field in seen._fields.items()
            if isinstance(field, Tensor) and field.is_floating_point()
        )

    @property
    def alone(self) -> bool:
        """One batch against itself."""
        return not {"y", "w", "other"} & set(self.leaves)


class ExampleTable(Mapping[str, Example]):
    """The rows by name. Modules enter theirs when they are imported: whoever reads has all."""

    def __init__(self) -> None:
        self._rows: dict[str, Example] = {}
        self._load: Callable[[], object] | None = None
        self._loading = threading.RLock()

    def late(self, load: Callable[[], object]) -> None:
        """load() imports every module that has rows."""
        self._load = load

    def enter(self, row: Example) -> None:
        if row.name in self._rows:
            raise ValueError(f"two examples are named {row.name!r}")
        self._rows[row.name] = row

    def _all(self) -> dict[str, Example]:
        if self._load is not None:
            self._complete()
        return self._rows

    def _complete(self) -> None:
        with self._loading:  # other threads wait until all are there
            if self._load is not None:
                self._load()
                self._load = None

    def __getitem__(self, name: str) -> Example:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


TABLE = ExampleTable()


def examples(
    function: Callable[..., Any],
    call: Call,
    variants: dict[str, Options | Callable[[Any], Options]] | None = None,
    *,
    name: str | None = None,
    **more: Any,
) -> None:
    """Put rows into the table: one call, and by variant the options that it is called with.

    A row is named after the function (or name) and its variant. more: fields of `Example`.
    """
    name = name or function.__name__
    for variant, options in (variants or {"": {}}).items():
        row = f"{name}, {variant}" if variant else name
        TABLE.enter(Example(row, function, call, options, **more))
