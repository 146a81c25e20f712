"""The losses as functions.

Every function takes `backend=` (None: `use_backend`, FUSED_LOSSES_BACKEND, else auto) and
`precision=`: "fp32" (default: float32 accuracy), "tf32", "mixed" (exact loss, bf16 products in
the gradients) or "bf16" (bf16 products, float32 sums). What a device cannot do is refused.
"""

from fused_losses.adaptive_scale import adaptive_margin_softmax
from fused_losses.contrastive_losses import (
    nt_xent,
    sigmoid_contrastive,
    soft_nearest_neighbor,
    supervised_contrastive,
)
from fused_losses.distances import pairwise_distance, pairwise_similarity
from fused_losses.kernel_means import (
    cauchy_schwarz_divergence,
    cauchy_schwarz_qmi,
    hsic,
    kernel_mean,
    mmd,
    uniformity,
)
from fused_losses.linear import linear_cross_entropy
from fused_losses.losses.class_loss import class_loss
from fused_losses.losses.unpg import unpg_margin_softmax
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
from fused_losses.mining import Pairs, Triplets, mine_pairs, mine_triplets
from fused_losses.neighbors import pairwise_topk
from fused_losses.noise_contrastive import info_nce
from fused_losses.primitives.maxsim.op import maxsim
from fused_losses.primitives.shared_negatives.op import shared_negatives
from fused_losses.ranking_losses import (
    angular,
    fast_ap,
    histogram,
    icnn,
    intra_pair_variance,
    ranked_list,
    tuplet_margin,
)
from fused_losses.similarity import logsumexp_similarity, similarity_attention
from fused_losses.softmax import MarginSoftmaxStats, margin_softmax
from fused_losses.transport import Transport, sinkhorn
from fused_losses.trilinear import trilinear_attention
from fused_losses.triplet_losses import (
    all_triplets,
    batch_easy_hard_triplet,
    batch_hard_triplet,
    centroid_triplet,
    contrastive,
    harmonic_triplet,
    margin_loss,
    prototype_triplet,
    snr_contrastive,
    triplet_margin,
)

__all__ = [
    "MarginSoftmaxStats",
    "Pairs",
    "Transport",
    "Triplets",
    "adaptive_margin_softmax",
    "all_triplets",
    "angular",
    "batch_easy_hard_triplet",
    "batch_hard_triplet",
    "cauchy_schwarz_divergence",
    "cauchy_schwarz_qmi",
    "centroid_triplet",
    "circle",
    "class_loss",
    "contrastive",
    "fast_ap",
    "generalized_lifted_structure",
    "harmonic_triplet",
    "histogram",
    "hsic",
    "icnn",
    "info_nce",
    "intra_pair_variance",
    "kernel_mean",
    "lifted_structure",
    "linear_cross_entropy",
    "logsumexp_similarity",
    "margin_loss",
    "margin_softmax",
    "maxsim",
    "mine_pairs",
    "mine_triplets",
    "mmd",
    "multi_similarity",
    "n_pairs",
    "nt_xent",
    "orthogonal_projection",
    "pairwise_distance",
    "pairwise_similarity",
    "pairwise_topk",
    "prototype_triplet",
    "proxy_anchor",
    "proxy_nca",
    "ranked_list",
    "shared_negatives",
    "sigmoid_contrastive",
    "similarity_attention",
    "sinkhorn",
    "snr_contrastive",
    "soft_nearest_neighbor",
    "supervised_contrastive",
    "trilinear_attention",
    "triplet_margin",
    "tuplet_margin",
    "uniformity",
    "unpg_margin_softmax",
]
