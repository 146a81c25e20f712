"""Margin softmax's op in torch: registration, torch.func, autocast, checkpointing."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import widest
from oracles import relative_error
from small_rows import C, D, N, inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import margins
from fused_losses.primitives.row_statistics.op import RowStatisticsFunction, op, row_statistics


def op_arguments(full: bool, requires_grad: bool) -> tuple[Any, ...]:
    """The op's arguments, from x to bend and kept_classes."""
    x = torch.randn(N, D, requires_grad=requires_grad)
    w = torch.randn(C, D, requires_grad=requires_grad)
    labels = torch.tensor([0, 3, 12, 3, -1, 5, 7])
    if not full:
        return x, w, labels, None, None, None, False, False, "fp32", None, 0
    classes = torch.tensor([0, 1, 3, 5, 7, 12])
    bias = torch.randn(C, requires_grad=requires_grad)
    return x, w, labels, classes, bias, torch.rand(C), True, True, "fp32", None, 0


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
def test_opcheck_forward(full: bool, streamed: str) -> None:
    torch.library.opcheck(op(streamed), op_arguments(full, requires_grad=True))


def test_opcheck_forward_that_keeps_scores(streamed: str) -> None:
    if streamed != "cpu":
        pytest.skip("only the cpu kernels keep scores")
    # 64 rows and all classes: what is kept is then written to the last score. A tile that does not
    # fit, and the padding of the rows, are allocated and left as they are, and nobody reads them.
    x, w = torch.randn(64, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    labels = torch.randint(0, C, (64,))
    torch.library.opcheck(
        op(streamed), (x, w, labels, None, None, None, False, False, "fp32", None, C)
    )


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
def test_opcheck_backward(full: bool, streamed: str) -> None:
    arguments = op_arguments(full, requires_grad=False)
    x, w, labels, classes, bias, shares, normalize, weighted, precision, *_ = arguments
    lse, target, summed, _, _, kept = op(streamed)(*arguments)
    torch.library.opcheck(
        op(streamed, "_backward"),
        (
            torch.rand_like(lse),
            torch.rand_like(target),
            torch.rand_like(summed) if weighted else None,
            x, w, labels, classes, bias, shares, lse, kept, normalize, weighted, precision,
            None, False,
            True, True, bias is not None,
        ),
    )  # fmt: skip


def test_opcheck_backward_of_one_side(streamed: str) -> None:
    arguments = op_arguments(False, requires_grad=False)
    lse, target, _, _, _, kept = op(streamed)(*arguments)
    for need_x, need_w in ((True, False), (False, True)):
        torch.library.opcheck(
            op(streamed, "_backward"),
            (
                torch.rand_like(lse), torch.rand_like(target), None, *arguments[:6], lse, kept,
                False, False, "fp32", None, False, need_x, need_w, False,
            ),
        )  # fmt: skip


def test_row_statistics_function_is_the_op(streamed: str) -> None:
    arguments = op_arguments(True, requires_grad=True)
    leaves = arguments[0], arguments[1], arguments[4]
    upstream = torch.randn(3, N)
    answers = []
    for out in (RowStatisticsFunction.apply(streamed, *arguments), op(streamed)(*arguments)):
        value = sum((u * o).sum() for u, o in zip(upstream, out[:3], strict=True))
        answers.append((*out[:5], *torch.autograd.grad(value, leaves)))
    for by_hand, registered in zip(*answers, strict=True):
        assert torch.equal(by_hand, registered)
    assert not RowStatisticsFunction.apply(streamed, *arguments)[4].requires_grad


def test_func_grad(backend: str) -> None:
    x, w, labels = inputs(widest(backend))

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, labels, backend=backend)

    wanted = torch.autograd.grad(loss(x, w), (x, w))
    for a, b in zip(torch.func.grad(loss, (0, 1))(x, w), wanted, strict=True):
        torch.testing.assert_close(a.detach(), b)
    gradients, value = torch.func.grad_and_value(loss)(x, w)
    torch.testing.assert_close(gradients.detach(), wanted[0])
    torch.testing.assert_close(value.detach(), loss(x, w).detach())


def test_func_grad_with_every_option(backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    bias = torch.randn(C, dtype=x.dtype)
    scale = torch.tensor(4.0, dtype=x.dtype)

    def loss(x: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return fused_losses.margin_softmax(
            x, w, labels, bias=bias, scale=scale, label_smoothing=0.1, backend=backend,
            class_weight=torch.ones(C, dtype=x.dtype),
            classes=torch.tensor([7, 0, 3, 12, 5, 1]),
        )  # fmt: skip

    leaves = [a.detach().clone().requires_grad_() for a in (x, w, bias, scale)]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, (0, 1, 2, 3))(x, w, bias, scale)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_func_grad_twice_is_refused_by_the_kernels(streamed: str) -> None:
    x, w, labels = inputs(widest(streamed))

    def loss(x: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w.detach(), labels, backend=streamed)

    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x.detach())


def test_vmap_is_refused_and_not_wrong(streamed: str) -> None:
    x, w, labels = inputs(widest(streamed))
    with pytest.raises(RuntimeError):
        torch.func.vmap(
            lambda w: row_statistics(x.detach(), w, labels.clamp_min(-1), backend=streamed).lse
        )(torch.stack([w.detach(), w.detach() + 1]))


def test_autocast_takes_the_weights_dtype(backend: str) -> None:
    # a bfloat16 backbone before a float32 table: the table is not rounded
    x, w, labels = inputs(torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_losses.margin_softmax(low, w, labels, backend=backend)
    loss.backward()
    answer = oracles.margin_softmax(
        low.detach().double().numpy(),
        w.detach().numpy(),
        labels.numpy(),
        margin=oracles.arcface(0.5),
    )
    assert loss.dtype == w.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert abs(loss.item() - answer.loss) <= 1e-5 * answer.loss
    assert relative_error(w.grad, answer.dw) <= 1e-5
    assert relative_error(low.grad, answer.dx) <= 2**-8


def test_autocast_around_the_backward_and_the_primitive(streamed: str) -> None:
    # torch advises against it, but it must not lower the products inside our kernels
    x, w, labels = inputs(torch.float32)
    labels = torch.where(labels < 0, -1, labels)
    plain = row_statistics(x, w, labels, backend=streamed)
    wanted = torch.autograd.grad(plain.lse.sum(), (x, w))
    with torch.autocast("cpu", torch.bfloat16):
        inside = row_statistics(x, w, labels, backend=streamed)
        got = torch.autograd.grad(inside.lse.sum(), (x, w))
    assert torch.equal(inside.lse, plain.lse)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_autocast_through_a_layer(backend: str) -> None:
    layer = torch.nn.Linear(4, D)
    _, w, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = layer(torch.randn(N, 4))
        assert x.dtype == torch.bfloat16
        loss = fused_losses.linear_cross_entropy(x, w, labels, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32  # as torch's under autocast
    assert np.isfinite(layer.weight.grad.numpy()).all() and w.grad.dtype == torch.float32


def test_checkpoint_recomputes_the_same(backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    margin = margins.ElasticArcFace(0.5, 0.2)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, labels, margin=margin, backend=backend)

    torch.manual_seed(3)
    wanted = torch.autograd.grad(loss(x, w), (x, w))
    torch.manual_seed(3)
    again = checkpoint(loss, x, w, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again, (x, w)), wanted, strict=True):
        assert torch.equal(a, b)
