"""Losses over classes with sub-centres, several labels a row, or no softmax; whole or sharded.

The losses as values (`losses.class_values`), and the function that runs one (`losses.class_loss`).
"""

from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.class_values import (
    MLCD,
    ClassLoss,
    MergedRows,
    SFace,
    Softmax,
    SoftTriple,
    SphereFace2,
)
from fused_losses.functions.difference_values import LDR, CrammerSinger, WestonWatkins
from fused_losses.functions.labels_together import LabelsTogether
from fused_losses.functions.mapped_ldr import ALDR, MappedLDR
from fused_losses.functions.normalized_values import MSE, NCE, ActivePassive
from fused_losses.functions.probability_values import (
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
from fused_losses.functions.row_weights import BiasWeights, equity_weights

__all__ = [
    "AGCE",
    "ALDR",
    "AUL",
    "GCE",
    "LDR",
    "MAE",
    "MLCD",
    "MSE",
    "NCE",
    "SCE",
    "ActivePassive",
    "BiasWeights",
    "ClassLoss",
    "CompSum",
    "CrammerSinger",
    "Focal",
    "LabelsTogether",
    "MappedLDR",
    "MergedRows",
    "OfProbability",
    "Poly1",
    "SFace",
    "SoftTriple",
    "Softmax",
    "SphereFace2",
    "WestonWatkins",
    "class_loss",
    "equity_weights",
]
