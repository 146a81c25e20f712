"""Losses over classes by other rules, beside margin softmax with ArcFace at their size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.bench.measure import Provider
from fused_losses.bench.micro.cases import MARGIN, SCALE, Case, backward, in_float64
from fused_losses.class_losses import MLCD, ClassLoss, SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.margins import ArcFace


class Ruled(NamedTuple):
    """A loss, its centres of a class and labels of a row."""

    loss: ClassLoss
    centers: int = 1
    labels: int = 1


ARCFACE = ArcFace(MARGIN, beyond_pi="none")
LOSSES = {
    "sface": Ruled(SFace()),
    "sphereface2": Ruled(SphereFace2(0.0)),
    "mlcd": Ruled(MLCD(), labels=8),
    "soft_triple": Ruled(SoftTriple(), centers=3),
    "sub_centers": Ruled(Softmax(ARCFACE, SCALE), centers=3),
    "several_labels": Ruled(Softmax(ARCFACE, SCALE), labels=8),
}


def case(name: str, n: int, c: int, d: int, device: str = "cpu", rivals: str = "all") -> Case:
    """n rows against c classes of the loss; margin softmax against all their centres."""
    loss, centers, labels = LOSSES[name]
    torch.manual_seed(0)
    x = torch.randn(n, d, device=device).requires_grad_()
    w = torch.randn(c, centers, d, device=device).requires_grad_()
    y = torch.randint(0, c, (n, labels), device=device)

    def ruled(**options: Any) -> Provider:
        return lambda: backward(class_loss(x, w, y, loss, **options))

    def plain() -> Tensor:
        found = margin_softmax(x, w.flatten(0, 1), y[:, 0] * centers, margin=ARCFACE, scale=SCALE)
        assert isinstance(found, Tensor)  # no stats were asked for
        return backward(found)

    def materialised(x: Tensor, w: Tensor) -> Tensor:
        return class_loss(x, w, y, loss, backend="reference")

    beside = "margin softmax, ArcFace"
    providers = {"fused fp32": ruled(), beside: plain}
    if rivals != "none":
        providers["eager"] = ruled(backend="reference")
        providers["rule in PyTorch, by tiles"] = ruled(backend="bounded")
    return Case(
        title=f"{name}, B={n}, C={c:,}, K={centers}, D={d}, forward + backward",
        providers=providers,
        ours=["fused fp32"],
        leaves=[x, w],
        flops=4 * 2.0 * n * c * centers * d,
        bytes=2.0 * (c * centers + n) * d * 4,
        unlike=(beside,),
        truth=None if rivals == "none" else in_float64(materialised, (x, w)),
    )


CASES: dict[str, Callable[..., Case]] = {name: partial(case, name) for name in LOSSES}
