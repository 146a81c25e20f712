"""Losses of rows and the clusters, neighbours or atoms that they fall to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base.validation import check_count
from fused_losses.functions.clusters import (
    Atoms,
    attract_disperse,
    sparse_reconstruction,
)
from fused_losses.functions.proxies import proxy_nca
from fused_losses.functions.segments import check_each_class, segment_mean
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry
from fused_losses.similarity.balanced import balanced_clusters


@entry(
    "Dizaji et al., Deep Clustering via Joint Convolutional Autoencoder Embedding and Relative "
    "Entropy Minimization",
    2017,
    block="clusters",
    primitive="divergence",
)
class DEPICTLoss(Loss):
    """The clustering term of DEPICT: a softmax over clusters, drawn to balanced targets.

        p_ik = softmax_k(<x_i, w_k> + b_k),  q_ik ~ p_ik / (sum_i p_ik)^(1/2)
        loss_i = -sum_k q_ik log p_ik

    Args: num_clusters, embedding_size: of the learnt `weight` [K, D] and `bias` [K].

    loss(embeddings [N, D], target_embeddings=None [N, D]): q, which has no gradient, is of the
    second rows where they are given (the paper's clean encoder beside its noisy one).
    Time O(N K D), memory O((N + K) D).
    """

    def __init__(self, num_clusters: int, embedding_size: int, **options: Any) -> None:
        super().__init__(**options)
        check_count("num_clusters", num_clusters)
        check_count("embedding_size", embedding_size)
        drawn = torch.randn(num_clusters, embedding_size) / embedding_size**0.5
        self.weight = nn.Parameter(drawn)
        self.bias = nn.Parameter(torch.zeros(num_clusters))

    def forward(self, embeddings: Tensor, target_embeddings: Tensor | None = None) -> Tensor:
        return balanced_clusters(
            embeddings, self.weight, self.bias, target_embeddings, **self.common()
        )


@entry(
    "Yang et al., Attracting and Dispersing: A Simple Approach for Source-free Domain Adaptation",
    2022,
    block="clusters",
    primitive="topk",
)
class AaDLoss(Loss):
    """Predictions drawn to those of the nearest features and away from the batch's others.

        loss_i = -sum_{j in kNN(i)} <p_i, p_j> + alpha sum_{m != i} <p_i, p_m>,  p = softmax(logits)

    Args: k: neighbours, by cosine. alpha: of the dispersing term, 1 at first in the paper, which
    lets it fall as (1 + 10 t)^-beta: set the attribute. precision is not used: the neighbours are
    exact.

    loss(embeddings [N, D], logits [N, C], ref_emb [M, D], ref_probabilities [M, C], ids [N],
    ref_ids [M]): neighbours are of the bank where one is given, whose predictions get no gradient,
    but rows with equal ids; else of the batch, without gradient through p_j. SF(DA)^2's
    neighbourhood term has this form (its code was not compared).
    Time O(N M D + N k C), memory O(N (C + D) + N k).
    """

    def __init__(self, k: int = 5, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.k, self.alpha = k, alpha

    def forward(
        self,
        embeddings: Tensor,
        logits: Tensor,
        ref_emb: Tensor | None = None,
        ref_probabilities: Tensor | None = None,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Tensor:
        given = (ref_emb, ref_probabilities, ids, ref_ids)
        return attract_disperse(
            embeddings,
            logits,
            *given,
            k=self.k,
            alpha=self.alpha,
            reduction=self.reduction,
            backend=self.backend,
        )


@entry(
    "Snell et al., Prototypical Networks for Few-shot Learning",
    2017,
    block="clusters",
    primitive="pairs",
)
class PrototypicalLoss(Loss):
    """A softmax over the squared distances to the class means of a support set.

        c_k = mean of the support's rows of class k
        loss_i = scale |x_i - c_y|^2 + log sum_k e^(-scale |x_i - c_k|^2)

    Args: num_classes: of an episode, each with a row in the support. scale: 1 in the paper.

    loss(embeddings [N, D], labels [N], ref_emb [M, D], ref_labels [M]), labels in [0, num_classes).
    Means are rounded to the rows' dtype. Time O(N C D + M D), memory O((N + M + C) D).
    """

    keeps = True

    def __init__(self, num_classes: int, *, scale: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        check_count("num_classes", num_classes)
        self.num_classes, self.scale = num_classes, scale

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> Tensor:
        means = segment_mean(ref_emb, ref_labels, self.num_classes)
        check_each_class("ref_labels", ref_labels, self.num_classes)
        return proxy_nca(embeddings, means, labels, scale=self.scale, **self.common())


@entry(
    "Gao et al., Scaling and Evaluating Sparse Autoencoders",
    2024,
    block="clusters",
    primitive="topk",
)
class TopKSparseAutoencoderLoss(Loss):
    """A sparse autoencoder of the k best of many latents, with the auxiliary loss of dead ones.

        z = relu(top k of W (x - b) + c),  x' = V^T z + b
        loss_i = mean (x - x')^2 + aux_weight mean (e - V^T z_aux)^2,  e = x - x', no gradient

    z_aux: of the aux_k best latents that are dead: none of the last dead_after rows fired them, nor
    does this batch. In training the buffer `quiet_rows` counts; under `torch.func` use eval().

    Args:
        num_latents, embedding_size: of `encoder`, `decoder` [F, D], `latent_bias` [F] and
            `pre_bias` [D]; the decoder begins as the encoder, with unit rows (keep them so).
        k: latents a row. aux_k: 512 in the paper, at most F; 0: no such loss. aux_weight: 1/32.
        dead_after: rows, 10 million.

    The paper's loss; its authors' code divides both terms by a variance. precision is not used: the
    choice is exact. Time O(N F D), memory O(N (k + aux_k + D) + F D).
    """

    quiet_rows: Tensor  # [F] int64, how many rows came since it last fired

    def __init__(
        self,
        num_latents: int,
        embedding_size: int,
        k: int = 32,
        *,
        aux_k: int = 512,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, value in (("num_latents", num_latents), ("embedding_size", embedding_size)):
            check_count(name, value)
        self.k, self.aux_k = k, min(aux_k, num_latents)
        self.aux_weight, self.dead_after = aux_weight, dead_after
        drawn = torch.randn(num_latents, embedding_size) / embedding_size**0.5
        self.encoder = nn.Parameter(drawn)
        self.decoder = nn.Parameter(nn.functional.normalize(drawn, dim=1))
        self.latent_bias = nn.Parameter(torch.zeros(num_latents))
        self.pre_bias = nn.Parameter(torch.zeros(embedding_size))
        self.register_buffer("quiet_rows", torch.zeros(num_latents, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        atoms = Atoms(self.encoder, self.decoder, self.latent_bias, self.pre_bias)
        quiet = self.quiet_rows + x.shape[0]
        loss, fired = sparse_reconstruction(
            x,
            atoms,
            quiet > self.dead_after,
            k=self.k,
            aux_k=self.aux_k,
            aux_weight=self.aux_weight,
            reduction=self.reduction,
            backend=self.backend,
        )
        if self.training:
            self.quiet_rows.copy_(torch.where(fired, 0, quiet))
        return loss
