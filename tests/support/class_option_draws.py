"""Options of the functions over classes at other values than their defaults, for the draws.

Which rows and classes take part is drawn with the inputs; a literal formula sees those alone, and
uses nothing of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import class_loss_draws as one
import margin_calls as calls
import margin_draws as m
import torch
from class_batch_draws import mada_rows, shared, unpg_rows
from distillation_formulas import TEMPERATURE, of_scores
from pair_cases import Case
from pair_formulas import zero_rows
from pair_rows import Inputs, lse, proxies, unit
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import class_losses as cl
from fused_losses import margins
from fused_losses.adaptive_scale import AdaptiveScale
from fused_losses.batch_negatives import UNPG

IGNORED, SCALE, CAP, SQUARE = -7, 16.0, 5.0, 0.25
ROWS = ("x", "w")


# ---- what takes part ----------------------------------------------------------------------------


def parted(n: int, m: int, d: int) -> Inputs:
    """Rows without a label, rows that count twice, and classes that no row has and none sees."""
    t = proxies(n, m, d)
    t.counts = torch.randint(0, 3, (n,)).float()
    t.counts[0] = 2
    kept = (torch.arange(m) % 2 == 0) | torch.isin(torch.arange(m), t.targets)
    t.taking = kept.nonzero()[:, 0].flip(0)
    t.targets[1::3] = IGNORED
    return t


def two_parted(n: int, m: int, d: int) -> Inputs:
    """The same of a student and a teacher, with biases of their classes."""
    t = parted(n, m, d)
    t.teacher, t.teacher_w = torch.randn(n, d) / d**0.25, torch.randn(m, d) / d**0.25
    t.bias, t.teacher_bias = torch.randn(m), torch.randn(m)
    return t


def alone(t: Inputs, counted: bool = True) -> Inputs:
    """The rows that take part, and the classes in their order."""
    kept = (t.targets != IGNORED) & (t.counts > 0 if counted else True)
    rows = kept.nonzero()[:, 0]
    made = {n: v[rows] for n, v in vars(t).items() if n in ("x", "teacher", "counts")}
    made |= {n: v[t.taking] for n, v in vars(t).items() if n in ("w", "teacher_w")}
    made |= {n: v[t.taking] for n, v in vars(t).items() if n in ("bias", "teacher_bias")}
    targets = (t.targets[rows, None] == t.taking).int().argmax(1)
    return Inputs(**made, targets=targets, rows=rows)


def total(rows: Callable[[Inputs], Tensor], mean: bool = False) -> Callable[[Inputs], Tensor]:
    """The sum of weighted rows, or their mean."""

    def formula(t: Inputs) -> Tensor:
        p = alone(t)
        each = (p.counts * rows(p)).sum()
        return each / p.counts.sum() if mean else each

    return formula


def in_place(rows: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """A value a row, 0 of those without a label."""

    def formula(t: Inputs) -> Tensor:
        p = alone(t, counted=False)
        each = rows(p)
        return each.new_zeros(len(t.x), *each.shape[1:]).index_put((p.rows,), each)

    return formula


def given(t: Inputs, counted: bool = True) -> dict[str, Any]:
    found = dict(ignore_index=IGNORED, classes=t.taking)
    return found | (dict(row_weight=t.counts) if counted else {})


# ---- the ends of a softmax ----------------------------------------------------------------------


def hot_of(t: Inputs) -> Tensor:
    return t.targets[:, None] == torch.arange(len(t.w))


def moved(c: Tensor, hot: Tensor) -> Tensor:
    """The label's cosine through an easy margin of 0.3, whose slope is taken for 1."""
    own = torch.where(hot, c, 0).sum(1)
    # the slope's 1 is that of a difference worth 0
    into = calls.easy(own, 0.3).detach() + torch.where(own.isinf(), 0, own - own.detach())
    return torch.where(hot, into[:, None], c)


EASY = margins.ArcFace(0.3, "easy")
SHARED = dict(margin=EASY, scale=SCALE, gradient="straight_through")


def scores(t: Inputs) -> tuple[Tensor, Tensor]:
    hot = hot_of(t)
    return SCALE * moved(unit(t.x) @ unit(t.w).T, hot), hot


