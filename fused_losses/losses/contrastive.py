"""Losses of rows against their positives and many negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.functions.contrastive import nt_xent
from fused_losses.functions.info_nce import info_nce
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry
from fused_losses.similarity.compatibility import higher_order_compatibility
from fused_losses.similarity.kernel_means import uniformity


@entry(
    "Chen et al., A Simple Framework for Contrastive Learning of Visual Representations",
    2020,
    block="contrastive",
    primitive="pairs",
)
class SimCLRLoss(Loss):
    """`nt_xent` of two views, s the cosine; ScatSimCLR's, too.

        loss_i = log sum_{k != i} e^(s_ik / temperature) - s_ip / temperature

    over the 2 N rows of both views, p the other view of i.

    Args: temperature: > 0 (the paper's best for long trainings, 0.5). normalize: divide rows by
    their norms first (True).

    loss(first [N, D], second [N, D]). Time O(2 N^2 D), memory O(N D).
    """

    keeps = True

    def __init__(self, temperature: float = 0.5, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.temperature, self.normalize = temperature, normalize

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        _same_shape("second", second, "first", first)
        return nt_xent(
            torch.cat([first, second]),
            temperature=self.temperature,
            normalize=self.normalize,
            **self.common(),
        )


@entry(
    "He et al., Momentum Contrast for Unsupervised Visual Representation Learning",
    2020,
    block="contrastive",
    primitive="pairs",
)
class MoCoLoss(Loss):
    """`info_nce` of queries with their own keys against a queue of older ones, s the cosine.

        loss_i = log(e^(<q_i, k_i> / temperature) + sum_Q e^(<q_i, k> / temperature))
               - <q_i, k_i> / temperature

    Args: dim: D. size: rows of the queue, random ones at first. temperature: > 0.
    normalize: divide queries and keys by their norms first (True).

    loss(query [N, D], key [N, D]), then `enqueue(key)`, which replaces the oldest rows: apart, so
    that a loss may be taken twice. Time O(N Q D), memory O((N + Q) D).
    """

    keeps = True
    queue: Tensor  # [Q, D]
    place: Tensor  # [] where the next key goes

    def __init__(
        self,
        dim: int,
        size: int = 65536,
        temperature: float = 0.07,
        *,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature, self.normalize = temperature, normalize
        self.register_buffer("queue", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return info_nce(
            query,
            key,
            temperature=self.temperature,
            own_key=True,
            queue=self.queue.to(query.dtype),
            normalize=self.normalize,
            **self.common(),
        )

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Keys [N, D] take the place of the oldest; of more than the queue has, the last."""
        _same_width("keys", keys, self.queue)
        size = self.queue.shape[0]
        keys = keys[-size:]
        if self.normalize:
            keys = nn.functional.normalize(keys, dim=1)
        at = (self.place + torch.arange(keys.shape[0], device=self.queue.device)) % size
        self.queue[at] = keys.to(self.queue.dtype)
        self.place.copy_((self.place + keys.shape[0]) % size)


@entry(
    "Robinson et al., Contrastive Learning with Hard Negative Samples",
    2021,
    block="contrastive",
    primitive="pairs",
)
class HardNegativeNCELoss(Loss):
    """`info_nce` whose negatives weigh e^(beta z): the nearer a negative, the more.

        loss_i = log(e^z_ii + M' sum_N e^((1 + beta) z) / sum_N e^(beta z)) - z_ii

    z the cosine over the temperature, M' how many negatives a row has; the paper's without its
    correction for positives among them (tau_plus = 0).

    Args: temperature: > 0. beta: >= 0. symmetric: the mean of this and of the columns' loss.
    normalize: divide rows by their norms first (True).

    loss(query [N, D], key [M, D], **given): given to `info_nce`. Time O(2 N M D), memory
    O((N + M) D).
    """

    keeps = True

    def __init__(
        self,
        temperature: float = 0.5,
        beta: float = 1.0,
        *,
        symmetric: bool = True,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature, self.beta = temperature, beta
        self.symmetric, self.normalize = symmetric, normalize

    def forward(self, query: Tensor, key: Tensor, **given: Any) -> Tensor:
        return info_nce(
            query,
            key,
            temperature=self.temperature,
            hardness=self.beta,
            symmetric=self.symmetric,
            normalize=self.normalize,
            **given,
            **self.beside(given),
        )


@entry(
    "Biondi et al., Stationary Representations: Optimally Approximating Compatibility and "
    "Implications for Improved Model Replacements",
    2024,
    block="contrastive",
    primitive="pairs",
    golden=("hoc_loss",),
)
class HOCLoss(Loss):
    """`higher_order_compatibility` of new features with an older model's, s the cosine.

        loss_i = log sum_j e^(mu [y_j != y_i] <old_i, new_j>) - mu <old_i, new_i>

    Args: mu: > 0. The paper adds a tenth of it to nine tenths of the cross entropy over a simplex.

    loss(new [N, D], old [N, D], labels [N]): rows as they are; the authors' are of norm 1.
    Time O(N^2 D), memory O(N D).
    """

    def __init__(self, mu: float = 10.0, **options: Any) -> None:
        super().__init__(**options)
        self.mu = mu

    def forward(self, new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        return higher_order_compatibility(new, old, labels, scale=self.mu, **self.common())


@entry(
    "Wang and Isola, Understanding Contrastive Representation Learning through Alignment and "
    "Uniformity on the Hypersphere",
    2020,
    block="contrastive",
    primitive="pairs",
)
class UniformityLoss(Loss):
    """`uniformity`: how evenly a batch covers the sphere; a number, whatever the reduction.

        loss = log mean_{i != j} e^(-t |x_i - x_j|^2)

    Args: t: > 0. normalize: divide rows by their norms first (True).

    loss(embeddings [N, D]). Time O(N^2 D / 2), memory O(N D).
    """

    def __init__(self, t: float = 2.0, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.t, self.normalize = t, normalize

    def forward(self, embeddings: Tensor) -> Tensor:
        own: dict[str, Any] = dict(t=self.t, normalize=self.normalize)
        return uniformity(embeddings, **own, precision=self.precision, backend=self.backend)


def _same_shape(name: str, rows: Tensor, of: str, others: Tensor) -> None:
    if rows.shape != others.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(others.shape)} as {of} has, got {tuple(rows.shape)}"
        )


def _same_width(name: str, rows: Tensor, queue: Tensor) -> None:
    if rows.dim() != 2 or rows.shape[1] != queue.shape[1]:
        raise ValueError(
            f"{name}: expected shape [N, {queue.shape[1]}] as the queue has, "
            f"got {tuple(rows.shape)}"
        )
