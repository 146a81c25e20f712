"""One streamed op: a forward and a backward kernel a backend, registered with torch.

The schemas stand here for every backend: C++ adds its kernels to what this defines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_losses import backends

PYTHON_BACKENDS = ("bounded", "triton", "cuda")
LIBRARY = torch.library.Library("fused_losses", "FRAGMENT")

Op = Callable[..., tuple[Tensor, ...]]


def refused(name: str, hint: str = "") -> Callable[..., tuple]:
    """What stands for a derivative that there is not."""

    def raises(ctx: Any, *grads: Tensor) -> tuple:
        raise NotImplementedError(
            f"{name}: a second derivative through the streamed kernels is not supported{hint}; "
            "use backend='reference', whose autograd goes to any order"
        )

    return raises


@dataclass(frozen=True)
class StreamedOp:
    """A forward op with its gradient, the same on every backend.

    setup_context(ctx, inputs, output) keeps what backward needs; gradients(backward_op, ctx,
    needed, grads) gives the gradients of the forward's arguments, in their order, by one call of
    backward_op; python(direction, backend, *arguments) runs the op of a backend in Python.
    """

    name: str
    forward: str  # schemas
    backward: str
    setup_context: Callable[[Any, tuple, tuple], None]
    gradients: Callable[[Op, Any, tuple, tuple], tuple]
    fake_forward: Op
    fake_backward: Op
    python: Callable[..., tuple[Tensor, ...]]
    second: Callable[..., tuple] | None = None  # the backward op's own gradient
    second_setup: Callable[[Any, tuple, tuple], None] | None = None
    # with "cpu" among them nothing of the op is compiled
    python_backends: tuple[str, ...] = PYTHON_BACKENDS

    def op(self, backend: str, direction: str = "") -> Any:
        """The registered op of a backend: forward, or with direction="_backward" its gradient."""
        return getattr(torch.ops.fused_losses, f"{self.name}_{backend}{direction}").default

    def __call__(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        # torch.library.register_autograd makes a Function without setup_context, which torch.func
        # refuses (torch 2.13); ours has one
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return StreamedFunction.apply(self, backend, *arguments)
        return self.op(backend)(*arguments)

    def define(self) -> None:
        """Registers the op with every backend that this build has."""
        in_python = self.python_backends
        compiled = () if backends.unavailable("cpu") or "cpu" in in_python else ("cpu",)
        for backend in (*in_python, *compiled):
            for direction, schema in (("", self.forward), ("_backward", self.backward)):
                name = f"{self.name}_{backend}{direction}"
                LIBRARY.define(name + schema)
                if backend in in_python:
                    run = self._python(direction, backend)
                    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
            self._register(backend)

    def _python(self, direction: str, backend: str) -> Op:
        return lambda *arguments: self.python(direction, backend, *arguments)

    def _register(self, backend: str) -> None:
        name = f"fused_losses::{self.name}_{backend}"
        backward_op = self.op(backend, "_backward")
        torch.library.register_fake(name, self.fake_forward)
        torch.library.register_fake(f"{name}_backward", self.fake_backward)
        torch.library.register_autograd(
            name,
            lambda ctx, *grads: self.gradients(backward_op, ctx, ctx.needs_input_grad, grads),
            setup_context=lambda ctx, inputs, output: self.setup_context(ctx, inputs, output),
        )
        torch.library.register_autograd(
            f"{name}_backward", self.second or refused(self.name), setup_context=self.second_setup
        )


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
