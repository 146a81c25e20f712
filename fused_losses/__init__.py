"""Fused losses for representation learning: any class count, never the N x M matrix."""

from fused_losses import backends, functional, margins
from fused_losses.backends import use_backend
from fused_losses.explain import Plan, explain
from fused_losses.functional import linear_cross_entropy, margin_softmax
from fused_losses.sweep import RowStatistics, RowStatisticsFunction, row_statistics
from fused_losses.version import __version__

__all__ = [
    "Plan",
    "RowStatistics",
    "RowStatisticsFunction",
    "__version__",
    "backends",
    "explain",
    "functional",
    "linear_cross_entropy",
    "margin_softmax",
    "margins",
    "row_statistics",
    "use_backend",
]
