"""sentence-transformers: what computes in the place of its losses over batches."""

from __future__ import annotations

from fused_losses.integrations.acceleration import Peer
from fused_losses.integrations.sentence_transformers.calls import PACKAGE
from fused_losses.integrations.sentence_transformers.guided import GUIDED
from fused_losses.integrations.sentence_transformers.multi_vector import INTERACTIONS
from fused_losses.integrations.sentence_transformers.ranking import RANKINGS
from fused_losses.integrations.sentence_transformers.triplets import TRIPLETS

_A_PAIR = "of the row or the pair itself: no matrix of pairs"
_CALLS = "calls its losses, which are accelerated"
LEFT = {
    "CoSENTLoss": "sorts the batch's scores and sums from one end: no matrix of pairs",
    "AnglELoss": "as CoSENTLoss, of another score",
    "GlobalOrthogonalRegularizationLoss": "moments of all cosines, of which products of columns, "
    "D x D, know enough",
    "ContrastiveLoss": _A_PAIR,
    "ContrastiveTensionLoss": _A_PAIR,
    "CosineSimilarityLoss": _A_PAIR,
    "OnlineContrastiveLoss": _A_PAIR,
    "SoftmaxLoss": _A_PAIR,
    "TripletLoss": _A_PAIR,
    "MSELoss": _A_PAIR,
    "MarginMSELoss": _A_PAIR,
    "EmbedDistillLoss": _A_PAIR,
    "DistillKLDivLoss": "of a row and its own documents: no matrix of pairs",
    "MultiVectorDistillKLDivLoss": "of a row and its own documents: no matrix of pairs",
    "MultiVectorMarginMSELoss": "of a row and its own documents: no matrix of pairs",
    "DenoisingAutoEncoderLoss": "a decoder's cross entropy over words",
    "AdaptiveLayerLoss": _CALLS,
    "Matryoshka2dLoss": _CALLS,
    "MatryoshkaLoss": _CALLS,
    "losses of sparse_encoder": "as those of the same names here, or penalties on a row",
    "losses of cross_encoder": "of scores that a model made of each pair",
}

PEER = Peer(
    package=PACKAGE,
    distribution="sentence-transformers",
    versions=("6.2",),
    rows=(*RANKINGS, *GUIDED, *TRIPLETS, *INTERACTIONS),
    left=LEFT,
)
