"""Losses of two towers: a row and its key, among the keys of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.functions.contrastive import sigmoid_contrastive
from fused_losses.functions.info_nce import info_nce
from fused_losses.functions.nested import nested_info_nce, sweeps_widths
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry

# what `nested_info_nce` takes of what `info_nce` does
NUMBERED = ("labels", "key_labels", "ids", "key_ids", "groups", "key_groups")
NESTED = {*NUMBERED, "offset", "exclude", "decoupled"}


@entry(
    "van den Oord et al., Representation Learning with Contrastive Predictive Coding",
    2018,
    block="contrastive",
    primitive="pairs",
)
class InfoNCELoss(Loss):
    """`info_nce` of rows and their keys, s the cosine.

        loss_i = log sum_j e^(s_ij / temperature) - s_ii / temperature

    Args:
        temperature: > 0. symmetric: the mean of this loss and of the columns'.
        normalize: divide rows by their norms first (True).

    loss(query [N, D], key [M, D], **given): given to `info_nce`, labels, negatives, queue, ids, ...
    Time O(N M D), memory O((N + M) D).
    """

    keeps = True

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        symmetric: bool = False,
        normalize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.temperature, self.symmetric, self.normalize = temperature, symmetric, normalize

    def forward(self, query: Tensor, key: Tensor, **given: Any) -> Tensor:
        return info_nce(
            query,
            key,
            temperature=self.temperature,
            symmetric=self.symmetric,
            normalize=self.normalize,
            **given,
            **self.beside(given),
        )

    def at_widths(
        self, widths: Sequence[int], rows: int, query: Tensor, key: Tensor, **given: Any
    ) -> Tensor | None:
        """The loss at each width, [W], from one sweep; None: it has none of this call."""
        if type(self).forward is not InfoNCELoss.forward or rows != 2 or given.keys() - NESTED:
            return None
        if not sweeps_widths(query, self.precision, self.backend):
            return None
        return nested_info_nce(
            query,
            key,
            widths,
            temperature=self.temperature,
            symmetric=self.symmetric,
            normalize=self.normalize,
            **given,
            **self.unkept(),
        )


@entry(
    "Radford et al., Learning Transferable Visual Models From Natural Language Supervision",
    2021,
    block="contrastive",
    primitive="pairs",
    golden=("openclip_ClipLoss",),
)
class ClipLoss(Loss):
    """CLIP's loss, `info_nce` of both ways, with the scale among its parameters.

        loss = (mean_i (log sum_j e^z_ij - z_ii) + mean_j (log sum_i e^z_ij - z_jj)) / 2

    with z_ij = e^logit_scale <image_i, text_j>.

    Args:
        temperature: what the scale starts from, log(1 / temperature).
        learnable: whether `logit_scale` is a parameter (else a buffer).
        normalize: divide rows by their norms first; open_clip's models have done it (False).

    loss(image_features [N, D], text_features [N, D], logit_scale): logit_scale None: e to the
    module's own; else the factor itself, as open_clip gives it. Time O(N^2 D), memory O(N D).
    """

    keeps = True
    logit_scale: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.normalize = normalize
        _held(self, "logit_scale", -math.log(temperature), learnable)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        options = self._options(logit_scale) | self.common()
        return info_nce(image_features, text_features, **options)

    def at_widths(
        self,
        widths: Sequence[int],
        rows: int,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor | None:
        """As that of `InfoNCELoss`."""
        if type(self).forward is not ClipLoss.forward or rows != 2:
            return None
        if not sweeps_widths(image_features, self.precision, self.backend):
            return None
        options = self._options(logit_scale) | self.unkept()
        return nested_info_nce(image_features, text_features, widths, **options)

    def _options(self, logit_scale: float | Tensor | None) -> dict[str, Any]:
        scale = self.logit_scale.double().exp() if logit_scale is None else logit_scale
        return dict(temperature=1 / scale, symmetric=True, normalize=self.normalize)


@entry(
    "Zhai et al., Sigmoid Loss for Language Image Pre-Training",
    2023,
    block="contrastive",
    primitive="pairs",
)
class SigLipLoss(Loss):
    """`sigmoid_contrastive`, with scale and bias among its parameters.

        loss_i = sum_j softplus(-l_ij (e^logit_scale <image_i, text_j> + logit_bias))

    with l = 1 on i = j, else -1.

    Args:
        scale, bias: where both start. learnable: whether they are parameters (else buffers).
        normalize: divide rows by their norms first; open_clip's models have done it (False).

    loss(image_features [N, D], text_features [M, D], logit_scale, logit_bias): None: the module's
    own; else the factor and the bias themselves, as open_clip gives them. Time O(N M D), memory
    O((N + M) D).
    """

    keeps = True
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        *,
        learnable: bool = True,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.normalize = normalize
        _held(self, "logit_scale", math.log(scale), learnable)
        _held(self, "logit_bias", bias, learnable)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        return sigmoid_contrastive(
            image_features,
            text_features,
            scale=self.logit_scale.double().exp() if logit_scale is None else logit_scale,
            bias=self.logit_bias if logit_bias is None else logit_bias,
            normalize=self.normalize,
            **self.common(),
        )


def _held(module: nn.Module, name: str, value: float, learnable: bool) -> None:
    """A number of the module: a parameter, or a buffer."""
    number = torch.tensor(value)
    if learnable:
        module.register_parameter(name, nn.Parameter(number))
    else:
        module.register_buffer(name, number)
