"""The large-class head: class centres of any number, over any number of ranks."""

from fused_losses.centers.collectives import Traffic, step_traffic
from fused_losses.centers.head import ClassCenters, HeadOptimizer, HeadStats
from fused_losses.centers.optimizers import RowOptimizer, make_row_optimizer

__all__ = [
    "ClassCenters",
    "HeadOptimizer",
    "HeadStats",
    "RowOptimizer",
    "Traffic",
    "make_row_optimizer",
    "step_traffic",
]
