"""The losses as functions.

Every function takes `backend=` (None: `use_backend`, FUSED_LOSSES_BACKEND, else auto) and
`precision=`: "fp32" (default: float32 accuracy), "tf32", "mixed" (exact loss, bf16 products in
the gradients) or "bf16" (bf16 products, float32 sums). What a device cannot do is refused.
"""

from fused_losses.contrastive import (
    nt_xent,
    sigmoid_contrastive,
    soft_nearest_neighbor,
    supervised_contrastive,
)
from fused_losses.kernel_means import (
    cauchy_schwarz_divergence,
    cauchy_schwarz_qmi,
    hsic,
    kernel_mean,
    mmd,
    uniformity,
)
from fused_losses.late_interaction import maxsim
from fused_losses.linear import linear_cross_entropy
from fused_losses.metric_losses import (
    circle,
    generalized_lifted_structure,
    lifted_structure,
    multi_similarity,
    n_pairs,
    orthogonal_projection,
    proxy_anchor,
    proxy_nca,
)
from fused_losses.noise_contrastive import info_nce
from fused_losses.similarity import logsumexp_similarity, similarity_attention
from fused_losses.softmax import MarginSoftmaxStats, margin_softmax
from fused_losses.transport import Transport, sinkhorn
from fused_losses.trilinear import trilinear_attention

__all__ = [
    "MarginSoftmaxStats",
    "Transport",
    "cauchy_schwarz_divergence",
    "cauchy_schwarz_qmi",
    "circle",
    "generalized_lifted_structure",
    "hsic",
    "info_nce",
    "kernel_mean",
    "lifted_structure",
    "linear_cross_entropy",
    "logsumexp_similarity",
    "margin_softmax",
    "maxsim",
    "mmd",
    "multi_similarity",
    "n_pairs",
    "orthogonal_projection",
    "nt_xent",
    "proxy_anchor",
    "proxy_nca",
    "sigmoid_contrastive",
    "similarity_attention",
    "sinkhorn",
    "soft_nearest_neighbor",
    "supervised_contrastive",
    "trilinear_attention",
    "uniformity",
]
