"""The cost model: its counts against execution, its traces, its page."""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CUDA
from places import ROOT

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import tiles as gpu_tiles
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.bench.roofline import cuda_forms, page
from fused_losses.bench.roofline.cache import L2
from fused_losses.bench.roofline.cost import cost, traced
from fused_losses.bench.roofline.operation import PLAIN
from fused_losses.bench.roofline.ops import ops
from fused_losses.bench.roofline.peaks import PEAKS, PEERS
from fused_losses.bench.roofline.trace import Trace, holders
from fused_losses.bench.roofline.work import Work, access, work_of
from fused_losses.primitives.distances import cuda as cuda_distances
from fused_losses.primitives.distances.inputs import DistanceInputs
from fused_losses.primitives.row_statistics import cuda, triton_tiles
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from fused_losses.primitives.row_update.op import sgd_rows_

META = dict(device="meta")


# ---- the CUDA kernels, in the host execution ----------------------------------------------------


def counted(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """kernel -> bytes loaded and stored when executed, and what the closed forms say."""
    library = cuda_launch.library()
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    plain = cuda_launch.launch

    def launch(name: str, **arguments: Any) -> None:
        work = work_of(name, name, 0, arguments)
        counts = (ctypes.c_uint64 * 8)()
        library.fused_losses_counts(counts)
        plain(name, **arguments)
        library.fused_losses_counts(counts)
        for i, v in enumerate((counts[1], counts[3], work.moved(False), work.moved(True))):
            found[name][i] += v

    for module, key, _ in holders(plain):
        monkeypatch.setattr(module, key, launch)
    call()
    return dict(found)


def cuda_rows(dtype: torch.dtype, bent: bool = False) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(48, 64, generator=g).to(dtype), torch.randn(512, 64, generator=g).to(dtype)
    bend = torch.randn(4, 48, generator=g) if bent else None
    inputs = Inputs(x, w, torch.randint(512, (48,), generator=g), normalize=True, bend=bend)
    lse = cuda.forward(inputs)[0]
    grads = RowGradients(torch.randn(48), torch.randn(48), None)
    cuda.backward(inputs, lse, grads, Needs(True, True, False))


def cuda_sums(dtype: torch.dtype) -> None:
    x, y = torch.randn(64, 48).to(dtype), torch.randn(128, 48).to(dtype)
    cuda_distances.forward(DistanceInputs(x, y, None, "cityblock", 1.0))


def cuda_update(dtype: torch.dtype) -> None:
    weight, grad = torch.randn(200, 64).to(dtype), torch.randn(40, 64).to(dtype)
    rows = torch.randperm(200)[:40]
    sgd_rows_(weight, rows, grad, torch.zeros(200, 64), lr=0.1, momentum=0.9, backend="cuda")


# kernel -> how far loads and stores may lie from the closed form: what lanes load alike, and
# ragged ends, are counted by the host once a lane
CUDA_CALLS = {
    "rows": (
        cuda_rows,
        dict(gather=0.02, row_scores=0.1, row_gradient=0.4, row_weight=0.2, row_finish=0.7),
    ),
    "bent rows": (
        partial(cuda_rows, bent=True),
        dict(row_scores=0.25, row_gradient=0.4),
    ),
    "cityblock": (cuda_sums, dict(distance_sums=0.1)),
    "update": (cuda_update, dict(sgd_rows=0.1)),
}


@pytest.mark.skipif(not CUDA, reason="FUSED_LOSSES_CUDA_ON_HOST=1 executes the CUDA kernels")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", CUDA_CALLS)
def test_closed_forms_of_cuda_kernels(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, slack = CUDA_CALLS[name]
    found = counted(lambda: call(dtype), monkeypatch)
    for kernel, allowed in slack.items():
        loads, stores, said_loads, said_stores = found[kernel]
        assert abs(loads - said_loads) <= allowed * loads, (kernel, found[kernel])
        # a maximum that did not grow is not stored
        slack_of_stores = 0.25 if kernel == "row_scores" else 0.02
        assert abs(stores - said_stores) <= slack_of_stores * stores, (kernel, found[kernel])


# ---- the model ----------------------------------------------------------------------------------


def works(name: str, direction: str, way: str, gpu: str = "H100") -> list[Work]:
    (op,) = (op for op in ops() if (op.name, op.direction) == (name, direction))
    return traced(op, way, PEAKS[gpu])


@pytest.mark.slow
def test_every_kernel_that_is_launched_has_a_closed_form() -> None:
    """A launch without one raises; these are all ways of all operations, on one GPU each."""
    for i, op in enumerate(ops()):
        for way in op.ways:
            peak = list(PEAKS.values())[i % len(PEAKS)]
            c = cost(traced(op, way, peak), peak)
            assert c.seconds > 0 and c.l2 > 0, (op.name, way)
            if way not in PLAIN:
                assert c.flops >= 0.99 * op.flops, (op.name, op.direction, way)
                # results that are still in L2 at the end are counted as written
                assert c.dram >= 0.9 * op.floor, (op.name, op.direction, way)


def test_margin_softmax_on_hopper_moves_less_than_the_best_peer() -> None:
    c = cost(works("margin_softmax", "forward", "triton"), PEAKS["H100"])
    assert c.l2 < 7.4e9
    assert c.l2 < 1e9 * min(moved for moved, _ in PEERS["margin_softmax", "forward"].values())
    # W once for 256 rows, once for the norms, and x once a chunk and program
    weight = 2 * 1_000_000 * 512
    assert abs(c.l2 - (4 * weight + weight)) < 1.6e9


@pytest.mark.parametrize("gpu", PEAKS)
def test_dram_stays_within_the_limit(gpu: str) -> None:
    (op,) = (op for op in ops() if op.name == "topk")
    c = cost(traced(op, "triton", PEAKS[gpu]), PEAKS[gpu])
    assert c.dram <= page.DRAM_LIMIT * op.floor


@pytest.mark.parametrize("gpu", PEAKS)
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_launches_of_the_classes_cost_less_than_a_tenth(direction: str, gpu: str) -> None:
    """Gaps between them, and a host that is no slower: what chunks beyond L2 are for."""
    c = cost(works("margin_softmax", direction, "triton", gpu), PEAKS[gpu])
    assert 1 < c.launches and c.launched < 1.1 * c.seconds
    slower = replace(c, launches=100 * c.launches, host=100 * c.host)
    assert slower.launched > 1.1 * slower.seconds


def test_what_is_beyond_a_limit_says_why() -> None:
    """The default backend at the shapes that the peers' figures are for, each in its own words."""
    found = page.rows(["margin_softmax", "info_nce", "topk"], ("triton",))
    for a in found:
        key = a.op.name, a.op.direction
        peers = [moved for moved, _ in PEERS.get(key, {}).values()]
        beyond = a.over("H100") > page.DRAM_LIMIT
        beyond |= bool(peers) and a.costs["H100"].l2 > 1e9 * min(peers)
        if beyond:
            assert f"{key[0]}, {key[1]}, {a.way}" in page.WHY
    text = "\n".join(page.gaps(found))
    assert "**info_nce, forward, triton**" in text
    assert "**topk, forward, triton**" not in text


def test_a_changed_tile_changes_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sum(w.moved() for w in works("linear_cross_entropy", "forward", "triton"))
    tiles = triton_tiles.TABLES["sm_90"].tiles
    narrow = gpu_tiles.Tile(128, 64, 64)
    monkeypatch.setitem(tiles, ("forward", "half"), narrow)
    after = sum(w.moved() for w in works("linear_cross_entropy", "forward", "triton"))
    assert 1.7 < after / before < 2.1


def test_cache_keeps_what_is_used_again() -> None:
    small, large = torch.empty(1 << 18, **META), torch.empty(1 << 22, **META)
    cache = L2(4 << 20)
    assert cache.touch(access(small, 0)) == 1 << 20
    assert cache.touch(access(small, 0)) == 0
    assert cache.touch(access(large, 0)) == 16 << 20
    assert cache.touch(access(small, 0)) == 1 << 20
    # what was changed is written when it is thrown out, or at the end
    assert cache.touch(access(small, 0, write=True)) == 0
    assert cache.flush({small.untyped_storage()._cdata}) == 1 << 20
    assert cache.touch(access(large, 0)) == (16 << 20) + (1 << 20)


def test_cache_tells_blocks_of_a_matrix_apart() -> None:
    matrix = torch.empty(1024, 1024, **META)
    cache = L2(16 << 20)
    assert cache.touch(access(matrix[:, :256], 0)) == 1 << 20
    assert cache.touch(access(matrix[:, 256:512], 0)) == 1 << 20
    assert cache.touch(access(matrix[:, :256], 0)) == 0


def test_products_and_plain_operations() -> None:
    a, b = torch.empty(512, 128, **META), torch.empty(128, 1024, **META)
    with Trace(own=False).running() as trace:
        (a @ b).exp().sum(1)
    names = [w.name for w in trace.work]
    assert names == ["product", "exp", "sum"]
    product, exponential, total = trace.work
    assert product.flops == 2 * 512 * 128 * 1024 and product.kind == "fp32"
    out = 4 * 512 * 1024
    # tiles of 256 x 256: a once for each of four, b for each of two
    assert product.moved() == 4 * 4 * a.numel() + 2 * 4 * b.numel() + out
    assert exponential.moved() == 2 * out
    assert total.moved() == out + 4 * 512


def test_compiled_stores_no_pointwise_results() -> None:
    a, b = torch.empty(512, 128, **META), torch.empty(128, 1024, **META)
    with Trace(own=False, compiled=True).running() as trace:
        z = (a @ b) * 2 + 1
        z.exp().sum(1)
        z.T @ a
    moved = [(w.name, w.moved(True)) for w in trace.work]
    assert [name for name, _ in moved] == ["product", "sum", "pointwise", "product"]
    # z is stored because a product reads it
    assert moved[2][1] == 4 * 512 * 1024


def test_host_code_is_left_as_it_was() -> None:
    before = cuda_launch.launch, triton_launch.launch, cuda_launch.on_host
    with Trace().running():
        assert cuda_launch.launch is not before[0]
    assert before == (cuda_launch.launch, triton_launch.launch, cuda_launch.on_host)


def test_page_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = page.rows(["maxsim", "cityblock"])
    text = page.page(found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "| triton |" in text and "*LIK*" in text
    page.plot(tmp_path / "bars.svg", found)
    bars = (tmp_path / "bars.svg").read_text()
    for way, colour in page.COLOURS.items():
        # of the legend there are two: its own, and an empty one
        assert bars.count(f"fill: {colour}") == sum(a.way == way for a in found) + 2


def test_page_in_the_repository_is_that_of_the_code() -> None:
    """Its names, not its figures: a tile that changes need not fail a test."""
    text = (ROOT / "docs" / "generated" / "roofline.md").read_text()
    for op in ops():
        assert f"**{op.name}, {op.direction}**, {op.shape}" in text
    assert "made on" not in text and os.sep + "work" not in text
    assert cuda_forms.WARP == 32
