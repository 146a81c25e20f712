"""Modes that must not change an answer: autocast, torch.func.grad, a backend of another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import example_values
import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
from conftest import STREAMED, require
from example_values import DIFFERENTIABLE, fields, floats
from torch import Tensor

import fused_losses
from fused_losses import backends
from fused_losses.base.examples import TABLE, ExampleInputs

SHAPE = (12, 17, 8)
FIELDS = fields(SHAPE)


def total(name: str, backend: str, **leaves: Tensor) -> Tensor:
    return example_values.total(name, backend, SHAPE, FIELDS | leaves)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_changes_neither_value_nor_gradient(name: str, backend: str) -> None:
    answers = []
    for enabled in (False, True):
        leaves = {k: FIELDS[k].clone().requires_grad_() for k in TABLE[name].leaves}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = total(name, backend, **leaves)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        answers.append([loss, *(g for g in found if g is not None)])
    for exact, got in zip(*answers, strict=True):
        # the same operations in the same order
        assert torch.equal(exact, got)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if "x" in TABLE[n].leaves])
def test_func_grad_is_the_gradient(name: str, streamed: str) -> None:
    leaf = FIELDS["x"].clone().requires_grad_()
    (want,) = torch.autograd.grad(total(name, streamed, x=leaf), leaf)
    got = torch.func.grad(lambda x: total(name, streamed, x=x))(leaf.detach())
    # another order of sums at most: two roundings of each of a row's terms
    size = want.abs().max()
    assert (got - want).abs().max() <= 2 * SHAPE[1] * torch.finfo(torch.float32).eps * size


HALF = torch.bfloat16
x, y, far = torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 3, 8)
MET: dict[str, Callable[[], Tensor]] = {
    "a queue": lambda: fused_losses.info_nce(x.to(HALF), y.to(HALF), queue=y),
    "negatives": lambda: fused_losses.info_nce(x.to(HALF), y.to(HALF), negatives=far),
    "maxsim": lambda: fused_losses.maxsim(far.to(HALF), far),
    "attention": lambda: fused_losses.similarity_attention(x.to(HALF), y.to(HALF), y),
    "trilinear": lambda: fused_losses.trilinear_attention(x.to(HALF), y, y, x.to(HALF), y),
    "hsic": lambda: fused_losses.hsic(x.to(HALF), y),
    "triplets": lambda: fused_losses.triplet_margin(x.to(HALF), y, y),
}


@pytest.mark.parametrize("name", MET)
def test_autocast_brings_unlike_dtypes_together(name: str) -> None:
    with torch.autocast("cpu", HALF):
        assert MET[name]().isfinite().all()
    with pytest.raises(TypeError, match="dtype"):
        MET[name]()


# how many numbers they return is for values to say, or PyTorch has no shapes for what they use
VALUED = (
    *("angular", "mine_", "radius_search", "shared_negatives", "unpg", "maxsim, lengths"),
    "pairwise_distance, mahalanobis",
)
# reference walks over lengths, or over a list of classes
LISTED = {("reference", "maxsim"), ("reference", "margin_softmax, classes")}
SHAPED = [
    (backend, name)
    for name, example in TABLE.items()
    for backend in ("reference", "bounded")
    if example.takes("backend") and not name.startswith(VALUED)
    if (backend, name) not in LISTED
]


def on_meta(given: Any) -> Any:
    """The same tensors without values."""
    if isinstance(given, Tensor):
        bare = given.detach().to("meta")
        return bare.requires_grad_() if bare.is_floating_point() else bare
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*map(on_meta, given))
    if isinstance(given, (list, tuple)):
        return type(given)(map(on_meta, given))
    return given


@pytest.mark.parametrize(("backend", "name"), SHAPED)
def test_tensors_without_values_have_an_answer_of_the_right_shape(backend: str, name: str) -> None:
    example = TABLE[name]
    args, options = example.arguments(ExampleInputs(*SHAPE))
    options = options | {"backend": backend}
    shapes = []
    for f in (lambda given: given, on_meta):
        given = {key: f(value) for key, value in options.items()}
        found = example.function(*[f(argument) for argument in args], **given)
        shapes.append([(part.shape, part.dtype) for part in floats(found)])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("metric", ["euclidean", "minkowski", "mahalanobis"])
def test_weighted_distances_of_tensors_without_values(metric: str) -> None:
    x, y = (torch.randn(n, 4, device="meta", requires_grad=True) for n in (5, 6))
    given = dict(VI=torch.eye(4, device="meta")) if metric == "mahalanobis" else dict(w=x[0] ** 2)
    found = fused_losses.pairwise_distance(x, y, metric=metric, **given)
    assert found.shape == (5, 6)
    assert torch.autograd.grad(found.sum(), y)[0].shape == y.shape


PRECISE = [n for n in DIFFERENTIABLE if TABLE[n].takes("precision")]


@pytest.mark.parametrize("name", PRECISE)
def test_mixed_rounds_no_forward(name: str, streamed: str) -> None:
    """`precision="mixed"` promises the value of fp32: only gradients' products are rounded."""
    example, values = TABLE[name], []
    example_values.on_backend(example, streamed)
    device = torch.device("cpu")
    if backends.reasons_against(streamed, device, torch.float32, "mixed"):
        pytest.skip(f"{streamed} has no mixed products here")
    for precision in ("fp32", "mixed"):
        inputs = ExampleInputs(*SHAPE)
        vars(inputs).update(FIELDS)
        found = example(inputs, backend=streamed, precision=precision)
        values.append(torch.cat([part.flatten().double() for part in floats(found)]))
    # 2^-8 is a product's rounding to bfloat16; a sum of another order moves a float32 by far less
    assert torch.allclose(*values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_backend_is_forced_in_its_own_thread_alone() -> None:
    inside, outside = threading.Barrier(2), threading.Barrier(2)
    seen: dict[str, str] = {}

    def forced() -> None:
        with backends.use_backend("reference"):
            inside.wait(30)
            outside.wait(30)
            seen["forced"] = backends.requested(None)

    def free() -> None:
        inside.wait(30)
        seen["free"] = backends.requested(None)
        with backends.use_backend("bounded"):
            outside.wait(30)
            seen["other"] = backends.requested(None)

    threads = [threading.Thread(target=run) for run in (forced, free)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {"free": backends.requested(None), "forced": "reference", "other": "bounded"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernel_mean", "mmd", "hsic", "uniformity"])
def test_compile_serves_every_batch_size(name: str) -> None:
    function = getattr(fused_losses, name)
    torch._dynamo.reset()
    one = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in range(5, 16):  # more than Dynamo would compile anew
        rows = [torch.randn(n, 4) for _ in range(1 if name in ("uniformity", "kernel_mean") else 2)]
        torch.testing.assert_close(one(*rows), function(*rows))


HOSTED: dict[str, Callable[..., Tensor]] = {
    "lifted_structure": lambda x, **o: fused_losses.lifted_structure(x, LABELS[: len(x)], **o),
    "angular": lambda x, **o: fused_losses.angular(x, LABELS[: len(x)], **o),
    "trilinear_attention": lambda x, **o: (
        fused_losses.trilinear_attention(x, x[:5], x, x[:5], x, **o).square().sum()
    ),
    "sinkhorn": lambda x, **o: (
        fused_losses.sinkhorn(x, x.roll(1, 0), iterations=3, cost="sqeuclidean", **o).cost
    ),
}
LABELS = torch.arange(16) % 4


# what is traced of another backend is the name of its op, which opcheck traces by itself
@pytest.mark.parametrize(
    ("streamed", "name"),
    [
        *(("cpu", name) for name in HOSTED),
        *((each, "angular") for each in STREAMED if each != "cpu"),
    ],
)
def test_what_reads_sizes_on_the_host_compiles_whole(name: str, streamed: str) -> None:
    require(streamed)
    f = HOSTED[name]
    torch._dynamo.reset()
    one = torch.compile(
        lambda x: f(x, backend=streamed), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (9, 12):
        x = torch.randn(n, 6, requires_grad=True)
        answers = []
        for call in (one, lambda x: f(x, backend=streamed)):
            loss = call(x)
            answers.append((loss, *torch.autograd.grad(loss, x)))
        for got, want in zip(*answers, strict=True):
            torch.testing.assert_close(got, want)


def test_compiled_code_hears_use_backend() -> None:
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(9, 6)
    one = torch.compile(lambda x: fused_losses.info_nce(x, x), fullgraph=True, backend=record)
    for name in ("bounded", "cpu", "bounded"):
        with backends.use_backend(name):
            one(x)
        # compiled once for each, and found again
        assert f"pair_statistics_{name}" in " ".join(seen[-2:])
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["supervised_contrastive", "contrastive", "lifted_structure"])
def test_compiled_autograd_of_a_batch_that_meets_itself(name: str) -> None:
    torch._dynamo.reset()
    f = getattr(fused_losses, name)
    x, labels = torch.randn(12, 6, requires_grad=True), torch.arange(12) % 4
    (want,) = torch.autograd.grad(f(x, labels), x)
    with compiled_autograd._enable(torch.compile(backend="eager", dynamic=True)):
        f(x, labels).backward()
    torch.testing.assert_close(x.grad, want)
