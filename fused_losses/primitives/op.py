"""One streamed op: a forward and a backward kernel a backend, registered with torch.

The schemas stand here for every backend: C++ adds its kernels to what this defines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.gpu.products import products_on
from fused_losses.backends.triton import target_loss, unit_rows  # noqa: F401 (enter their forms)
from fused_losses.base.compiled import seen, transformed
from fused_losses.base.numerics import no_autocast
from fused_losses.primitives.library import LIBRARY

PYTHON_BACKENDS = ("bounded", "triton", "cuda")

Op = Callable[..., Any]


ANY_ORDER = "backend='reference', whose autograd goes to any order"


def refused(name: str, hint: str = "", instead: str = ANY_ORDER) -> Callable[..., tuple]:
    """What stands for a derivative that there is not."""

    def raises(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(
            f"{name}: a second derivative through the streamed kernels is not supported{hint}; "
            f"use {instead}"
        )

    return raises


def through_backward(
    ctx: Any, arguments: list[Any], grads: tuple, run: Callable[[list[Any]], tuple]
) -> tuple:
    """The backward op's own derivative: run(its arguments) is that backward, differentiable."""
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {i: arguments[i].view_as(arguments[i]) for i in wanted}
        outputs = run([leaves.get(i, a) for i, a in enumerate(arguments)])
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
        ]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(leaves.values()),
            [g for _, g in pairs],
            allow_unused=True,
            create_graph=further,
        )
    out: list[Tensor | None] = [None] * len(arguments)
    for i, g in zip(leaves, found, strict=True):
        out[i] = g
    return tuple(out)


