"""Fused losses for representation learning: any class count, never the N x M matrix.

Names are imported when they are first asked for.
"""

import sys
from typing import TYPE_CHECKING

from fused_losses import backends, functional
from fused_losses.backends import use_backend
from fused_losses.base.examples import TABLE
from fused_losses.base.late import everything, late
from fused_losses.explain import Plan, explain
from fused_losses.primitives.library import LIBRARY
from fused_losses.version import __version__
from fused_losses.warm_up import warm_up

if TYPE_CHECKING:
    from fused_losses import centers as centers
    from fused_losses import class_losses, losses, margins, metrics, miners
    from fused_losses import functions as functions
    from fused_losses import mining as mining
    from fused_losses import pairwise as pairwise
    from fused_losses import similarity as similarity
    from fused_losses.centers import ClassCenters, DSimplexHead, SphericalHead
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

if TYPE_CHECKING:
    del Clusters, MarginSoftmaxStats, RadiusNeighbors, SoftmaxOutputs, Transport  # noqa: F821
else:
    __getattr__, __dir__ = late(__name__, functional)
    # who asks for an op or an example by name finds all
    LIBRARY.late(lambda: everything(sys.modules[__name__]))
    TABLE.late(lambda: everything(sys.modules[__name__]))
