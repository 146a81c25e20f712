"""Margin softmax's table of cases, its data and its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracles
import torch
from torch import Tensor

import fused_losses
from fused_losses import margins

# package margin (a factory: AdaFace has state) and the oracle's formula for it
MARGINS: dict[str, tuple[Callable[[], Any], Any]] = {
    "none": (lambda: None, None),
    "cosface": (lambda: margins.CosFace(0.35), oracles.cosface(0.35)),
    "arcface": (lambda: margins.ArcFace(0.5), oracles.arcface(0.5)),
    "arcface-monotone": (
        lambda: margins.ArcFace(0.5, "monotone"),
        oracles.arcface(0.5, "monotone"),
    ),
    "sphereface": (lambda: margins.SphereFace(4.0), oracles.sphereface4()),
    "combined": (
        lambda: margins.CombinedMargin(1.35, 0.3, 0.2),
        oracles.combined(1.35, 0.3, 0.2),
    ),
    "adaface": (
        lambda: margins.AdaFace().eval().requires_grad_(False),
        oracles.adaface(20.0, 100.0),
    ),
    "magface": (lambda: margins.MagFace(), oracles.magface()),
    "callable": (
        lambda: lambda t: t**3 - 0.1,
        lambda t, norm: (t**3 - 0.1, 3 * t**2, 0 * t),
    ),
}


@dataclass(frozen=True)
class Case:
    """One call of margin_softmax: shapes and options, with options made from a generator."""

    id: str
    n: int
    d: int
    c: int
    margin: str = "arcface"
    scale: float | str = 64.0
    normalize: bool = True
    bias: bool = False
    smoothing: float = 0.0
    ignored: float = 0.0  # the share of rows with ignore_index
    class_weight: bool = False
    classes: str = ""  # "", "sorted" or "unsorted"
    gradient: str = "exact"
    reduction: str = "mean"
    size: float = 1.0  # of the embeddings
    options: dict = field(default_factory=dict)


class Data:
    """Peaked data of a case: a third of the rows near their centre, duplicates among the rest."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        rng = np.random.default_rng([case.n, case.d, case.c])
        w = rng.standard_normal((case.c, case.d))
        labels = rng.integers(0, case.c, case.n)
        x = rng.standard_normal((case.n, case.d))
        x[::3] = 0.5 * x[::3] + w[labels[::3]]
        if case.n > 3:
            x[3], labels[3] = x[2], labels[2]  # the same row twice
        if case.c > 7:
            w[7] = w[2]  # the same centre twice: a tie for the hardest class
        x *= case.size / (np.sqrt(case.d) if not case.normalize else 1)
        ignored = rng.random(case.n) < case.ignored
        labels[ignored] = -100
        self.options: dict[str, Any] = {}
        self.x, self.w = (torch.from_numpy(a).to(dtype) for a in (x, w))
        self.labels = torch.from_numpy(labels)
        if case.bias:
            self.options["bias"] = torch.from_numpy(rng.standard_normal(case.c)).to(dtype)
        if case.class_weight:
            self.options["class_weight"] = torch.from_numpy(rng.uniform(0.2, 2, case.c)).to(dtype)
        if case.classes:
            own = np.unique(labels[labels >= 0])
            extra = np.setdiff1d(rng.permutation(case.c)[: case.c // 3], own)
            ids = own if case.classes == "target" else np.concatenate([own, extra])
            ids = np.sort(ids) if case.classes == "sorted" else rng.permutation(ids)
            self.options["classes"] = torch.from_numpy(ids)
        if case.scale == "scalar":
            self.options["scale"] = torch.tensor(23.0, dtype=dtype)
        elif case.scale == "rows":
            self.options["scale"] = torch.from_numpy(rng.uniform(5, 40, case.n)).to(dtype)
        elif case.scale == "norm":
            self.options["scale"] = self.x.norm(dim=1)
        else:
            self.options["scale"] = case.scale
        self.options["label_smoothing"] = case.smoothing
        # what multiplies the rows' losses under reduction="none"
        self.upstream = torch.from_numpy(rng.standard_normal(case.n))

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs, as fresh leaves, by the oracle's name of their gradient."""
        found = {"dx": self.x, "dw": self.w, "dbias": self.options.get("bias")}
        if isinstance(self.options["scale"], Tensor):
            found["dscale"] = self.options["scale"]
        return {k: v.clone().requires_grad_() for k, v in found.items() if v is not None}


def oracle(case: Case, data: Data) -> oracles.Answer:
    """What the exact answer is for the (already rounded) inputs."""
    options = {k: v.double().numpy() if isinstance(v, Tensor) and v.is_floating_point() else v
               for k, v in data.options.items()}  # fmt: skip
    if "classes" in options:
        options["classes"] = options["classes"].numpy()
    return oracles.margin_softmax(
        data.x.double().numpy(),
        data.w.double().numpy(),
        data.labels.numpy(),
        margin=MARGINS[case.margin][1],
        penalty=oracles.magface_penalty if case.margin == "magface" else None,
        normalize=case.normalize,
        straight_through=case.gradient == "straight_through",
        reduction=case.reduction,
        upstream=data.upstream.numpy() if case.reduction == "none" else None,
        **options,
    )


def ask(
    case: Case, data: Data, backend: str, **changes: Any
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """The loss (under "none": weighted and summed), its gradients by name, and the stats."""
    leaves = data.leaves()
    options = {
        "margin": MARGINS[case.margin][0](),
        "normalize": case.normalize,
        "gradient": case.gradient,
        "reduction": case.reduction,
        "return_stats": True,
        **data.options,
        **case.options,
        **changes,
    }
    if "dbias" in leaves:
        options["bias"] = leaves["dbias"]
    if "dscale" in leaves:
        options["scale"] = leaves["dscale"]
    loss, stats = fused_losses.margin_softmax(
        leaves["dx"], leaves["dw"], data.labels, backend=backend, **options
    )
    if case.reduction == "none":
        assert loss.shape == (case.n,)
        loss = (loss * data.upstream).sum()
    loss.backward()
    return loss.detach(), {k: v.grad for k, v in leaves.items()}, stats
