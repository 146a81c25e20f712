"""Distillation of a head: its classes' scores drawn to a teacher's, both tables in shards."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fused_losses.base import validation
from fused_losses.base.class_labels import flattened
from fused_losses.base.numerics import accumulate_dtype, no_autocast, unit_rows
from fused_losses.base.validation import NO_TARGET, check_plain, describe
from fused_losses.centers.batch import device_of
from fused_losses.centers.collectives import Gathered
from fused_losses.centers.divergence_engine import DivergenceEngine, DivergenceSweep, TeacherShard
from fused_losses.centers.shard import Shard
from fused_losses.centers.swept_table import SweptTable
from fused_losses.functions.distillation import check_frozen
from fused_losses.functions.distillation_kinds import (
    KINDS,
    DistillationKind,
    DistillationOptions,
    checked_options,
)
from fused_losses.primitives.divergence.parts import statistics_of


@_disable_dynamo  # as the head's own forward
def distillation(
    self: SweptTable,
    embeddings: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | SweptTable,
    *,
    kind: str = "kl",
    temperature: float | None = None,
    labels: Tensor | None = None,
    row_weight: Tensor | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    eps: float | None = None,
    removed: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_scale: float | None = None,
    teacher_normalize: bool | None = None,
) -> Tensor:
    """The head's scores drawn to a teacher's, both tables in shards: `fused_losses.distillation`.

        u = (scale <x_i, w_j> + b_j) / T        v = (teacher_scale <t_i, wt_j> + bt_j) / T

    without margin, and rows as the head takes them (`normalize`). The mean over all ranks' rows of
    the kind's loss, the same on every rank and, with its gradients, those of one process. It is a
    loss of the head like its own: backward steps the rows, and of both in one step the gradients
    add up with update="step", every=2 or optimizer=None.

    Args:
        embeddings: [n, D] of this rank, or [n, T, D].
        teacher: [n, Dt] or [n, T, Dt]: the teacher's rows of the same inputs.
        teacher_weight: [c, Dt]: the teacher's rows of the classes of this rank's shard
            [class_start, class_start + c), of the table's dtype and on its device; or a frozen
            `ClassCenters` in the same shards, which has its scale, bias and normalize.
        kind, temperature, alpha, beta, eps, removed: as in `fused_losses.distillation`, numbers.
        labels: [n] or [n, T] int64; pskd, dkd and ofa need them. For all kinds rows labelled
            ignore_index take no part.
        row_weight: [n] or [n, T] >= 0, of the mean.
        teacher_bias: [c]. teacher_scale: > 0, 1 by default. teacher_normalize: both sides of the
            teacher by their norms, False by default.

    Every rank must call it, alike, and its backward. Below sample_rate 1 both softmaxes are over
    the sample (with labels their classes are in it). A table of sub-centres is refused, and so are
    a teacher's dense or top scores. Raises ValueError, TypeError or IndexError for bad arguments,
    on the other ranks a RuntimeError that names the rank; RuntimeError in backward where the
    teacher's table was changed in between.
    Time O(B C (D + Dt) / W) a rank, jsd and tv sweep twice; memory O(B (D + Dt)) and the chunks.
    Communication: `fused_losses.centers.collectives`, the teacher's rows gathered besides.
    """
    self._check_wrapped()
    given: dict[str, Any] = dict(alpha=alpha, beta=beta, eps=eps, removed=removed)
    own = dict(
        teacher_bias=teacher_bias, teacher_scale=teacher_scale, teacher_normalize=teacher_normalize
    )
    lead = embeddings.shape[:-1] if isinstance(embeddings, Tensor) else ()
    placed = labels
    if placed is None:  # of no class
        device = device_of(embeddings, self._table)
        placed = torch.full(lead, self.ignore_index, dtype=torch.int64, device=device)
    embeddings, placed, row_weight = flattened(embeddings, placed, row_weight)
    calls: list[_Asked] = []

    def checked() -> int:
        told = None if labels is None else placed
        calls.append(_checked(
            self, embeddings, teacher, teacher_weight, own, kind, temperature, told, lead, given,
        ))  # fmt: skip
        return calls[0].number

    with no_autocast(device_of(embeddings, self._table)):
        batch, arriving = self._met(embeddings, placed, row_weight, checked)
        (call,) = calls
        of, t = call.of, call.temperature
        taught = Gathered(self.ranks, call.rows, batch.counts)
        if labels is None:  # all rows take part, and no class of a sample is theirs
            batch = batch._replace(labels=torch.zeros_like(batch.labels))
        taking_part = self._groups(batch.local)
        self._updates.catch_up(taking_part, self._table.device)
        # an ignored row must not reach the gradients, not even with NaN
        rows, teacher_rows = (
            torch.where(batch.valid[:, None], each.wait(), 0) for each in (arriving, taught)
        )
        table = self._table.detach()
        wide = accumulate_dtype(table.dtype)
        x = self.multiplied(rows.to(wide)).contiguous()
        engine = DivergenceEngine(
            of.divergence, tuple(of.params(call.options)), self.plain_scale / t,
            call.side.over(teacher_rows.to(wide), t, table), self.normalize, self.precision,
            self.backend,
        )  # fmt: skip
        apart = batch.local if of.labelled else torch.full_like(batch.local, NO_TARGET)
        sweep = DivergenceSweep(
            Shard(table, apart, rows.device, self.chunk_bytes), taking_part, engine
        )
        with torch.no_grad():
            statistics = sweep.over_shards(self.ranks, x)
        saved = self._saved(batch, x, statistics, engine.bounds(statistics), None, sweep)
        # the target is a statistic here
        none = torch.zeros_like(batch.local, dtype=statistics.dtype)
        statistics, *_ = self._apart(embeddings, saved, none, rows)
        each = of.loss(statistics_of(statistics, of.divergence), call.options)
        each = each / self._counted(taking_part) if of.mean else each
        return self._mean(each * t**2 if of.squared else each, saved)


# ---- checks -------------------------------------------------------------------------------------


class _Taught(NamedTuple):
    """A teacher's classes of this shard, and how its rows meet them."""

    weight: Tensor  # [c, Dt]
    bias: Tensor | None  # [c]
    scale: float
    normalize: bool
    head: SweptTable | None

    def over(self, rows: Tensor, temperature: float, table: Tensor) -> TeacherShard:
        """With the rows of all ranks [B, Dt]."""
        if self.head is not None:
            rows = self.head.multiplied(rows)
        elif self.normalize:
            rows = unit_rows(rows)
        bias = None if self.bias is None else self.bias.to(rows.dtype) / temperature
        weight = self.weight
        # a student that is its own teacher steps chunk by chunk, each after it was read
        follows = weight.is_inference() or weight.data_ptr() == table.data_ptr()
        written = None if follows else weight._version
        sharp = rows * (self.scale / temperature)
        return TeacherShard(sharp, weight, bias, self.normalize, written)


