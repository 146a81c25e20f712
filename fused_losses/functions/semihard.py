"""The triplets of every positive pair with one semi-hard negative."""

from __future__ import annotations

from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import PRECISIONS, examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.sides import batch_sides
from fused_losses.base.validation import check_at_least, check_plain
from fused_losses.functions.scored_rows import DISTANCES, over_terms, scored_rows
from fused_losses.primitives.row_rules.op import row_losses

FALLBACKS = ("farthest",)


def semihard_triplet(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]
    ref_labels: Tensor | None = None,  # [M]
    *,
    margin: float = 1.0,
    fallback: str | None = "farthest",
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Semi-hard triplets at margin=1.0 (`BatchSemiHardTripletLoss`: 5.0).

    Each positive pair against the nearest negative that is farther than its positive.

        loss_ap = [d_ap - d_an + margin]+,  d_an = min over the n with d_an > d_ap

    Args:
        embeddings, labels: [N, D], [N] integers, the anchors. ref_embeddings, ref_labels: [M, D],
            [M], where positives and negatives come from; without them the batch itself.
        margin: >= 0. fallback: what stands in where no negative is farther than the positive:
            "farthest", the farthest negative (TensorFlow Addons, sentence-transformers); None: the
            pair is left out (FaceNet says nothing of it).
        distance: "euclidean", "sqeuclidean", "cosine" (of rows of norm 1).
        reduction: "mean" over the positive pairs that have a negative, "sum", "none" [N]: the sum
            of each anchor's.

    The choice is not differentiated. Returns float32 (float64 for float64 inputs). Raises
    ValueError, TypeError for bad arguments. Time O(N M D + N M log M), memory O((N + M) D) and a
    few blocks. Paper: Schroff et al., FaceNet, 2015.
    """
    check_plain(margin=margin)
    both = batch_sides(embeddings, labels, reduction, precision, ref_embeddings, ref_labels)
    check_at_least("margin", margin, 0)
    validation.check_choice("distance", distance, DISTANCES)
    if fallback is not None:
        validation.check_choice("fallback", fallback, FALLBACKS)
    with no_autocast(embeddings.device):
        inputs = scored_rows(both, distance, precision, normalize)._replace(
            rule="semihard", params=(margin, fallback is not None)
        )
        total, count = row_losses(inputs, backend=backend).unbind(dim=1)
        return over_terms(total, count, reduction, accumulate_dtype(both.x.dtype))


examples(
    semihard_triplet,
    lambda f, t: f(t.x, t.labels),
    {"": {}, "no fallback": dict(margin=0.4, fallback=None, reduction="none")},
    precisions=PRECISIONS[:3],  # rounded scores choose other semi-hard rows
)
examples(
    semihard_triplet,
    lambda f, t: f(t.x, t.labels, t.y, t.y_labels),
    {"ref": dict(distance="sqeuclidean")},
    precisions=PRECISIONS[:3],
)
