"""The large-class head: class centres of any number, over any number of ranks."""

from fused_losses.centers.clipping import clip_grad_norm_
from fused_losses.centers.collectives import Traffic, step_traffic
from fused_losses.centers.gathering import AllRows, all_rows
from fused_losses.centers.head import ClassCenters
from fused_losses.centers.head_optimizer import HeadOptimizer
from fused_losses.centers.optimizers import RowOptimizer, make_row_optimizer
from fused_losses.centers.predict import TopClasses, class_scores, top_classes
from fused_losses.centers.resize import carry_over, set_rows
from fused_losses.centers.simplex import DSimplexHead
from fused_losses.centers.spherical import SphericalHead
from fused_losses.centers.statistics import HeadStats
from fused_losses.centers.subcenters import SubCenters

__all__ = [
    "AllRows",
    "ClassCenters",
    "DSimplexHead",
    "HeadOptimizer",
    "HeadStats",
    "RowOptimizer",
    "SphericalHead",
    "SubCenters",
    "TopClasses",
    "Traffic",
    "all_rows",
    "carry_over",
    "class_scores",
    "clip_grad_norm_",
    "make_row_optimizer",
    "set_rows",
    "step_traffic",
    "top_classes",
]