class _Asked(NamedTuple):
    """The arguments of one rank, checked."""

    of: DistillationKind
    options: DistillationOptions
    temperature: float
    rows: Tensor  # [n, Dt]
    side: _Taught
    number: int  # alike on all ranks


def _checked(
    head: SweptTable,
    embeddings: Tensor,  # [n, D]
    teacher: Tensor,
    teacher_weight: Tensor | SweptTable,
    own: dict[str, Any],
    kind: str,
    temperature: float | None,
    labels: Tensor | None,  # [n]
    lead: tuple[int, ...],  # shape of the rows, as given
    given: dict[str, float | None],
) -> _Asked:
    validation.check_choice("kind", kind, tuple(KINDS))
    of = KINDS[kind]
    options = checked_options(kind, of, **given)
    check_plain(temperature=temperature, teacher_scale=own["teacher_scale"])
    t = of.temperature if temperature is None else temperature
    t = float(validation.number("temperature", t, embeddings))
    if head.sub_centers > 1:
        raise ValueError(
            f"sub_centers: expected 1 for a distillation, got a head with {head.sub_centers}"
        )
    if of.labelled and (labels is None or labels.dim() != 1):
        got = "None" if labels is None else describe(labels)
        raise ValueError(f"labels: expected one class id a row with kind={kind!r}, got {got}")
    rows = _checked_rows(head, embeddings, teacher, lead)
    side = _checked_side(head, rows, teacher_weight, own)
    call = (
        kind, tuple(options), t, labels is None, side.scale, side.normalize,
        side.bias is None, tuple(side.weight.shape[1:]), rows.shape[1], str(rows.dtype),
    )  # fmt: skip
    return _Asked(of, options, t, rows, side, zlib.crc32(repr(call).encode()) or 1)


