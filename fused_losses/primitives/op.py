"""One streamed op: a forward and a backward kernel a backend, registered with torch.

The schemas stand here for every backend: C++ adds its kernels to what this defines.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_losses import backends

PYTHON_BACKENDS = ("bounded", "triton", "cuda")
LIBRARY = torch.library.Library("fused_losses", "FRAGMENT")

Op = Callable[..., Any]


def refused(name: str, hint: str = "") -> Callable[..., tuple]:
    """What stands for a derivative that there is not."""

    def raises(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(
            f"{name}: a second derivative through the streamed kernels is not supported{hint}; "
            "use backend='reference', whose autograd goes to any order"
        )

    return raises


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
        # refuses (torch 2.13); ours has one
        differentiable = self.backward_schema is not None
        transformed = differentiable and not torch.compiler.is_compiling()
        if transformed and torch._C._are_functorch_transforms_active():
            return StreamedFunction.apply(self, backend, *arguments)
        return self.op(backend)(*arguments)

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
            lambda ctx, *grads: self.gradients(backward_op, ctx, ctx.needs_input_grad, grads),
            setup_context=lambda ctx, inputs, output: self.setup_context(ctx, inputs, output),
        )
        torch.library.register_autograd(
            f"{name}_backward", self.second or refused(self.name), setup_context=self.setup_second
        )


# every op by its name, without a backend's
OPS: dict[str, StreamedOp] = {}


def _python(run: Op, backend: str) -> Op:
    def on_backend(*arguments: Any) -> Any:
        # a product inside a kernel is ours to round, also where autocast surrounds the backward
        with torch.autocast(arguments[0].device.type, enabled=False):
            return run(backend, *arguments)

    return on_backend


class StreamedFunction(torch.autograd.Function):
    """A streamed op under torch.func: the same gradient as the registered op's."""

    @staticmethod
    def forward(streamed: StreamedOp, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        return streamed.op(backend)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.streamed, ctx.backend = inputs[:2]
        ctx.streamed.setup_context(ctx, inputs[2:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        def backward_op(*arguments: Any) -> tuple[Tensor, ...]:
            return _BackwardFunction.apply(ctx.streamed, ctx.backend, *arguments)

        needed = ctx.needs_input_grad[2:]
        return (None, None, *ctx.streamed.gradients(backward_op, ctx, needed, grads))


class _BackwardFunction(torch.autograd.Function):
    """The backward op where torch.func differentiates through it."""

    @staticmethod
    def forward(streamed: StreamedOp, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        return streamed.op(backend, "_backward")(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.streamed = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        hint = "" if ctx.streamed.second is None else " under torch.func"
        return refused(ctx.streamed.name, hint)(ctx, *grads)
