"""Losses that own the centres of their classes, and what a miner's indices mean to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_losses.base.class_labels import one_label
from fused_losses.base.indices import Indices, occurrences
from fused_losses.base.numerics import accumulate_dtype, reduced
from fused_losses.base.parameters import check_above, check_row_weight
from fused_losses.base.validation import (
    NO_TARGET,
    check_device,
    check_matrix,
    describe,
)
from fused_losses.centers.arguments import counts
from fused_losses.functions.class_loss import class_loss
from fused_losses.functions.class_values import ClassLoss
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.nested import sweeps_widths
from fused_losses.functions.nested_classes import nested_margin_softmax
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import Module, entry
from fused_losses.margins import Margin


def of_classes(
    paper: str, year: int, *golden: str, primitive: str = "row_statistics", block: str = "classes"
) -> Callable[[Module], Module]:
    """`entry` of a loss over classes."""
    return entry(paper, year, block=block, primitive=primitive, golden=golden)


def softmax_loss(embeddings: Tensor, weight: Tensor, labels: Tensor, **given: Any) -> Tensor:
    """`margin_softmax` without statistics."""
    loss = margin_softmax(embeddings, weight, labels, **given)
    assert isinstance(loss, Tensor)  # nobody asks for the others
    return loss


class LabelledLoss(Loss):
    """A loss of rows by their labels alone, called as pytorch-metric-learning calls them.

    Args: ignore_index: the label of rows that take no part. Others: as in `Loss`.
    """

    def __init__(self, *, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        self.ignore_index = ignore_index

    def common(self) -> dict[str, Any]:
        return dict(ignore_index=self.ignore_index, **super().common())

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
        *,
        row_weight: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        refuse_references(self, ref_emb, ref_labels)
        # new ones throughout: Dynamo takes a dict that changes for no dict of options
        given = {**given, **self.beside(given)}
        if indices is None:
            return self.loss(embeddings, labels, row_weight=row_weight, **given)
        weights = occurrences(indices, embeddings)
        plain = torch.ones_like(weights) if row_weight is None else row_weight.to(weights)
        reduction = "sum" if self.reduction == "mean" else self.reduction
        given = {**given, "reduction": reduction}
        loss = self.loss(embeddings, labels, row_weight=weights * plain, **given)
        return self.over_rows(loss, labels, plain) if self.reduction == "mean" else loss

    def over_rows(self, loss: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
        """A sum over what the rows with a label count for, [N]; 0 over none."""
        present = labels != self.ignore_index
        present = present.any(dim=1) if present.dim() == 2 else present
        whole = torch.where(present, plain, 0).sum()
        return loss / torch.where(whole > 0, whole, 1).to(loss.dtype)


class ClassifierLoss(LabelledLoss):
    """A loss over classes whose centres it owns: `weight` [C, D], or [C, K, D] with K of a class.

    Args:
        num_classes: C. embedding_size: D. centers: K.
        normalize: rows and centres are divided by their norms.
        ignore_index: the label of rows that take no part.
        device, dtype: of `weight`. Others: as in `Loss`.

    loss(embeddings [N, D], labels [N] int64, indices): indices, a miner's (a, p, n) or
    (a, p, a, n), int64: a row counts as often as it is in them, over the most that one is; the mean
    stays that over all rows, as in pytorch-metric-learning. row_weight [N] >= 0: as in
    `margin_softmax`; beside indices it multiplies their weights. There are no reference rows: what
    an embedding meets are the centres, so ref_emb and ref_labels are refused.

    pytorch-metric-learning keeps its centres as `W` [D, C]: its state dict is loaded, transposed.
    `weight` has a dense gradient: for heads that fit beside the model. Of 10^6 classes, of shards
    over ranks and of samples of classes, `ClassCenters` is the head, with the same margins.
    """

    former = "W"  # pytorch-metric-learning's name of the centres

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        centers: int = 1,
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_classes, self.embedding_size = counts(
            num_classes=num_classes, embedding_size=embedding_size
        )
        self.normalize = normalize
        (centers,) = counts(centers=centers)
        several = () if centers == 1 else (centers,)
        shape = self.num_classes, *several, self.embedding_size
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal centres, pytorch-metric-learning's; of products as they are, nn.Linear's."""
        if self.normalize:
            nn.init.normal_(self.weight)
        else:
            bound = self.embedding_size**-0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def common(self) -> dict[str, Any]:
        return dict(normalize=self.normalize, **super().common())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        own, former = prefix + "weight", prefix + self.former
        if former in state_dict and (former == own or own not in state_dict):
            stored = state_dict.pop(former)
            # a name that both have: as it is, where it fits
            fits = former == own and stored.shape == self.weight.shape
            state_dict[own] = stored if fits else self.of_former(stored)
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def of_former(self, stored: Tensor) -> Tensor:
        """`weight` of what pytorch-metric-learning has, [D, C K]."""
        return stored.T.reshape(self.weight.shape) if stored.dim() == 2 else stored


