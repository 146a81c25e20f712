"""Distillation over many classes: two score matrices meet tile by tile, neither is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.class_labels import one_label
from fused_losses.base.examples import examples
from fused_losses.base.memory_budget import MemoryBudget, room_of
from fused_losses.base.numerics import (
    accumulate_dtype,
    followed,
    nan_where_infinite,
    no_autocast,
    reduced,
    unit_rows,
)
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.functions.distillation_kinds import KINDS, DistillationKind, checked_options
from fused_losses.functions.positions import over_two_positions
from fused_losses.functions.top_teacher import TopTeacher, check_known, check_top, top_distillation
from fused_losses.primitives.divergence.faults import spoilt_by
from fused_losses.primitives.divergence.inputs import DivergenceInputs
from fused_losses.primitives.divergence.op import DivergenceStatistics, choose, divergence
from fused_losses.primitives.row_statistics.inputs import kept_classes

SIDES = ("student", "teacher")


@over_two_positions
def distillation(
    student: Tensor,  # [N, Ds] or [..., Ds]
    student_weight: Tensor,  # [C, Ds]
    teacher: Tensor | TopTeacher,  # [N, Dt], or scores [N, C], or their top K
    teacher_weight: Tensor | None = None,  # [C, Dt]
    *,
    kind: str = "kl",
    temperature: float | Tensor | None = None,
    labels: Tensor | None = None,  # [N] or [...]
    alpha: float | None = None,
    beta: float | None = None,
    eps: float | None = None,
    removed: float | None = None,
    student_bias: Tensor | None = None,  # [C]
    teacher_bias: Tensor | None = None,  # [C]
    student_scale: float | Tensor = 1.0,
    teacher_scale: float | Tensor = 1.0,
    normalize: bool | str = False,
    teacher_grad: bool = False,
    classes: Tensor | None = None,  # [K]
    ignore_index: int = -100,
    precision: str = "fp32",
    memory_budget: MemoryBudget = 0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """A student's scores over C classes drawn to a teacher's, without either N x C matrix.

        u = (student_scale <x_i, w_j> + b_j) / T        v = (teacher_scale <t_i, wt_j> + bt_j) / T
        p_s, p_t: their softmaxes

    kind, and what it adds up:

    - "kl": T^2 KL(p_t || p_s) (Hinton et al., 2015); "reverse_kl": T^2 KL(p_s || p_t);
    - "jsd": T^2 (beta KL(p_t || m) + (1 - beta) KL(p_s || m)), m = beta p_t + (1 - beta) p_s;
      beta in (0, 1), 0.5 by default; "tv": sum |p_t - p_s| / 2;
    - "soft_ce": -sum p_t log p_s; "pskd": the same of targets (1 - alpha) onehot + alpha p_t,
      alpha in [0, 1], 0.8 by default (Kim et al., PS-KD, 2021);
    - "dkd": T^2 (alpha KL of [p_y, 1 - p_y] + beta KL of the softmaxes without class y), alpha 1,
      beta 8, T 4 by default (Zhao et al., 2022). Class y is taken out exactly; removed=-1000.0
      lowers its score by that much, as the authors' code does;
    - "ofa": -sum W log p_s, W = (p_t + onehot)^eps - onehot; eps > 0, 1 by default (Hao et
      al., OFA-KD, 2023);
    - "bernoulli": T^2 sum_j KL of sigmoids, T 2 by default; "bernoulli_norm": of sigmoid(u - v)
      and 1/2 (Yang et al., DHKD, 2024). eps: sigmoids are cut to [eps, 1 - eps], 0 (not at all) by
      default, the authors' is 1e-8;
    - "mse": (u - v)^2, its mean over the classes.

    Args:
        student: [N, Ds] float32, bfloat16, float16 or float64, of student_weight's dtype; or
            [..., Ds] beside a teacher, labels and scales of a row in the same shape [...].
        student_weight: [C, Ds]: a classifier, a queue or prototypes.
        teacher: [N, Dt] beside teacher_weight [C, Dt], of the student's dtype; or without it scores
            [N, C] of any float dtype, read by tiles; or `TopTeacher(ids, values)`, the K best
            scores: every other class has p_t = 0 (kl, soft_ce, pskd, jsd, tv, ofa and dkd, which
            needs a listed class beside the label; others are refused). No gradient goes there, and
            a teacher that asks for one is refused, unless teacher_grad=True.
        temperature: T > 0, a number or a tensor of one value, which may need a gradient; by default
            the kind's, else 1.
        labels: [N] int64; pskd, dkd and ofa need them. For all kinds rows labelled ignore_index
            take no part.
        student_bias, teacher_bias: [C].
        student_scale, teacher_scale: > 0; a number, a tensor of one value or of one a row [N].
        normalize: divide rows and weights by their norms: True (both sides), "student" or
            "teacher".
        classes: [K] distinct ids of the classes that take part; of a TopTeacher's list those that
            are among them, at least one a row.
        precision, backend: as in `margin_softmax`.
        memory_budget: at most so many bytes of scores the forward keeps to spare the backward their
            products, two of six (cpu only; a TopTeacher's, one of four), or "auto", as in
            `margin_softmax`.
        reduction: "mean" over the rows that take part (0 over none), "sum" or "none" [N], [...].

    Near agreement the loss and the gradients keep their digits: nothing subtracts two
    logsumexp's; teacher = student gives exactly 0 (but on "reference"). A row with NaN or inf, of
    either side, is NaN and leaves others alone; a class with one makes every row NaN. Returns
    float32 (float64 for float64 inputs).
    Raises ValueError, TypeError, IndexError for bad arguments; RuntimeError when the backend cannot
    run the call. Time O(N K (Ds + Dt)); memory beyond inputs and gradients O(N D) plus a tile,
    plus memory_budget. The same bits in every run on one number of threads.
    """
    validation.check_choice("kind", kind, tuple(KINDS))
    of = KINDS[kind]
    options = checked_options(kind, of, alpha=alpha, beta=beta, eps=eps, removed=removed)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    room = room_of(memory_budget, student_weight)
    if not isinstance(normalize, bool):
        validation.check_choice("normalize", normalize, SIDES)
    unit_student, unit_teacher = (normalize is True or normalize == side for side in SIDES)
    validation.check_pair("student", student, "student_weight", student_weight)
    c = student_weight.shape[0]
    student = validation.meet(student, student_weight, "student", "student_weight")
    t = of.temperature if temperature is None else temperature
    number = validation.number("temperature", t, student)
    some_ignored = labels is not None
    valid, labels = _checked_labels(kind, of, labels, student, c, ignore_index)
    classes = validation.increasing_classes(classes, student)
    for name, vector in (("student_bias", student_bias), ("teacher_bias", teacher_bias)):
        if vector is not None:
            validation.check_vector(name, vector, c, "one value a class [C]", student)
    given = (teacher_weight, teacher_bias, teacher_scale)
    if not teacher_grad:
        check_frozen(
            ", or give teacher_grad=True",
            teacher=teacher.values if isinstance(teacher, TopTeacher) else teacher,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            teacher_scale=teacher_scale,
        )
    if isinstance(teacher, TopTeacher):
        check_top(teacher, kind, student, c, *given, unit_teacher)
        check_known(teacher, kind, labels, valid, classes, c, options)
    else:
        teacher = _checked_teacher(teacher, teacher_weight, student, c)
    accumulate = accumulate_dtype(student_weight.dtype)

    def factor(name: str, scale: float | Tensor) -> float | Tensor:
        """scale / T, of one value or of one a row [N]."""
        plain = not isinstance(scale, Tensor) and not isinstance(t, Tensor)
        checked = _checked_scale(name, scale, student)
        return float(scale) / float(t) if plain else (checked / number).to(accumulate)

    with no_autocast(student.device):
        sharp = factor("student_scale", student_scale)
        x = torch.where(valid[:, None], student.to(accumulate), 0)
        x = _times(unit_rows(x) if unit_student else x, sharp)
        of_student = x, student_weight, _biased(student_bias, number, accumulate)
        if isinstance(teacher, TopTeacher):
            # an ignored row's scores must not reach the gradients, not even with NaN
            values = torch.where(valid[:, None], teacher.values, 0)
            teacher = TopTeacher(teacher.ids, values if teacher_grad else values.detach())
            loss = top_distillation(
                kind, *of_student, teacher, number, labels, classes, options, unit_student,
                precision, room, backend,
            )  # fmt: skip
            loss = loss + spoilt_by(student_weight, classes) + nan_where_infinite(x)
            if student_bias is not None:
                loss = loss + spoilt_by(student_bias, classes)
        else:
            dull = factor("teacher_scale", teacher_scale)
            rows, scales = _teacher_rows(
                teacher, teacher_weight, dull, unit_teacher, valid, accumulate
            )
            bias = _biased(teacher_bias, number, accumulate)
            if not teacher_grad:
                rows = rows.detach()
                teacher_weight, bias, scales = (
                    v if v is None else v.detach() for v in (teacher_weight, bias, scales)
                )
            inputs = DivergenceInputs(
                x, student_weight, rows, teacher_weight, labels, classes, of_student[2], bias,
                scales, unit_student, unit_teacher and teacher_weight is not None, of.divergence,
                of.params(options), precision,
            )  # fmt: skip
            if some_ignored and choose(inputs, backend) == "reference":
                # the streamed forms leave out rows that nothing is asked of
                inputs = inputs._replace(teacher=torch.where(valid[:, None], inputs.teacher, 0))
            given = room, x, student_weight, inputs.taking_part, inputs.kept_scores
            found = divergence(inputs, kept_classes=kept_classes(*given), backend=backend)
            # a row that takes no part asks for nothing, not even with NaN
            found = DivergenceStatistics(*(torch.where(valid, part, 0) for part in found))
            loss = of.loss(found, options)
            loss = loss / inputs.taking_part if of.mean else loss
        loss = loss * number.to(loss) ** 2 if of.squared else loss
        return reduced(loss, valid, reduction, accumulate)


def _times(rows: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return rows * (factor[:, None] if factor.dim() else factor)
    return rows if factor == 1 else rows * factor


def _biased(bias: Tensor | None, temperature: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else (bias.to(temperature.dtype) / temperature).to(dtype)


def _teacher_rows(
    teacher: Tensor,
    weight: Tensor | None,
    factor: float | Tensor,
    unit: bool,
    valid: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The teacher's rows with their factor in them, or its scores and the factors beside, [N]."""
    if weight is not None:
        rows = torch.where(valid[:, None], teacher.to(dtype), 0)
        return _times(unit_rows(rows) if unit else rows, factor), None
    if not isinstance(factor, Tensor):
        if factor == 1:
            return teacher, None
        factor = torch.full(
            (), factor, dtype=accumulate_dtype(teacher.dtype), device=teacher.device
        )
    return teacher, factor.expand(teacher.shape[0]).contiguous()


# ---- checks -------------------------------------------------------------------------------------


def _checked_labels(
    kind: str,
    of: DistillationKind,
    labels: Tensor | None,
    student: Tensor,
    c: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Which rows take part [N] bool, and the labels that stand apart, -1: none [N]."""
    n = student.shape[0]
    nobody = torch.full((n,), NO_TARGET, device=student.device)
    if labels is None:
        if of.labelled:
            raise ValueError(f"labels: expected class ids ({n},) with kind={kind!r}, got None")
        return torch.ones_like(nobody, dtype=torch.bool), nobody
    marked = one_label(labels, student, c, ignore_index)
    return marked != NO_TARGET, marked if of.labelled else nobody


def _checked_scale(name: str, scale: float | Tensor, like: Tensor) -> Tensor:
    """A tensor [] or [N] in float64."""
    n = like.shape[0]
    if isinstance(scale, Tensor) and scale.dim() == 1 and scale.shape[0] == n != 1:
        validation.check_vector(name, scale, n, "one value a row [N]", like)
        return scale.double()
    return validation.number(name, scale, like)


def check_frozen(instead: str = "", **teachers: object) -> None:
    """Refuses what asks for a gradient of a teacher, which gets none."""
    for name, value in teachers.items():
        if isinstance(value, Tensor) and followed(value):
            raise ValueError(
                f"{name}: expected a teacher without gradient, got one that asks for it; detach "
                f"it{instead}"
            )


def _checked_teacher(teacher: Tensor, weight: Tensor | None, student: Tensor, c: int) -> Tensor:
    """The teacher's rows or scores; under autocast rows in their weight's dtype."""
    n = student.shape[0]
    if weight is None:
        validation.check_matrix("teacher", teacher, "[N, C] scores, or [N, D] beside a weight")
        if tuple(teacher.shape) != (n, c):
            raise ValueError(
                f"teacher: expected scores ({n}, {c}), or rows beside a teacher_weight, got "
                f"{describe(teacher)}"
            )
    else:
        validation.check_pair("teacher", teacher, "teacher_weight", weight)
        if teacher.shape[0] != n:
            raise ValueError(f"teacher: expected {n} rows as student has, got {describe(teacher)}")
        if weight.shape[0] != c:
            raise ValueError(
                f"teacher_weight: expected {c} classes as student_weight has, got "
                f"{describe(weight)}"
            )
        validation.check_same_dtype("student", student, "teacher_weight", weight)
        teacher = validation.meet(teacher, weight, "teacher", "teacher_weight")
    validation.check_device("student", student, "teacher", teacher)
    return teacher


examples(
    distillation,
    lambda f, t: f(t.x, t.w, t.negatives[:, 0], t.z, teacher_grad=True),
    {
        "": {},
        "reverse": dict(kind="reverse_kl", temperature=2.0, normalize=True, student_scale=4.0),
        "jsd": lambda t: dict(kind="jsd", beta=0.25, temperature=t.temperature),
        "soft_ce": lambda t: dict(
            kind="soft_ce", classes=torch.arange(0, len(t.w), 3).to(t.targets)
        ),
        "pskd": lambda t: dict(kind="pskd", labels=t.targets),
        "dkd": lambda t: dict(kind="dkd", labels=t.targets),
        "ofa": lambda t: dict(kind="ofa", eps=1.5, labels=t.targets),
        "bernoulli": dict(kind="bernoulli"),
        "bernoulli_norm": dict(kind="bernoulli_norm"),
        "mse": dict(kind="mse"),
    },
)
