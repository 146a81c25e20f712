"""Modules over pairs give the authors' own numbers, values and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from torch import nn

from fused_losses import losses

FOLDER = Path(__file__).parents[1] / "golden" / "pairs"
# by their defaults, and what the record's code has otherwise
MODULES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "msloss_orig_b40": (losses.MultiSimilarityLoss, dict(beta=40.0, mining_margin=0.1)),
    "pml_MultiSimilarityLoss": (losses.MultiSimilarityLoss, {}),
    "pml_ContrastiveLoss": (losses.ContrastiveLoss, {}),
    "pml_SignalToNoiseRatioContrastiveLoss": (losses.SignalToNoiseRatioContrastiveLoss, {}),
    "pml_GeneralizedLiftedStructureLoss": (losses.GeneralizedLiftedStructureLoss, {}),
    "pml_IntraPairVarianceLoss": (losses.IntraPairVarianceLoss, {}),
    "pml_NPairsLoss": (losses.NPairsLoss, {}),
    "pml_SupConLoss": (losses.SupConLoss, {}),
    "pml_TripletMarginLoss_all": (losses.TripletMarginLoss, {}),
    "pml_TripletMarginLoss_swap_smooth": (
        losses.TripletMarginLoss,
        dict(margin=0.2, swap=True, smooth_loss=True),
    ),
    "pml_AngularLoss": (losses.AngularLoss, {}),
    "pml_HistogramLoss": (losses.HistogramLoss, dict(delta=0.1)),
    "ctl_batchhard_margin0.5": (losses.BatchHardTripletLoss, dict(margin=0.5)),
    "ctl_centroid": (losses.CentroidTripletLoss, dict(margin=0.5)),
    "opl_signed": (losses.OrthogonalProjectionLoss, {}),
    "opl_abs": (losses.OrthogonalProjectionLoss, dict(gamma=2.0, absolute=True)),
}


@pytest.mark.float64
@pytest.mark.parametrize("backend", ["reference", "cpu", "bounded"])
@pytest.mark.parametrize("name", MODULES)
def test_goldens(name: str, backend: str) -> None:
    data = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / f"{name}.npz").items()}
    build, options = MODULES[name]
    x = data["x"].double().requires_grad_()
    loss = build(backend=require(backend), **options)(x, data["labels"])
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.detach(), data["loss"].double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, data["grad_x"].double(), rtol=1e-5, atol=1e-8)


def test_records_are_of_these_modules() -> None:
    told = {g: e.module for e in losses.catalogue() for g in e.golden}
    for name, (build, _) in MODULES.items():
        assert told[name] is build, name
