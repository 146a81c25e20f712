"""Rows of the catalogue: contrastive losses of a batch by its labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from catalogue_pairs_cases import cosines, log_sum
from catalogue_table import Case
from torch import Tensor, nn

from fused_losses import losses


def nt_xent(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """-log(e^z_p / (e^z_p + sum_N e^z)), of each positive pair."""
    s, positive, negative = cosines(x, labels)
    terms = [
        torch.cat([z[p][None], z[n]]).logsumexp(0) - z[p]
        for z, near, n in zip(s / 0.07, positive, negative, strict=True)
        for p in near.nonzero()[:, 0]
    ]
    return torch.stack(terms).mean() if terms else (x * 0).sum()


def supcon(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    some = positive.any(dim=1)
    if not some.any():
        return (x * 0).sum()
    z = s[some] / 0.1
    mean = (z * positive[some]).sum(dim=1) / positive[some].sum(dim=1)
    return (log_sum(z, (positive | negative)[some]) - mean).mean()


def soft_nearest_neighbor(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    _, positive, negative = cosines(x, labels)
    some = positive.any(dim=1)
    if not some.any():
        return (x * 0).sum()
    unit = F.normalize(x, dim=1)
    z = -(unit[:, None] - unit).square().sum(dim=2)[some]
    return (log_sum(z, (positive | negative)[some]) - log_sum(z, positive[some])).mean()


def n_pairs(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The first two rows of each class that has two."""
    unit = F.normalize(x, dim=1)
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    rows = [r[:2] for r in rows if len(r) > 1]
    if not rows:
        return (x * 0).sum()
    a, p = torch.stack(rows).unbind(dim=1)
    return F.cross_entropy(unit[a] @ unit[p].T, torch.arange(len(a)))


CASES = {
    "NTXentLoss": Case(lambda d: losses.NTXentLoss(), nt_xent),
    "SupConLoss": Case(lambda d: losses.SupConLoss(), supcon),
    "SoftNearestNeighborLoss": Case(
        lambda d: losses.SoftNearestNeighborLoss(), soft_nearest_neighbor
    ),
    # the first rows of a class are others in another order; how many is read
    "NPairsLoss": Case(lambda d: losses.NPairsLoss(), n_pairs, ordered=True, compiles=False),
}
