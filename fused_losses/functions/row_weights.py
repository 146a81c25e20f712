"""Weights of rows by what is known of them beside their loss: they go in as `row_weight`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.parameters import check_parameter
from fused_losses.base.validation import check_choice, describe
from fused_losses.functions.class_values import check_floats

RANGES = ("global", "local")


class BiasWeights(nn.Module):
    """Bias loss's weights, larger where a sample's features vary more (Abrahamyan et al., 2021).

        w_i = exp(alpha (v_i - low) / (max v - min v)) - beta,  v_i the variance of features i

    Over all numbers of a sample, unbiased. within "global": low is the smallest v of any batch so
    far, which is state, saved with the module; training alone lowers it. "local": min v. max v and
    min v are the batch's. Where all v are equal the fraction is 0 (the authors' is NaN).

    alpha >= 0, beta in [0, 1]. features [N, ...], two numbers a sample at least -> [N] in their
    accumulation dtype, without gradient. The authors' mean divides by N and not by the weights:
    `class_loss(..., row_weight=w, reduction="sum") / N`.
    """

    low: Tensor

    def __init__(self, alpha: float = 0.3, beta: float = 0.3, within: str = "global") -> None:
        super().__init__()
        check_floats(check_parameter, alpha=alpha, beta=beta)
        check_parameter("alpha", alpha, 0)
        check_parameter("beta", beta, 0, 1)
        check_choice("within", within, RANGES)
        self.alpha, self.beta, self.within = float(alpha), float(beta), within
        self.register_buffer("low", torch.tensor(torch.inf, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Raises TypeError or ValueError. Time and memory O(features)."""
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = describe(features) if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features: expected a floating point tensor [N, ...], got {got}")
        if features.dim() < 2 or features[:1].numel() < 2 * len(features[:1]):
            raise ValueError(
                f"features: expected [N, ...], two numbers a sample at least, got "
                f"{describe(features)}"
            )
        wide = accumulate_dtype(features.dtype)
        found = features.flatten(1).to(wide).var(dim=1)
        if not len(found):
            return found
        least, most = found.min(), found.max()
        low = least
        if self.within == "global":
            low = torch.minimum(self.low.to(least), least)
            if self.training:
                self.low.copy_(low)
        span = most - least
        share = torch.where(span == 0, 0, (found - low) / torch.where(span == 0, 1, span))
        return (self.alpha * share).exp() - self.beta

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, within={self.within!r}"


def equity_weights(likelihood: Tensor, *, gamma: float = 5.0, eta: float = 1.0) -> Tensor:
    """(eta + (1 - p)^gamma) / (eta + 1): generalised focal weights (DatasetEquity, 2023).

    likelihood: [N] p in [0, 1], of a sample in the data set, not of its label; floating point.
    gamma >= 0, eta >= 0. -> [N] in p's dtype, in (0, 1], without gradient. Raises
    TypeError or ValueError.
    """
    check_floats(check_parameter, gamma=gamma, eta=eta)
    check_parameter("gamma", gamma, 0)
    check_parameter("eta", eta, 0)
    if not isinstance(likelihood, Tensor) or likelihood.dim() != 1:
        got = describe(likelihood) if isinstance(likelihood, Tensor) else type(likelihood).__name__
        raise TypeError(f"likelihood: expected a floating point tensor [N], got {got}")
    likelihood = likelihood.detach()
    check_parameter("likelihood", likelihood, 0, 1, carries=True)
    with torch.no_grad():
        return (eta + (1 - likelihood) ** gamma) / (eta + 1)
