"""What a launch asks of a GPU: the accesses to its tensors, and its operations.

A closed form of a kernel is a function of the launch's own arguments and tile that says so;
`FORMS` has them all, those of Triton's kernels (`triton_forms`) and of the CUDA ones
(`cuda_forms`), by what is launched. test_roofline.py holds them to what the kernels load,
store and multiply when executed (Triton's interpreter, the host build).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from fused_losses.backends.gpu.device import ceil_div


def count(t: Tensor) -> int:
    """Distinct elements of a tensor, expanded dimensions once."""
    return prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)


@dataclass(frozen=True)
class Access:
    """What one launch reads of a tensor, or writes."""

    storage: Any
    begin: int  # bytes from the start of the storage
    size: int  # distinct bytes
    moved: int  # bytes between L2 and the processors
    write: bool = False
    sweeps: int = 1  # how often the region is gone through in turn
    block: bool = False  # rows of a wider matrix: known by where they begin


@dataclass
class Work:
    """What one launch does."""

    name: str
    kind: str = ""  # of the products: half, tf32, fp32
    flops: int = 0  # of products
    scalar: int = 0  # other floating point operations, about
    own: bool = False  # launched by this package, else by PyTorch
    accesses: list[Access] = field(default_factory=list)

    def moved(self, write: bool | None = None) -> int:
        """Bytes between L2 and the processors: those written, those read, or both."""
        return sum(a.moved for a in self.accesses if write is None or a.write == write)


def access(t: Tensor, moved: int, begin: int = 0, size: int | None = None, **how: Any) -> Access:
    """An access of `moved` bytes; begin and size in elements of t, from its first one."""
    if size is None:
        last = sum((s - 1) * stride for s, stride in zip(t.shape, t.stride(), strict=True))
        size = last + 1 if t.numel() else 0
        if size > 1.5 * count(t):
            size, how["block"] = count(t), True
    e = t.element_size()
    return Access(
        t.untyped_storage(), (int(t.storage_offset()) + begin) * e, size * e, moved, **how
    )


class Launch:
    """One launch's arguments by name, and the work that a closed form finds in it."""

    def __init__(self, name: str, programs: int, values: dict[str, Any]) -> None:
        self.values, self.programs = values, programs
        self.work = Work(name, own=True)

    def __getattr__(self, name: str) -> Any:
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """The argument is given."""
        return self.values.get(name) is not None

    def read(self, name: str, count: int, begin: int = 0, size: int | None = None, sweeps: int = 1):
        """Of an argument, if it is given, `count` elements; begin and size as in `access`."""
        t = self.values.get(name)
        if t is not None and count:
            e = t.element_size()
            self.work.accesses.append(access(t, count * e, begin, size, sweeps=sweeps))

    def write(self, name: str, count: int, begin: int = 0, size: int | None = None) -> None:
        """As `read`."""
        t = self.values.get(name)
        if t is not None and count:
            e = t.element_size()
            self.work.accesses.append(access(t, count * e, begin, size, write=True))

    def multiply(self, scores: int, depth: int, like: Tensor) -> None:
        """Products of `scores` pairs of rows."""
        flops = 2 * scores * depth
        dot = self.DOT
        self.work.kind = "half" if like.element_size() < 4 or self.BF16 else "fp32"
        if self.work.kind == "fp32" and dot in ("tf32", "tf32x3"):
            self.work.kind = "tf32"
            flops *= 3 if dot == "tf32x3" else 1
        self.work.flops += flops


Form = Callable[[Launch], None]
FORMS: dict[Hashable, Form] = {}  # by a Triton kernel, or by a CUDA kernel's name


def form(kernel: Hashable) -> Callable[[Form], Form]:
    """Enters the closed form of a kernel."""

    def add(f: Form) -> Form:
        FORMS[kernel] = f
        return f

    return add


def work_of(kernel: Hashable, name: str, programs: int, values: dict[str, Any]) -> Work:
    """What the closed form says of one launch."""
    if kernel not in FORMS:
        raise NotImplementedError(f"no closed form of the kernel {name}")
    launch = Launch(name, programs, values)
    FORMS[kernel](launch)
    return launch.work


def tile_products(
    s: Launch,
    x: str,
    y: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    d: int,
    programs: int,
) -> None:
    """Tiles of BM x BN whose operands are read whole, rows (first, count) past the end as well."""
    stride_x, stride_y = s.values[x].stride(0), s.values[y].stride(0)
    # a row operand beyond half of L2 is gone through again for every wave of tiles
    sweeps = ceil_div(programs, 256)
    s.read(x, programs * s.BM * d, rows[0] * stride_x, rows[1] * stride_x, sweeps)
    s.read(y, programs * s.BN * d, columns[0] * stride_y, columns[1] * stride_y)
    s.multiply(programs * s.BM * s.BN, ceil_div(d, s.BK) * s.BK, s.values[x])
