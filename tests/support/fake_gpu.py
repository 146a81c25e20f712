"""A GPU of shapes: fake CUDA tensors, our host code as it is, launches and waits noted.

Needs the devices of `fake_cuda.cpp`. An op of ours runs its Python form down to its launches, which
are noted with the device that was current. What reads values is noted, and answered as well as
one can who knows none.
"""

from __future__ import annotations

import ctypes
import os
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_losses import backends, primitives
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.base.compiled import extension
from fused_losses.primitives import op as ops

PACKAGE = f"{os.sep}fused_losses{os.sep}"
FIRST_STREAM = 1000  # the stream of cuda:i is 1000 + i
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
LISTED = (aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.equal, aten.bincount)
READS = (aten._local_scalar_dense, aten.item, aten.is_nonzero)
# what launches nothing: allocations, and views beside those that say so themselves
ALLOCATED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
SIZES = ("_local_scalar_dense", "is_same_size", "split_with_sizes")
VIEWED = ("view", "alias", "lift_fresh", "resize_", "set_")


@dataclass(frozen=True)
class Launched:
    """One launch: where it was asked for, and where its tensors are."""

    kernel: str
    current: int
    stream: int | None  # None: Triton's, which is the current one
    devices: frozenset[int | None]


@dataclass
class Noted:
    """What a call asked of the GPU."""

    launches: list[Launched] = field(default_factory=list)
    waits: list[tuple[str, str]] = field(default_factory=list)  # kind, place in the package
    # of each op of ours: bytes beside inputs and outputs, and what its workspace tells
    memory: list[tuple[str, int, int]] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)  # ops, with their backend
    # PyTorch's operators that launch a kernel each, or more: with their place in the package
    operations: list[tuple[str, str]] = field(default_factory=list)
    # of float32 products of the library in ops on GPU backends: whether tf32 is off in its thread
    without_tf32: list[bool] = field(default_factory=list)


def place() -> str:
    """The line of the package that is running: module.function."""
    frames = [f for f in traceback.extract_stack() if PACKAGE in f.filename]
    if not frames:
        return "outside"
    module = Path(frames[-1].filename.rpartition(PACKAGE)[2]).with_suffix("")
    return f"{'.'.join(module.parts)}.{frames[-1].name}"


def launches(func: Any) -> bool:
    """Whether an operator on tensors of a GPU launches a kernel."""
    name = func._schema.name.removeprefix("aten::")
    if func.namespace != "aten":
        return False
    viewed = func.is_view or any(word in name for word in VIEWED)
    return name not in (*ALLOCATED, *SIZES) and not viewed