class MarginClassifier(ClassifierLoss):
    """Cross entropy of scale times cosines, the label's after `head()`."""

    keeps = True
    scale: float | Tensor
    gradient = "exact"

    def head(self) -> Margin | None:
        """The margin by this loss's hyper-parameters."""
        raise NotImplementedError

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        own: dict[str, Any] = dict(margin=self.head(), scale=self.scale, gradient=self.gradient)
        return softmax_loss(embeddings, self.weight, labels, **own, **given)

    def at_widths(
        self, widths: Sequence[int], rows: int, embeddings: Tensor, labels: Tensor, **given: Any
    ) -> Tensor | None:
        """The loss at each width of rows and centres, [W], from one sweep; None: it has none."""
        own = (
            type(self).forward is LabelledLoss.forward and type(self).loss is MarginClassifier.loss
        )
        if not own or rows != 1 or self.weight.dim() != 2 or given.keys() - {"row_weight"}:
            return None
        margin = self.head()
        # averages move once a width, in its own call
        kept = isinstance(margin, nn.Module) or hasattr(margin, "bend")
        each = isinstance(self.scale, Tensor) and self.scale.numel() != 1
        if kept or each or not sweeps_widths(embeddings, self.precision, self.backend):
            return None
        return nested_margin_softmax(
            embeddings,
            self.weight,
            labels,
            widths,
            margin=margin,
            scale=self.scale,
            gradient=self.gradient,
            **given,
            **self.unkept(),
        )


class HeldMargin(MarginClassifier):
    """Whose margin is an object, made once: it keeps averages, or bends other classes."""

    margin: Any

    def head(self) -> Any:
        return self.margin


class ValuedClassifier(ClassifierLoss):
    """A loss of `class_losses` over the centres, `value()`."""

    keeps = True

    def value(self) -> ClassLoss:
        """The loss by this module's hyper-parameters."""
        raise NotImplementedError

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        return class_loss(embeddings, self.weight, labels, self.value(), **given)


class LinearClassifier(ValuedClassifier):
    """A loss of z = scale <x, w>: the products as they are, but for `normalize=True`.

    Args: scale: > 0. Others: as in `ClassifierLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        scale: float = 1.0,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, **options)
        check_above("scale", scale)
        self.scale = scale


class CheckedRows(NamedTuple):
    """Rows and labels of a loss that no function of `functional` checks."""

    x: Tensor  # [N, D] in the accumulation dtype, 0 where there is no label
    known: Tensor  # [N] labels, 0 where there is none
    valid: Tensor  # [N] bool

    def reduced(self, each: Tensor, given: dict[str, Any]) -> Tensor:
        """The loss a row by the reduction and row weights that a module was given."""
        return reduced(each, self.valid, given["reduction"], self.x.dtype, given["row_weight"])


def checked_rows(loss: Any, embeddings: Tensor, labels: Tensor, **given: Any) -> CheckedRows:
    """Raises ValueError, TypeError, IndexError for rows and labels of other sizes than `loss`'s."""
    check_matrix("embeddings", embeddings, "[N, D]")
    if embeddings.shape[1] != loss.embedding_size:
        raise ValueError(
            f"embeddings: expected [N, {loss.embedding_size}], got {describe(embeddings)}"
        )
    check_device("embeddings", embeddings, "weight", loss.weight)
    check_row_weight(given["row_weight"], len(embeddings), embeddings)
    labels = one_label(labels, embeddings, loss.num_classes, loss.ignore_index)
    valid = labels != NO_TARGET
    # a row without a label must not reach the gradients, not even with NaN
    x = torch.where(valid[:, None], embeddings.to(accumulate_dtype(embeddings.dtype)), 0)
    return CheckedRows(x, torch.where(valid, labels, 0), valid)


def refuse_references(loss: nn.Module, ref_emb: object, ref_labels: object) -> None:
    """ValueError: what the rows meet are centres."""
    for name, given in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
        if given is not None:
            raise ValueError(
                f"{name}: expected None of {type(loss).__name__}, whose rows meet the centres of "
                "classes and no other rows"
            )
