"""Losses over classes by D x D products, and classifiers that stay where they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base.memory_budget import half_of
from fused_losses.base.numerics import (
    no_autocast,
    reduced,
    root,
    row_dtype,
    softplus,
    unit_rows,
)
from fused_losses.base.parameters import check_above, check_parameter, check_row_weight
from fused_losses.base.products import product
from fused_losses.base.validation import check_matrix, describe
from fused_losses.centers.simplex import DSimplexHead
from fused_losses.losses.owned import (
    ClassifierLoss,
    LabelledLoss,
    checked_rows,
    of_classes,
    softmax_loss,
)

PLAIN: dict[str, Any] = dict(normalize=False)  # rows and centres as they are


@of_classes(
    "Zhang et al., P2SGrad: Refined Gradients for Optimizing Deep Face Models",
    2019,
    "pml_P2SGradLoss",
    primitive="rows",
)
class P2SGradLoss(ClassifierLoss):
    """Squared error of cosines: mean over the classes of (cos theta_j - [j = y])^2.

    The other classes come as x^T (sum_j w_j w_j^T) x, in float64 where the device has it: nothing
    [N, C]. pytorch-metric-learning's `weight` is [D, C]: a state dict of that shape is transposed
    (where C = D it cannot be told and is taken as it is), and it keeps its columns at norm 1.
    Args: descriptors_dim: D, first, as there. Time O((N + C) D^2), memory O((N + C) D).
    """

    former = "weight"

    def __init__(self, descriptors_dim: int, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, descriptors_dim, **options)

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        rows = checked_rows(self, embeddings, labels, **given)
        with no_autocast(embeddings.device):
            wide = row_dtype(embeddings.device)
            x, w = rows.x.to(wide), self.weight.to(wide)
            if self.normalize:
                x, w = unit_rows(x), unit_rows(w)
            every = (product(x, product(w.T, w.T)) * x).sum(dim=1)
            own = (x * w[rows.known]).sum(dim=1)
            return rows.reduced((every + 1 - 2 * own) / self.num_classes, given)


@of_classes(
    "de Brebisson, Vincent, The Z-loss: A Shift and Scale Invariant Classification Loss Belonging "
    "to the Spherical Family",
    2016,
    "spherical_z_loss",
    primitive="rows",
)
class ZLoss(ClassifierLoss):
    """softplus(a (b - z_y)) / a of the score standardised over all classes.

        z_y = (o_y - mean o) / std o,    o_j = <x, w_j>

    By D x D products of the centres less their mean: the variance is a sum of squares, and nothing
    is subtracted. `SphericalHead` makes exact SGD steps of it that cost the same at any C.
    Args: a > 0, b. Time O((N + C) D^2), memory O((N + C) D).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, a: float = 1.0, b: float = 0.0, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, **PLAIN | options)
        check_above("a", a)
        check_parameter("b", b)
        self.a, self.b = a, b

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        rows = checked_rows(self, embeddings, labels, **given)
        with no_autocast(embeddings.device):
            x, w = rows.x, self.weight.to(rows.x.dtype)
            if self.normalize:
                x, w = unit_rows(x), unit_rows(w)
            moved = w - w.mean(dim=0)
            variance = (product(x, product(moved.T, moved.T) / self.num_classes) * x).sum(dim=1)
            above = (x * moved[rows.known]).sum(dim=1)
            # the authors' small number
            z = above / (root(variance) + 1e-12)
            return rows.reduced(softplus(self.a * (self.b - z)) / self.a, given)


