"""Losses over classes with sub-centres, several labels a row, or no softmax; whole or sharded.

The losses as values (`losses.class_values`), and the function that runs one (`losses.class_loss`).
"""

from fused_losses.losses.class_loss import class_loss
from fused_losses.losses.class_values import (
    MLCD,
    ClassLoss,
    MergedRows,
    SFace,
    Softmax,
    SoftTriple,
    SphereFace2,
)
from fused_losses.losses.probability_values import (
    AGCE,
    AUL,
    GCE,
    MAE,
    SCE,
    CompSum,
    Focal,
    OfProbability,
    Poly1,
)

__all__ = [
    "AGCE",
    "AUL",
    "GCE",
    "MAE",
    "MLCD",
    "SCE",
    "ClassLoss",
    "CompSum",
    "Focal",
    "MergedRows",
    "OfProbability",
    "Poly1",
    "SFace",
    "SoftTriple",
    "Softmax",
    "SphereFace2",
    "class_loss",
]
