"""A function that a trace takes whole, as one op with its gradient.

For what reads a size on the host, or whose backward runs blocks again that autograd must not keep:
neither can be traced. Out of compiled code the function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast
from fused_losses.primitives.kept import keep, kept
from fused_losses.primitives.library import LIBRARY
from fused_losses.primitives.op import ANY_ORDER, refused


class OpaqueOp:
    """run(*arguments) -> Tensor, registered as fused_losses::name.

    schema: its arguments, "(Tensor x, float t)"; like: an empty result of the right shape. The
    gradient, of the floating point tensors, is that of run, which is called again for it; `instead`
    says what has a second one.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable[..., Tensor],
        like: Callable[..., Tensor],
        instead: str = ANY_ORDER,
    ) -> None:
        self.name, self.run = name, run
        for suffix, given, out, body, fake in (
            ("", schema, "Tensor", self._forward, like),
            ("_backward", schema.replace("(", "(Tensor grad, ", 1), "Tensor[]", self._backward,
             lambda grad, *arguments: _empty(arguments)),
        ):  # fmt: skip
            LIBRARY.define(f"{name}{suffix}{given} -> {out}")
            LIBRARY.impl(f"{name}{suffix}", body, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fused_losses::{name}{suffix}", fake)
        torch.library.register_autograd(
            f"fused_losses::{name}", self._gradients, setup_context=self._keep
        )
        torch.library.register_autograd(
            f"fused_losses::{name}_backward", refused(name, instead=instead)
        )

    def __call__(self, *arguments: Any) -> Tensor:
        # values are what run reads: meta tensors have none
        if torch.compiler.is_compiling() or arguments[0].is_meta:
            return self._op("")(*arguments)
        return self.run(*arguments)

    def _op(self, suffix: str) -> Any:
        return getattr(torch.ops.fused_losses, self.name + suffix).default

    def _forward(self, *arguments: Any) -> Tensor:
        with torch.no_grad(), no_autocast(arguments[0].device):
            found = self.run(*arguments)
        # an op's result is no argument of it
        return found.clone() if any(found is a for a in arguments) else found

    def _backward(self, grad: Tensor, *arguments: Any) -> list[Tensor]:
        # an op's body runs below autograd, which is let in again
        key = torch._C.DispatchKey.AutogradFunctionality
        guard = torch._C._SetExcludeDispatchKeyGuard(key, False)
        with guard, torch.enable_grad(), no_autocast(grad.device):
            given = [a.detach().requires_grad_() if _moves(a) else a for a in arguments]
            leaves = [a for a in given if _moves(a)]
            found = torch.autograd.grad(
                self.run(*given), leaves, grad, allow_unused=True, materialize_grads=True
            )
        return [g.contiguous() for g in found]

    def _keep(self, ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG002 (a hook)
        keep(ctx, inputs)

    def _gradients(self, ctx: Any, grad: Tensor) -> tuple:
        arguments, _ = kept(ctx)
        found = iter(self._op("_backward")(grad.contiguous(), *arguments))
        return tuple(next(found) if _moves(a) else None for a in arguments)


def _moves(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _empty(arguments: tuple) -> list[Tensor]:
    return [a.new_empty(a.shape) for a in arguments if _moves(a)]
