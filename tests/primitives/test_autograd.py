"""Derivatives of every kind, and the program transforms that the ops must pass through."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from conftest import widest
from oracles import relative_error
from small_rows import C, N, inputs
from torch import Tensor

import fused_losses
from fused_losses import margins
from fused_losses.primitives.row_statistics.op import row_statistics

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
