"""`explain(fn, *args, **kw)`: which backend a call would run on, why, and what it would need."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from fused_losses import backends
from fused_losses.base import plans
from fused_losses.primitives import op as ops

SLACK = 1 << 18  # of Python's objects, and of what is too small to be counted
PANEL = 1 << 16  # of a product of 16-bit matrices, whatever their sizes: a library's packed tiles
KNOWN = 1 << 20  # elements of a tensor of integers whose values are carried along

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addmm_, aten.baddbmm_)
SCATTERS = (aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_)
WIDENED = (*PRODUCTS, *SCATTERS)
REDUCTIONS = (aten.sum, aten.prod, aten.cumsum, aten.mean)
AS_GIVEN = (aten.where, aten.masked_fill, aten.copy)  # whose tensors differ in dtype on purpose


@dataclass(frozen=True)
class Plan:
    """How a call would run."""

    backend: str
    reasons: dict[str, list[str]]  # why the backends that were passed over cannot take the call
    # beyond inputs and gradients, forward and backward. Of a matrix of distances, neighbours and
    # mined lists the result and its gradient are not counted either, nor the parts of a list
    peak_extra_bytes: int
    # of these, scores that forwards keep: at most `memory_budget`, and 0 where a form keeps none
    kept_bytes: int = 0

    def __str__(self) -> str:
        passed = "".join(f"\n  not {who}: {', '.join(w)}" for who, w in self.reasons.items())
        extra, kept = (size / 2**20 for size in (self.peak_extra_bytes, self.kept_bytes))
        of_kept = f", {kept:.1f} of them kept scores" if kept else ""
        return f"{self.backend}, at most {extra:.1f} MiB extra{of_kept}{passed}"


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """The plan of `fn(*args, **kwargs)` and of its backward, neither of which is run.

    fn: a function of `fused_losses.functional`, a primitive, or a loss of your own made of these
    and of PyTorch's operators; a module's parameters and buffers are inputs, too. It is called on
    tensors that have a shape and no values: what PyTorch allocates is added up, and each op of ours
    tells its own workspace. Gradients are those that the arguments ask for. Time of the call's
    operators without their work; the first call in a process also sets up PyTorch's fake tensors.
    Raises what the call itself would raise for shapes, types and backends, and ValueError where
    what it does depends on the values of a tensor.
    """
    trace = ShapeTrace()
    with backends.watched() as chosen:
        trace.call(fn, args, kwargs)
    name, refused = chosen[0] if chosen else ("bounded", {})
    peak = trace.peak(counted=not plans.is_handed_out(fn))
    return Plan(name, refused, SLACK + peak, trace.kept_bytes)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", repr(fn))


class ShapeTrace(TorchDispatchMode):
    """Every storage that comes and goes while a function runs on fake tensors."""

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.fake = fake or FakeTensorMode(allow_non_fake_inputs=True)  # what a function holds
        self.inputs: dict[int, Tensor] = {}  # by the identity of the real ones
        self.events: list[tuple[int, int]] = []  # a storage's number and the bytes it adds
        self.numbers = WeakIdKeyDictionary()  # of storages
        self.known = WeakIdKeyDictionary()  # values of integers, of a tensor
        self.hoped = WeakIdKeyDictionary()  # of a check's result
        self.not_ours: set[int] = set()  # inputs and their gradients
        self.results: set[int] = set()  # and theirs
        self.count = 0
        self.kept_bytes = 0  # of scores

    # ---- the run ---------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """fn and its backward on tensors of these shapes; a module's own are inputs, too."""
        args, kwargs = tree_map_only(Tensor, self.input, (args, kwargs))
        called = fn
        if isinstance(fn, nn.Module):
            own = {k: self.input(t) for k, t in (*fn.named_parameters(), *fn.named_buffers())}
            called = lambda *a, **k: torch.func.functional_call(fn, own, a, k)
        with self.fake, self, plans.heard_by(self.add):
            try:
                self.run(called, args, kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(
                    f"fn: expected work that depends on shapes alone, but {_name(fn)} reads the "
                    f"values of a tensor on the host ({error.func})"
                ) from error

    def run(self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward and, where a result needs a gradient, backward."""
        results = [t for t in tree_leaves(fn(*args, **kwargs)) if isinstance(t, Tensor)]
        self.results |= {self._number(t) for t in results}
        ends = [t for t in results if t.requires_grad]
        slopes = [torch.empty_like(t) for t in ends]
        self.results |= {self._number(t) for t in slopes}
        if ends:
            torch.autograd.backward(ends, slopes)
        leaves = [t.grad for t in self.inputs.values() if t.grad is not None]
        self.not_ours |= {self._number(t) for t in leaves}

    def input(self, real: Tensor) -> Tensor:
        """A leaf of its shape."""
        if id(real) in self.inputs:
            return self.inputs[id(real)]
        leaf = real.detach().requires_grad_(real.requires_grad)
        fake = leaf if isinstance(leaf, FakeTensor) else self.fake.from_tensor(leaf)
        self.not_ours.add(self._number(fake))
        if _is_small(real):
            self.known[fake] = real.detach()
        self.inputs[id(real)] = fake
        return fake

    # ---- what is alive ---------------------------------------------------------------------------

    def add(self, workspace_bytes: int) -> None:
        """So much comes and goes."""
        self.count += 1
        self.events += [(self.count, workspace_bytes), (self.count, -workspace_bytes)]

    def _number(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        if storage not in self.numbers:
            self.count += 1
            number, size = self.count, storage.nbytes()
            self.numbers[storage] = number
            self.events.append((number, size))
            weakref.finalize(storage, self.events.append, (number, -size)).atexit = False
        return self.numbers[storage]

    def peak(self, counted: bool) -> int:
        """The most bytes alive at once; counted: results too."""
        left_out = self.not_ours if counted else self.not_ours | self.results
        alive = most = 0
        for number, size in self.events:
            alive += 0 if number in left_out else size
            most = max(most, alive)
        return most

    # ---- every operator --------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0] in self.hoped:
                return self.hoped[args[0]]
            if args[0] in self.known:
                with _disable_current_modes():
                    return self.known[args[0]].item()
        if func is aten.equal.default:
            return False  # whoever asks has a way for each answer; this one is the general one
        if func.namespace == "fused_losses":
            self.add(_workspace(func, args))
        out = self._of_unknown_length(func, args)
        if out is None:
            out = self.result(func, args, kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for t in made:
            self._number(t)
        if func.namespace == "fused_losses" and func._schema.returns[-1].name == "kept":
            self.kept_bytes += made[-1].nbytes
        self.add(_within(func, args, made))
        self._carry(func, args, kwargs, made)
        return out

    def result(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What an operator gives: of an op of ours its shapes, whose workspace is told."""
        return func(*args, **kwargs)

    def _of_unknown_length(self, func: Any, args: tuple) -> Tensor | None:
        """As much as there may be, of what a mask picks; exactly that where the mask is known."""
        if func is aten.nonzero.default:
            mask = args[0]
            if mask in self.known:
                with _disable_current_modes():
                    real = self.known[mask].nonzero()
                    fake = self.fake.from_tensor(real)
                self.known[fake] = real
                return fake
            return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            x, (mask,) = args
            count = mask.numel()
            if mask in self.known:
                with _disable_current_modes():
                    count = int(self.known[mask].sum())
            return x.new_empty((count, *x.shape[mask.dim() :]))
        return None

    def _carry(self, func: Any, args: tuple, kwargs: dict[str, Any], made: list[Tensor]) -> None:
        """Values of small tensors of integers and of scalars, and what a check hopes for."""
        if func.overloadpacket in (aten.any, aten.all) and made[0].numel() == 1:
            # a check looks for what should not be, or that all is as it should be
            self.hoped[made[0]] = func.overloadpacket is aten.all
            return
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            # what is written is known no more, by whatever view
            written = {t.untyped_storage()._cdata for t in given}
            for t in [t for t in self.known if t.untyped_storage()._cdata in written]:
                del self.known[t]
            return
        open_ended = torch.Tag.nondeterministic_seeded in func.tags
        if (
            open_ended
            or not all(_is_small(t) for t in made)
            or not all(t in self.known for t in given)
        ):
            return
        with _disable_current_modes():
            real = func(*tree_map_only(Tensor, lambda t: self.known[t], args), **kwargs)
        for t, value in zip(
            made, (r for r in tree_leaves(real) if isinstance(r, Tensor)), strict=True
        ):
            self.known[t] = value


def _is_small(t: Tensor) -> bool:
    """Whether its values are carried along."""
    whole = not t.is_floating_point() and t.numel() <= KNOWN
    return (whole or t.numel() == 1) and t.device.type == "cpu"


def _workspace(func: Any, args: tuple) -> int:
    """What one of our ops needs beside its inputs and outputs."""
    name = func._schema.name.removeprefix("fused_losses::")
    direction = "_backward" if name.endswith("_backward") else ""
    op, _, backend = name.removesuffix(direction).rpartition("_")
    return ops.OPS[op].workspace(backend, direction, args)


def _within(func: Any, args: tuple, made: list[Tensor]) -> int:
    """What an operator of PyTorch allocates within itself on the CPU, beside inputs and outputs.

    There a reduction and an operator on elements first copy what they are given in another dtype
    than they compute in (a mask that is summed or multiplied); logsumexp keeps the exponentials and
    isinf the magnitudes, a mask as an index becomes a list of places, a sort holds keys and places
    of the lines that it sorts, and 16-bit operands of products and of scatter are widened or
    packed (at most 4 bytes an element, and a panel).
    """
    given = [t for t in args if isinstance(t, Tensor)]
    if not made or any(t.device.type != "cpu" for t in (*given, *made)):
        return 0
    if func.overloadpacket in (aten.logsumexp, aten.isinf):
        return given[0].nbytes
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        masks = [t for t in args[1] if t is not None and t.dtype == torch.bool]
        return sum(mask.numel() * mask.dim() * 8 for mask in masks)
    if func.overloadpacket is aten.sort and given[0].dim():
        line = given[0].shape[args[1] if len(args) > 1 and isinstance(args[1], int) else -1]
        return line * (given[0].itemsize + 8) * torch.get_num_threads()
    if func.overloadpacket in WIDENED and given[0].dtype in (torch.bfloat16, torch.float16):
        packed = 4 * sum(t.numel() for t in given if t.dtype == given[0].dtype)
        return packed + PANEL * (func.overloadpacket in PRODUCTS)
    if func.overloadpacket in REDUCTIONS:
        return given[0].numel() * made[0].itemsize if given[0].dtype != made[0].dtype else 0
    if torch.Tag.pointwise in func.tags and func.overloadpacket not in AS_GIVEN:
        kind = ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
        computed = elementwise_dtypes(*args, type_promotion_kind=kind)[1]
        return sum(t.numel() for t in given if t.dtype != computed) * computed.itemsize
    return 0
