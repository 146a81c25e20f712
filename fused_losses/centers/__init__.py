"""The large-class head: class centres of any number, over any number of ranks."""

from fused_losses.centers.collectives import Traffic, step_traffic
from fused_losses.centers.head import ClassCenters
from fused_losses.centers.optimizers import RowOptimizer, make_row_optimizer
from fused_losses.centers.statistics import HeadStats
from fused_losses.centers.update import HeadOptimizer

__all__ = [
    "ClassCenters",
    "HeadOptimizer",
    "HeadStats",
    "RowOptimizer",
    "Traffic",
    "make_row_optimizer",
    "step_traffic",
]