def of_end(end: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """By log p of the label, of capped scores, and the square of the denominator's logarithm."""

    def rows(t: Inputs) -> Tensor:
        z, hot = scores(t)
        z = CAP * torch.tanh(z / CAP)
        own = torch.where(hot, z, 0).sum(1)
        log_p = -torch.logaddexp(torch.zeros_like(own), lse(z, ~hot) - own)
        return end(log_p) + SQUARE * z.logsumexp(1) ** 2

    return rows


def of_scores_and_square(ends: one.Ends, square: float = SQUARE) -> Callable[[Inputs], Tensor]:
    def rows(t: Inputs) -> Tensor:
        z, hot = scores(t)
        return ends(z, hot) + square * z.logsumexp(1) ** 2

    return rows


def _truncated(log_p: Tensor) -> Tensor:
    floor = torch.full_like(log_p, 0.3).log()
    return m.rest(0.5 * torch.where(log_p < floor, floor, log_p)) / 0.5


_capped: dict[str, Any] = SHARED | dict(softcap=CAP, z_loss=SQUARE)
ENDS: dict[str, tuple[cl.ClassLoss, Callable[[Tensor], Tensor]]] = {
    "OfProbability": (cl.OfProbability(**_capped), lambda z: -z),
    "CompSum": (cl.CompSum(0.5, **_capped), lambda z: 2 * torch.expm1(-0.5 * z)),
    "GCE": (cl.GCE(0.5, k=0.3, **_capped), _truncated),
    "MAE": (cl.MAE(**_capped), lambda z: 2 * m.rest(z)),
    "AGCE": (cl.AGCE(2.0, 3.0, **_capped), lambda z: (27 - (2 + z.exp()) ** 3) / 3),
    "AUL": (cl.AUL(3.0, 3.0, **_capped), lambda z: ((3 - z.exp()) ** 3 - 8) / 3),
    "SCE": (cl.SCE(0.5, 2.0, A=2.0, **_capped), lambda z: -0.5 * z + 4 * m.rest(z)),
    "Focal": (cl.Focal(3.0, **_capped), lambda z: -z * m.rest(z) ** 3),
    "Poly1": (cl.Poly1(2.0, **_capped), lambda z: -z + 2 * m.rest(z)),
}
_squared: dict[str, Any] = SHARED | dict(z_loss=SQUARE)
OF_OTHERS: dict[str, tuple[cl.ClassLoss, Callable[[Inputs], Tensor]]] = {
    "Softmax": (
        cl.Softmax(EASY, SCALE, "straight_through"),
        of_scores_and_square(one.cross_entropy, 0.0),
    ),
    "NCE": (cl.NCE(**_squared), of_scores_and_square(one.nce)),
    "MSE": (cl.MSE(**_squared), of_scores_and_square(one.mse)),
    "ActivePassive": (
        cl.ActivePassive(cl.AGCE(2.0, 2.0), alpha=0.5, beta=2.0, **_squared),
        of_scores_and_square(one.active_passive),
    ),
    "LDR": (
        cl.LDR(threshold=1.0, lam=0.5, **SHARED),
        of_scores_and_square(one.ldr(1.0, 0.5), 0.0),
    ),
}


def sphereface2(t: Inputs) -> Tensor:
    """The slope of 2 ((c + 1) / 2)^3 - 1 taken for 1."""
    s = m.Seen(t)
    g = 2 * ((s.cosine + 1) / 2) ** 3 - 1
    g = s.cosine + (g - s.cosine).detach()
    labels = s.over_labels(m.softplus(-(40 * (g - 0.4) + t.bias)))
    rest = torch.where(s.own, 0, m.softplus(40 * (g + 0.4) + t.bias)).sum(1)
    return s.mean(50 / 40 * (0.7 * labels + 0.3 * rest))


def stats(t: Inputs) -> Tensor:
    """The loss, then what is told of each row: both cosines and the denominator's logarithm."""
    z, hot = scores(t)
    c = unit(t.x) @ unit(t.w).T
    hardest = zero_rows(torch.where(hot, -torch.inf, c).amax(1))
    told = torch.stack([z.logsumexp(1), torch.where(hot, c, 0).sum(1), hardest], 1).detach()
    return torch.cat([one.cross_entropy(z, hot)[:, None], told], 1)


def told(t: Inputs, **more: Any) -> Tensor:
    options = SHARED | given(t, counted=False) | dict(reduction="none", return_stats=True)
    loss, s = fl.margin_softmax(t.x, t.w, t.targets, **options, **more)
    return torch.stack([loss, s.logsumexp, s.target_cosine, zero_rows(s.hardest_cosine)], 1)


def outputs(t: Inputs) -> Tensor:
    z = SCALE * (unit(t.x) @ unit(t.w).T)
    log_p = z - z.logsumexp(1, keepdim=True)
    own = torch.where(hot_of(t), z, 0).sum(1)
    others = lse(z, ~hot_of(t))
    columns = [z.logsumexp(1), -m.softplus(others - own), -(log_p.exp() * log_p).sum(1)]
    return torch.stack(columns, 1)


def _outputs(t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(scale=SCALE, normalize=True, entropy=True)
    options |= given(t, False) | more
    found = fl.softmax_outputs(t.x, t.w, t.targets, **options)
    assert found.entropy is not None
    return torch.stack([found.logsumexp, found.log_prob, found.entropy], 1)


# ---- distillation -------------------------------------------------------------------------------

DISTILLED: dict[str, dict[str, float]] = {
    "kl": dict(temperature=2.0),
    "jsd": dict(beta=0.3),
    "pskd": dict(alpha=0.6),
    "dkd": dict(alpha=0.5, beta=2.0, removed=-1000.0),
    "ofa": dict(eps=1.5),
    "bernoulli": dict(eps=0.01, temperature=1.5),
}


def distilled(kind: str, reduction: str) -> Callable[[Inputs], Tensor]:
    options = dict(DISTILLED[kind])
    temperature = options.pop("temperature", TEMPERATURE.get(kind, 1.0))

    def rows(t: Inputs) -> Tensor:
        u = (1.5 * (t.x @ t.w.T) + t.bias) / temperature
        v = (0.5 * (t.teacher @ t.teacher_w.T) + t.teacher_bias) / temperature
        return of_scores(kind, u, v, t.targets, temperature, **options)

    every = in_place(rows)
    return every if reduction == "none" else lambda t: every(t).sum()


def distil(kind: str, reduction: str, t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(
        student_bias=t.bias,
        teacher_bias=t.teacher_bias,
        student_scale=1.5,
        teacher_scale=0.5,
        teacher_grad=True,
        reduction=reduction,
    )
    options |= DISTILLED[kind] | given(t, counted=False)
    tables = (t.x, t.w, t.teacher, t.teacher_w)
    return fl.distillation(*tables, kind=kind, labels=t.targets, **options, **more)


# ---- the batch's own scale, margin and negatives ------------------------------------------------


def adaptive(t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(margin=AdaptiveScale(0.05, 16.0, "median"), reduction="sum")
    options |= given(t)
    return fl.adaptive_margin_softmax(t.x, t.w, t.targets, **options, **more)


def adaptive_eval(t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(training=False, normalize=False, reduction="none")
    options |= given(t, counted=False)
    return fl.adaptive_margin_softmax(t.x, t.w, t.targets, **options, **more)


def unpg(t: Inputs, **more: Any) -> Tensor:
    options: dict[str, Any] = dict(margin=EASY, scale=SCALE, negatives=UNPG(0.5), reduction="sum")
    options |= given(t) | dict(gradient="straight_through", normalize=False)
    return fl.unpg_margin_softmax(t.x, t.w, t.targets, **options, **more)


def whiskers(t: Inputs) -> Tensor:
    found = shared(t.x, unit(t.x) @ unit(t.x).T, t.targets, t.scale, 0.5)
    return (t.x.sum() + t.scale) * 0 if found == -torch.inf else found


def _whiskers(t: Inputs, **more: Any) -> Tensor:
    return zero_rows(fl.shared_negatives(t.x, t.targets, scale=t.scale, whisker=0.5, **more))


def class_loss(loss: cl.ClassLoss, t: Inputs, **more: Any) -> Tensor:
    return fl.class_loss(t.x, t.w, t.targets, loss, **given(t), **more)


def straight_sphereface2(t: Inputs, **more: Any) -> Tensor:
    loss = cl.SphereFace2(t.bias, gradient="straight_through")
    return fl.class_loss(t.x, t.w, t.targets, loss, **more)


TABLES = ("x", "w", "teacher", "teacher_w")
DRAWN = [
    *(
        Case(f"ends_{name}", parted, partial(class_loss, loss), f, ROWS, function=fl.class_loss)
        for name, (loss, f) in (
            *((name, (loss, total(of_end(end), True))) for name, (loss, end) in ENDS.items()),
            *((name, (loss, total(rows, True))) for name, (loss, rows) in OF_OTHERS.items()),
        )
    ),
    *(
        Case(
            f"distillation_{kind}_options",
            two_parted,
            partial(distil, kind, reduction),
            distilled(kind, reduction),
            TABLES,
            function=fl.distillation,
        )
        for kind, reduction in zip(DISTILLED, ("sum", "none") * 3, strict=True)
    ),
    *(
        Case(name, make, call, f, leaves, function=function)
        for name, make, call, f, leaves, function in (
            ("class_loss_SphereFace2_straight", m.sub_centers, straight_sphereface2)
            + (sphereface2, (*ROWS, "bias"), fl.class_loss),
            ("margin_softmax_told", parted, told, in_place(stats), ROWS, fl.margin_softmax),
            ("softmax_outputs_parted", parted, _outputs)
            + (in_place(outputs), ROWS, fl.softmax_outputs),
            ("adaptive_margin_softmax_parted", parted, adaptive)
            + (total(partial(mada_rows, alpha=0.05, smallest=16.0, background="median")),)
            + (ROWS, fl.adaptive_margin_softmax),
            ("adaptive_margin_softmax_eval", parted, adaptive_eval)
            + (in_place(partial(mada_rows, normalize=False, training=False)),)
            + (ROWS, fl.adaptive_margin_softmax),
            ("unpg_margin_softmax_parted", parted, unpg)
            + (total(lambda t: unpg_rows(t, moved, 0.5, False)), ROWS, fl.unpg_margin_softmax),
            ("shared_negatives_whisker", proxies, _whiskers)
            + (whiskers, ("x", "scale"), fl.shared_negatives),
        )
    ),
]
