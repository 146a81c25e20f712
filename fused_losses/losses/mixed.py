"""Metrix: a loss over pairs with rows that are mixed of a positive and a negative."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_losses.base.indices import Indices, WeightedPairs, checked_indices
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.base.validation import (
    check_choice,
    check_device,
    check_integers,
    check_matrix,
    describe,
)
from fused_losses.losses.pairs import ContrastiveLoss
from fused_losses.losses.registry import entry
from fused_losses.mining.triplets import mine_triplets

DRAWN_FOR = ("batch", "pair")


@entry(
    "Venkataramanan et al., It Takes Two to Tango: Mixup for Deep Metric Learning",
    2021,
    block="pairs",
    primitive="listed",
)
class MetrixLoss(nn.Module):
    """Metrix: a loss over pairs, and the same of mixed rows v = share x_p + (1 - share) x_n.

        loss = L(batch) + weight L({(a, v): a positive by share, a negative by 1 - share})

    A term of a pair, or its exponential in a sum, is multiplied by what the pair counts for
    (`WeightedPairs`). Mixed are each positive pair (a, p) with a's nearest negative n, as the
    authors' code has it for inputs; rows as they are given, which L normalises once mixed.

    Args:
        loss: a loss of the catalogue that weighs pairs: `ContrastiveLoss`, `MultiSimilarityLoss`,
            `CircleLoss`, `SoftNearestNeighborLoss`; None: the authors',
            `ContrastiveLoss(neg_margin=0.5)`.
        weight: of the mixed rows, >= 0; the authors' 0.4. alpha: share is drawn from Beta(alpha,
            alpha), the authors' 2. drawn_for: "batch": one share a call, the authors'; "pair".

    loss(embeddings [N, D], labels [N], indices, share=, generator=). indices: triplets (a, p, n)
    int64 [T] to mix in place of the mined ones, p and n of one class with a or not. share: given
    in place of drawn, a number or a tensor [] or [T] in [0, 1], which may need a gradient.
    generator: of the draws, on the CPU; None: torch's own. Mining reads how many triplets there
    are on the host. Time that of L, O(N^2 D) and O(T D) of T triplets, memory O((N + T) D).
    """

    def __init__(
        self,
        loss: nn.Module | None = None,
        weight: float = 0.4,
        alpha: float = 2.0,
        *,
        drawn_for: str = "batch",
    ) -> None:
        super().__init__()
        loss = ContrastiveLoss(neg_margin=0.5) if loss is None else loss
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss: expected a module, got {type(loss).__name__}")
        check_parameter("weight", weight, 0)
        check_above("alpha", alpha)
        check_choice("drawn_for", drawn_for, DRAWN_FOR)
        self.loss, self.weight, self.alpha = loss, float(weight), float(alpha)
        self.drawn_for = drawn_for

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Indices | None = None,
        *,
        share: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        check_matrix("embeddings", embeddings, "[N, D]")
        check_integers("labels", labels, (embeddings.shape[0],), embeddings)
        plain = self.loss(embeddings, labels)
        n = embeddings.shape[0]
        if indices is None:
            found = mine_triplets(
                embeddings, labels, positive="all", normalize=getattr(self.loss, "normalize", True)
            )
            a, p, k = found[:3]
        else:
            given = checked_indices(indices, n, n, embeddings)
            if len(given) != 3:
                raise ValueError(f"indices: expected triplets (a, p, n), got {len(given)} lists")
            a, p, k = given
        with no_autocast(embeddings.device):
            x = embeddings.to(accumulate_dtype(embeddings.dtype))
            w = self._share(share, len(a), generator, x)
            mixed = w[:, None] * x.index_select(0, p) + (1 - w)[:, None] * x.index_select(0, k)
            own = torch.arange(len(a), device=x.device)
            pairs = WeightedPairs(a, own, a, own, w, 1 - w)
            return plain + self.weight * self.loss(x, None, pairs, mixed)

    def _share(
        self,
        share: float | Tensor | None,
        count: int,
        generator: torch.Generator | None,
        x: Tensor,
    ) -> Tensor:
        """[T], given or drawn."""
        if isinstance(share, Tensor):
            check_device("embeddings", x, "share", share)
            if share.shape not in ((), (count,)) or not share.is_floating_point():
                raise ValueError(f"share: expected [] or [{count}] numbers, got {describe(share)}")
            return share.to(x.dtype).expand(count)
        if share is not None:
            check_parameter("share", share, 0, 1)
            return x.new_full((count,), float(share))
        size = (2, count if self.drawn_for == "pair" else 1)
        alphas = torch.full(size, self.alpha, dtype=torch.float64)
        one, other = torch.ops.aten._standard_gamma(alphas, generator)
        return (one / (one + other)).to(x).expand(count)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, alpha={self.alpha}, drawn_for={self.drawn_for!r}"
