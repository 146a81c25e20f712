"""`warm_up(fn, *args, **kw)`: what Triton compiles for a call, compiled before the first one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fused_losses import backends
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.explain import ShapeTrace
from fused_losses.primitives import op as ops


class Warmed(NamedTuple):
    """A kernel that is ready."""

    kernel: str
    seconds: float  # next to none where it was


Told = Callable[[int, int, Warmed], None]


def warm_up(
    fn: Callable[..., Any], *args: Any, progress: bool | Told = True, **kwargs: Any
) -> tuple[Warmed, ...]:
    """Compiles the Triton kernels that `fn(*args, **kwargs)` and its backward launch.

    fn is called on tensors that have shapes and no values, as `explain` calls it: nothing runs on
    the device, and no tensor is allocated there. Gradients are those that the arguments ask for.
    A later call of these dtypes, this D and these options compiles nothing, one of another number
    of rows (an epoch's last batch) one kernel at most. Kernels go into Triton's cache on the disk,
    too, so that a later process, or another rank of this machine, finds them.

    progress: True writes a line a kernel to stderr, False none; or it is called with (how many are
    ready, of how many, the last one).

    Returns the kernels in the order of their launches, each once, with the seconds that it took.
    Raises RuntimeError without a GPU or where the kernels are interpreted, ValueError where no
    tensor is on a GPU or where what fn does depends on values, and what the call itself would raise
    for shapes, types and backends. Time: seconds a kernel that is in no cache.
    """
    if why := _nothing_to_compile():
        raise RuntimeError(f"warm_up: nothing can be compiled ahead here: {why}")
    own = [*fn.parameters(), *fn.buffers()] if isinstance(fn, torch.nn.Module) else []
    given = [t for t in tree_leaves((args, kwargs, own)) if isinstance(t, Tensor)]
    if not any(t.is_cuda for t in given):
        where = sorted({str(t.device) for t in given})
        raise ValueError(
            f"args: expected tensors on a GPU, which the kernels are compiled for, got "
            f"{', '.join(where) or 'no tensor'}"
        )
    trace = _LaunchTrace(given)
    trace.call(fn, args, kwargs)
    tell = progress if callable(progress) else (_line if progress else None)
    out: list[Warmed] = []
    for launch in trace.launches.values():
        start = time.perf_counter()
        launch.compile()
        out.append(Warmed(launch.kernel.fn.__name__, time.perf_counter() - start))
        if tell is not None:
            tell(len(out), len(trace.launches), out[-1])
    return tuple(out)


def _nothing_to_compile() -> str | None:
    if triton_launch.interpreted():
        return "TRITON_INTERPRET=1 interprets the kernels"
    return backends.unavailable("triton")


def _line(ready: int, total: int, last: Warmed) -> None:
    print(
        f"fused_losses: {ready} of {total} kernels ready, {last.kernel} in {last.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )


@dataclass(frozen=True)
class _Pointer:
    """A tensor as Triton's launcher looks at it."""

    dtype: torch.dtype
    device: torch.device
    address: int  # of which only the alignment counts
    size: int  # bytes of its storage

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return self.size


class _WarmLaunch(NamedTuple):
    """A kernel with what it is specialised for."""

    kernel: Any
    args: tuple  # pointers in the place of tensors
    constants: dict[str, Any]
    options: dict[str, Any]
    device: torch.device

    def compile(self) -> None:
        """By Triton's own launcher, which enters it where a launch looks."""
        with torch.cuda.device(self.device):
            self.kernel.run(*self.args, grid=(1,), warmup=True, **self.constants, **self.options)


class _LaunchTrace(ShapeTrace):
    """The launches of a function that runs on fake tensors, our ops down to their kernels."""

    follows_launches = True

    def __init__(self, given: list[Tensor]) -> None:
        fakes = [t.fake_mode for t in given if isinstance(t, FakeTensor)]
        super().__init__(fakes[0] if fakes else None)
        self.launches: dict[tuple, _WarmLaunch] = {}
        self.begins: dict[int, int] = {}  # where storages of real inputs begin

    def input(self, real: Tensor) -> Tensor:
        fake = super().input(real)
        if not isinstance(real, FakeTensor):
            self.begins[fake.untyped_storage()._cdata] = real.untyped_storage().data_ptr()
        return fake

    def result(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func._overloadname == "dtype_out":  # whose decomposition fakes cannot call
            return kwargs["out"]
        name = func._schema.name.removeprefix("fused_losses::")
        direction = "_backward" if name.endswith("_backward") else ""
        op, _, backend = name.removesuffix(direction).rpartition("_")
        if func.namespace != "fused_losses" or backend not in ("triton", "cuda"):
            return super().result(func, args, kwargs)
        run = ops.OPS[op].backward if direction else ops.OPS[op].forward
        with self, torch.no_grad():
            return run(backend, *args)

    def hear_launch(self, kernel: Any, args: tuple, constants: dict, options: dict) -> None:
        tensor = gpu_device.first(args)
        assert tensor is not None
        pointers = triton_launch.changed(args, self._pointer)
        told = triton_launch.changed(pointers, _specialised)
        key = kernel, tensor.device, told, *constants.items(), *options.items()
        self.launches.setdefault(
            key, _WarmLaunch(kernel, pointers, constants, options, tensor.device)
        )

    def _pointer(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        begin = self.begins.get(storage._cdata, 0)
        address = begin + int(value.storage_offset()) * value.element_size()
        return _Pointer(value.dtype, value.device, address, storage.nbytes())


def _specialised(value: Any) -> Any:
    """As much of an argument as a kernel may be compiled for."""
    if isinstance(value, _Pointer):
        return value.dtype, value.address % 16 == 0, value.size < 2**31
    if isinstance(value, float):
        return "float"
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return value