class Shapes(TorchDispatchMode):
    """Runs our ops' Python forms on fakes, and notes what waits for the device."""

    follows_launches = True

    def __init__(self, noted: Noted, devices: Any, start_on: int) -> None:
        super().__init__()
        self.noted, self.devices, self.start_on = noted, devices, start_on
        self.hoped: dict[int, bool] = {}
        self.kept: list[Tensor] = []  # so that their identities are
        self.inside = 0  # forms of GPU backends
        self.on_backend = 0  # ops on such, those in PyTorch's operators too
        self.counted: set[int] = set()  # storages, by their address
        self.alive = self.most = 0  # their bytes on a GPU

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fused_losses":
            return self.ours(func, args)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self.on_backend and self.composite(func):
            # without autograd an operator made of others comes whole
            with self:
                return func.decompose(*args, **kwargs)
        if self.on_backend and func.overloadpacket in PRODUCTS and given[-1].dtype == torch.float32:
            self.noted.without_tf32.append(extension().tf32_is_off())
        on_gpu = any(t.is_cuda for t in given)
        if on_gpu and (wait := self.waits(func, args, kwargs)):
            self.noted.waits.append((wait, place()))
        out = self.of_values(func, args) if on_gpu else None
        if func._overloadname == "dtype_out":  # which fakes' own decomposition cannot call
            out = kwargs["out"]
        if out is None:
            out = func(*args, **kwargs)
        to_gpu = isinstance(out, Tensor) and out.is_cuda
        for t in tree_leaves(out):
            if self.inside and isinstance(t, Tensor) and t.is_cuda:
                self.count(t.untyped_storage())
        if (on_gpu or to_gpu) and launches(func):
            self.noted.operations.append((func._schema.name.removeprefix("aten::"), place()))
        if to_gpu and not on_gpu and given and func.overloadpacket is aten._to_copy:
            self.noted.waits.append(("host to device", place()))
        return out

    @staticmethod
    def composite(func: Any) -> bool:
        noted = (*READS, *LISTED, aten.repeat_interleave)
        made = torch._C._dispatch_has_kernel_for_dispatch_key
        ours = func.namespace == "aten" and func.overloadpacket not in noted
        return ours and made(func.name(), "CompositeImplicitAutograd")

    def count(self, storage: Any) -> None:
        """Its bytes are alive until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.counted:
            return
        self.counted.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)

        def freed() -> None:
            self.counted.discard(key)
            self.alive -= size

        weakref.finalize(storage, freed).atexit = False

    def ours(self, func: Any, args: tuple) -> Any:
        """An op of ours: its form runs, and what it holds is set beside what the op tells."""
        name = func._schema.name.removeprefix("fused_losses::")
        self.noted.chosen.append(name)
        direction = "_backward" if name.endswith("_backward") else ""
        op, _, backend = name.removesuffix(direction).rpartition("_")
        run = ops.OPS[op].backward if direction else ops.OPS[op].forward
        before = self.devices.fake_exchange_device(self.start_on)
        # a primitive without a form of the backend's own runs on PyTorch's operators
        form = Path(primitives.__file__).parent / ops.OPS[op].primitive / f"{backend}.py"
        on_gpu = backend in ("triton", "cuda")
        own = on_gpu and form.is_file()
        self.inside += own
        self.on_backend += on_gpu
        try:
            for t in tree_leaves(args):
                if isinstance(t, Tensor) and t.is_cuda:
                    self.count(t.untyped_storage())
            start = self.most = self.alive
            with self, torch.no_grad():
                out = ops._python(run, backend)(*args)
            made = {t.untyped_storage()._cdata: t for t in tree_leaves(out) if t is not None}
            held = self.most - start - sum(t.untyped_storage().nbytes() for t in made.values())
            told = ops.OPS[op].workspace(backend, direction, args)
            if own:
                self.noted.memory.append((name, held, told))
            return out
        finally:
            self.inside -= own
            self.on_backend -= on_gpu
            self.devices.fake_exchange_device(before)

    def waits(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
        """What kind of wait an operator is, on tensors of a device."""
        packet = func.overloadpacket
        name = func._schema.name.removeprefix("aten::")
        if packet in READS:
            return "item"
        if packet in LISTED or "unique" in name:
            return name
        if packet in INDEXED:
            at = [t for t in args[1] if t is not None]
            if any(t.dtype in (torch.bool, torch.uint8) for t in at):
                return "mask as index"
            if args[0].is_cuda and any(not t.is_cuda for t in at):
                return "host to device"
        if packet is aten._to_copy and not args[0].is_cuda:
            return None
        if packet is aten._to_copy and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            return "device to host"
        if packet is aten.copy_ and args[0].is_cuda != args[1].is_cuda and args[1].numel():
            return "host to device" if args[0].is_cuda else "device to host"
        repeats_of_tensor = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        return "repeat_interleave" if repeats_of_tensor else None

    def of_values(self, func: Any, args: tuple) -> Any:
        """What an operator whose result depends on values gives at most; None: any other."""
        packet = func.overloadpacket
        if packet in READS:
            # a count is 1, and a solver's information 0
            count = int(args[0].dtype == torch.int64)
            return self.hoped.get(id(args[0]), False) if args[0].dtype == torch.bool else count
        if packet is aten.equal:
            return False
        if packet is aten.nonzero_numpy:
            return _picked(args[0])
        if packet is aten.nonzero:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if packet is aten.bincount:
            given = args[2] if len(args) > 2 else 0
            return args[0].new_empty((max(args[0].numel(), given),))
        if func is aten.repeat_interleave.Tensor:
            return args[0].new_empty((args[0].numel(),))
        if packet is aten.masked_select:
            return args[0].new_empty((args[0].numel(),))
        if packet in (aten._unique2, aten.unique_consecutive, aten.unique_dim):
            x = args[0]
            each = x.new_empty(x.shape if packet is aten.unique_dim else (x.numel(),))
            inverse = x.new_empty(x.shape, dtype=torch.int64)
            return each, inverse, x.new_empty((each.shape[0],), dtype=torch.int64)
        if packet in INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1]):
            return func(args[0], [i for t in args[1] for i in _places(t)], *args[2:])
        if packet in (aten.any, aten.all):
            out = func(*args)
            if out.numel() == 1:
                self.hoped[id(out)] = packet is aten.all
                self.kept.append(out)
            return out
        return None


def _places(index: Tensor | None) -> list[Tensor | None]:
    """An index, and for a mask the places that it may pick."""
    masks = index is not None and index.dtype in (torch.bool, torch.uint8)
    return [*_picked(index)] if masks else [index]


def _picked(mask: Tensor) -> list[Tensor]:
    """As many places as there may be, one index for each dimension."""
    return [mask.new_empty((mask.numel(),), dtype=torch.int64) for _ in range(mask.dim())]


@contextmanager
def gpu(
    monkeypatch: pytest.MonkeyPatch, able: tuple[str, ...], arch: str = "sm_90", start_on: int = 0
) -> Iterator[Noted]:
    """Within: cuda:0 and cuda:1 of an architecture, where backends of `able` run."""
    noted = Noted()
    devices = ctypes.CDLL(os.environ["FAKE_CUDA_LIBRARY"])

    def current() -> int:
        return devices.fake_current_device()

    def stream(device: object = None) -> Any:
        return SimpleNamespace(cuda_stream=FIRST_STREAM + current())

    patch = monkeypatch.setattr
    patch(torch.cuda, "_exchange_device", devices.fake_exchange_device)
    patch(torch.cuda, "_maybe_exchange_device", devices.fake_exchange_device)
    patch(torch.cuda, "current_device", current)
    patch(torch.cuda, "current_stream", stream)
    patch(torch.random, "fork_rng", lambda **_: nullcontext())  # there are no generators
    patch(gpu_device, "architecture", lambda device: arch)
    patch(gpu_device, "processors", lambda device: 132)
    patch(FakeTensor, "data_ptr", lambda self: 0)

    def reasons(name: str, device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
        return [] if name in able else [f"{name} is left out"]

    patch(backends, "reasons_against", reasons)
    patch(backends, "unavailable", lambda name: None if name in able else "left out")
    _watch_triton(patch, noted, current)
    _watch_cuda(patch, noted, current)
    mode = Shapes(noted, devices, start_on)
    with FakeTensorMode(), mode:
        yield noted


def _watch_triton(patch: Callable[..., None], noted: Noted, current: Callable[[], int]) -> None:
    triton = pytest.importorskip("triton")

    def grid(kernel: Any, programs: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            given = triton_launch.by_name(kernel, args, {}).values()
            devices = frozenset(t.device.index for t in given if isinstance(t, Tensor))
            assert isinstance(programs[0], int) and programs[0] > 0
            noted.launches.append(Launched(kernel.fn.__name__, current(), None, devices))

        return run

    patch(triton.runtime.jit.KernelInterface, "__getitem__", grid)


def _watch_cuda(patch: Callable[..., None], noted: Noted, current: Callable[[], int]) -> None:
    launch, described = cuda_launch.launch, cuda_launch._function
    asked: list[frozenset[int | None]] = []

    def described_alone(name: str) -> tuple:
        _, struct, fields = described(name)

        def run(arguments: Any, stream: ctypes.c_void_p) -> int:
            noted.launches.append(Launched(name, current(), stream.value, asked[-1]))
            return 0

        return run, struct, fields

    def watched(name: str, **arguments: Any) -> None:
        given = [t for t in arguments.values() if isinstance(t, Tensor)]
        asked.append(frozenset(t.device.index for t in given))
        launch(name, **arguments)

    patch(cuda_launch, "_function", described_alone)
    patch(cuda_launch, "launch", watched)
