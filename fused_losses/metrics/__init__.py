"""How good an embedding is: retrieval, kNN classification, verification. Never an N x M matrix."""

from fused_losses.functions.kmeans import Clusters, kmeans
from fused_losses.metrics.graded import ndcg
from fused_losses.metrics.identification import Identification, MatchCurve, cmc, dir_at_far
from fused_losses.metrics.knn import KnnClasses, knn_classify, radius_classify
from fused_losses.metrics.memory import EmbeddingMemory
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
from fused_losses.metrics.revisited import RevisitedMap, RevisitedProtocol, revisited_map
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
from fused_losses.pairwise.radius import RadiusNeighbors, radius_search

__all__ = [
    "AllPairs",
    "Clusters",
    "EmbeddingMemory",
    "EqualErrorRate",
    "Identification",
    "KnnClasses",
    "MatchCurve",
    "RadiusNeighbors",
    "Retrieval",
    "RevisitedMap",
    "RevisitedProtocol",
    "Roc",
    "VerificationAccuracy",
    "all_pairs_tar_at_far",
    "auc",
    "cmc",
    "dir_at_far",
    "eer",
    "gap",
    "kmeans",
    "knn_classify",
    "map_at_k",
    "map_at_r",
    "mean_reciprocal_rank",
    "ndcg",
    "precision_at_k",
    "r_precision",
    "radius_classify",
    "radius_search",
    "recall_at_k",
    "revisited_map",
    "roc",
    "tar_at_far",
    "threshold_at_far",
    "verification_accuracy",
]