class StreamedOp:
    """A forward op with its gradient, the same on every backend; a primitive is a subclass.

    What it must say: name, primitive, schema, forward, fake_forward and workspace; and to have a
    gradient backward_schema, setup_context, gradients, backward and fake_backward.
    """

    name: str
    primitive: str  # the folder with its forms
    schema: str
    backward_schema: str | None = None  # None: there is no gradient
    # with "cpu" among them nothing of the op is compiled
    python_backends: tuple[str, ...] = PYTHON_BACKENDS
    # what has a second derivative where the op has none
    instead: str = ANY_ORDER
    # gradient of the backward op, as `gradients` and `setup_context` are of the forward op
    second: Callable[..., tuple] | None = None
    setup_second: Callable[[Any, tuple, Any], None] | None = None

    def forward(self, backend: str, *arguments: Any) -> Any:
        """Runs the op of a backend in Python."""
        raise NotImplementedError

    def backward(self, backend: str, *arguments: Any) -> Any:
        """Runs the gradient's op of a backend in Python."""
        raise NotImplementedError

    def setup_context(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """Keeps what `gradients` needs."""
        raise NotImplementedError

    def gradients(self, backward_op: Op, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        """Gradients of the forward's arguments, in their order, by one call of backward_op."""
        raise NotImplementedError

    def fake_forward(self, *arguments: Any) -> Any:
        """Empty outputs of the right shapes."""
        raise NotImplementedError

    def fake_backward(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        """Bytes that the op holds at its peak beyond inputs and outputs, at most.

        direction: as in `op`. Of the arguments only shapes, dtypes and devices are read.
        """
        raise NotImplementedError

    # ---- the same for every op ------------------------------------------------------------------

    def op(self, backend: str, direction: str = "") -> Any:
        """The registered op of a backend: forward, or with direction="_backward" its gradient."""
        return getattr(torch.ops.fused_losses, f"{self.name}_{backend}{direction}").default

    def form(self, backend: str) -> ModuleType:
        """A backend's form of the primitive."""
        return backends.module(self.primitive, backend)

    def __call__(self, backend: str, *arguments: Any) -> Any:
        # torch.library.register_autograd makes a Function without setup_context, which torch.func
        # refuses (torch 2.13), and without jvp, so that tangents end in it; ours has both
        if self.backward_schema is not None and not torch.compiler.is_compiling():
            if transformed():
                return StreamedFunction.apply(self, backend, *arguments)
            if not seen():
                if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
                    return _PlainFunction.apply(self, backend, *arguments)
                with torch._C._AutoDispatchBelowAutograd():
                    return self.op(backend)(*arguments)
        return self.op(backend)(*arguments)

    def run_backward(self, backend: str, *arguments: Any) -> Any:
        """The backward op, also within a transform of torch.func or a level of forward mode."""
        if torch.compiler.is_compiling():
            return self.op(backend, "_backward")(*arguments)
        if transformed():
            return _BackwardFunction.apply(self, backend, *arguments)
        if torch.is_grad_enabled() or seen():
            return self.op(backend, "_backward")(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(backend, "_backward")(*arguments)

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        """What the outputs move by where the arguments do by moves, None: not at all.

        Here one sweep of the bounded form with dual numbers, which keeps no graph.
        """
        del output  # of which forms with a sweep of their own make use
        given = duals(arguments, moves)
        if direction:
            return moves_of(self.backward("bounded", *given))
        return tangents_of(self.forward("bounded", *given))

    def _exact_gradients(self, backward_op: Op, ctx: Any, grads: tuple) -> tuple:
        """`gradients`, also where autocast surrounds the backward."""
        of = next((g for g in grads if g is not None), None)
        if of is None:
            return (None,) * len(ctx.needs_input_grad)
        with no_autocast(of.device):
            return self.gradients(backward_op, ctx, ctx.needs_input_grad, grads)

    def define(self) -> None:
        """Registers the op with every backend that this build has."""
        OPS[self.name] = self
        in_python = self.python_backends
        compiled = () if backends.unavailable("cpu") or "cpu" in in_python else ("cpu",)
        for backend in (*in_python, *compiled):
            for direction, schema, run in (
                ("", self.schema, self.forward),
                ("_backward", self.backward_schema, self.backward),
            ):
                if schema is None:
                    continue
                name = f"{self.name}_{backend}{direction}"
                LIBRARY.define(name + schema)
                if backend in in_python:
                    LIBRARY.impl(name, _python(run, backend), "CompositeExplicitAutograd")
            self._register(backend)

    def _register(self, backend: str) -> None:
        name = f"fused_losses::{self.name}_{backend}"
        torch.library.register_fake(name, self.fake_forward)
        if self.backward_schema is None:
            return
        backward_op = self.op(backend, "_backward")
        torch.library.register_fake(f"{name}_backward", self.fake_backward)
        torch.library.register_autograd(
            name,
            lambda ctx, *grads: self._exact_gradients(backward_op, ctx, grads),
            setup_context=lambda ctx, inputs, output: self.setup_context(ctx, inputs, output),
        )
        torch.library.register_autograd(
            f"{name}_backward",
            self.second or refused(self.name, instead=self.instead),
            setup_context=self.setup_second,
        )


# every op by its name, without a backend's
OPS: dict[str, StreamedOp] = {}


def _python(run: Op, backend: str) -> Op:
    def on_backend(*arguments: Any) -> Any:
        # a product inside an op is ours to round, also where autocast surrounds the backward; what
        # may be a tf32 one its form says itself
        with no_autocast(arguments[0].device), products_on(backend):
            return run(backend, *arguments)

    return on_backend


def duals(arguments: tuple, moves: tuple) -> list[Any]:
    """The arguments as dual numbers, where they have a tangent; a level must be open."""
    return [
        a if t is None else forward_ad.make_dual(a.detach(), t.detach())
        for a, t in zip(arguments, moves, strict=True)
    ]


def primals(saved: tuple) -> tuple:
    """What `jvp` finds saved, without the tangents; what else differentiates follows it still."""
    return tuple(
        forward_ad.unpack_dual(t).primal if t is not None and t.is_floating_point() else t
        for t in saved
    )


def tangents_of(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """What dual numbers move by; None: not at all."""
    return tuple(
        forward_ad.unpack_dual(o).tangent if o.is_floating_point() else None
        for o in ((out,) if isinstance(out, Tensor) else out)
    )


def moves_of(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`tangents_of` what a backward gave, each of which must have one."""
    found = zip(gradients, tangents_of(gradients), strict=True)
    return tuple(torch.zeros_like(g) if t is None else t for g, t in found)


def _keep(ctx: Any, inputs: tuple, output: Any) -> None:
    """What `jvp` needs: the tensors where autograd finds them, the rest beside."""
    ctx.single = isinstance(output, Tensor)
    output = (output,) if ctx.single else output
    ctx.save_for_forward(*[a if isinstance(a, Tensor) else None for a in inputs], *output)
    ctx.others = [None if isinstance(a, Tensor) else a for a in inputs]


def _moved(ctx: Any, direction: str, tangents: tuple) -> Any:
    """The outputs' tangents, as `jvp` returns them."""
    saved, count = primals(ctx.saved_tensors), len(ctx.others)
    arguments = (
        other if tensor is None else tensor
        for tensor, other in zip(saved[:count], ctx.others, strict=True)
    )
    of, name = partial(ctx.streamed.tangents, direction), ctx.streamed.name
    found = TangentFunction.apply(name, of, count, *arguments, *tangents[2:], *saved[count:])
    return found[0] if ctx.single else found


def _each(function: Any, info: Any, in_dims: tuple, arguments: tuple) -> tuple[Any, Any]:
    """A rule for vmap: one call an item, its outputs stacked."""
    calls = [
        function.apply(
            *(
                a.select(dim, i).contiguous() if isinstance(dim, int) else a
                for a, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    out = tuple(None if o[0] is None else torch.stack(o) for o in zip(*calls, strict=True))
    return out, tuple(None if o is None else 0 for o in out)


class _PlainFunction(torch.autograd.Function):
    """The registered op's gradient in eager code that no transform and no mode looks at.

    What torch.library.register_autograd makes, without the schema that it walks in each call.
    """

    @staticmethod
    def forward(ctx: Any, streamed: StreamedOp, backend: str, *arguments: Any) -> Any:
        ctx.streamed, ctx.backend = streamed, backend
        with torch._C._AutoDispatchBelowAutograd():
            output = streamed.op(backend)(*arguments)
        streamed.setup_context(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        of = next((g for g in grads if g is not None), None)
        if of is None:
            return (None,) * len(ctx.needs_input_grad)
        run = partial(ctx.streamed.run_backward, ctx.backend)
        with no_autocast(of.device):
            found = ctx.streamed.gradients(run, ctx, ctx.needs_input_grad[2:], grads)
        return (None, None, *found)


class StreamedFunction(torch.autograd.Function):
    """A streamed op under torch.func and in forward mode: the registered op's own gradient."""

    @staticmethod
    def forward(streamed: StreamedOp, backend: str, *arguments: Any) -> Any:
        return streamed.op(backend)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.streamed, ctx.backend = inputs[:2]
        ctx.streamed.setup_context(ctx, inputs[2:], output)
        _keep(ctx, inputs[2:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        def backward_op(*arguments: Any) -> tuple[Tensor, ...]:
            return _BackwardFunction.apply(ctx.streamed, ctx.backend, *arguments)

        needed = ctx.needs_input_grad[2:]
        of = next((g for g in grads if g is not None), None)
        if of is None:
            return (None,) * len(ctx.needs_input_grad)
        with no_autocast(of.device):
            return (None, None, *ctx.streamed.gradients(backward_op, ctx, needed, grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _moved(ctx, "", tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, streamed: StreamedOp, *arguments: Any) -> Any:
        raise NotImplementedError(
            f"{streamed.name}: torch.func.vmap over the rows of a streamed op is not supported; "
            "give it all rows at once, or call it in a loop"
        )


class _BackwardFunction(torch.autograd.Function):
    """The backward op where torch.func differentiates through it."""

    @staticmethod
    def forward(streamed: StreamedOp, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        return streamed.op(backend, "_backward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.streamed = inputs[0]
        _keep(ctx, inputs[2:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        hint = "" if ctx.streamed.second is None else " under torch.func or in forward mode"
        return refused(ctx.streamed.name, hint)(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        return _moved(ctx, "_backward", tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        return _each(_BackwardFunction, info, in_dims, arguments)


class TangentFunction(torch.autograd.Function):
    """of(arguments, tangents, output), with no further derivative: that is refused."""

    @staticmethod
    def forward(
        name: str, of: Callable[[tuple, tuple, tuple], tuple], count: int, *given: Any
    ) -> tuple[Any, ...]:
        arguments, tangents, output = given[:count], given[count : 2 * count], given[2 * count :]
        exact = no_autocast(arguments[0].device)
        with exact, forward_ad._set_fwd_grad_enabled(True):
            return of(arguments, tangents, output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return refused(ctx.name, " (forward mode has one direction)")(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        return refused(ctx.name, " (forward mode has one direction)")(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[Any, Any]:
        return _each(TangentFunction, info, in_dims, arguments)
