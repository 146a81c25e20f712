"""Distances in torch: transforms, compiled, memory, refusals, equal bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import CUDA, STREAMED, require, widest
from counted import COUNTER, MIB, told_by_child
from distance_rows import BOUNDS, F64, close, few, near, options, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
from fused_losses import backends
from fused_losses.pairwise.distance import pairwise_distance, pairwise_similarity
from fused_losses.pairwise.metrics import METRICS
from fused_losses.primitives.distances import bounded as bounded_distances
from fused_losses.primitives.distances import op as primitive
from fused_losses.primitives.distances.inputs import (
    FLAT,
    KINDS,
    PRODUCTS,
    DistanceInputs,
    DistanceNeeds,
)
from fused_losses.primitives.distances.op import DISTANCE_MATRIX, distance_matrix


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 3), (2, 3)),
        ((2, 1), (1, 3)),
        ((), (2, 3)),
        ((2, 3), ()),
        ((1,), (2, 3)),
        ((0,), (0,)),
        ((0,), (1,)),
        ((0,), ()),
    ],
)
@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "snr", "mahalanobis"])
@pytest.mark.parametrize(("n", "m"), [(4, 5), (1, 5), (4, 1)])
def test_leading_dimensions(
    metric: str, left: tuple, right: tuple, n: int, m: int, backend: str
) -> None:
    dtype = widest(backend)
    x = torch.randn(*left, n, 6, dtype=dtype, requires_grad=True)
    y = torch.randn(*right, m, 6, dtype=dtype, requires_grad=True)
    given = dict(variance=torch.rand(*right, m, 6, dtype=dtype) + 0.5)
    given = given if metric == "mahalanobis" else {}
    out = pairwise_distance(x, y, metric, backend=backend, **given)
    lead = torch.broadcast_shapes(left, right)
    assert out.shape == (*lead, n, m)
    wide_x, wide_y = (
        x.expand(*lead, n, 6).reshape(-1, n, 6),
        y.expand(*lead, m, 6).reshape(-1, m, 6),
    )
    upstream = torch.randn_like(out)
    want = x.sum() * 0
    for k, (a, b) in enumerate(zip(wide_x, wide_y, strict=True)):
        some = {n: v.expand(*lead, m, 6).reshape(-1, m, 6)[k] for n, v in given.items()}
        one = pairwise_distance(a, b, metric, backend="reference", **some)
        close(out.reshape(-1, n, m)[k], one, BOUNDS[dtype])
        want = want + (one * upstream.reshape(-1, n, m)[k]).sum()
    got = torch.autograd.grad((out * upstream).sum(), (x, y))
    for g, w in zip(got, torch.autograd.grad(want + y.sum() * 0, (x, y)), strict=True):
        if dtype == F64:
            close(g, w, 1e-10)
        else:
            near(g, w, BOUNDS[dtype])


def test_batch_with_itself(backend: str) -> None:
    x = torch.randn(3, 4, 6)
    out = pairwise_distance(x, metric="cosine", backend=backend)
    assert out.shape == (3, 4, 4) and bool((out.diagonal(dim1=1, dim2=2) == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "d"), [(0, 3, 4), (3, 0, 4), (0, 0, 4), (2, 3, 0)])
def test_empty(kind: str, n: int, m: int, d: int, backend: str) -> None:
    x, y = (torch.rand(k, d, requires_grad=True) for k in (n, m))
    w = torch.rand(m, d) if kind == "scaled" else None
    out = distance_matrix(x, y, w, kind=kind, backend=backend)
    assert out.shape == (n, m) and bool((out == 0).all())
    if kind not in FLAT:
        for g, t in zip(torch.autograd.grad(out.sum(), (x, y)), (x, y), strict=True):
            assert g.shape == t.shape and bool((g == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str, backend: str) -> None:
    x, y = torch.rand(20, 9), torch.rand(20, 66)
    w = torch.rand(20, 66) if kind == "scaled" else None
    f = lambda a, b, c: distance_matrix(a, b, c, kind=kind, p=3.0, backend=backend)
    inputs = [t for t in (x.T, y.T, w if w is None else w.T) if t is not None]
    inputs = [*inputs, None][:3]
    dense = [None if t is None else t.contiguous() for t in inputs]
    out = f(*inputs)
    # a product of other strides sums in another order
    torch.testing.assert_close(out, f(*dense), rtol=BOUNDS[torch.float32], atol=1e-7)
    if kind not in FLAT:
        # what comes back is often no dense matrix: of a sum, a transpose, a broadcast row
        for grad in (torch.ones(()).expand(9, 66), torch.randn(66, 9).T, torch.randn(1, 66)):
            grad = grad.expand(9, 66)
            found = []
            for given, up in ((inputs, grad), (dense, grad.contiguous())):
                leaves = [t.detach().requires_grad_() for t in given[:2]]
                found.append(torch.autograd.grad(f(*leaves, given[2]), leaves, up))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_long_rows(backend: str) -> None:
    x, y = torch.rand(3, 5_000), torch.rand(2, 5_000)
    for kind in KINDS:
        w = torch.rand(2, 5_000) if kind == "scaled" else None
        given = dict(kind=kind, p=3.0)
        wide = None if w is None else w.double()
        want = distance_matrix(x.double(), y.double(), wide, backend="reference", **given)
        close(distance_matrix(x, y, w, backend=backend, **given), want, 1e-5)


def weights_of(kind: str, m: int, d: int) -> Tensor | None:
    return dict(canberra=torch.rand(d), scaled=torch.rand(m, d), hamming=torch.rand(d)).get(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, streamed: str) -> None:
    few(streamed, kind == "scaled")
    x, y = (torch.rand(n, 4, requires_grad=True) for n in (3, 5))
    w = weights_of(kind, 5, 4)
    op = DISTANCE_MATRIX.op(streamed)
    torch.library.opcheck(op, (x, y, w, kind, 3.0, "fp32"))
    if kind in FLAT:
        return
    out = op(x, y, w, kind, 3.0, "fp32").detach()
    grad, *inputs = torch.randn_like(out), *(t.detach() for t in (out, x, y))
    needs_w = kind in ("canberra", "scaled")
    back = DISTANCE_MATRIX.op(streamed, "_backward")
    for needs in ((True, True, needs_w), (True, False, False), (False, True, False)):
        torch.library.opcheck(back, (grad, *inputs, w, kind, 3.0, "fp32", *needs))


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in FLAT])
def test_func_grad(metric: str, streamed: str) -> None:
    few(streamed, metric == "chebyshev")
    x, f = to_transform(metric, streamed)
    leaf = x.clone().requires_grad_()
    found, (want,) = torch.func.grad(f)(x), torch.autograd.grad(f(leaf), leaf)
    # in a transform PyTorch's formulas stand for the extension's: some roundings of each term
    near = 4 * len(x) * torch.finfo(x.dtype).eps * want.abs().amax()
    assert (found - want).abs().amax() <= near


OTHERS = [name for name in STREAMED if name != "cpu"]


# Dynamo traces every metric's Python. AOTAutograd, slower, then traces one op: of a product, of a
# sum of powers, of weights with a gradient of their own
WHOLE = ("cosine", "minkowski", "mahalanobis")


# what is traced of another backend is the name of its op, which opcheck traces by itself
@pytest.mark.parametrize(
    ("streamed", "metric"),
    [*(("cpu", name) for name in METRICS), *((each, "chebyshev") for each in OTHERS)],
)
def test_compiles_whole(metric: str, streamed: str) -> None:
    x, f = to_transform(metric, require(streamed))
    torch.compiler.reset()
    compiler = "aot_eager" if metric in WHOLE or streamed != "cpu" else "eager"
    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    if metric in FLAT:
        assert torch.equal(compiled(x), f(x))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in (5, 7):
            x = rows(metric, n, 4, dtype=torch.float32)
            leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)  # an error if it is taken for a number
            with torch.compiler.set_stance("default" if n == 5 else "fail_on_recompile"):
                got = torch.autograd.grad(compiled(leaf), leaf)[0]
            torch.testing.assert_close(got, torch.autograd.grad(f(other), other)[0])


def to_transform(metric: str, backend: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    x, y = (rows(metric, n, 4, dtype=torch.float32) for n in (5, 6))
    given = {k: v.float() if isinstance(v, Tensor) else v for k, v in options(metric, 4).items()}
    return x, lambda a: pairwise_distance(a, y, metric, backend=backend, **given).square().sum()


def test_similarity_transforms(streamed: str) -> None:
    few(streamed, False)
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    gamma = torch.tensor(0.3)
    f = lambda a, g: pairwise_similarity(a, y, "rbf", gamma=g, backend=streamed).sum()
    leaves = [x.clone().requires_grad_(), gamma.clone().requires_grad_()]
    want = torch.autograd.grad(f(*leaves), leaves)
    for g, w in zip(torch.func.grad(f, argnums=(0, 1))(x, gamma), want, strict=True):
        assert torch.equal(g, w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "jensenshannon", "mahalanobis"])
def test_autocast(metric: str, backend: str) -> None:
    x, y = rows(metric, 5, 4).abs().float(), rows(metric, 6, 4).abs().float()
    given = options(metric, 4)
    plain = pairwise_distance(x, y, metric, backend=backend, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_distance(x, y, metric, backend=backend, **given), plain)
        out = pairwise_distance(x, y.bfloat16(), metric, backend=backend, **given)
    assert out.dtype == torch.float32
    with pytest.raises(TypeError, match="y: expected the dtype of x"):
        pairwise_distance(x, y.bfloat16(), metric, backend=backend, **given)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in FLAT])
def test_bounded_never_holds_all_differences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_distances, "BLOCK_BYTES", 4 << 10)
    n, m, d = 60, 50, 40
    # every pair is near
    x, y = 1 + 1e-3 * torch.rand(n, d), 1 + 1e-3 * torch.rand(m, d)
    w = weights_of(kind, m, d)
    inputs, needs = DistanceInputs(x, y, w, kind, 3.0), DistanceNeeds(True, True, w is not None)
    with Largest() as seen:
        out = bounded_distances.forward(inputs)
        bounded_distances.backward(out, out, inputs, needs)
    assert n * m <= seen.elements < n * m * d // 8


CHILD = (
    COUNTER
    + """
