"""The losses as functions.

Every function takes `backend=` (None: `use_backend`, FUSED_LOSSES_BACKEND, else auto) and
`precision=`: "fp32" (default: float32 accuracy), "tf32" (the library's products where the process
allows them: docs/gpu.md), "mixed" (exact loss, bf16 products in the gradients) or "bf16" (bf16
products, float32 sums). What a device cannot do is refused.
"""

from typing import TYPE_CHECKING

from fused_losses.base.late import late

if TYPE_CHECKING:
    from fused_losses.base.indices import WeightedPairs
    from fused_losses.functions.adaptive_scale import adaptive_margin_softmax
    from fused_losses.functions.angular import angular
    from fused_losses.functions.centroids import centroid_triplet, prototype_triplet
    from fused_losses.functions.chosen_triplets import batch_easy_hard_triplet, batch_hard_triplet
    from fused_losses.functions.class_loss import class_loss
    from fused_losses.functions.contrastive import (
        nt_xent,
        sigmoid_contrastive,
        soft_nearest_neighbor,
        supervised_contrastive,
    )
    from fused_losses.functions.distillation import distillation
    from fused_losses.functions.gated_pairs import gated_contrastive
    from fused_losses.functions.gaussian_classes import (
        class_aware_alignment,
        gaussian_cross_entropy,
        gaussian_scores,
    )
    from fused_losses.functions.info_nce import info_nce
    from fused_losses.functions.joint_pairs import (
        adaptive_temperature,
        guided_contrastive,
        hard_contrastive,
        masked_contrastive,
    )
    from fused_losses.functions.kmeans import Clusters, kmeans
    from fused_losses.functions.lifted import generalized_lifted_structure, lifted_structure
    from fused_losses.functions.linear_cross_entropy import linear_cross_entropy
    from fused_losses.functions.margin_pairs import (
        contrastive,
        margin_loss,
        snr_contrastive,
        threshold_consistent_margin,
    )
    from fused_losses.functions.margin_softmax import margin_softmax
    from fused_losses.functions.margin_softmax_stats import MarginSoftmaxStats
    from fused_losses.functions.multiple_negatives import multiple_negatives
    from fused_losses.functions.neighbours import icnn
    from fused_losses.functions.nested import nested_info_nce
    from fused_losses.functions.nested_classes import nested_margin_softmax
    from fused_losses.functions.pair_weighting import (
        circle,
        multi_similarity,
        n_pairs,
        orthogonal_projection,
    )
    from fused_losses.functions.proxies import proxy_anchor, proxy_nca
    from fused_losses.functions.ranking import fast_ap, histogram, ranked_list, tuplet_margin
    from fused_losses.functions.segments import segment_mean, segment_sum
    from fused_losses.functions.semihard import semihard_triplet
    from fused_losses.functions.smooth_ranks import pnp, smooth_ap
    from fused_losses.functions.softmax_outputs import SoftmaxOutputs, softmax_outputs
    from fused_losses.functions.sparse_codes import sparse_codes, sparse_decode
    from fused_losses.functions.top_teacher import TopTeacher
    from fused_losses.functions.triplets import (
        all_triplets,
        harmonic_triplet,
        triplet_margin,
    )
    from fused_losses.functions.unpg import unpg_margin_softmax
    from fused_losses.functions.variance import intra_pair_variance
    from fused_losses.mining.lists import Pairs, Triplets
    from fused_losses.mining.pairs import mine_pairs
    from fused_losses.mining.triplets import mine_triplets
    from fused_losses.pairwise.distance import pairwise_distance, pairwise_similarity
    from fused_losses.pairwise.radius import RadiusNeighbors, radius_search
    from fused_losses.pairwise.topk import pairwise_topk
    from fused_losses.primitives.maxsim.op import maxsim
    from fused_losses.primitives.shared_negatives.op import shared_negatives
    from fused_losses.similarity.attention import logsumexp_similarity, similarity_attention
    from fused_losses.similarity.bandwidth import median_bandwidth
    from fused_losses.similarity.binary import (
        PackedCodes,
        binary_codes,
        hamming,
        hamming_topk,
        pack_codes,
        packed_product,
    )
    from fused_losses.similarity.compatibility import higher_order_compatibility
    from fused_losses.similarity.grams import cka, coding_rate
    from fused_losses.similarity.kernel_means import (
        cauchy_schwarz_divergence,
        cauchy_schwarz_qmi,
        hsic,
        kernel_mean,
        mmd,
        uniformity,
    )
    from fused_losses.similarity.leanvec import LeanVec, leanvec
    from fused_losses.similarity.muvera import CountSketch, muvera_encode, muvera_planes
    from fused_losses.similarity.sinkhorn import Transport, sinkhorn
    from fused_losses.similarity.sinkhorn_divergence import sinkhorn_divergence
    from fused_losses.similarity.trilinear import trilinear_attention

__all__ = [
    "Clusters",
    "CountSketch",
    "LeanVec",
    "MarginSoftmaxStats",
    "PackedCodes",
    "Pairs",
    "RadiusNeighbors",
    "SoftmaxOutputs",
    "TopTeacher",
    "Transport",
    "Triplets",
    "WeightedPairs",
    "adaptive_margin_softmax",
    "adaptive_temperature",
    "all_triplets",
    "angular",
    "batch_easy_hard_triplet",
    "batch_hard_triplet",
    "binary_codes",
    "cauchy_schwarz_divergence",
    "cauchy_schwarz_qmi",
    "centroid_triplet",
    "circle",
    "cka",
    "class_aware_alignment",
    "class_loss",
    "coding_rate",
    "contrastive",
    "distillation",
    "fast_ap",
    "gated_contrastive",
    "gaussian_cross_entropy",
    "gaussian_scores",
    "generalized_lifted_structure",
    "guided_contrastive",
    "hamming",
    "hamming_topk",
    "hard_contrastive",
    "harmonic_triplet",
    "higher_order_compatibility",
    "histogram",
    "hsic",
    "icnn",
    "info_nce",
    "intra_pair_variance",
    "kernel_mean",
    "kmeans",
    "leanvec",
    "lifted_structure",
    "linear_cross_entropy",
    "logsumexp_similarity",
    "margin_loss",
    "margin_softmax",
    "masked_contrastive",
    "maxsim",
    "median_bandwidth",
    "mine_pairs",
    "mine_triplets",
    "mmd",
    "multi_similarity",
    "multiple_negatives",
    "muvera_encode",
    "muvera_planes",
    "n_pairs",
    "nested_info_nce",
    "nested_margin_softmax",
    "nt_xent",
    "orthogonal_projection",
    "pack_codes",
    "packed_product",
    "pairwise_distance",
    "pairwise_similarity",
    "pairwise_topk",
    "pnp",
    "prototype_triplet",
    "proxy_anchor",
    "proxy_nca",
    "radius_search",
    "ranked_list",
    "segment_mean",
    "segment_sum",
    "semihard_triplet",
    "shared_negatives",
    "sigmoid_contrastive",
    "similarity_attention",
    "sinkhorn",
    "sinkhorn_divergence",
    "smooth_ap",
    "snr_contrastive",
    "soft_nearest_neighbor",
    "softmax_outputs",
    "sparse_codes",
    "sparse_decode",
    "supervised_contrastive",
    "threshold_consistent_margin",
    "trilinear_attention",
    "triplet_margin",
    "tuplet_margin",
    "uniformity",
    "unpg_margin_softmax",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = late(__name__)
