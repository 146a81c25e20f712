"""How the authors' numbers for the losses over rows are asked of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.functions import angular, centroids, margin_pairs, neighbours, variance
from fused_losses.functions import chosen_triplets as ct
from fused_losses.functions import ranking as rl
from fused_losses.functions import triplets as tl


def listed(labels: Tensor) -> tuple[Tensor, ...]:
    """Every triplet of a batch."""
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    return (positive[:, :, None] & ~same[:, None]).nonzero().unbind(1)


def over_nonzero(losses: Tensor) -> Tensor:
    return losses.sum() / (losses > 0).sum()


def swap_smooth(x: Tensor, labels: Tensor, backend: str) -> Tensor:
    """Listed triplets: no backend has a say."""
    x = F.normalize(x)
    options = dict(margin=0.2, eps=0.0, swap=True, smooth=True)
    return tl.triplet_margin(x, x, x, triplets=listed(labels), **options)


UNIT = {"normalize": True}
GOLDENS: dict[str, Callable[..., Tensor]] = {
    "pml_TripletMarginLoss_all": lambda x, y, **o: tl.all_triplets(x, y, **UNIT, **o),
    "pml_TripletMarginLoss_swap_smooth": swap_smooth,
    "pml_TripletMarginLoss_batchhard": lambda x, y, **o: over_nonzero(
        ct.batch_hard_triplet(x, y, margin=0.2, reduction="none", **UNIT, **o)
    ),
    "pml_ContrastiveLoss": lambda x, y, **o: margin_pairs.contrastive(x, y, **UNIT, **o),
    "pml_SignalToNoiseRatioContrastiveLoss": lambda x, y, **o: margin_pairs.snr_contrastive(
        x, y, **UNIT, **o
    ),
    "ctl_batchhard_margin0.5": lambda x, y, **o: ct.batch_hard_triplet(x, y, margin=0.5, **o),
    "ctl_centroid": lambda x, y, **o: centroids.centroid_triplet(x, y, **o),
    "pml_AngularLoss": lambda x, y, **o: angular.angular(
        x, y, normalize_negatives=False, **UNIT, **o
    ),
    "pml_IntraPairVarianceLoss": lambda x, y, **o: variance.intra_pair_variance(x, y, **UNIT, **o),
    "pml_HistogramLoss": lambda x, y, **o: rl.histogram(x, y, bins=20, **UNIT, **o),
    "icnn_full": lambda x, y, **o: neighbours.icnn(x, y, neighbors=4, window=6, **o),
}
