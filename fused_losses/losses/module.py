"""What the modules share: their options, how they print, and the call of a metric-learning loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from fused_losses.base.indices import Indices
from fused_losses.base.memory_budget import MemoryBudget, check_budget


class Loss(nn.Module):
    """A loss with the options that all have.

    Args:
        reduction: "mean", "sum" or "none". precision, backend: as in `functional`.
        memory_budget: bytes or "auto", as in `info_nce`: what the forward may keep to spare the
            backward a product. Of losses that `keeps` says have it; others refuse any but 0.

    A hyper-parameter is an attribute of its name: read at each call, shown by `repr`, a buffer or a
    parameter where it is a tensor.
    """

    keeps: ClassVar[bool] = False  # whether its function takes a memory_budget
    memory_budget: MemoryBudget = 0  # of modules that were pickled before there was one

    def __init__(
        self,
        *,
        reduction: str = "mean",
        precision: str = "fp32",
        backend: str | None = None,
        memory_budget: MemoryBudget = 0,
    ) -> None:
        super().__init__()
        check_budget(memory_budget)
        if memory_budget != 0 and not self.keeps:
            raise ValueError(
                f"memory_budget: expected 0 for {type(self).__name__}, whose forward keeps no "
                f"scores; got {memory_budget!r}"
            )
        self.reduction, self.precision, self.backend = reduction, precision, backend
        self.memory_budget = memory_budget

    def common(self) -> dict[str, Any]:
        """The options that a function over rows takes."""
        plain = dict(reduction=self.reduction, precision=self.precision, backend=self.backend)
        return dict(**plain, memory_budget=self.memory_budget) if self.keeps else plain

    def beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The same but for a budget that a call gives itself."""
        return {k: v for k, v in self.common().items() if k != "memory_budget" or k not in given}

    def unkept(self) -> dict[str, Any]:
        """The same of a function that keeps nothing."""
        return {k: v for k, v in self.common().items() if k != "memory_budget"}

    def extra_repr(self) -> str:
        plain = {"reduction": "mean", "precision": "fp32", "backend": None, "memory_budget": 0}
        own = {k: v for k, v in vars(self).items() if k[0] != "_" and k != "training"}
        return ", ".join(f"{k}={v!r}" for k, v in own.items() if plain.get(k, own) != v)


class MetricLoss(Loss):
    """A loss of a batch by its labels, as pytorch-metric-learning calls it.

    Args:
        normalize: divide rows by their norms first (True, as there). Others: as in `Loss`.

    loss(embeddings [N, D], labels [N] integers, indices, ref_emb [M, D], ref_labels [M]):
    indices: of a miner, (a, p, n) or (a, p, a, n) int64 [P]; None: every pair or triplet. a are
    rows of embeddings, p and n of ref_emb where it is given, else of embeddings. ref_emb: rows
    that the batch meets in place of itself, a memory's or another view's. With indices labels may
    be None.
    """

    refuses: ClassVar[dict[str, str]] = {}  # what a call may not give, and why

    def __init__(self, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.normalize = normalize

    def common(self) -> dict[str, Any]:
        return dict(normalize=self.normalize, **super().common())

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        """The function with this loss's hyper-parameters and what was given to the call."""
        raise NotImplementedError

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        for name, value in (("indices", indices), ("ref_emb", ref_emb)):
            if value is not None and name in self.refuses:
                told = f"{name}: expected None for {type(self).__name__}, {self.refuses[name]}"
                raise ValueError(f"{told}; got {type(value).__name__}")
        given = dict(indices=indices, ref_embeddings=ref_emb, ref_labels=ref_labels)
        given = {name: value for name, value in given.items() if value is not None}
        return self.loss(embeddings, labels, **given, **self.common())


class BatchLoss(MetricLoss):
    """A metric-learning loss that is one number of its batch, and has no reduction."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.reduction != "mean":
            raise ValueError(
                f"reduction: expected 'mean', for the loss is one number of the batch, got "
                f"{self.reduction!r}"
            )

    def common(self) -> dict[str, Any]:
        options = super().common()
        del options["reduction"]
        return options
