"""How good an embedding is: retrieval, kNN classification, verification. Never an N x M matrix."""

from fused_losses.metrics.knn import KnnClasses, knn_classify
from fused_losses.metrics.retrieval import (
    Retrieval,
    gap,
    map_at_k,
    map_at_r,
    mean_reciprocal_rank,
    precision_at_k,
    r_precision,
    recall_at_k,
)
from fused_losses.metrics.verification import (
    AllPairs,
    EqualErrorRate,
    Roc,
    VerificationAccuracy,
    all_pairs_tar_at_far,
    auc,
    eer,
    roc,
    tar_at_far,
    threshold_at_far,
    verification_accuracy,
)

__all__ = [
    "AllPairs",
    "EqualErrorRate",
    "KnnClasses",
    "Retrieval",
    "Roc",
    "VerificationAccuracy",
    "all_pairs_tar_at_far",
    "auc",
    "eer",
    "gap",
    "knn_classify",
    "map_at_k",
    "map_at_r",
    "mean_reciprocal_rank",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "roc",
    "tar_at_far",
    "threshold_at_far",
    "verification_accuracy",
]
