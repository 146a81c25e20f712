"""A student drawn to a teacher: scores over classes, both sides factored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import unit_rows
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.centers.arguments import counts
from fused_losses.functions.distillation import distillation
from fused_losses.functions.top_teacher import TopTeacher
from fused_losses.losses.module import Loss
from fused_losses.losses.registry import entry


def _of_teachers(paper: str, year: int, *golden: str) -> Any:
    return entry(paper, year, block="distillation", primitive="divergence", golden=golden)


class DistillationLoss(Loss):
    """A loss of `distillation`: u = <x_i, w_j> / T of the student, v of the teacher.

    Args:
        temperature: T > 0. normalize: True, False, "student" or "teacher", whose rows and weights
        are divided by their norms. ignore_index: the label of rows that take no part. Others: as in
        `Loss`.

    loss(student [N, D], student_weight [C, D], teacher [N, D'] with teacher_weight [C, D'], or
    scores [N, C], or `TopTeacher`, labels=): and by name what else `distillation` takes: biases,
    scales, classes, teacher_grad, memory_budget.
    """

    keeps = True
    kind = "kl"

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        normalize: bool | str = False,
        ignore_index: int = -100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_above("temperature", temperature)
        self.temperature, self.normalize = temperature, normalize
        self.ignore_index = ignore_index

    def own(self) -> dict[str, Any]:
        """What the kind takes beside the temperature."""
        return {}

    def forward(
        self,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor | TopTeacher,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        **given: Any,
    ) -> Tensor:
        given = {**given, **dict(kind=self.kind, temperature=self.temperature, labels=labels)}
        given = {**given, **dict(normalize=self.normalize, ignore_index=self.ignore_index)}
        given = {**given, **self.own(), **self.beside(given)}
        return distillation(student, student_weight, teacher, teacher_weight, **given)


@_of_teachers("Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network", 2015)
class KDLoss(DistillationLoss):
    """T^2 KL(p_t || p_s) of the softmaxes over all classes.

    Args: temperature: T, 4 as most code has it. reverse: KL(p_s || p_t).
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(self, temperature: float = 4.0, *, reverse: bool = False, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.reverse = reverse

    @property
    def kind(self) -> str:
        return "reverse_kl" if self.reverse else "kl"


@_of_teachers(
    "Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023
)
class JSDLoss(DistillationLoss):
    """T^2 (beta KL(p_t || m) + (1 - beta) KL(p_s || m)), m = beta p_t + (1 - beta) p_s.

    Args: beta: in (0, 1). temperature: T. Time O(N C D), memory O((N + C) D).
    """

    kind = "jsd"

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(temperature, **options)
        check_parameter("beta", beta, 0, 1)
        self.beta = beta

    def own(self) -> dict[str, Any]:
        return dict(beta=self.beta)


@_of_teachers(
    "Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023
)
class TotalVariationLoss(DistillationLoss):
    """sum_j |p_t - p_s| / 2 of the softmaxes over all classes.

    Args: temperature: T. Time O(N C D), memory O((N + C) D).
    """

    kind = "tv"


@_of_teachers("Ba, Caruana, Do Deep Nets Really Need to be Deep?", 2014)
class LogitMSELoss(DistillationLoss):
    """(u - v)^2 of the scores, its mean over the classes.

    Args: temperature: T. Time O(N C D), memory O((N + C) D).
    """

    kind = "mse"


@_of_teachers("Zhao et al., Decoupled Knowledge Distillation", 2022, "dkd")
class DKDLoss(DistillationLoss):
    """T^2 (alpha KL of [p_y, 1 - p_y] + beta KL of the softmaxes without the label's class).

    Args: alpha, beta, temperature: the authors'. removed: None: the class is taken out; -1000.0:
    its score is lowered by that, as the authors' code has it. Needs labels.
    Time O(N C D), memory O((N + C) D).
    """

    kind = "dkd"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        *,
        removed: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        self.alpha, self.beta, self.removed = alpha, beta, removed

    def own(self) -> dict[str, Any]:
        return dict(alpha=self.alpha, beta=self.beta, removed=self.removed)


@_of_teachers(
    "Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge "
    "Distillation",
    2023,
    "ofakd_eps1.5",
)
class OFALoss(DistillationLoss):
    """-sum_j W log p_s, W = (p_t + onehot)^eps - onehot: the label weighs more, the surer it is.

    Args: eps: > 0; 1 is soft cross entropy. temperature: T; no factor T^2. Needs labels.
    Time O(N C D), memory O((N + C) D).
    """

    kind = "ofa"

    def __init__(self, eps: float = 1.0, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(temperature, **options)
        check_above("eps", eps)
        self.eps = eps

    def own(self) -> dict[str, Any]:
        return dict(eps=self.eps)


@_of_teachers(
    "Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets", 2021, "pskd"
)
class PSKDLoss(DistillationLoss):
    """-sum_j ((1 - alpha) onehot + alpha p_t) log p_s; the teacher is the last epoch's student.

    Args: alpha: in [0, 1], the last epoch's; the authors' is 0.8 epoch / epochs: set `alpha` as the
    epochs go. Needs labels. Time O(N C D), memory O((N + C) D).
    """

    kind = "pskd"

    def __init__(self, alpha: float = 0.8, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(temperature, **options)
        check_parameter("alpha", alpha, 0, 1)
        self.alpha = alpha

    def own(self) -> dict[str, Any]:
        return dict(alpha=self.alpha)


@_of_teachers(
    "Yang et al., Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary "
    "Head",
    2024,
    "dhkd_BinaryKL",
)
class DHKDLoss(DistillationLoss):
    """T^2 sum_j KL of the sigmoids of v and u: the term of the auxiliary head.

    Args: temperature: T. norm: of sigmoid(u - v) and 1/2. eps: sigmoids are cut to [eps, 1 - eps]
    (the authors' 1e-8; 0 cuts nothing). The main head's cross entropy is a loss of its own.
    Time O(N C D), memory O((N + C) D).
    """

    def __init__(
        self, temperature: float = 2.0, *, norm: bool = False, eps: float = 0.0, **options: Any
    ) -> None:
        super().__init__(temperature, **options)
        check_parameter("eps", eps, 0, 0.5)
        self.norm, self.eps = norm, eps

    @property
    def kind(self) -> str:
        return "bernoulli_norm" if self.norm else "bernoulli"

    def own(self) -> dict[str, Any]:
        return dict(eps=self.eps)


@_of_teachers(
    "Ji et al., BioD2C: A Dual-level Semantic Consistency Constraint Framework for Biomedical VQA",
    2025,
)
class FeatureQueueKDLoss(Loss):
    """KL of two softmaxes over one queue of features: what a row is like, as two models see it.

        p_s = softmax(<x_i, q_j> / T),   p_t = softmax(<t_i, q_j> / T),   T^2 KL(p_t || p_s)

    Rows and queue of norm 1. loss(student [N, D], teacher [N, D]): in training the teacher's rows
    then take the oldest places of `queue` [size, D], which is state and starts at random.
    Args: embedding_size: D. size: of the queue. temperature: T (these two are ours).
    Time O(N size D), memory O((N + size) D).
    """

    keeps = True
    queue: Tensor
    place: Tensor

    def __init__(
        self, embedding_size: int, size: int = 4096, temperature: float = 0.07, **options: Any
    ) -> None:
        super().__init__(**options)
        embedding_size, self.size = counts(embedding_size=embedding_size, size=size)
        check_above("temperature", temperature)
        self.temperature = temperature
        self.register_buffer("queue", unit_rows(torch.randn(size, embedding_size)))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, **given: Any) -> Tensor:
        # what the graph keeps must not move with the queue
        queue = self.queue.clone() if self.training else self.queue
        given = {
            **given,
            **dict(temperature=self.temperature, normalize=True),
            **self.beside(given),
        }
        loss = distillation(student, queue, teacher, queue, **given)
        if self.training:
            self._enter(teacher.detach())
        return loss

    @torch.no_grad()
    def _enter(self, rows: Tensor) -> None:
        rows = unit_rows(rows[-self.size :])
        places = (self.place + torch.arange(len(rows), device=rows.device)) % self.size
        self.queue.index_copy_(0, places, rows.to(self.queue.dtype))
        self.place.copy_((self.place + len(rows)) % self.size)
