"""Rows of the catalogue: a batch's classes as sets."""

from __future__ import annotations

import torch
from catalogue_pairs_cases import cosines, log_sum
from catalogue_table import Case
from torch import Tensor, nn

from fused_losses import losses


def graph_cut(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    e = ((s - 1) / 0.2).exp()
    return (e * negative - 0.7 * e * positive).sum(dim=1).mean()


def facility_location(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, _, negative = cosines(x, labels)
    some = negative.any(dim=1)
    if not some.any():
        return (x * 0).sum()
    return log_sum((s - 1)[some] / 0.2, negative[some]).mean()


def flmi(_: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, positive, negative = cosines(x, labels)
    some = positive.any(dim=1) & negative.any(dim=1)
    if not some.any():
        return (x * 0).sum()
    near, far = (0.2 * log_sum(s[some] / 0.2, which[some]) for which in (positive, negative))
    return torch.minimum(near, 0.6 * far).mean()


def gcmi(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    s, _, negative = cosines(x, labels)
    return (s * negative).sum(dim=1).mean()


CASES = {
    "GraphCutLoss": Case(lambda d: losses.GraphCutLoss(weight=0.7), graph_cut),
    "FacilityLocationLoss": Case(lambda d: losses.FacilityLocationLoss(), facility_location),
    "FLMILoss": Case(lambda d: losses.FLMILoss(weight=0.6), flmi),
    "GCMILoss": Case(lambda d: losses.GCMILoss(), gcmi),
}
