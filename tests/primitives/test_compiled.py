"""`margin_softmax` and `linear_cross_entropy` compiled: no breaks, one program for all batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MEASURED, STREAMED, require
from torch import Tensor

import fused_losses
from fused_losses import margins


@pytest.fixture(params=MEASURED)
def traced(request: pytest.FixtureRequest) -> str:
    """A backend to compile around: the ops are traced alike whatever runs them."""
    return require(request.param)


@pytest.fixture
def fresh_compiler() -> object:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED: dict[str, Callable[[], dict[str, Any]]] = {
    "arcface": lambda: {},
    "combined": lambda: {"margin": margins.CombinedMargin()},
    "sphereface": lambda: {"margin": margins.SphereFace()},
    "magface": lambda: {"margin": margins.MagFace()},
    "adaface-training": lambda: {"margin": margins.AdaFace()},
    "elastic": lambda: {"margin": margins.ElasticArcFace(std=0.0, plus="rank")},
    "callable": lambda: {"margin": lambda t: t - 0.2},
    "everything": lambda: {
        "bias": torch.linspace(-1, 1, 50),
        "label_smoothing": 0.1,
        "class_weight": torch.linspace(0.5, 2, 50),
        "classes": torch.arange(0, 50, 1).flip(0),
        "gradient": "straight_through",
        "return_stats": True,
    },
    "budget": lambda: {"memory_budget": 1 << 20},
}


# plain functions of the cosine: Dynamo traces each, AOTAutograd that of arcface for all
PLAIN = ("combined", "sphereface", "callable")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("traced", "name"),
    [
        *(("cpu", name) for name in COMPILED),
        *((other, "arcface") for other in STREAMED if other != "cpu"),
        ("bounded", "everything"),
    ],
)
def test_compile_without_breaks_for_any_batch_size(name: str, traced: str) -> None:
    # aot_eager traces forward and backward as inductor does; test_inductor runs the whole of it,
    # with every size a symbol. What is traced of another backend is the name of its op, which
    # opcheck traces by itself.
    require(traced)
    options, plain = COMPILED[name](), COMPILED[name]()

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Any:
        return fused_losses.margin_softmax(x, w, labels, backend=traced, **options)

    compiler = "eager" if name in PLAIN else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    w = torch.randn(50, 8, requires_grad=True)
    for n in (12, 31, 33):
        x = (5 * torch.randn(n, 8)).requires_grad_()
        labels = torch.randint(0, 50, (n,))
        labels[3] = -100
        for batch in (x, labels):
            # an error if the batch's size is taken for a number
            torch._dynamo.mark_dynamic(batch, 0)
        with torch.compiler.set_stance("default" if n == 12 else "fail_on_recompile"):
            got = compiled(x, w, labels)
        wanted = fused_losses.margin_softmax(x, w, labels, backend=traced, **plain)
        if options.get("return_stats"):
            for a, b in zip(got[1], wanted[1], strict=True):
                torch.testing.assert_close(a, b)
            got, wanted = got[0], wanted[0]
        torch.testing.assert_close(got, wanted)
        got = torch.autograd.grad(got, (x, w))
        for a, b in zip(got, torch.autograd.grad(wanted, (x, w)), strict=True):
            # compiled code's unit rows are rounded by themselves
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    if name == "adaface-training":
        torch.testing.assert_close(options["margin"].mean, plain["margin"].mean)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_draws_elastic_margins(traced: str) -> None:
    margin = margins.ElasticCosFace(0.35, 0.2)
    compiled = torch.compile(
        lambda x, w, y: fused_losses.margin_softmax(
            x, w, y, margin=margin, reduction="none", backend=traced
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    x, w, y = torch.randn(12, 8), torch.randn(50, 8), torch.randint(0, 50, (12,))
    first, second = compiled(x, w, y), compiled(x, w, y)
    assert torch.isfinite(first).all() and not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    require("cpu")

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, y, backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    w = torch.randn(50, 8, requires_grad=True)
    for n in (12, 31):
        x, y = torch.randn(n, 8, requires_grad=True), torch.randint(0, 50, (n,))
        got, wanted = compiled(x, w, y), loss(x, w, y)
        torch.testing.assert_close(got, wanted)
        got = torch.autograd.grad(got, (x, w))
        for a, b in zip(got, torch.autograd.grad(wanted, (x, w)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_the_backend_left_to_auto() -> None:
    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return fused_losses.margin_softmax(x, w, y)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, w, y = torch.randn(12, 8), torch.randn(50, 8), torch.randint(0, 50, (12,))
    torch.testing.assert_close(compiled(x, w, y), loss(x, w, y))
    with fused_losses.use_backend("bounded"):
        wanted = fused_losses.margin_softmax(x, w, y, backend="bounded")
        torch.testing.assert_close(compiled(x, w, y), wanted)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_linear_cross_entropy(traced: str) -> None:
    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return fused_losses.linear_cross_entropy(x, w, y, backend=traced)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    w = torch.randn(50, 8, requires_grad=True)
    for n in (12, 31):
        x = torch.randn(n, 8, requires_grad=True)
        soft = torch.softmax(torch.randn(n, 50), 1)
        for target in (torch.randint(0, 50, (n,)), soft):
            for batch in (x, target):
                # an error if the batch's size is taken for a number
                torch._dynamo.mark_dynamic(batch, 0)
            got, wanted = compiled(x, w, target), loss(x, w, target)
            torch.testing.assert_close(got, wanted)
            got = torch.autograd.grad(got, (x, w))
            for a, b in zip(got, torch.autograd.grad(wanted, (x, w)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