@of_classes(
    "Biondi et al., Stationary Representations: Optimally Approximating Compatibility and "
    "Implications for Improved Model Replacements",
    2024,
    "dsimplex_5",
    primitive="rows",
)
class DSimplexLoss(LabelledLoss):
    """`DSimplexHead`: cross entropy over the vertices of a regular simplex, none of it stored.

    Args: num_classes, embedding_size (None: C - 1), margin, scale, normalize, preallocated: of
    `DSimplexHead`. No `weight`; precision and backend have no say.
    Time O(N D), memory O(N D).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int | None = None,
        *,
        margin: Any = None,
        scale: float = 1.0,
        normalize: bool = False,
        preallocated: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        own: dict[str, Any] = dict(margin=margin, scale=scale, normalize=normalize)
        self.head = DSimplexHead(
            num_classes,
            embedding_size,
            preallocated=preallocated,
            reduction="none",
            ignore_index=self.ignore_index,
            **own,
        )

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        weight = given["row_weight"]
        check_row_weight(weight, len(embeddings), embeddings)
        if weight is not None:
            labels = torch.where(weight > 0, labels, self.ignore_index)
        each = self.head(embeddings, labels)
        return reduced(each, labels != self.ignore_index, given["reduction"], each.dtype, weight)


@of_classes(
    "Ricci et al., Backward-Compatible Aligned Representations via an Orthogonal Transformation "
    "Layer",
    2024,
)
class OCALoss(ClassifierLoss):
    """An extended feature that stays compatible: its first d coordinates are the old model's.

        new = CE(W R f, y)      old = CE(P f_d, y)      pull = 1 - cos(P_y, f_d)
        loss = sum of weights times these; f of norm 1, f_d its first d coordinates, of norm 1 again

    R is orthogonal, the exponential of the antisymmetric part of the parameter `turn` [D, D] (a
    reflection is not reached); it starts at 1. P: the old classifier's prototypes [C, d], a buffer,
    taken as they are. The authors give the cosines no scale.
    Args: prototypes: P. weights: the authors' (5, 10, 5). Others: as in `ClassifierLoss`.
    Time O(N C D + D^3), memory O((N + C) D + D^2).
    """

    keeps = True
    prototypes: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        prototypes: Tensor,
        weights: tuple[float, float, float] = (5.0, 10.0, 5.0),
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, **PLAIN | options)
        check_matrix("prototypes", prototypes, "[C, d]")
        if len(prototypes) != num_classes or prototypes.shape[1] > embedding_size:
            raise ValueError(
                f"prototypes: expected [{num_classes}, d <= {embedding_size}], got "
                f"{describe(prototypes)}"
            )
        if len(weights) != 3:
            raise ValueError(f"weights: expected three, got {weights}")
        for weight in weights:
            check_parameter("weights", weight, 0)
        self.weights = tuple(weights)
        self.register_buffer("prototypes", prototypes.detach().to(self.weight))
        size = self.embedding_size, self.embedding_size
        self.turn = nn.Parameter(torch.zeros_like(self.weight[:1]).expand(size).clone())

    def rotation(self) -> Tensor:
        """R [D, D], in float64 where the device has it."""
        turn = self.turn.to(row_dtype(self.turn.device))
        return torch.linalg.matrix_exp((turn - turn.T) / 2)

    def loss(self, embeddings: Tensor, labels: Tensor, **given: Any) -> Tensor:
        rows = checked_rows(self, embeddings, labels, **given)
        with no_autocast(embeddings.device):
            f = unit_rows(rows.x)
            turned = product(f, self.rotation().to(f.dtype))
            old = unit_rows(f[:, : self.prototypes.shape[1]])
            prototypes = self.prototypes.to(f.dtype)
            budget = half_of(given["memory_budget"], embeddings)
            options: dict[str, Any] = {**given, "memory_budget": budget}
            options = {**options, **dict(margin=None, scale=1.0)}
            new = softmax_loss(turned, self.weight.to(f.dtype), labels, **options)
            plain = {**options, **PLAIN}
            near = softmax_loss(old, prototypes, labels, **plain)
            pull = 1 - (unit_rows(prototypes[rows.known]) * old).sum(dim=1)
            first, second, third = self.weights
            return first * new + second * near + third * rows.reduced(pull, given)
