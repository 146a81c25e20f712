"""How many kernels a step launches on a GPU, what it holds there, and what Triton compiles for it.

Forward and backward on CUDA tensors without values; `test_fake_gpu.py` runs this file. A launch is
one of our kernels or one of PyTorch's operators, which may launch more than one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import fake_gpu
import launch_keys
import pytest
import torch
from fake_gpu import Noted
from torch import Tensor

from fused_losses import functional as F
from fused_losses.margins import ArcFace

DEVICE = "cuda:1"
BOTH = ("triton", "cuda", "bounded")
BF16, FP32 = torch.bfloat16, torch.float32


def rows(*shape: int, dtype: torch.dtype = BF16, leaf: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE, requires_grad=leaf)


def labels(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int64, device=DEVICE)


def margin_softmax(
    n: int, c: int, d: int, dtype: torch.dtype = BF16, backend: str | None = None
) -> Tensor:
    x, w = rows(n, d, dtype=dtype), rows(c, d, dtype=dtype)
    loss = F.margin_softmax(x, w, labels(n), margin=ArcFace(0.5), backend=backend)
    assert isinstance(loss, Tensor)
    return loss


def linear_cross_entropy(n: int, c: int, d: int, dtype: torch.dtype = BF16) -> Tensor:
    return F.linear_cross_entropy(rows(n, d, dtype=dtype), rows(c, d, dtype=dtype), labels(n))


def info_nce(
    n: int, d: int, dtype: torch.dtype = BF16, backend: str | None = None, normalize: bool = False
) -> Tensor:
    x, y = rows(n, d, dtype=dtype), rows(n, d, dtype=dtype)
    return F.info_nce(x, y, symmetric=True, normalize=normalize, backend=backend)


def sub_centers(n: int, c: int, k: int, d: int) -> Tensor:
    loss = F.margin_softmax(rows(n, d), rows(c, k, d), labels(n), margin=ArcFace(0.5))
    assert isinstance(loss, Tensor)
    return loss


def topk(n: int, m: int, d: int, metric: str, dtype: torch.dtype = BF16) -> Tensor:
    x, y = rows(n, d, dtype=dtype, leaf=False), rows(m, d, dtype=dtype, leaf=False)
    return F.pairwise_topk(x, y, 10, metric)[0]


class Launches(NamedTuple):
    """A step, and how much it launches at most."""

    step: Callable[[], Tensor]
    kernels: int  # ours
    library: int  # products
    vectors: int  # every other operator, on rows and vectors of a row's length
    mib: int  # held by one of our ops beside inputs and outputs


TABLE = {
    "margin_softmax bf16": Launches(lambda: margin_softmax(1024, 10**6, 512), 43, 35, 23, 256),
    "margin_softmax fp32": Launches(
        lambda: margin_softmax(1024, 10**6, 512, FP32), 63, 51, 19, 264
    ),
    "linear_cross_entropy bf16": Launches(
        lambda: linear_cross_entropy(8192, 131_072, 1024), 21, 32, 28, 192
    ),
    "linear_cross_entropy fp32": Launches(
        lambda: linear_cross_entropy(8192, 131_072, 1024, FP32), 26, 36, 22, 264
    ),
    "info_nce bf16": Launches(lambda: info_nce(32_768, 512), 68, 32, 125, 288),
    "info_nce fp32": Launches(lambda: info_nce(32_768, 512, FP32), 68, 32, 122, 352),
    "info_nce of unit rows": Launches(
        lambda: info_nce(32_768, 512, normalize=True), 72, 32, 125, 288
    ),
    "sub-centres": Launches(lambda: sub_centers(1024, 250_000, 4, 512), 41, 35, 182, 288),
    "margin_softmax by CUDA kernels": Launches(
        lambda: margin_softmax(1024, 10**6, 512, backend="cuda"), 109, 87, 26, 280
    ),
    "info_nce by CUDA kernels": Launches(
        lambda: info_nce(32_768, 512, backend="cuda"), 42, 94, 192, 400
    ),
    "topk of a bank": Launches(lambda: topk(1024, 10**6, 256, "dot"), 6, 0, 56, 48),
    "topk by angle": Launches(lambda: topk(1024, 10**6, 256, "cosine"), 8, 0, 88, 48),
    "topk by distance": Launches(
        lambda: topk(1024, 10**6, 256, "euclidean", FP32), 6, 0, 92, 48
    ),
    "margin_softmax, small": Launches(lambda: margin_softmax(256, 10_000, 512), 11, 3, 23, 40),
    "linear_cross_entropy, small": Launches(
        lambda: linear_cross_entropy(256, 10_000, 512), 6, 3, 28, 40
    ),
}  # fmt: skip
# at most so many launches: a tenth of a small step's time, and of one whose G comes in chunks
BARS = {
    "margin_softmax, small": 40,
    "linear_cross_entropy, small": 40,
    "margin_softmax bf16": 120,
    "linear_cross_entropy bf16": 120,
    "linear_cross_entropy fp32": 120,
}
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")


def run(step: Callable[[], Any]) -> None:
    value = step()
    if value.requires_grad:
        value.backward()


def counted(found: Noted) -> tuple[int, int, int]:
    """Kernels of ours, products of the library, other operators."""
    products = sum(name in PRODUCTS for name, _ in found.operations)
    return len(found.launches), products, len(found.operations) - products


@pytest.mark.parametrize("name", TABLE)
def test_launches_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = TABLE[name]
    with fake_gpu.gpu(monkeypatch, BOTH) as found:
        run(case.step)
    got, most = counted(found), (case.kernels, case.library, case.vectors)
    assert all(a <= b for a, b in zip(got, most, strict=True)), (got, Counter(found.operations))
    assert sum(got) <= BARS.get(name, sum(most)), got
    for op, held, told in found.memory:
        assert held <= min(told, case.mib << 20), (op, held, told)


# steps of a training epoch: 1,024 rows, and the rest that is left for its last one
EPOCHS: dict[str, Callable[[int], Any]] = {
    "margin_softmax": lambda n: margin_softmax(n, 100_000, 512),
    "margin_softmax fp32": lambda n: margin_softmax(n, 100_000, 512, FP32),
    "sub-centres": lambda n: F.margin_softmax(rows(n, 512), rows(10_000, 3, 512), labels(n)),
    "linear_cross_entropy": lambda n: linear_cross_entropy(n, 131_072, 1024),
    "info_nce": lambda n: info_nce(n, 512),
    "supervised_contrastive": lambda n: F.supervised_contrastive(rows(n, 512), labels(n)),
    "topk": lambda n: topk(n, 100_000, 256, "dot"),
}


@pytest.mark.parametrize("name", EPOCHS)
def test_ragged_last_batches_compile_one_kernel_at_most(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with launch_keys.compiled(monkeypatch) as found:
        run(lambda: EPOCHS[name](1024))
        whole = found.copy()
        for rest in (1021, 1018, 7):
            run(lambda n=rest: EPOCHS[name](n))
    assert whole.total() > 0
    assert (found - whole).total() <= 1, found - whole


def test_an_unaligned_view_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count counts: rows that begin between vectors are another kernel."""
    with launch_keys.compiled(monkeypatch) as found:
        run(lambda: linear_cross_entropy(64, 1000, 64))
        before = found.total()
        w = rows(1001 * 64 + 1)[1:64001].view(1000, 64)
        run(lambda: F.linear_cross_entropy(rows(64, 64), w, labels(64)))
    assert found.total() > before
