"""Bytes and FLOPs of what a GPU would be given: the host code's launches, on tensors without data.

`Trace` runs the real host code for an architecture of choice. Every kernel is met by its closed
form (`work`), every library product and other PyTorch operation by what it reads and writes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.base import validation
from fused_losses.bench.roofline import cuda_forms  # noqa: F401 (enters them)
from fused_losses.bench.roofline.work import Work, access, count, work_of

# of a library's product, assumed: 128 x 256, which from sm_90 on two processors share (clusters
# with multicast; `gpu_anchors.md` saw as much in Liger's): 256 x 256 as L2 sees it
LIBRARY_TILE = {"sm_80": (128, 256), "sm_90": (256, 256), "sm_100": (256, 256)}

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: (0, 1, None),
    aten.mm.out: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.bmm.out: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.addmm.out: (1, 2, 0),
    aten.addmm_.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten.baddbmm.out: (1, 2, 0),
    aten.baddbmm_.default: (1, 2, 0),
}
CREATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
WRITES = ("copy_", "fill_", "zero_", "zeros", "full", "ones", "zeros_like", "ones_like", "arange")
WRITES += ("new_zeros", "new_full", "new_ones", "full_like", "scalar_tensor", "eye")


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors(item)]
    return []


def product_work(
    a: Tensor, b: Tensor, out: Tensor, more: Tensor | None, half: bool, arch: str
) -> Work:
    """A library product by tiles of LIBRARY_TILE, the longer side along the longer one."""
    batch = prod(a.shape[:-2])
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    high, wide = LIBRARY_TILE[arch] if m <= n else LIBRARY_TILE[arch][::-1]
    work = Work("product", "half" if half else "fp32", 2 * batch * m * n * k)
    moved_a = batch * m * k * ceil_div(n, wide) * a.element_size()
    moved_b = batch * k * n * ceil_div(m, high) * b.element_size()
    moved_out = batch * m * n * out.element_size()
    work.accesses = [access(a, moved_a), access(b, moved_b), access(out, moved_out, write=True)]
    if more is not None:
        work.accesses.append(access(more, count(more) * more.element_size()))
    return work


class Trace(TorchDispatchMode):
    """Collects the work of what runs under it, all of it on the meta device.

    own: our host code, whose 16-bit products are written with widened operands off a GPU.
    compiled: a rule for torch.compile. Results of pointwise operations are never stored: who reads
    them reads what they are made of. Products and sorts read stored operands; a softmax over rows
    reads its argument twice; what backward needs of pointwise results is computed again.
    """

    def __init__(
        self, arch: str = "sm_90", processors: int = 132, compiled: bool = False, own: bool = True
    ) -> None:
        super().__init__()
        self.arch, self.processors, self.compiled = arch, processors, compiled
        self.work: list[Work] = []
        self.kept: list[Any] = []  # storages stay alive: their addresses are their names
        self.made_of: dict[int, list[Tensor]] = {}  # storage -> what a result not stored is made of
        self.own = own

    def source(self, t: Tensor) -> list[Tensor]:
        return self.made_of.get(t.untyped_storage()._cdata, [t])

    def stored(self, t: Tensor) -> Tensor:
        """t in memory: written now if it was not stored."""
        key = t.untyped_storage()._cdata
        if key in self.made_of:
            sources = self.made_of.pop(key)
            self.simple("pointwise", sources, [t])
        return t

    def simple(self, name: str, reads: list[Tensor], writes: list[Tensor], times: int = 1) -> None:
        work = Work(name, scalar=sum(count(t) for t in reads or writes))
        work.accesses = [access(t, times * count(t) * t.element_size()) for t in reads if t.numel()]
        work.accesses += [
            access(t, count(t) * t.element_size(), write=True) for t in writes if t.numel()
        ]
        self.work.append(work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tensors(args) + tensors(list(kwargs.values()))
        made = tensors(result)
        self.kept += [t.untyped_storage() for t in made]
        name = func._schema.name.split("::")[1]
        if func in PRODUCTS:
            self.product(func, args, kwargs, made[0])
        elif name in ("_euclidean_dist", "_cdist_forward", "_cdist_backward"):
            self.distances(name, given, made[0])
        elif not made or name in CREATE or func.is_view or self.aliases(func):
            pass
        elif name == "_to_copy" and self.own and self.widened(args[0], made[0]):
            self.made_of[made[0].untyped_storage()._cdata] = self.source(args[0])
        else:
            self.other(func, name, given, made)
        return result

    @staticmethod
    def aliases(func: Any) -> bool:
        """A view that is not marked as one (`_unsafe_view`, `_reshape_alias`)."""
        return "view" in func._schema.name or "alias" in func._schema.name

    @staticmethod
    def widened(a: Tensor, b: Tensor) -> bool:
        """16-bit rows in float32: what stands for a 16-bit product on tensors that are no GPU's."""
        return a.element_size() == 2 and b.dtype == torch.float32

    def product(self, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
        at = PRODUCTS[func]
        a, b = args[at[0]], args[at[1]]
        beta = kwargs.get("beta", 1)
        more = args[at[2]] if at[2] is not None and beta else None
        operands = []
        for t in (a, b):
            (source, *rest) = self.source(t)
            if not rest and self.widened(source, t) and source.numel() >= t.numel():
                # the operand itself, in the shape that is multiplied
                e = torch.empty_strided(t.shape, t.stride(), dtype=source.dtype, device="meta")
                operands.append((e, source))
            else:
                operands.append((self.stored(t), None))
        half = all(t.element_size() == 2 for t, _ in operands)
        work = product_work(operands[0][0], operands[1][0], out, more, half, self.arch)
        for i, (_, source) in enumerate(operands):
            if source is not None:
                work.accesses[i] = access(source, work.accesses[i].moved, 0, None)
        self.work.append(work)

    def distances(self, name: str, given: list[Tensor], out: Tensor) -> None:
        """torch.cdist: a product of rows with their norms, or a block of threads a pair."""
        x, y = given[-2:] if name != "_cdist_backward" else given[1:3]
        if name == "_euclidean_dist":
            self.work.append(product_work(x, y.T, out, None, False, self.arch))
            return self.simple("pointwise", [out], [out])
        pairs, d = x.shape[0] * y.shape[0], x.shape[1]
        self.simple(name, given, [out])
        work = self.work[-1]
        work.accesses += [access(t, pairs * d * t.element_size()) for t in (x, y)]
        work.scalar = 3 * pairs * d
        return None

    def other(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        in_place = name.endswith("_") or "out" in func._schema.overload_name
        if name in WRITES:
            reads = [] if name != "copy_" else given[1:2]
            reads = [s for t in reads for s in self.source(t)]
            self.simple(name, reads, made)
            return
        lazy = self.compiled and not in_place
        if (lazy and torch.Tag.pointwise in func.tags) or (lazy and name in ("_to_copy", "clone")):
            sources = {id(s): s for t in given for s in self.source(t)}
            for t in made:
                self.made_of[t.untyped_storage()._cdata] = list(sources.values())
            return
        if self.compiled and "log_softmax" in name:
            read = {id(s): s for t in given for s in self.source(t)}
            self.simple(name, list(read.values()), [], 2 if name == "_log_softmax" else 1)
            self.made_of[made[0].untyped_storage()._cdata] = list(read.values())
            return
        if self.compiled and name in ("topk", "sort", "index", "gather"):
            given = [self.stored(t) for t in given]
        if name == "index_copy_":
            # as many rows as are given
            new = self.stored(given[-1])
            self.simple(name, [new], [])
            to = access(given[0], count(new) * new.element_size(), 0, count(new), write=True)
            self.work[-1].accesses.append(to)
            return
        if "gather" in name or name in ("index", "index_select", "nll_loss_forward"):
            # as much of the source as is taken from it
            self.simple(name, [*given[1:], made[0]], made)
            return
        read = {id(s): s for t in given for s in self.source(t)}
        self.simple(name, list(read.values()), made)

    # ---- our own launches -----------------------------------------------------------------------

    def triton(self, kernel: Any, programs: int, args: tuple, constants: dict, _: Any) -> None:
        """In the place of `triton_launch.launch`."""
        self.work.append(triton_work(kernel, programs, args, constants))
        given = triton_launch.by_name(kernel, args, {}).values()
        self.kept += [t.untyped_storage() for t in given if isinstance(t, Tensor)]

    def cuda(self, name: str, **arguments: Any) -> None:
        """In the place of `cuda_launch.launch`."""
        self.work.append(work_of(name, name, 0, arguments))

    @contextmanager
    def running(self) -> Iterator[Trace]:
        """The host code believes in a GPU of the trace's architecture."""
        doubles = {cuda_launch.launch: self.cuda, cuda_launch.on_host: lambda: False}
        held = [place for value in doubles for place in holders(value)]
        with pretended(self.arch, self.processors, self.triton):
            for module, key, value in held:
                setattr(module, key, doubles[value])
            try:
                with self:
                    yield self
            finally:
                for module, key, value in held:
                    setattr(module, key, value)


def triton_work(kernel: Any, programs: int, args: tuple, constants: dict) -> Work:
    """What the closed form says of one launch of a Triton kernel."""
    # Triton, which its kernels are written in, is optional
    from fused_losses.bench.roofline import triton_forms  # noqa: F401 (enters them)

    values = triton_launch.by_name(kernel, args, constants)
    return work_of(kernel, kernel.fn.__name__, programs, values)


def holders(value: Any) -> list[tuple[ModuleType, str, Any]]:
    """Where this package's modules hold a function: by-name imports of it, too."""
    modules = [m for name, m in sys.modules.items() if name.startswith("fused_losses.")]
    return [(m, key, v) for m in modules for key, v in vars(m).items() if v is value]


@contextmanager
def pretended(arch: str, processors: int, launch: Callable[..., None]) -> Iterator[None]:
    """The Triton host code believes in a GPU, and launches through `launch`.

    arch: a row of the tile tables. Labels, which have no data, are not checked.
    """
    doubles: dict[tuple[ModuleType, str], Callable[..., Any]] = {
        (triton_launch, "launch"): launch,
        (gpu_device, "architecture"): lambda device: arch,
        (gpu_device, "processors"): lambda device: processors,
    }
    for name in dir(validation):
        if name.startswith("check_"):
            doubles[validation, name] = lambda *a, **k: None
    saved = {(module, name): getattr(module, name) for module, name in doubles}
    try:
        for (module, name), double in doubles.items():
            setattr(module, name, double)
        yield
    finally:
        for (module, name), value in saved.items():
            setattr(module, name, value)
