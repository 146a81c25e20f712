"""Fused losses for representation learning: any class count, never the N x M matrix."""

from fused_losses import backends, class_losses, functional, losses, margins, metrics, miners
from fused_losses.backends import use_backend
from fused_losses.centers import ClassCenters, DSimplexHead, SphericalHead
from fused_losses.explain import Plan, explain
from fused_losses.functional import *  # noqa: F403 (the names are in its __all__)
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.unpg import UNPG
from fused_losses.primitives.row_statistics.op import (
    RowStatistics,
    RowStatisticsFunction,
    row_statistics,
)
from fused_losses.primitives.topk.inputs import PrincipalRows, QuantizedRows
from fused_losses.primitives.topk.op import quantize_rows
from fused_losses.primitives.topk.principal import principal_rows
from fused_losses.version import __version__
from fused_losses.warm_up import warm_up

__all__ = [
    "UNPG",
    "AdaptiveScale",
    "ClassCenters",
    "DSimplexHead",
    "Plan",
    "PrincipalRows",
    "QuantizedRows",
    "RowStatistics",
    "RowStatisticsFunction",
    "SphericalHead",
    "__version__",
    "backends",
    "class_losses",
    "explain",
    "functional",
    "losses",
    "margins",
    "metrics",
    "miners",
    "principal_rows",
    "quantize_rows",
    "row_statistics",
    "use_backend",
    "warm_up",
]
__all__ += functional.__all__
# the types of some results are named in `functional` alone
__all__.remove("Clusters")
__all__.remove("MarginSoftmaxStats")
__all__.remove("RadiusNeighbors")
__all__.remove("SoftmaxOutputs")
__all__.remove("Transport")
del Clusters, MarginSoftmaxStats, RadiusNeighbors, SoftmaxOutputs, Transport  # noqa: F821
