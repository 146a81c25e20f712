"""Which options the drawn calls give to a function: watched where the call begins."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

Options = dict[Any, set[str]]  # by function or class, those that a call gave another value


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Name and default of each option."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _code(function: Callable[..., Any]) -> CodeType:
    where = function.__init__ if isinstance(function, type) else inspect.unwrap(function)
    return where.__code__


def _other(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return value is not default
    return type(value) is not type(default) or value != default


@contextmanager
def watched(functions: list[Callable[..., Any]]) -> Iterator[Options]:
    """What is called inside: the options of `functions` that differ from their defaults."""
    known = {_code(f): (f, options_of(f)) for f in functions}
    found: Options = {f: set() for f in functions}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code not in known:
            return
        function, defaults = known[frame.f_code]
        given = frame.f_locals
        found[function] |= {n for n, d in defaults.items() if _other(given.get(n, d), d)}
        # a loss or margin that was made before, as a table has it
        for made in list(given.values()):
            if type(made) in found and dataclasses.is_dataclass(made):
                own = options_of(type(made)).items()
                found[type(made)] |= {n for n, d in own if _other(getattr(made, n, d), d)}

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)


# no draw gives these another value yet; tests of their own have some
NOT_DRAWN = {
    "ActivePassive": "gradient margin softcap z_loss",
    "AdaFace": "eps h margin momentum",
    "adaptive_margin_softmax": "classes ignore_index margin "
    "normalize reduction row_weight training",
    "AGCE": "a gradient margin q softcap z_loss",
    "ALDR": "device map",
    "all_pairs_tar_at_far": "metric p",
    "angular": "normalize_negatives",
    "AngularMiner": "angle normalize",
    "ArcFace": "eps",
    "AUL": "a gradient margin q softcap z_loss",
    "BatchEasyHardMiner": "allowed_neg_range allowed_pos_range neg_strategy pos_strategy",
    "BatchHardMiner": "metric p",
    "BiasWeights": "alpha beta within",
    "centroid_triplet": "margin reduction",
    "circle": "reduction",
    "class_loss": "classes ignore_index",
    "CombinedMargin": "beyond_pi eps",
    "CompSum": "gradient margin softcap z_loss",
    "CrossBatchMemory": "device dtype",
    "DistanceWeightedMiner": "cutoff generator nonzero_loss_cutoff",
    "distillation": "alpha beta classes eps ignore_index memory_budget reduction removed "
    "student_bias student_scale teacher_bias teacher_scale temperature",
    "ElasticArcFace": "beyond_pi generator margin plus std",
    "ElasticCosFace": "generator margin std",
    "equity_weights": "eta gamma",
    "fast_ap": "reduction",
    "Focal": "gamma gradient margin softcap z_loss",
    "GCE": "gradient k margin z_loss",
    "harmonic_triplet": "distance normalize reduction triplets",
    "higher_order_compatibility": "reduction",
    "knn_classify": "ids num_classes ref_ids temperature",
    "LDR": "gradient margin softcap z_loss",
    "lifted_structure": "reduction",
    "linear_cross_entropy": "memory_budget options reduction",
    "logsumexp_similarity": "exclude y_groups",
    "MAE": "gradient margin softcap z_loss",
    "MagFace": "beyond_pi",
    "map_at_k": "ids ref_ids",
    "map_at_r": "ids ref_ids",
    "margin_loss": "margin ref_embeddings ref_labels",
    "margin_softmax": "classes gradient ignore_index memory_budget return_stats",
    "maxsim": "document_mask lengths query_mask",
    "mean_reciprocal_rank": "ids k ref_ids",
    "mine_pairs": "cutoff epsilon generator ids negative negative_margin "
    "negative_range nonzero_loss_cutoff p positive positive_margin positive_range ref_ids",
    "mine_triplets": "ids negative_range p positive_range ref_ids",
    "Miner": "metric normalize p",
    "MSE": "gradient margin softcap z_loss",
    "multi_similarity": "duplicate",
    "MultiSimilarityMiner": "epsilon",
    "MVSoftmax": "beyond_pi",
    "n_pairs": "normalize reduction",
    "NCE": "gradient margin softcap z_loss",
    "nt_xent": "reduction",
    "OfProbability": "gradient margin scale softcap z_loss",
    "orthogonal_projection": "normalize",
    "PairMarginMiner": "neg_margin pos_margin",
    "pairwise_distance": "base covariance",
    "pairwise_topk": "exclude p screen x_ids y_ids",
    "Poly1": "gradient margin softcap z_loss",
    "precision_at_k": "ids ref_ids",
    "proxy_anchor": "reduction",
    "proxy_nca": "reduction",
    "r_precision": "ids ref_ids",
    "ranked_list": "alpha margin reduction",
    "recall_at_k": "ids ref_ids",
    "SCE": "A gradient margin softcap z_loss",
    "shared_negatives": "whisker",
    "sigmoid_contrastive": "offset reduction",
    "sinkhorn": "tolerance x_weight y_weight",
    "snr_contrastive": "reduction",
    "Softmax": "gradient",
    "softmax_outputs": "classes ignore_index",
    "SphereFace": "beyond_pi",
    "SphereFace2": "gradient",
    "triplet_margin": "eps p reduction",
    "TripletMarginMiner": "type_of_triplets",
    "unpg_margin_softmax": "classes gradient ignore_index margin negatives normalize reduction "
    "row_weight",
}
