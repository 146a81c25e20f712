"""pytorch-metric-learning: what computes in the place of its losses."""

from __future__ import annotations

from fused_losses.integrations.acceleration import Peer
from fused_losses.integrations.pytorch_metric_learning.calls import PACKAGE
from fused_losses.integrations.pytorch_metric_learning.classes import CLASS_LOSSES
from fused_losses.integrations.pytorch_metric_learning.memory import MEMORY
from fused_losses.integrations.pytorch_metric_learning.pairs import PAIR_LOSSES
from fused_losses.integrations.pytorch_metric_learning.ranks import RANK_LOSSES
from fused_losses.integrations.pytorch_metric_learning.triplets import TRIPLET_LOSSES

LEFT = {
    "losses.DynamicSoftMarginLoss": "each triplet's difference moves a histogram that the loss "
    "keeps, which needs them all",
    "losses.ManifoldLoss": "inverts a matrix of all rows and proxies: nothing to stream",
    "losses.MultipleLosses": "calls its losses, which are accelerated",
    "losses.P2SGradLoss": "changes its own parameter in the call and asserts that it did",
    "losses.SelfSupervisedLoss": "calls its loss, which is accelerated",
    "losses.VICRegLoss": "products of columns, D x D: no matrix of pairs",
    "distances": "return the matrix that they are asked for",
    "miners": "the tuples that they return are lists of pairs; those of `fused_losses.miners` "
    "have the same names and find them without the matrix",
    "reducers": "take the losses of rows, which ours are, or a number that is reduced",
    "regularizers": "functions of the rows or of the centres",
}

PEER = Peer(
    package=PACKAGE,
    distribution="pytorch-metric-learning",
    versions=("2.9",),
    rows=(*PAIR_LOSSES, *TRIPLET_LOSSES, *RANK_LOSSES, *CLASS_LOSSES, MEMORY),
    left=LEFT,
)
