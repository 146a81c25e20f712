"""The losses as functions.

Every function takes `backend=` (None: `use_backend`, FUSED_LOSSES_BACKEND, else auto) and
`precision=`: "fp32" (default: float32 accuracy), "tf32", "mixed" (exact loss, bf16 products in
the gradients) or "bf16" (bf16 products, float32 sums). What a device cannot do is refused.
"""

from fused_losses.losses.adaptive_scale import adaptive_margin_softmax
from fused_losses.losses.centroids import centroid_triplet, prototype_triplet
from fused_losses.losses.chosen_triplets import batch_easy_hard_triplet, batch_hard_triplet
from fused_losses.losses.class_loss import class_loss
from fused_losses.losses.contrastive import (
    nt_xent,
    sigmoid_contrastive,
    soft_nearest_neighbor,
    supervised_contrastive,
)
from fused_losses.losses.distillation import distillation
from fused_losses.losses.info_nce import info_nce
from fused_losses.losses.linear_cross_entropy import linear_cross_entropy
from fused_losses.losses.margin_pairs import contrastive, margin_loss, snr_contrastive
from fused_losses.losses.margin_softmax import margin_softmax
from fused_losses.losses.margin_softmax_stats import MarginSoftmaxStats
from fused_losses.losses.neighbours import icnn
from fused_losses.losses.pair_weighting import (
    circle,
    generalized_lifted_structure,
    lifted_structure,
    multi_similarity,
    n_pairs,
    orthogonal_projection,
)
from fused_losses.losses.proxies import proxy_anchor, proxy_nca
from fused_losses.losses.ranking import angular, fast_ap, histogram, ranked_list, tuplet_margin
from fused_losses.losses.softmax_outputs import SoftmaxOutputs, softmax_outputs
from fused_losses.losses.top_teacher import TopTeacher
from fused_losses.losses.triplets import (
    all_triplets,
    harmonic_triplet,
    triplet_margin,
)
from fused_losses.losses.unpg import unpg_margin_softmax
from fused_losses.losses.variance import intra_pair_variance
from fused_losses.mining.lists import Pairs, Triplets
from fused_losses.mining.pairs import mine_pairs
from fused_losses.mining.triplets import mine_triplets
from fused_losses.pairwise.distance import pairwise_distance, pairwise_similarity
from fused_losses.pairwise.topk import pairwise_topk
from fused_losses.primitives.maxsim.op import maxsim
from fused_losses.primitives.shared_negatives.op import shared_negatives
from fused_losses.similarity.attention import logsumexp_similarity, similarity_attention
from fused_losses.similarity.compatibility import higher_order_compatibility
from fused_losses.similarity.kernel_means import (
    cauchy_schwarz_divergence,
    cauchy_schwarz_qmi,
    hsic,
    kernel_mean,
    mmd,
    uniformity,
)
from fused_losses.similarity.sinkhorn import Transport, sinkhorn
from fused_losses.similarity.trilinear import trilinear_attention

__all__ = [
    "MarginSoftmaxStats",
    "Pairs",
    "SoftmaxOutputs",
    "TopTeacher",
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
    "distillation",
    "fast_ap",
    "generalized_lifted_structure",
    "harmonic_triplet",
    "higher_order_compatibility",
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
    "softmax_outputs",
    "supervised_contrastive",
    "trilinear_attention",
    "triplet_margin",
    "tuplet_margin",
    "uniformity",
    "unpg_margin_softmax",
]