from fused_losses.primitives.distances import bounded as b
from fused_losses.primitives.distances.inputs import FLAT, DistanceInputs, DistanceNeeds
b.BLOCK_BYTES = 1 << 20
torch.set_num_threads(1)
def run(kind, n, d, spread):
    torch.manual_seed(0)
    x, y = (1 + spread * torch.rand(n, d) for _ in range(2))
    w = dict(canberra=torch.rand(d), scaled=torch.rand(n, d)).get(kind)
    got = []
    inputs = DistanceInputs(x, y, w, kind, 3.0)
    def step():
        out = b.forward(inputs)
        got.append(out)
        if kind not in FLAT:
            got.extend(b.backward(out, out, inputs, DistanceNeeds(True, True, w is not None)))
    peak = extra(step) - sum(t.nbytes for t in got)
    return peak, b.workspace_bytes(n, n, d, x.dtype, kind)
cases = json.loads(sys.argv[1])
# threads, lazy imports and the buffers that MKL keeps, by the products' sizes, are the process's
for case in cases.values():
    run(*case)
print(json.dumps({name: run(*case) for name, case in cases.items()}))
"""
)


@pytest.mark.slow
def test_bounded_memory_is_what_it_says() -> None:
    cases = {k: (k, 600, 40, 1.0) for k in KINDS if k != "dot"}
    # every pair near; rows of which few fit in a block
    cases["euclidean-near"] = ("euclidean", 600, 40, 1e-6)
    cases["sqeuclidean-long"] = ("sqeuclidean", 100, 4_000, 1.0)
    cases["cityblock-long"] = ("cityblock", 100, 4_000, 1.0)
    for name, (extra, told) in told_by_child(CHILD, cases).items():
        _, n, d, _ = cases[name]
        assert extra <= told < n * n * d * 4 / 4, name
        assert told <= 4 * extra + 2 * MIB, name


def test_the_kinds_without_products_on_triton() -> None:
    gpu, float32 = torch.device("cuda"), torch.float32
    for kind in KINDS:
        if kind in PRODUCTS:
            continue
        with pytest.raises(RuntimeError, match=f"backend='triton' cannot run kind '{kind}'"):
            primitive.choose("triton", gpu, float32, "fp32", kind)
        # the CUDA C++ kernels where there are any, and no word of Triton
        best = "bounded" if backends.reasons_against("cuda", gpu, float32, "fp32") else "cuda"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for asked, precision in ((None, "tf32"), ("auto", "fp32")):
                chosen, refused = primitive.choose(asked, gpu, float32, precision, kind)
                assert chosen == best and set(refused) <= {"cuda"}
    with pytest.raises(RuntimeError, match="made of products"):
        pairwise_distance(torch.rand(3, 4), metric="canberra", backend="triton")
    with fused_losses.use_backend("triton"), pytest.raises(RuntimeError, match="best path"):
        pairwise_distance(torch.rand(3, 4), metric="kl")


@pytest.mark.parametrize("name", STREAMED)
def test_the_result_is_the_same_twice(name: str) -> None:
    require(name)
    x, y = torch.rand(130, 70), torch.rand(200, 70)
    for kind in KINDS:
        w = weights_of(kind, 200, 70)
        f = lambda k=kind, c=w: distance_matrix(x, y, c, kind=k, p=3.0, backend=name)
        assert torch.equal(f(), f())


@pytest.mark.parametrize("gpu", CUDA)
def test_the_same_bits_in_any_order_of_threads_and_blocks(
    gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(gpu)
    dtype = torch.float32
    found = []
    for kind in KINDS:
        metric = "kl" if kind in ("kl", "jensenshannon") else kind
        # rows that are near some and far from others, in more than one block of pairs and tile
        x, y = rows(metric, 70, 40, dtype=dtype), rows(metric, 135, 40, dtype=dtype)
        y[:9] = x[:9] * 1.01
        w = weights_of(kind, 135, 40)
        upstream, got = torch.randn(70, 135), []
        for seed in (0, 1, 2):
            monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", str(seed))
            op = DISTANCE_MATRIX.op(gpu)
            out = op(x, y, w, kind, 3.0, "fp32")
            back = DISTANCE_MATRIX.op(gpu, "_backward")
            rest = (kind, 3.0, "fp32", True, True, kind in ("canberra", "scaled"))
            got.append([out, *(() if kind in FLAT else back(upstream, out, x, y, w, *rest))])
        found.append(got)
    for got in found:
        for other in got[1:]:
            assert all(torch.equal(a, b) for a, b in zip(got[0], other, strict=True))
