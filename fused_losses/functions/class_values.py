"""Losses over classes with sub-centres, several labels a row, or no softmax; whole or sharded.

A loss is a frozen value: which rule folds the negative classes (`primitives.class_rules`), and what
it makes of a row's statistics and of the cosines of its labels, in ordinary PyTorch on small
vectors. `class_loss` runs it in one process, `ClassCenters` over shards: the statistics merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import joined, over_last, softplus
from fused_losses.base.parameters import check_above, check_margin, check_parameter
from fused_losses.base.validation import GRADIENTS, describe
from fused_losses.functions.margin_calls import apply_margin, bend_of, penalty_of
from fused_losses.margins import ArcFace, Margin
from fused_losses.primitives.class_rules.rules import raised


class MergedRows(NamedTuple):
    """What a loss is made of: of every row, over all classes that take part."""

    statistics: Tensor  # [S, N] of the rule, over the negatives
    targets: Tensor  # [N, L] cosines with the labels, 0 where there is none
    present: Tensor  # [N, L] bool: there is a label
    norms: Tensor | None = None  # [N] |x| of the embeddings, for margins that use it
    of_values: bool = False  # the statistics carry the gradient of the rule's values
    negatives: Tensor | None = None  # [N] how many classes they are over, where the loss counts
    values: Tensor | None = None  # [R, N] as the rule took them; with a gradient on the reference
    hardest: Tensor | None = None  # [N] cosine of the best negative, -inf: none; where it is asked


Sweep = Callable[[str, list[float], Tensor | None], Tensor]


def count_negatives(labels: Tensor, taking_part: int | Tensor) -> Tensor:
    """How many classes are none of a row's labels; labels [N, L], -1: none. [N] float64"""
    order = labels.sort(dim=1).values
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = order[:, 1:] != order[:, :-1]
    return (taking_part - (first & (order >= 0)).sum(dim=1)).to(torch.float64)


class ClassLoss:
    """What every loss has: the whole interface that `class_loss` and a sharded head ask for.

    rule: a name in `class_rules.rules.CLASS_RULES`; softness: how a class's centres are pooled
    (`class_rules.pool`), 0: the best one.
    """

    rule: str
    softness: float = 0.0
    counts: bool = False  # whether `row_loss` asks how many negatives a row has
    by_targets: bool = False  # whether `values` asks for the labels' cosines
    asks_hardest: bool = False  # whether it is made of the best negative, found by a sweep

    def params(self) -> list[float]:
        """The rule's."""
        raise NotImplementedError

    def values(self, targets: Tensor, present: Tensor) -> Tensor | None:  # noqa: ARG002 (a hook)
        """Numbers of each row that the rule takes, [R, N], or None.

        targets [N, L]: cosines with the labels, 0 where there is none; present [N, L] bool.
        """
        return None

    def swept_values(
        self,
        sweep: Sweep,  # noqa: ARG002 (a hook)
        targets: Tensor,
        present: Tensor,
        negatives: Tensor | None,  # noqa: ARG002
    ) -> Tensor | None:
        """`values`, of losses that must see the classes before the sweep that has the gradient.

        sweep(rule, params, values) gives [S, N] over the negatives. What this returns may follow
        gradients: the reference, whose sweeps do, gives the rule and `row_loss` the same values.
        """
        return self.values(targets, present)

    def row_loss(self, rows: MergedRows) -> Tensor:
        """Each row's loss [N], differentiable in statistics, targets and norms.

        A row without labels may have any finite loss: the caller leaves it out.
        """
        raise NotImplementedError


def check_floats(check: Callable[..., None], **numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, Tensor):  # whose gradient would be lost in the rule
            raise TypeError(
                f"{name}: expected a float, got a tensor of {describe(number)}, whose gradient "
                "would be lost"
            )
        check(name, number)


def _present_sum(terms: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, terms, 0).sum(dim=1)


