"""Other people's kernels, each where it is installed.

Those for a GPU are written from their documented interfaces; no GPU was at hand to run them on. One
that fails is reported in the table with its error; one that computes something else is not timed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fused_losses.base.records import told
from fused_losses.bench.measure import Provider

LossOfTensors = Callable[..., Tensor]
PANORAMA_LEVELS = 8
ABSENT: dict[str, str] = {}  # peers that were asked for, and why they are left out


@cache
def peer(name: str) -> ModuleType | None:
    """A module, or None with the reason printed, once: peers are no dependencies."""
    try:
        return importlib.import_module(name)
    # one that was built for another torch fails in its own way
    except Exception as error:
        ABSENT[name] = told(error)
        print(f"without {name}: {ABSENT[name]}", file=sys.stderr)
        return None


def _steps(losses: dict[str, LossOfTensors], *inputs: Tensor) -> dict[str, Provider]:
    def step(loss: LossOfTensors) -> Provider:
        def run() -> Tensor:
            value = loss(*inputs)
            value.backward()
            return value.detach()

        return run

    return {name: step(loss) for name, loss in losses.items()}


def cross_entropy(x: Tensor, w: Tensor, y: Tensor, scale: float) -> dict[str, Provider]:
    """Linear cross entropies of unit rows: no margin, so the peers do less. 16-bit inputs."""
    losses: dict[str, LossOfTensors] = {}
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        cce = peer("cut_cross_entropy")
        if cce is not None:
            losses["cut-cross-entropy"] = lambda x, w, y: cce.linear_cross_entropy(
                F.normalize(x) * scale, F.normalize(w), y
            )
        liger = peer("liger_kernel.transformers")
        if liger is not None:
            fused = liger.LigerFusedLinearCrossEntropyLoss()
            losses["Liger"] = lambda x, w, y: fused(F.normalize(w), F.normalize(x) * scale, y)
    return _steps(losses, x, w, y)


def metric_learning(
    loss: str,
    x: Tensor,
    labels: Tensor,
    *,
    distance: str = "DotProductSimilarity",
    **options: Any,
) -> dict[str, Provider]:
    """A loss of pytorch-metric-learning; `miner`: what chooses its pairs.

    Of rows as they are, but that cosines are of rows that it normalises.
    """
    losses = peer("pytorch_metric_learning.losses")
    if losses is None:
        return {}
    distances = importlib.import_module("pytorch_metric_learning.distances")
    miner = options.pop("miner", None)
    # a cosine takes no choice
    choice = {} if distance == "CosineSimilarity" else {"normalize_embeddings": False}
    kind = getattr(distances, distance)(**choice)
    run = getattr(losses, loss)(distance=kind, **options)
    if miner is None:
        return _steps({"pytorch-metric-learning": run}, x, labels)
    miners = importlib.import_module("pytorch_metric_learning.miners")
    mined = getattr(miners, miner)(distance=kind)
    return _steps({"pytorch-metric-learning": lambda x, y: run(x, y, mined(x, y))}, x, labels)


def distillation(of_scores: LossOfTensors) -> dict[str, LossOfTensors]:
    """Liger's fused distillation, which walks by chunks of 1,024 rows, of a loss of two scores."""
    found = peer("liger_kernel.chunked_loss.fused_linear_distillation")
    if found is None:
        return {}
    base = found.LigerFusedLinearDistillationBase

    class Fused(base):
        @staticmethod
        def distillation_loss_fn(u: Tensor, v: Tensor, **_: object) -> Tensor:
            return of_scores(u, v) * len(u)

        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            return base.forward(Fused, ctx, *inputs, weight_hard_loss=0.0, weight_soft_loss=1.0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            return base.backward(ctx, grad)[:5]

    def loss(x: Tensor, w: Tensor, t: Tensor, wt: Tensor) -> Tensor:
        return Fused.apply(x, w, t, wt, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    return {"Liger": loss}


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Provider]:
    """The sigmoid loss of siglip-kernel, whose temperature comes as a logarithm."""
    found = peer("siglip_kernel") if x.is_cuda else None
    if found is None:
        return {}
    loss = {"siglip-kernel": lambda x, y, s, b: found.fused_siglip_loss(x, y, s.log(), b)}
    return _steps(loss, x, y, scale, bias)


def attention(query: Tensor, key: Tensor, value: Tensor, slope: Tensor) -> dict[str, Provider]:
    """torch's own attention kernels, on one head: SDPA anywhere, flex_attention on a GPU."""
    kernels: dict[str, LossOfTensors] = {"SDPA": F.scaled_dot_product_attention}
    if query.is_cuda:
        kernels["flex_attention"] = torch.compile(flex_attention)

    def loss(kernel: LossOfTensors) -> LossOfTensors:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = kernel(*(t[None, None] for t in (q, k, v)))[0, 0]
            return (out * slope).sum()

        return run

    losses = {name: loss(kernel) for name, kernel in kernels.items()}
    return _steps(losses, query, key, value)


def flat(
    faiss: ModuleType,
    x: Tensor,
    y: Tensor,
    k: int,
    axes: Tensor | None = None,  # [D, D] orthonormal, to which Panorama's rows are turned
) -> dict[str, Provider]:
    """faiss' flat indices on the CPU: all products, and Panorama's, a run of columns at a time."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    width = x.shape[1]
    plain = faiss.IndexFlatIP(width)
    plain.add(y.numpy())
    found: dict[str, Provider] = {
        "faiss IndexFlatIP": lambda: torch.from_numpy(plain.search(x.numpy(), k)[0])
    }
    if not hasattr(faiss, "IndexFlatIPPanorama"):
        print(f"without Panorama: faiss {faiss.__version__} has none", file=sys.stderr)
        return found
    levels = faiss.IndexFlatIPPanorama(width, PANORAMA_LEVELS)
    levels.add((y if axes is None else y @ axes).numpy())

    def panorama() -> Tensor:
        rows = x if axes is None else x @ axes
        return torch.from_numpy(levels.search(rows.numpy(), k)[0])

    return found | {"faiss IndexFlatIPPanorama": panorama}


def neighbours(x: Tensor, y: Tensor, k: int) -> dict[str, Provider]:
    """faiss' flat index with its bank on the GPU."""
    faiss = peer("faiss") if x.is_cuda else None
    if faiss is None or not hasattr(faiss, "StandardGpuResources"):
        return {}
    # its search then takes tensors of the device
    importlib.import_module("faiss.contrib.torch_utils")
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), y.shape[1])
    index.add(y.float())
    return {"faiss GpuIndexFlatIP": lambda: index.search(x.float(), k)[0]}
