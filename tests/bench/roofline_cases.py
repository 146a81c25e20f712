"""Closed forms of the Triton kernels against what the interpreter loads, stores and multiplies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import divergence_formulas
import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.bench.roofline.trace import triton_work
from fused_losses.primitives.class_rules import triton as triton_class_rules
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.distances import triton as triton_distances
from fused_losses.primitives.distances.inputs import DistanceInputs, DistanceNeeds
from fused_losses.primitives.divergence import triton as triton_divergence
from fused_losses.primitives.divergence.inputs import (
    DivergenceGradients,
    DivergenceInputs,
    DivergenceNeeds,
    DivergenceSaved,
)
from fused_losses.primitives.maxsim import triton as triton_maxsim
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.pairs import triton as triton_pairs
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds, Rule
from fused_losses.primitives.row_statistics import triton, triton_chunks
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from fused_losses.primitives.topk import triton as triton_topk

Counts = dict[str, list[int]]  # kernel -> bytes loaded, bytes stored, FLOPs of products


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple]:
    """Runs a call; what its kernels did, and what the closed forms say."""
    now = [0, 0, 0]

    def hook(name: str, count: Callable[..., None]) -> None:
        plain = getattr(InterpreterBuilder, name)

        def counting(self: Any, *args: Any) -> Any:
            count(*args)
            return plain(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    def add(at: int) -> Callable[..., None]:
        def count(pointers: Any, *rest: Any) -> None:
            mask = rest[0] if at == 0 else rest[1]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            now[at] += size * int(np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape)))

        return count

    def products(a: Any, b: Any, *rest: Any) -> None:
        now[2] += 2 * a.data.size * b.data.shape[-1]

    hook("create_masked_load", add(0))
    hook("create_masked_store", add(1))
    hook("create_dot", products)

    def run(call: Callable[[], Any]) -> tuple[Counts, Counts]:
        seen: Counts = defaultdict(lambda: [0, 0, 0])
        said: Counts = defaultdict(lambda: [0, 0, 0])
        launch = triton_launch.launch

        def counting(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
            work = triton_work(kernel, programs, args, constants)
            now[:] = 0, 0, 0
            launch(kernel, programs, args, constants, tile)
            for i, v in enumerate((work.moved(False), work.moved(True), work.flops)):
                said[work.name][i] += v
                seen[work.name][i] += now[i]

        with monkeypatch.context() as patch:
            patch.setattr(triton_launch, "launch", counting)
            call()
        return dict(seen), dict(said)

    return run


def same(counts: tuple[Counts, Counts], wanted: set[str], slack: float = 0.0) -> None:
    seen, said = counts
    assert wanted <= set(seen)
    for name, got in seen.items():
        for what, g, s in zip(("loads", "stores", "products"), got, said[name], strict=True):
            assert abs(g - s) <= slack * g, (name, what, g, s)


def rows(n: int, c: int, d: int, dtype: torch.dtype, processors: int = 10**6, **more: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    weighted, extra = more.get("weighted", False), more.get("extra", False)
    ids = (
        torch.randperm(c, generator=g)[: more["classes"]].sort().values
        if "classes" in more
        else None
    )
    pool = torch.arange(c) if ids is None else ids
    inputs = Inputs(
        torch.randn(n, d, generator=g).to(dtype),
        torch.randn(c, d, generator=g).to(dtype),
        pool[torch.randint(len(pool), (n,), generator=g)],
        ids,
        torch.randn(c, generator=g).to(dtype) if extra else None,
        torch.rand(c, generator=g) if extra else None,
        more.get("normalize", True),
        weighted,
        bend=torch.randn(4, n, generator=g) if more.get("bent") else None,
    )

    def call() -> None:
        saved = gpu_device.processors
        gpu_device.processors = lambda device: processors
        try:
            lse = triton.forward(inputs)[0]
            grads = torch.randn(n), torch.randn(n), torch.randn(n) if weighted else None
            needs = Needs(True, True, extra, compact=inputs.bend is not None)
            triton.backward(inputs, lse, RowGradients(*grads), needs)
        finally:
            gpu_device.processors = saved

    return call


STORED = {"forward_tiles", "forward_rows", "gradient_tiles"}
OWNED = {"forward_tiles", "forward_rows", "owner_rows", "owner_classes"}
ROWS = {
    "float32": (rows(37, 53, 24, torch.float32), STORED | {"finish_weight", "inverse_norms"}),
    "bent": (rows(37, 53, 24, torch.float32, classes=40, bent=True), STORED),
    "owners of bent": (rows(33, 101, 24, torch.bfloat16, 0, extra=True, bent=True), OWNED),
    "linear": (rows(40, 90, 40, torch.bfloat16, normalize=False), STORED),
    "everything": (
        rows(33, 101, 32, torch.float16, classes=67, extra=True, weighted=True),
        STORED | {"finish_weight"},
    ),
    "owners": (rows(33, 101, 32, torch.bfloat16, processors=0), OWNED - {"forward_tiles"}),
    "owners of everything": (
        rows(33, 101, 24, torch.bfloat16, 0, classes=67, extra=True, weighted=True),
        OWNED,
    ),
    "resident": (rows(60, 203, 64, torch.bfloat16, processors=6), {"forward_resident"}),
    "resident classes": (
        rows(64, 203, 48, torch.float16, processors=6, classes=77, normalize=False),
        {"forward_resident"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_statistics(name: str, counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kernels = ROWS[name]
    same(counted(call), kernels)
    monkeypatch.setattr(triton, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(triton_chunks, "MAX_CHUNK", 64)
    same(counted(call), kernels | {"merge_tiles"})


def classes(dtype: torch.dtype, many: int, some: int, values: int = 0, **more: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    n, c, d, centers = 37, 53, 24, more.get("centers", 1)
    p = ClassInputs(
        torch.randn(n, d, generator=g).to(dtype),
        torch.randn(c * centers, d, generator=g).to(dtype),
        torch.full((n, many), -1),
        torch.randperm(c, generator=g)[:some].sort().values if some else None,
        torch.rand(values, n, generator=g) if values else None,
        **more,
    )

    def call() -> None:
        out = triton_class_rules.forward(p)
        grads = torch.ones_like(out.statistics), torch.ones_like(out.targets)
        triton_class_rules.backward(*grads, out.statistics, p, False, True, True)

    return call


CLASSES = {
    "softmax": classes(torch.float32, 1, 0, params=[4.0]),
    "sums": classes(torch.bfloat16, 3, 0, 4, rule="summed_softmax", params=[4.0], normalize=False),
    "best": classes(torch.float32, 2, 41, rule="sface", params=[4.0, 1.0], centers=3),
    "soft": classes(
        torch.float16, 1, 41, 1, rule="sphereface2", params=[4.0, 0.1, 3.0, 0.0], centers=3,
        softness=0.2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_class_rules(name: str, counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"forward_classes", "merge_classes", "gradient_classes"}
    same(counted(CLASSES[name]), kernels)
    monkeypatch.setattr(triton_class_rules, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(triton_chunks, "MAX_CHUNK", 64)
    same(counted(CLASSES[name]), kernels)


def pairs(n: int, m: int, d: int, dtype: torch.dtype, **more: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    labels, ids = more.get("labels", True), more.get("ids", False)

    def integers(count: int, wanted: bool) -> Any:
        return torch.randint(5, (count,), generator=g, dtype=torch.int32) if wanted else None

    p = PairInputs(
        torch.randn(n, d, generator=g).to(dtype),
        torch.randn(m, d, generator=g).to(dtype),
        torch.tensor(0.5, dtype=torch.float64),
        x_labels=integers(n, labels),
        y_labels=integers(m, labels),
        x_ids=integers(n, ids),
        y_ids=integers(m, ids),
        positive=Rule(-1.5, 0.25),
        negative=Rule(2.0, 0.75),
        apart=more.get("apart", False),
    )
    reduction, cols = more.get("reduction", "lse"), more.get("cols", True)

    def call() -> None:
        if "attention" in more:
            values = torch.randn(m, more["attention"], generator=g).to(dtype)
            out, lse = triton_pairs.attention(values, p, labels)
            needs = PairNeeds(True, True, True, False, False)
            grads = torch.randn(out.shape), torch.randn(lse.shape).double()
            triton_pairs.attention_backward(*grads, out, lse, values, p, labels, True, needs)
            return
        r, c = triton_pairs.statistics(p, reduction, cols)
        grads = torch.randn(2, 2, n).double(), torch.randn(2, 2, c.shape[-1]).double()
        needs = PairNeeds(True, True, True, False, False)
        triton_pairs.statistics_backward(*grads, r, c, p, reduction, cols, needs)

    return call


STATISTICS = {"statistics_tiles", "merge_tiles", "gradient_tiles"}
PAIRS = {
    "two sides": (pairs(37, 53, 24, torch.float32), STATISTICS),
    "rows": (pairs(40, 70, 32, torch.bfloat16, labels=False, cols=False), STATISTICS),
    "sigmoid": (pairs(33, 67, 40, torch.float16, reduction="softplus", cols=False), STATISTICS),
    # of rows that are far apart, as the closed forms say
    "apart": (
        pairs(37, 53, 24, torch.float32, apart=True),
        {*STATISTICS, "distance_tiles", "near_distances", "split_tiles", "near_sums"},
    ),
    "ids": (pairs(33, 67, 16, torch.bfloat16, ids=True), STATISTICS),
    "attention": (
        pairs(37, 53, 24, torch.float32, attention=16, labels=False),
        {"attention_tiles"},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kernels = PAIRS[name]
    same(counted(call), kernels)
    monkeypatch.setattr(triton_pairs, "PARTIAL_BYTES", 16 * 2 * 100)
    same(counted(call), kernels)


@pytest.mark.parametrize("keep, dtype", ((5, torch.bfloat16), (140, torch.float32)))
def test_topk(keep: int, dtype: torch.dtype, counted: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 40, generator=g).to(dtype) for n in (20, 150))
    labels = [torch.randint(3, (n,), generator=g, dtype=torch.int32) for n in (20, 150)]
    a, m = torch.randn(150, generator=g), torch.rand(150, generator=g)
    more = (None, None, None, False, "fp32")

    def call() -> None:
        triton_topk.screen(x, y, a, m, keep, *labels, "different", *more)
        triton_topk.screen(x, y, a, None, keep, None, None, "any", *more)

    same(counted(call), {"best_columns" if keep <= 128 else "key_tiles"})


@pytest.mark.parametrize("kind", ("dot", "euclidean"))
@pytest.mark.parametrize("shape", ((37, 53, 24), (20, 40, 48)))
def test_distances(kind: str, shape: tuple[int, ...], counted: Any) -> None:
    g = torch.Generator().manual_seed(0)
    n, m, d = shape
    x, y = (torch.randn(rows, d, generator=g) for rows in (n, m))

    inputs = DistanceInputs(x, y, None, kind)

    def call() -> None:
        out = triton_distances.forward(inputs)
        needs = DistanceNeeds(True, True, False)
        triton_distances.backward(torch.randn(n, m), out, inputs, needs)

    same(counted(call), {"distance_tiles", "product_gradients"})


@pytest.mark.parametrize("d", (16, 160))
def test_maxsim(d: int, counted: Any) -> None:
    g = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(3 * 11, d, generator=g), torch.randn(4 * 19, d, generator=g)
    offsets = torch.arange(4) * 11, torch.arange(5) * 19

    inputs = MaxsimInputs(queries, documents, *offsets)

    def call() -> None:
        scores, index = triton_maxsim.forward(inputs)
        grad = torch.randn(scores.shape)
        triton_maxsim.backward(grad, index, inputs, MaxsimNeeds(True, True))

    same(counted(call), {"token_maxima", "token_sums", "query_gradients", "document_gradients"})


def divergence(kind: str, d: tuple[int, int] = (24, 32), **more: Any) -> Callable[[], None]:
    given = divergence_formulas.drawn(37, 53, d=d, **more).to(torch.float32)
    values = (v.detach() if isinstance(v, torch.Tensor) else v for v in vars(given).values())
    p = DivergenceInputs(*values, kind, divergence_formulas.PARAMS[kind])

    def call() -> None:
        lse, teacher_lse, *_, folds = triton_divergence.forward(p)
        vectors, one = [torch.randn(37).double() for _ in range(4)], p.bias is not None
        needs = DivergenceNeeds(
            False, True, True, True, p.teacher_weight is not None, one, one,
            p.teacher_scale is not None,
        )  # fmt: skip
        saved = DivergenceSaved(lse, teacher_lse, folds)
        triton_divergence.backward(p, saved, DivergenceGradients(*vectors, folds), needs)

    return call


BOTH = {"divergence_runs", "side_gradient"}
DIVERGENCES = {
    "plain": (divergence("forward", plain=True), BOTH),
    "sampled": (divergence("jensen_shannon", sampled=True), BOTH | {"share_runs", "inverse_norms"}),
    "one width": (divergence("reverse", (24, 24), sampled=True), BOTH | {"class_shrink"}),
    "dense": (divergence("power", dense=True), BOTH),
    "dense sampled": (divergence("squared", dense=True, sampled=True), BOTH),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(name: str, counted: Any) -> None:
    call, kernels = DIVERGENCES[name]
    same(counted(call), kernels)
