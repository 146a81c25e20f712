"""Derivatives of every kind, and the program transforms that the ops must pass through."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import widest
from oracles import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import margins
from fused_losses.primitives.row_statistics.op import RowStatisticsFunction, op, row_statistics

N, D, C = 7, 5, 13


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    w = torch.randn(C, D, dtype=dtype, requires_grad=True)
    return x, w, torch.tensor([0, 3, 12, 3, -100, 5, 7])


SMALL = {"scale": 4.0}  # at 64 a finite difference of 1e-6 sees the curvature
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "arcface": lambda: {},
    "arcface-monotone": lambda: {"margin": margins.ArcFace(0.5, "monotone")},
    "sphereface": lambda: {"margin": margins.SphereFace(4.0), "scale": 2.0},
    "magface": lambda: {"margin": margins.MagFace(l_a=0.5, u_a=10.0)},
    # every row's quality is clipped to -1, or the finite difference would see the detached norm
    "adaface": lambda: {"margin": margins.AdaFace(h=100.0).double().eval()},
    "products": lambda: {"margin": None, "normalize": False, "scale": 1.0},
    "smoothing-class-weight": lambda: {
        "label_smoothing": 0.2,
        "class_weight": torch.rand(C, dtype=torch.float64),
    },
    "classes": lambda: {"classes": torch.tensor([7, 0, 3, 12, 5, 1])},
    "classes-smoothing": lambda: {
        "classes": torch.tensor([7, 0, 3, 12, 5, 1]),
        "label_smoothing": 0.2,
    },
    "budget": lambda: {"memory_budget": 64 * 8 * 5},
    "rows": lambda: {"reduction": "none"},
}


@pytest.mark.float64
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str, backend: str) -> None:
    x, w, labels = inputs()
    bias = torch.randn(C, dtype=torch.float64, requires_grad=True)
    options = {**SMALL, **OPTIONS[name]()}

    def loss(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, labels, bias=bias, backend=backend, **options)

    # the fast mode checks a random projection of the Jacobian, the full one every entry
    assert torch.autograd.gradcheck(loss, (x, w, bias), fast_mode=name != "arcface")


@pytest.mark.float64
@pytest.mark.parametrize("shape", [(), (N,)], ids=["scalar", "rows"])
def test_gradcheck_of_the_scale(shape: tuple[int, ...], backend: str) -> None:
    x, w, labels = inputs()
    scale = (3 + torch.rand(shape, dtype=torch.float64)).requires_grad_()

    def loss(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, labels, scale=scale, backend=backend)

    assert torch.autograd.gradcheck(loss, (x, w, scale), fast_mode=True)


@pytest.mark.float64
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_the_primitive(normalize: bool, weighted: bool, streamed: str) -> None:
    x, w, labels = inputs()
    labels = torch.where(labels < 0, -1, labels)
    bias = torch.randn(C, dtype=torch.float64, requires_grad=True)
    shares = torch.rand(C, dtype=torch.float64)

    def statistics(x: Tensor, w: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = row_statistics(
            x, w, labels, bias=bias, column_weight=shares, normalize=normalize, weighted=weighted,
            backend=streamed,
        )  # fmt: skip
        return out[:3] if weighted else out[:2]

    assert torch.autograd.gradcheck(statistics, (x, w, bias), fast_mode=True)


@pytest.mark.float64
def test_gradcheck_of_linear_cross_entropy(backend: str) -> None:
    x, w, labels = inputs()
    soft = torch.softmax(torch.randn(N, C, dtype=torch.float64), 1)
    for target in (labels, soft):
        assert torch.autograd.gradcheck(
            lambda x, w, t=target: fused_losses.linear_cross_entropy(x, w, t, backend=backend),
            (x, w),
        )


# --- second derivatives ---------------------------------------------------------------------------


def test_second_derivative_works_on_the_reference() -> None:
    x, w, labels = inputs()
    assert torch.autograd.gradgradcheck(
        lambda x, w: fused_losses.margin_softmax(
            x, w, labels, margin=margins.CosFace(0.2), scale=3.0, backend="reference"
        ),
        (x, w),
    )


def test_second_derivative_is_refused_by_the_kernels(streamed: str) -> None:
    x, w, labels = inputs(widest(streamed))
    loss = fused_losses.margin_softmax(x, w, labels, backend=streamed)
    dx, _ = torch.autograd.grad(loss, (x, w), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative.*backend='reference'"):
        dx.square().sum().backward()


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 64 * 8 * 5, 1 << 20])
def test_backward_twice_through_one_graph_is_the_same(budget: int, backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    loss = fused_losses.margin_softmax(x, w, labels, memory_budget=budget, backend=backend)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_gradients_accumulate(backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    fused_losses.margin_softmax(x, w, labels, backend=backend).backward()
    once = x.grad.clone(), w.grad.clone()
    fused_losses.margin_softmax(x, w, labels, backend=backend).backward()
    torch.testing.assert_close(x.grad, 2 * once[0])
    torch.testing.assert_close(w.grad, 2 * once[1])


def test_upstream_gradient_scales_the_result(backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    rows = fused_losses.margin_softmax(x, w, labels, reduction="none", backend=backend)
    factor = torch.randn(N, dtype=x.dtype)
    got = torch.autograd.grad(rows, (x, w), factor)
    answer = oracles.margin_softmax(
        x.detach().numpy(),
        w.detach().numpy(),
        labels.numpy(),
        margin=oracles.arcface(0.5),
        reduction="none",
        upstream=factor.numpy(),
    )
    room = 1e-10 if x.dtype == torch.float64 else 1e-5
    assert relative_error(got[0], answer.dx) <= room
    assert relative_error(got[1], answer.dw) <= room


def test_a_change_in_place_between_forward_and_backward_is_noticed(backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    loss = fused_losses.margin_softmax(x, w, labels, margin=None, normalize=False, backend=backend)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_nothing_is_kept(backend: str) -> None:
    x, w, labels = inputs(widest(backend))
    with torch.no_grad():
        loss = fused_losses.margin_softmax(x, w, labels, memory_budget=1 << 20, backend=backend)
    assert loss.grad_fn is None and not loss.requires_grad
    with torch.inference_mode():
        same = fused_losses.margin_softmax(x, w, labels, backend=backend)
    assert torch.equal(loss, same)


def test_two_threads_at_once(backend: str) -> None:
    tasks = [inputs(widest(backend)) for _ in range(4)]

    def solve(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss = fused_losses.margin_softmax(x, w, labels, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    wanted = [solve(*task) for task in tasks]
    got: list[list[tuple[Tensor, ...]]] = [[] for _ in tasks]

    def repeat(index: int) -> None:
        for _ in range(10):
            got[index].append(solve(*tasks[index]))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for answers, exact in zip(got, wanted, strict=True):
        assert len(answers) == 10  # an exception in a thread would leave fewer
        for answer in answers:
            assert all(torch.equal(a, b) for a, b in zip(answer, exact, strict=True))


# --- the registered ops ---------------------------------------------------------------------------


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


# --- transforms -----------------------------------------------------------------------------------


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
