"""MadaCos: the scale and the margin of a softmax are read off the batch, with nothing to tune.

    t_i = cos(x_i, w_{y_i})     med = the lower median of t     B_i = sum_{j != y_i} exp(s cos_ij)
    s = ln(k (1 - alpha) / alpha) / (1 - med), at least `smallest`
    m = max(0, med - ln(B alpha / (1 - alpha)) / s)
    loss_i = log(exp(s (t_i - m)) + B_i) - s (t_i - m)

After the margin the median row has probability alpha, and a row at t = 1 the odds k: half of the
batch stays hard at any stage of training. (Zhu et al., Coarse-to-Fine: Learning Compact
Discriminative Representation for Single-Stage Image Retrieval, 2023.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import no_autocast, over_last
from fused_losses.base.parameters import check_parameter
from fused_losses.functions.class_rows import ClassOptions, class_rows
from fused_losses.functions.positions import over_positions

BACKGROUNDS = ("sample", "median", "mean")


@dataclass(frozen=True)
class AdaptiveScale:
    """MadaCos as two steps on [N] vectors, in between which one sweep over the classes finds B.

    alpha: in (0, 1), what the median row's probability becomes. odds: k. smallest <= s <= largest
    (the bound above is ours: as med nears 1, s has none). background: which B enters m, that of
    the row whose cosine is the median ("sample"; the first such row), the lower median or the mean
    of all B. Neither s nor m has a gradient. Time O(N log N), memory O(N).
    """

    alpha: float = 0.02
    smallest: float = 32.0
    background: str = "sample"
    odds: float = 9_999_999.0
    largest: float = 1e4

    def __post_init__(self) -> None:
        for name in ("alpha", "smallest", "odds", "largest"):
            check_parameter(name, getattr(self, name))
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: expected a value in (0, 1), got {self.alpha}")
        if not self.odds * (1 - self.alpha) > self.alpha:
            raise ValueError(f"odds: expected more than alpha / (1 - alpha), got {self.odds}")
        if not 0 < self.smallest <= self.largest < math.inf:
            raise ValueError(
                "smallest, largest: expected 0 < smallest <= largest, finite, got "
                f"{self.smallest}, {self.largest}"
            )
        validation.check_choice("background", self.background, BACKGROUNDS)

    @property
    def log_odds(self) -> float:
        """ln(alpha / (1 - alpha))"""
        return math.log(self.alpha) - math.log1p(-self.alpha)

    def scale_of(self, target_cosine: Tensor, valid: Tensor | None = None) -> Tensor:
        """s of a batch. target_cosine [N], valid [N] bool (None: every row) -> [], its dtype."""
        median = lower_median(target_cosine.detach(), valid)
        span = math.log(self.odds) - self.log_odds
        return (span / (1 - median).clamp_min(span / self.largest)).clamp_min(self.smallest)

    def margin_of(
        self,
        target_cosine: Tensor,  # [N]
        lse: Tensor,  # [N]
        scale: Tensor | float,
        valid: Tensor | None = None,  # [N]
    ) -> Tensor:
        """m of a batch, in units of the cosine. lse: log B of each row, with this scale. []

        In logarithms throughout: B overflows float32 at s cos = 88. 0 over no rows, or no B.
        """
        target_cosine, lse = target_cosine.detach(), lse.detach()
        scale = scale.detach() if isinstance(scale, Tensor) else scale
        median = lower_median(target_cosine, valid)
        log_b = self._background(target_cosine, lse, median, valid)
        margin = (median - (log_b + self.log_odds) / scale).clamp_min(0)
        margin = torch.where(log_b == -torch.inf, 0, margin)
        return margin if valid is None else torch.where(valid.any(), margin, 0)

    def _background(
        self, target_cosine: Tensor, lse: Tensor, median: Tensor, valid: Tensor | None
    ) -> Tensor:
        if lse.numel() == 0:
            return lse.new_full((), -torch.inf)
        if self.background == "median":
            return lower_median(lse, valid)
        here = torch.ones_like(lse, dtype=torch.bool) if valid is None else valid
        if self.background == "mean":
            count = here.sum().to(lse.dtype)
            return over_last(lse, here) - count.log()
        at = ((target_cosine == median) & here).to(torch.uint8).argmax()
        return lse.index_select(0, at[None])[0]


def lower_median(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The ((n - 1) // 2)-th smallest of the n valid values, 0 of none, NaN with a NaN. [N] -> []

    torch.median's choice, without the host learning n. Time O(N log N), memory O(N).
    """
    if values.numel() == 0:
        return values.new_zeros(())
    if valid is None:
        return values.median()
    n = valid.sum()
    ordered = torch.where(valid, values, torch.inf).sort().values
    middle = ordered.index_select(0, ((n - 1) // 2).clamp_min(0)[None])[0]
    middle = torch.where(n == 0, 0, middle)
    return torch.where((values.isnan() & valid).any(), torch.nan, middle)


@over_positions
def adaptive_margin_softmax(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    margin: AdaptiveScale = AdaptiveScale(),
    training: bool = True,
    normalize: bool = True,
    ignore_index: int = -100,
    classes: Tensor | None = None,  # [K]
    precision: str = "fp32",
    row_weight: Tensor | None = None,  # [N]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Margin softmax with MadaCos's scale and margin (module docstring); arguments, dtypes and
    errors are those of `margin_softmax`, the scale apart.

    training=False: m = 0. Ignored rows take no part in the median, nor in the mean. A NaN row
    makes the median NaN, and with it every row's loss.
    One sweep over the classes: time O(N K D), memory O(N D) plus a tile, on "reference" O(N K).
    """
    if not isinstance(margin, AdaptiveScale):
        raise TypeError(f"margin: expected an AdaptiveScale, got {type(margin).__name__}")
    options = ClassOptions(
        normalize, ignore_index, classes, precision, reduction, backend, row_weight
    )
    rows = class_rows(embeddings, weight, labels, options)
    with no_autocast(embeddings.device):
        cosine = rows.target_cosine()
        # rounded once: what multiplies the scores is what the margin is for
        scale = margin.scale_of(cosine, rows.valid).to(rows.x.dtype)
        lse, target = rows.statistics(scale)
        if training:
            target = target - scale * margin.margin_of(cosine, lse, scale, rows.valid)
        return rows.cross_entropy(target, lse)


examples(adaptive_margin_softmax, lambda f, t: f(t.x, t.w, t.targets))
