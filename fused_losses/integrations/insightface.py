"""insightface's recognition/arcface_torch: its sharded head, without the logits of all classes.

    import partial_fc_v2
    fused_losses.integrations.accelerate(partial_fc_v2)      # or its class; or "insightface"

    z_j = s clamp(cos(x_i, w_j)),   z_y = s margin(cos(x_i, w_y)),   of the gathered batch
    loss = mean of min(log sum_j e^{z_j} - z_y, -log 1e-30)

The slope of the margin counts as 1, and embeddings get W times the gradient, as the peer has it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_losses.base.numerics import against, no_autocast
from fused_losses.base.unit_norm import unit
from fused_losses.centers.collectives import Ranks
from fused_losses.centers.gathering import all_rows
from fused_losses.functions.margin_calls import apply_margin, bend_of
from fused_losses.integrations.acceleration import NotCovered, Peer, PeerCall, PeerRow
from fused_losses.margins import ArcFace, CosFace, InterclassFilter, Margin
from fused_losses.primitives.row_statistics.op import row_statistics

LARGEST = -math.log(1e-30)  # of a row's loss: the peer's share of the softmax has this floor


class _PeerMargin(NamedTuple):
    """The peer's margin as one of ours."""

    margin: Margin | None
    scale: float


def _margin_of(module: Any) -> _PeerMargin:
    """By its class and numbers; and by what it does to some cosines: users keep the file."""
    name = type(module).__name__
    try:
        if name == "CombinedMarginLoss":
            found = _combined(module)
        elif name == "ArcFace":
            found = _PeerMargin(ArcFace(module.margin, "none"), float(module.s))
        elif name == "CosFace":
            found = _PeerMargin(CosFace(module.m), float(module.s))
        else:
            raise NotCovered(f"{name}, a margin that is not known")
    except (AttributeError, TypeError, ValueError) as error:
        raise NotCovered(f"{name} of other numbers: {error}") from error
    if not _does(module, found):
        raise NotCovered(f"{name}, which computes something else here")
    return found


def _combined(module: Any) -> _PeerMargin:
    if module.m1 == 1 and module.m3 == 0:
        margin = ArcFace(module.m2, "none")
    elif module.m3 > 0:
        margin = CosFace(module.m3)  # m1 and m2 take no part
    else:
        raise NotCovered(f"m1={module.m1}, m3={module.m3}, which the peer refuses")
    threshold = module.interclass_filtering_threshold
    if threshold > 0:
        margin = InterclassFilter(margin, threshold)
    return _PeerMargin(margin, float(module.s))


def _does(module: Any, found: _PeerMargin) -> bool:
    """Whether the peer's module makes of some cosines what ours does."""
    cosines = torch.linspace(-0.98, 0.98, 15, dtype=torch.float64).view(5, 3)
    cosines = cosines[[3, 0, 4, 1, 2]]
    labels = torch.tensor([0, 2, 1, -1, 1])
    with torch.no_grad():
        got = module(cosines.clone(), labels[:, None])
        kept = cosines
        if isinstance(found.margin, InterclassFilter):
            kept = torch.where(cosines > found.margin.threshold, 0, cosines)
        here = labels >= 0
        at = here.nonzero()[:, 0], labels[here]
        kept = kept.index_put(at, found.margin(cosines[at]) if found.margin else cosines[at])
    return torch.allclose(got, found.scale * kept, rtol=1e-9, atol=1e-9 * found.scale)


class _Joined(torch.autograd.Function):
    """log sum over the ranks of e^{lse}, the same on each. [P]"""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, ranks: Ranks) -> Tensor:
        top = lse.clone()
        ranks.maximum_(top)
        top = torch.where(top > -torch.inf, top, 0)
        mass = (lse - top).exp()
        total = mass.clone()
        ranks.sum_(total)
        ctx.save_for_backward(torch.where(total > 0, mass / total, 0))
        return total.log() + top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class _Summed(torch.autograd.Function):
    """The sum over the ranks, the same on each, which each differentiates alike."""

    @staticmethod
    def forward(ctx: Any, each: Tensor, ranks: Ranks) -> Tensor:
        total = each.clone()
        ranks.sum_(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def partial_fc(call: PeerCall, head: Any, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
    """The loss of all ranks' rows; the classes are drawn, and the weight is read, as the peer's."""
    if head.fp16:
        raise NotCovered("fp16=True, whose products are of 16 bits")
    if type(head.dist_cross_entropy).__name__ != "DistCrossEntropy":
        raise NotCovered(f"{type(head.dist_cross_entropy).__name__}, a loss that is not known")
    if local_embeddings.dtype != head.weight.dtype or local_embeddings.dim() != 2:
        raise NotCovered("embeddings of another shape or dtype than the weight's")
    if head.last_batch_size not in (0, len(local_embeddings)):
        raise NotCovered("batches of two sizes, which the peer refuses")
    margin, scale = _margin_of(head.margin_softmax)
    head.last_batch_size = len(local_embeddings)
    ranks = Ranks()
    with no_autocast(local_embeddings.device):
        embeddings, _ = all_rows(local_embeddings, gradient_scale="ddp_mean", even=True)
        labels = ranks.all_gather(local_labels.squeeze_().long().view(-1)).view(-1)
        here = (labels >= head.class_start) & (labels < head.class_start + head.num_local)
        labels = torch.where(here, labels - head.class_start, -1)
        classes = None
        if head.sample_rate < 1:
            with torch.no_grad():  # the rows themselves are read where they lie
                head.sample(labels.clone()[:, None], here[:, None])
            classes = head.weight_index
        bend = bend_of(margin, torch.zeros_like(embeddings[:, 0]), here)
        if bend is not None:
            # from cosines to scores
            t, p, q, r = bend
            bend = torch.stack((t * scale, p * scale, q, r / scale)).to(embeddings.dtype)
        found = row_statistics(
            unit(embeddings) * scale,
            head.weight,
            labels,
            classes=classes,
            normalize=True,
            bend=bend,
            backend=call.backend,
        )
        moved = scale * apply_margin(margin, found.target / scale, None, "straight_through", here)
        others = _Joined.apply(found.lse, ranks)
        target = _Summed.apply(torch.where(here, moved, 0), ranks)
        present = here.to(others.dtype)
        ranks.sum_(present)
        # of a label that no rank has, the peer's share is its floor, and all classes are pushed
        each = torch.where(present > 0, against(target, others), others)
        floor = each.detach().clamp_max(LARGEST).where(present > 0, LARGEST)
        return (each + (floor - each.detach())).mean().to(local_embeddings.dtype)


_SCORES = "changes the scores that it is given; the head knows its numbers"
PEER = Peer(
    package="partial_fc_v2",
    distribution="insightface's recognition/arcface_torch, in the script's folder,",
    versions=(),
    rows=(
        PeerRow(
            "PartialFC_V2",
            "forward",
            partial_fc,
            "row_statistics over the shards",
            "fp16=True; margins other than the three below, or changed ones",
        ),
    ),
    left={"CombinedMarginLoss": _SCORES, "ArcFace": _SCORES, "CosFace": _SCORES},
)
