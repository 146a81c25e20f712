"""Heads over ranks, and their batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_losses import class_losses, margins
from fused_losses.centers import ClassCenters
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.unpg import UNPG

C, D = 23, 6
COUNTS = {1: [9], 2: [4, 5], 3: [5, 0, 4], 4: [2, 3, 0, 4]}  # rows of each rank: uneven, empty
PLAIN: dict[str, Any] = {"margin": None, "normalize": False, "bias": True}
HEADS: dict[str, dict[str, Any]] = {
    "arcface": {},
    "adaface": {"margin": "AdaFace"},
    "magface": {"margin": margins.MagFace(l_a=0.5, u_a=4.0)},
    "elastic": {"margin": margins.ElasticArcFace(0.4, 0.1)},
    "curricular": {"margin": "CurricularFace"},
    "mv-softmax": {"margin": "MVSoftmax"},
    "filter": {"margin": "InterclassFilter"},
    "sampled": {"sample_rate": 0.4},
    "sampled, corrected": {"sample_rate": 0.4, "log_q": True},
    "sub-centres": {"sub_centers": 3},
    "sub-centres, sampled": {"sub_centers": 2, "sample_rate": 0.5, "log_q": True},
    "sface": {"margin": class_losses.SFace()},
    "sphereface2": {"margin": class_losses.SphereFace2(0.3)},
    "sphereface2, sampled": {
        "margin": class_losses.SphereFace2(0.3), "sample_rate": 0.5, "log_q": True,
    },
    "several labels": {"margin": class_losses.MLCD(16.0), "labels": 3},
    "adaptive scale": {"margin": AdaptiveScale(smallest=2.0)},
    "scale that learns, smoothed": {"scale": 7.0, "label_smoothing": 0.1},
    "smoothed, a sample": {"label_smoothing": 0.2, "sample_rate": 0.4},
    "smoothed sub-centres, sampled": {
        "label_smoothing": 0.2, "sub_centers": 2, "sample_rate": 0.5, "log_q": True,
    },
    "its sample": {"scale": 7.0, "sample_rate": 0.4, "log_q": True},
    "shared negatives": {"batch_negatives": UNPG(1.0)},
    "margins of classes": {"margin": margins.ArcFace(torch.linspace(0.1, 0.6, C))},
    "their sample, several centres": {
        "margin": margins.CosFace(torch.linspace(0, 0.5, C)), "sample_rate": 0.5, "sub_centers": 2,
    },
    "bias, a scale that learns": {**PLAIN, "scale": 2.0},
    "bias, sampled": {**PLAIN, "sample_rate": 0.4, "log_q": True},
}  # fmt: skip


def make(name: str, **more: Any) -> ClassCenters:
    options = {k: v for k, v in HEADS[name].items() if k != "labels"}
    if isinstance(options.get("margin"), str):
        kind = getattr(margins, options["margin"])
        inner = (margins.ArcFace(),) if options["margin"] == "InterclassFilter" else ()
        options["margin"] = kind(*inner)
    if "scale" in options:
        options["scale"] = nn.Parameter(torch.tensor(options["scale"], dtype=torch.float64))
    defaults = dict(dtype=torch.float64, scale=16.0, chunk_bytes=4 * D * 8, seed=1)
    return ClassCenters(C, D, **{**defaults, **options, **more})


def batch(name: str, step: int = 0) -> tuple[Tensor, Tensor]:
    """The whole batch of a step, one row of it ignored."""
    generator = torch.Generator().manual_seed(100 + step)
    n = sum(COUNTS[1])
    x = torch.randn(n, D, dtype=torch.float64, generator=generator)
    width = HEADS[name].get("labels")
    y = torch.randint(0, C, (n, width) if width else (n,), generator=generator)
    y[2] = -100
    return x, y


def own(rank: int, world: int, *rows: Tensor) -> list[Tensor]:
    start = sum(COUNTS[world][:rank])
    return [t[start : start + COUNTS[world][rank]].clone() for t in rows]


def train(rank: int, options: dict[str, Any], steps: int) -> dict[str, Any]:
    world = dist.get_world_size()
    head = make("arcface", **options)
    losses, gradients = [], []
    for step in range(steps):
        x, y = own(rank, world, *batch("arcface", step))
        x.requires_grad_()
        loss = head(x, y)
        loss.backward()
        head.optimizer.step()
        losses.append(loss.item())
        gradients.append(x.grad / world)
    head.settle()
    return {"losses": losses, "weight": head.weight.clone(), "dx": gradients}


SGD = dict(optimizer="sgd", optimizer_options=dict(lr=0.3, momentum=0.9, weight_decay=0.01))
