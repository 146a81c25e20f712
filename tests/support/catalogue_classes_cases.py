"""Rows of the catalogue: softmaxes with margins over centres that the module owns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case
from torch import Tensor, nn

from fused_losses import losses

C = 11
Ends = Callable[[Tensor], Tensor]  # target cosines -> what they become


def classed(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """A batch [n, d] float64 with labels below C."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return Call((x, labels % C))


def cosines(module: nn.Module, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1) @ F.normalize(module.weight, dim=-1).flatten(0, -2).T


def own(s: Tensor, labels: Tensor) -> Tensor:
    return s.gather(1, labels[:, None])[:, 0]


def moved(s: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Scores with others for the labels."""
    return torch.where(F.one_hot(labels, s.shape[1]).bool(), target[:, None], s)


def softmaxed(end: Ends, scale: float) -> Callable[..., Tensor]:
    """Cross entropy of cosines, the label's after `end`."""

    def loss(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        s = cosines(module, x)
        return F.cross_entropy(scale * moved(s, labels, end(own(s, labels))), labels)

    return loss


def arc(margin: float) -> Ends:
    def end(t: Tensor) -> Tensor:
        theta = t.acos()
        return torch.where(
            theta < math.pi - margin, (theta + margin).cos(), t - margin * math.sin(margin)
        )

    return end


def psi(t: Tensor) -> Tensor:
    """The paper's of m = 4."""
    four = 8 * t**4 - 8 * t**2 + 1
    k = (4 * t.acos() / math.pi).floor().detach()
    return (-1) ** k * four - 2 * k


def straight(end: Ends) -> Ends:
    return lambda t: t + (end(t.detach()) - t.detach())


def sub_centers(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x).view(len(x), C, 3).amax(dim=2)
    return F.cross_entropy(64 * moved(s, labels, arc(math.radians(28.6))(own(s, labels))), labels)


def large_margin(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    size = x.norm(dim=1, keepdim=True) * module.weight.norm(dim=1)
    return F.cross_entropy(size * moved(s, labels, psi(own(s, labels))), labels)


def sphere(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    z = x.norm(dim=1, keepdim=True) * moved(s, labels, psi(own(s, labels)))
    return F.cross_entropy(z, labels)


def norm_face(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module.scale * cosines(module, x), labels)


def elastic(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    drawn = torch.randn(len(x), dtype=torch.float64).to(x) * 0.0125 + 0.35
    return F.cross_entropy(64 * moved(s, labels, own(s, labels) - drawn), labels)


def ada_face(module: nn.Module, x: Tensor, labels: Tensor, **_: Any) -> Tensor:
    s = cosines(module, x)
    norm = x.detach().norm(dim=1).clamp(0.001, 100)
    mean = 0.99 * module.margin.mean + 0.01 * norm.mean()
    std = module.margin.std
    if len(x) > 1:
        std = 0.99 * std + 0.01 * norm.std()
    zhat = (0.333 * (norm - mean) / (std + 1e-3)).clamp(-1, 1)
    theta = (own(s, labels).clamp(-1 + 1e-3, 1 - 1e-3).acos() - 0.4 * zhat).clamp(
        1e-3, math.pi - 1e-3
    )
    return F.cross_entropy(64 * moved(s, labels, theta.cos() - 0.4 * (1 + zhat)), labels)


def sym_face(
    module: nn.Module, x: Tensor, labels: Tensor, left: Tensor, right: Tensor, frontness: Tensor
) -> Tensor:
    away = 1 - F.cosine_similarity(left, right)
    front = frontness >= 0.5
    return ada_face(module, x, labels) + away[front].sum() / len(x)


def halves(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows, and of each two halves and how frontal it is."""
    arguments = classed(n, d, labels, generator).arguments
    left, right = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    front = torch.rand(n, generator=generator, dtype=torch.float64)
    return Call(arguments, dict(left=left, right=right, frontness=front))


def curricular(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    t = own(s, labels)
    average = (0.99 * module.margin.t + 0.01 * t.mean()).detach()
    threshold = (t.acos() + 0.5).cos().detach()
    bent = torch.where(s > threshold[:, None], s * (average + s), s)
    return F.cross_entropy(64 * moved(bent, labels, arc(0.5)(t)), labels)


def mag_face(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    t, a = own(s, labels), x.norm(dim=1).clamp(10, 110)
    margin = (0.8 - 0.45) / 100 * (a - 10) + 0.45
    end = torch.where(t > 0, (t.acos() + margin).cos(), t)
    each = F.cross_entropy(64 * moved(s, labels, end), labels, reduction="none")
    return (each + 35 * (a / 110**2 + 1 / a)).mean()


def long(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Rows as long as those whose length MagFace tells apart."""
    x, labels = classed(n, d, labels, generator).arguments
    return Call((20 * x, labels))


def mv_softmax(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    t = arc(0.5)(own(s, labels))
    lifted = torch.where(s > t.detach()[:, None], 1.2 * s + 0.2, s)
    return F.cross_entropy(32 * moved(lifted, labels, t), labels)


def sface(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    theta = s.detach().acos()
    hot = F.one_hot(labels, C).bool()
    pull, push = torch.sigmoid(80 * (theta - 0.8)), torch.sigmoid(80 * (1.23 - theta))
    return 64 * torch.where(hot, -pull * s, push * s).sum(dim=1).mean()


def sphereface2(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    g = 2 * ((cosines(module, x) + 1) / 2) ** 3 - 1
    hot = F.one_hot(labels, C).bool()
    pull = -F.logsigmoid(40 * (g - 0.4) + module.bias)
    push = -F.logsigmoid(-40 * (g + 0.4) - module.bias)
    return 50 / 40 * torch.where(hot, 0.7 * pull, 0.3 * push).sum(dim=1).mean()


def mada_cos(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s = cosines(module, x)
    t = own(s, labels)
    median = t.detach().median()
    scale = (math.log(9_999_999 * 0.98 / 0.02) / (1 - median)).clamp_min(32)
    at = int((t == median).int().argmax())
    others = torch.cat([s[at, : labels[at]], s[at, labels[at] + 1 :]]).detach()
    background = (scale * others).logsumexp(0)
    margin = (median - (background + math.log(0.02 / 0.98)) / scale).clamp_min(0)
    return F.cross_entropy(scale * moved(s, labels, t - margin), labels)


def unpg(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, unit = cosines(module, x), F.normalize(x, dim=1)
    p = unit @ unit.T
    pairs = p[(labels[:, None] != labels).triu(1)]
    z = 64 * moved(s, labels, own(s, labels) - 0.5)
    if len(pairs):
        order = pairs.detach().sort().values
        low, high = order[int(0.25 * len(pairs))], order[int(0.75 * len(pairs))]
        reach = 1.5 * (high - low)
        kept = pairs[(pairs >= low - reach) & (pairs <= high + reach)]
        z = torch.cat([z, (64 * kept).logsumexp(0).expand(len(x), 1)], dim=1)
    return F.cross_entropy(z, labels)


def head(build: Callable[..., nn.Module], formula: Callable[..., Tensor], **row: Any) -> Case:
    return Case(lambda d: build(C, d), formula, **dict(dict(call=classed), **row))


# averages that move at each call, or weights that are not differentiated: no differences
HELD: dict[str, Any] = dict(gradcheck=False)
CASES = {
    "ArcFaceLoss": head(losses.ArcFaceLoss, softmaxed(arc(math.radians(28.6)), 64)),
    "SubCenterArcFaceLoss": head(losses.SubCenterArcFaceLoss, sub_centers),
    "CosFaceLoss": head(losses.CosFaceLoss, softmaxed(lambda t: t - 0.35, 64)),
    "LargeMarginSoftmaxLoss": head(losses.LargeMarginSoftmaxLoss, large_margin),
    "SphereFaceLoss": head(losses.SphereFaceLoss, sphere),
    "NormalizedSoftmaxLoss": head(losses.NormalizedSoftmaxLoss, softmaxed(lambda t: t, 20)),
    "NormFaceLoss": head(losses.NormFaceLoss, norm_face),
    "CombinedMarginLoss": head(
        losses.CombinedMarginLoss,
        softmaxed(straight(lambda t: (t.acos() + 0.5).cos()), 64),
        **HELD,
    ),
    "ElasticFaceLoss": head(
        lambda c, d: losses.ElasticFaceLoss(c, d, "cos"), elastic, ordered=True
    ),
    "AdaFaceLoss": head(losses.AdaFaceLoss, ada_face, **HELD),
    "SymFaceLoss": head(losses.SymFaceLoss, sym_face, call=halves, **HELD),
    "CurricularFaceLoss": head(losses.CurricularFaceLoss, curricular, **HELD),
    "MagFaceLoss": head(losses.MagFaceLoss, mag_face, call=long),
    "MVSoftmaxLoss": head(losses.MVSoftmaxLoss, mv_softmax, **HELD),
    "SFaceLoss": head(losses.SFaceLoss, sface, **HELD),
    "SphereFace2Loss": head(losses.SphereFace2Loss, sphereface2),
    "MadaCosLoss": head(losses.MadaCosLoss, mada_cos, **HELD),
    "UNPGLoss": head(losses.UNPGLoss, unpg),
}