@dataclass(frozen=True)
class Softmax(ClassLoss):
    """Cross entropy with a margin on the target, over classes of one centre or several.

        mean over the row's labels p of  -log(e^{z_p} / (e^{z_p} + sum_neg e^{s psi(c_j)}))
        z_p = s margin(c_p)

    With one label that is margin softmax (sub-centre ArcFace: Deng et al., 2020); each of several
    meets the negatives alone, not the other labels. margin: as in `margin_softmax`; one with a
    `bend` moves the negatives by psi, and such a one, or one that uses the embeddings' norms,
    takes one label a row. gradient: "exact" or "straight_through". softcap: None, or scores z
    become softcap tanh(z / softcap), that of the target after its margin (Gemma 2); beside no
    margin with a bend. z_loss >= 0: so many times the square of the denominator's logarithm is
    added (PaLM).
    """

    margin: Margin | None = ArcFace(0.5)
    scale: float = 64.0
    gradient: str = "exact"
    z_loss: float = field(default=0.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_margin(self.margin)
        check_floats(check_above, scale=self.scale)
        validation.check_choice("gradient", self.gradient, GRADIENTS)
        check_floats(check_parameter, z_loss=self.z_loss)
        check_parameter("z_loss", self.z_loss, 0)
        if self.softcap is not None:
            self._check_softcap(self.softcap)

    def _check_softcap(self, softcap: float) -> None:
        check_floats(check_above, softcap=softcap)
        if hasattr(self.margin, "bend"):
            raise ValueError(
                "softcap: expected None beside a margin that bends other classes, got "
                f"{softcap} beside {type(self.margin).__name__}"
            )

    @property
    def rule(self) -> str:
        return "softmax" if self.softcap is None else "capped_softmax"

    def params(self) -> list[float]:
        capped = [] if self.softcap is None else [float(self.softcap)]
        return [float(self.scale), *capped]

    def values(self, targets: Tensor, present: Tensor) -> Tensor | None:
        if not hasattr(self.margin, "bend"):
            return None
        one_label(self.margin, targets)
        with torch.no_grad():
            return bend_of(self.margin, targets[:, 0], present[:, 0])

    def row_loss(self, rows: MergedRows) -> Tensor:
        z = self._capped(self._scaled(self._moved(rows.targets, rows.norms, rows.present)))
        each = self.of_labels(z, rows)
        if self.z_loss:
            each = each + self.z_loss * joined(z, self.denominators(rows)) ** 2
        return over_labels(each, z, rows.present) + penalty_of(self.margin, rows.norms)

    def denominators(self, rows: MergedRows) -> Tensor:
        """The logarithms of what each label meets, [N, L] or [N, 1]."""
        return rows.statistics[0][:, None]

    def of_labels(self, z: Tensor, rows: MergedRows) -> Tensor:
        """The loss of each label by its score, [N, L] -> [N, L]."""
        return label_ends(z, rows.statistics[0], self.end)

    def end(self, log_p: Tensor, log_rest: Tensor) -> Tensor:  # noqa: ARG002 (of others)
        """The loss of a label by log p and log(1 - p) of its probability. [N, L]"""
        return -log_p

    def _capped(self, z: Tensor) -> Tensor:
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def _scaled(self, cosines: Tensor) -> Tensor:
        return self.scale * cosines

    def _moved(self, targets: Tensor, norms: Tensor | None, present: Tensor) -> Tensor:
        """[N, L] target cosines after the margin."""
        if getattr(self.margin, "uses_norm", False):
            one_label(self.margin, targets)
            if norms is None:
                raise ValueError(f"norms: expected [N], which {self.margin} uses, got None")
            norms = norms.to(targets.dtype)
        flat, here = targets.flatten(), present.flatten()
        return apply_margin(self.margin, flat, norms, self.gradient, here).view_as(targets)


def one_label(what: object, targets: Tensor) -> None:
    if targets.shape[1] != 1:
        raise ValueError(
            f"labels: expected one a row with {type(what).__name__}, got {targets.shape[1]}"
        )


def label_ends(z: Tensor, lse: Tensor, end: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`Softmax.end` of each label, [N, L]; z [N, L], lse [N] of the negatives."""
    others = lse[:, None] != -torch.inf
    above = z - torch.where(others, lse[:, None], 0)
    # each exact where the other is near 0
    loss = end(F.logsigmoid(above), F.logsigmoid(-above))
    # beside no class the probability is 1, and has no curve either
    zero = 0 * z.detach()
    return torch.where(others, loss, end(zero, zero - torch.inf))


def over_labels(each: Tensor, z: Tensor, present: Tensor) -> Tensor:
    """Mean over a row's labels, [N]; z [N, L] their scores."""
    # the limit is 0, but an infinite score is a fault that must show, as it does in F.cross_entropy
    each = torch.where(z == torch.inf, torch.nan, each)
    return _present_sum(each, present) / present.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class SoftTriple(ClassLoss):
    """Cross entropy over classes whose centres are pooled softly (Qian et al., 2019).

        S'_c = sum_k softmax_k(c_ck / gamma) c_ck,     z_j = la (S'_j - margin [j = y])

    Several labels a row as in `Softmax`. Defaults: pytorch-metric-learning's. The paper's second
    term, which draws the centres of a class together, is a function of the weight alone and is
    not here.
    """

    la: float = 20.0
    gamma: float = 0.1
    margin: float = 0.01

    rule = "softmax"

    def __post_init__(self) -> None:
        check_floats(check_above, la=self.la, gamma=self.gamma)
        check_floats(check_parameter, margin=self.margin)

    @property
    def softness(self) -> float:
        return float(self.gamma)

    def params(self) -> list[float]:
        return [float(self.la)]

    def row_loss(self, rows: MergedRows) -> Tensor:
        z = self.la * (rows.targets - self.margin)
        each = label_ends(z, rows.statistics[0], lambda log_p, _: -log_p)
        return over_labels(each, z, rows.present)


@dataclass(frozen=True)
class SFace(ClassLoss):
    """Cosines pulled and pushed with weights that fade by sigmoids of the angle (2205.12010).

        loss = -s sum_labels sigmoid(k (theta_y - a)) c_y + s sum_neg sigmoid(k (b - theta_j)) c_j

    The weights are detached. A cosine beyond +-1 by rounding counts as +-1 in its angle (the
    authors' code gives NaN). Their run on CASIA has a = 0.87, b = 1.2.
    """

    scale: float = 64.0
    k: float = 80.0
    a: float = 0.8
    b: float = 1.23

    rule = "sface"

    def __post_init__(self) -> None:
        check_floats(check_above, scale=self.scale, k=self.k)
        check_floats(check_parameter, a=self.a, b=self.b)

    def params(self) -> list[float]:
        return [float(self.k), float(self.b)]

    def row_loss(self, rows: MergedRows) -> Tensor:
        angle = rows.targets.detach().clamp(-1, 1).acos()
        pull = torch.sigmoid(self.k * (angle - self.a)) * rows.targets
        return self.scale * (rows.statistics[0] - _present_sum(pull, rows.present))


@dataclass(frozen=True)
class SphereFace2(ClassLoss):
    """A binary classifier a class instead of a softmax (Wen et al., 2022; additive margin "C").

        g(c) = 2 ((c + 1) / 2)^t - 1,    z_y = r (g(c_y) - m) + b,    z_j = r (g(c_j) + m) + b
        loss = lw / r (alpha sum_labels softplus(-z_y) + (1 - alpha) sum_neg softplus(z_j))

    bias: a float, or a scalar tensor that may need a gradient; `balanced` gives the paper's start.
    scale: r. gradient: "exact", or "straight_through": g's slope taken for 1 (opensphere).
    """

    bias: float | Tensor
    scale: float = 40.0
    margin: float = 0.4
    t: float = 3.0
    alpha: float = 0.7
    lw: float = 50.0
    gradient: str = "exact"

    rule = "sphereface2"

    def __post_init__(self) -> None:
        check_floats(check_above, scale=self.scale, lw=self.lw)
        check_floats(check_parameter, margin=self.margin, t=self.t, alpha=self.alpha)
        check_parameter("t", self.t, 1)
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: expected a value in (0, 1), got {self.alpha}")
        if isinstance(self.bias, Tensor) and self.bias.numel() != 1:
            raise ValueError(f"bias: expected one number, got {describe(self.bias)}")
        check_parameter("bias", self.bias, carries=True)
        validation.check_choice("gradient", self.gradient, GRADIENTS)

    @classmethod
    def balanced(
        cls,
        classes: int,
        scale: float = 40.0,
        margin: float = 0.4,
        t: float = 3.0,
        alpha: float = 0.7,
        lw: float = 50.0,
        gradient: str = "exact",
    ) -> SphereFace2:
        """With the bias at which the loss is smallest where every cosine is 0.

        d loss / d b = 0: q (1 + e^{-v - b}) = 1 + e^{u + b} with u, v the scores of label and
        negative without b and q = alpha / ((1 - alpha)(classes - 1)), a quadratic in e^b.
        """
        if classes < 2:
            raise ValueError(f"classes: expected at least 2, got {classes}")
        q = alpha / ((1 - alpha) * (classes - 1))
        start = 2 * 0.5**t - 1
        u, v = scale * (start - margin), scale * (start + margin)
        root = math.sqrt((1 - q) ** 2 + 4 * q * math.exp(u - v))
        bias = math.log(2 * q) - v - math.log(1 - q + root)
        return cls(bias, scale, margin, t, alpha, lw, gradient)

    def params(self) -> list[float]:
        straight = self.gradient == "straight_through"
        return [float(v) for v in (self.scale, self.margin, self.t, straight)]

    def values(self, targets: Tensor, present: Tensor) -> Tensor | None:  # noqa: ARG002 (a hook)
        return self._bias(targets).expand(1, targets.shape[0])

    def _bias(self, like: Tensor) -> Tensor:
        if isinstance(self.bias, Tensor):
            return self.bias.to(like).reshape(())
        return like.new_full((), self.bias)  # no copy to the device, which would wait for it

    def row_loss(self, rows: MergedRows) -> Tensor:
        bias = self._bias(rows.targets)
        g = raised(rows.targets, self.t, self.gradient == "straight_through")
        z = self.scale * (g - self.margin) + bias
        of_labels = _present_sum(softplus(-z), rows.present)
        # worth 0: the gradient of the negatives' sum in the bias is their second statistic
        of_negatives = rows.statistics[0]
        if not rows.of_values:
            of_negatives = of_negatives + (bias - bias.detach()) * rows.statistics[1].detach()
        return self.lw / self.scale * (self.alpha * of_labels + (1 - self.alpha) * of_negatives)


@dataclass(frozen=True)
class MLCD(ClassLoss):
    """Multi-label cluster discrimination (2407.17331): two sums, one of the labels' classes.

        loss = log(1 + sum_labels e^{-s c_p}) + log(1 + sum_neg e^{s c_j})

    The paper leaves the scale inside its similarities, and there is no public training code: the
    default is ours.
    """

    scale: float = 64.0

    rule = "softmax"

    def __post_init__(self) -> None:
        check_floats(check_above, scale=self.scale)

    def params(self) -> list[float]:
        return [float(self.scale)]

    def row_loss(self, rows: MergedRows) -> Tensor:
        attract = over_last(-self.scale * rows.targets, rows.present)
        return softplus(attract) + softplus(rows.statistics[0])