def _checked_rows(
    head: SweptTable, embeddings: Tensor, teacher: Tensor, lead: tuple[int, ...]
) -> Tensor:
    if isinstance(teacher, Tensor) and teacher.dim() > 2 and teacher.shape[:-1] == lead:
        teacher = teacher.flatten(0, -2)
    validation.check_matrix("teacher", teacher, "[n, Dt] beside a teacher_weight [c, Dt]")
    check_frozen(teacher=teacher)
    if teacher.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"teacher: expected {embeddings.shape[0]} rows as embeddings has, got "
            f"{describe(teacher)}"
        )
    if (teacher.dtype == torch.float64) != (head._table.dtype == torch.float64):
        raise TypeError(
            f"teacher: expected float64 where the table is, and only there: it is "
            f"{head._table.dtype}, got {describe(teacher)}"
        )
    validation.check_device("embeddings", embeddings, "teacher", teacher)
    return teacher.detach()


def _checked_side(
    head: SweptTable, rows: Tensor, weight: Tensor | SweptTable, own: dict[str, Any]
) -> _Taught:
    if isinstance(weight, SweptTable):
        return _checked_head(head, rows, weight, own)
    validation.check_matrix("teacher_weight", weight, "[c, Dt], this shard's rows of the teacher")
    check_frozen(teacher_weight=weight, teacher_bias=own["teacher_bias"])
    first, count = head.class_start, head.num_local
    if weight.shape[0] != count:
        raise ValueError(
            f"teacher_weight: expected the {count} classes of this rank's shard, [{first}, "
            f"{first + count}) of {head.num_classes}, got {describe(weight)}"
        )
    if rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"teacher: expected [n, {weight.shape[1]}] as teacher_weight has, got {describe(rows)}"
        )
    validation.check_same_dtype("the head's table", head._table, "teacher_weight", weight)
    validation.check_device("the head's table", head._table, "teacher_weight", weight)
    bias, scale = own["teacher_bias"], own["teacher_scale"]
    if bias is not None:
        validation.check_vector("teacher_bias", bias, count, "one value a class [c]", weight)
    scale = float(validation.number("teacher_scale", 1.0 if scale is None else scale, rows))
    return _Taught(weight.detach(), bias, scale, bool(own["teacher_normalize"]), None)


def _checked_head(
    head: SweptTable, rows: Tensor, teacher: SweptTable, own: dict[str, Any]
) -> _Taught:
    """A teacher that is a head of its own."""
    for name, value in own.items():
        if value is not None:
            raise ValueError(f"{name}: expected None beside a ClassCenters, which has its own")
    names = ("num_classes", "class_start", "num_local", "sub_centers")
    wanted, got = ({name: getattr(each, name) for name in names} for each in (head, teacher))
    if wanted != got:
        raise ValueError(f"teacher_weight: expected a head of {wanted}, got one of {got}")
    if teacher._leaf.requires_grad:
        raise ValueError(
            "teacher_weight: expected a frozen head, got one that trains; requires_grad_(False) "
            "freezes it"
        )
    if rows.shape[1] != teacher.embedding_dim:
        raise ValueError(f"teacher: expected [n, {teacher.embedding_dim}], got {describe(rows)}")
    validation.check_same_dtype("the head's table", head._table, "teacher_weight", teacher._table)
    validation.check_device("the head's table", head._table, "teacher_weight", teacher._table)
    return _Taught(teacher.weight.detach(), None, teacher.plain_scale, teacher.normalize, teacher)
