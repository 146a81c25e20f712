"""The large-class head: class centres sharded over ranks, sampled, and updated inside backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast, unit_rows
from fused_losses.base.rounding import rounding_key
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.centers.collectives import DTYPES, Gathered, Ranks, Scattered, meet
from fused_losses.centers.optimizers import RowOptimizer, make_row_optimizer
from fused_losses.centers.sampling import sample
from fused_losses.centers.shard import (
    CHUNK_BYTES,
    Engine,
    Gradients,
    Group,
    Rows,
    RuleEngine,
    Shard,
    ShardSweep,
    SoftmaxEngine,
    Sums,
)
from fused_losses.centers.step import Batch, Sharded, Step
from fused_losses.centers.storage import Storage, initialise_
from fused_losses.class_losses import ClassLoss, MergedRows, Softmax
from fused_losses.losses.adaptive_scale import AdaptiveScale
from fused_losses.losses.unpg import UNPG
from fused_losses.margins import ArcFace, Margin
from fused_losses.primitives.shared_negatives.op import add_shared

GRADIENT_SCALES = ("ddp_mean", "global_sum")
UPDATES = ("backward", "step")


class HeadStats(NamedTuple):
    """What a step knows of this rank's rows, detached; ignored rows 0 and False."""

    target_cosine: Tensor  # [n] float64, of the first label, before the margin
    hit: Tensor  # [n] bool: that label scores above every other class that took part


@dataclass(frozen=True)
class _Adaptive(ClassLoss):
    """AdaptiveScale in a batch whose scale is known."""

    margin: AdaptiveScale
    scale: float
    valid: Tensor
    training: bool

    rule = "softmax"

    def params(self) -> list[float]:
        return [self.scale]

    def row_loss(self, rows: MergedRows) -> Tensor:
        target, lse = rows.targets[:, 0], rows.statistics[0]
        moved = target
        if self.training:
            moved = target - self.margin.margin_of(target, lse, self.scale, self.valid)
        return -F.logsigmoid(self.scale * moved - lse)


class HeadOptimizer(torch.optim.Optimizer):
    """The head's updates behind torch's interface: hyper-parameters for learning-rate schedules.

    With update="backward" a step has been taken when backward returns, with the hyper-parameters
    that stood then, and `step` does nothing; with update="step" it is taken here.
    """

    def __init__(self, head: ClassCenters, defaults: dict[str, Any]) -> None:
        self._head = head
        super().__init__([head.weight], dict(defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._head._take_pending()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the backwards since the last step (update="step")."""
        self._head._pending.clear()


class ClassCenters(nn.Module):
    """A margin-softmax head over any number of classes, sharded over the ranks.

        loss = mean over all ranks' rows of  loss_i(cosines of x_i with every class)

    Each rank holds ceil(C / W) consecutive classes (the last ones fewer, or none) and gets the
    batches of all; the loss is the same number on every rank, and its gradients are those of one
    process with the whole table. Batches may differ in size between ranks and be empty.

    Args:
        num_classes: C.
        embedding_dim: D.
        margin: None, an object of `fused_losses.margins`, a callable on the target cosine, a
            `ClassLoss` (SFace, SphereFace2, MLCD, SoftTriple, ...) or `AdaptiveScale`.
        scale: > 0 (a ClassLoss and AdaptiveScale have their own).
        normalize: rows of both sides by their norm.
        gradient: "exact" or "straight_through", as in `margin_softmax`.
        sample_rate: in (0, 1]; below 1 a training step sees the batch's own classes and each other
            class with this chance (PartialFC: An et al., 2022), drawn by (seed, step) alike
            whatever the number of ranks.
        log_q: a drawn class counts 1 / sample_rate times: the sums over classes are then unbiased.
        sub_centers: K centres of a class, the best counts; weight is [C, K, D].
        optimizer: None: `weight` is a parameter with an ordinary gradient (row-sparse below
            sample_rate 1). "sgd", "adamw", "adagrad": backward updates the rows chunk by chunk, as
            torch.optim would with a dense gradient (`fused_losses.centers.optimizers`), and no
            gradient of the table ever exists.
        optimizer_options: its hyper-parameters, `state_dtype`, `stochastic_rounding`.
        update: "backward", or "step": backward keeps O(B D), `head.optimizer.step()` sweeps again
            and updates. Several backwards before a step add up, and `grad_norm`, `scale_grad`
            work in between (gradient scaling, clipping together with a backbone).
        max_grad_norm: the table's gradient is scaled down to this norm (all shards together);
            one more sweep a step.
        process_group, device_mesh, mesh_dim: who shares the table; default: all ranks, or one.
        dtype: of the table: float32, bfloat16, float16 or float64.
        device: of the table. It may be the host while embeddings are on a GPU: chunks then move.
        storage: a folder: table and optimiser states live in memory-mapped files there; "pinned":
            in page-locked host memory, for a GPU that reads it chunk by chunk.
        gradient_scale: "ddp_mean": embeddings get W times the gradient of the loss, so that
            DistributedDataParallel's (or FSDP's) average over ranks of the backbone's gradients is
            that of one process; "global_sum": the gradient itself, for those who sum. The table's
            gradient is that of the loss in both.
        batch_negatives: `UNPG()`: pairs of different people in the batch as negatives of all rows.
        seed: of the first rows and of the samples.
        chunk_bytes: of table rows that one kernel call takes.
        precision, backend: as in `margin_softmax`; "reference" has no streamed form.

    The head must stay outside DistributedDataParallel and FSDP: its rows differ between ranks.
    Memory: table, optimiser states, 8 bytes a row, a chunk's gradient, O(B D). Time O(B C D / W)
    a rank. Communication: `fused_losses.centers.collectives`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: Margin | ClassLoss | AdaptiveScale | None = ArcFace(0.5),  # noqa: B008 (frozen)
        scale: float = 64.0,
        normalize: bool = True,
        gradient: str = "exact",
        sample_rate: float = 1.0,
        log_q: bool = False,
        sub_centers: int = 1,
        optimizer: str | None = None,
        optimizer_options: dict[str, Any] | None = None,
        update: str = "backward",
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        device_mesh: DeviceMesh | None = None,
        mesh_dim: int | str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage: str | Path | None = None,
        gradient_scale: str = "ddp_mean",
        batch_negatives: UNPG | None = None,
        seed: int = 0,
        ignore_index: int = -100,
        chunk_bytes: int = CHUNK_BYTES,
        precision: str = "fp32",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, count in (
            ("num_classes", num_classes), ("embedding_dim", embedding_dim),
            ("sub_centers", sub_centers), ("chunk_bytes", chunk_bytes),
        ):  # fmt: skip
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if not scale > 0:
            raise ValueError(f"scale: expected a value > 0, got {scale}")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate: expected a value in (0, 1], got {sample_rate}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a value > 0, got {max_grad_norm}")
        if dtype not in validation.FLOATS:
            raise TypeError(f"dtype: expected a floating point type, got {dtype}")
        if backend == "reference":
            raise ValueError(
                "backend: expected a streamed one, got 'reference'; margin_softmax(..., "
                "backend='reference') materialises the logits"
            )
        validation.check_choice("update", update, UPDATES)
        validation.check_choice("gradient_scale", gradient_scale, GRADIENT_SCALES)
        validation.check_choice("precision", precision, validation.PRECISIONS)
        if optimizer is None and (update != "backward" or max_grad_norm or optimizer_options):
            raise ValueError(
                "update, max_grad_norm, optimizer_options: expected an optimizer beside them, "
                "got optimizer=None"
            )
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.margin, self.scale, self.normalize = margin, scale, normalize
        self.gradient, self.sample_rate, self.log_q = gradient, sample_rate, log_q
        self.sub_centers, self.update_at, self.max_grad_norm = sub_centers, update, max_grad_norm
        self.gradient_scale, self.batch_negatives = gradient_scale, batch_negatives
        self.seed, self.ignore_index, self.chunk_bytes = seed, ignore_index, chunk_bytes
        self.precision, self.backend = precision, backend
        if not isinstance(margin, ClassLoss | AdaptiveScale):
            Softmax(margin, scale, gradient)  # its own checks
        if batch_negatives is not None and self._loss_of(1.0).rule != "softmax":
            raise ValueError("batch_negatives: expected a softmax loss beside it")

        self.ranks = Ranks(process_group, device_mesh, mesh_dim)
        self.class_start, stop = self.ranks.shard(num_classes)
        self.num_local = stop - self.class_start
        device = torch.device(device or "cpu")
        place = Storage(storage, device, rank=self.ranks.rank, world=self.ranks.world)
        middle = () if sub_centers == 1 else (sub_centers,)
        weight = place.zeros("weight", (self.num_local, *middle, embedding_dim), dtype)
        initialise_(weight, self.class_start, seed=seed)
        self._rows: RowOptimizer | None = None
        self._pending: list[tuple[Step, Gradients]] = []
        self._grad_factor = 1.0
        self._version = 0  # training forwards, what draws the sample without an optimiser
        # backward runs also where no embedding needs a gradient
        self._anchor = torch.zeros((), requires_grad=True)
        if optimizer is None:
            self.weight = nn.Parameter(weight)
            self.optimizer = None
        else:
            self.register_buffer("weight", weight)
            self._rows = make_row_optimizer(
                optimizer, weight, seed=seed, allocate=place.zeros, **(optimizer_options or {})
            )
            self._rows.row_offset = self.class_start
            self.optimizer = HeadOptimizer(self, self._rows.defaults)

    # ---- forward --------------------------------------------------------------------------------

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, HeadStats]:
        """The mean loss over all ranks' rows that have a label, the same on every rank; 0 of none.

        embeddings [n, D] of this rank · labels [n] or [n, L] int64 in [0, C), or `ignore_index`.
        Every rank must call it, and its backward. In eval mode all classes take part and nothing
        changes; without gradients too, but for the averages that a margin keeps.
        Raises ValueError, TypeError or IndexError for bad arguments, on the other ranks a
        RuntimeError that names the rank.
        """
        training = self.training and torch.is_grad_enabled()
        with no_autocast(embeddings.device):
            batch, arriving = self._gather(embeddings, labels)
            # while the embeddings are on their way
            groups = self._groups(batch.local, training)
            self._catch_up(groups)
            # an ignored row must not reach the gradients, not even with NaN
            rows = torch.where(batch.valid[:, None], arriving.wait(), 0)
            step, loss, found = self._swept(batch, rows, groups, return_stats)
            leaf = self.weight if self._rows is None else self._anchor
            statistics, targets, norms, rows = Sharded.apply(
                embeddings, leaf, self, step, found.targets, rows
            )
            statistics = self._with_pairs(statistics, rows, batch, loss)
            with self._alike(embeddings.device):
                each = loss.row_loss(MergedRows(statistics, targets, batch.present, norms))
            total = torch.where(batch.valid, each, 0).sum() / batch.valid.sum().clamp_min(1)
            total = total.to(step.x.dtype)
        if training and self._rows is None:
            self._version += 1
        if not return_stats:
            return total
        own = slice(batch.first, batch.first + embeddings.shape[0])
        cosine = torch.where(batch.valid, found.targets[:, 0], 0)
        hit = batch.valid & (found.targets[:, 0] > found.best)
        return total, HeadStats(cosine[own], hit[own])

    def _gather(self, embeddings: Tensor, labels: Tensor) -> tuple[Batch, Gathered]:
        """The ranks meet; the labels of all, and their embeddings on the way."""
        refusal: Exception | None = None
        said = (0, 0, 0, 0)
        try:
            labels = self._checked(embeddings, labels)
            code = DTYPES.index(embeddings.dtype)
            said = (*embeddings.shape, labels.shape[1], code)
        except (ValueError, TypeError, IndexError) as error:
            refusal = error
        needs = torch.is_grad_enabled() and embeddings.requires_grad
        counts, need_x = meet(self.ranks, refusal is not None, *said, needs, embeddings.device)
        if refusal is not None:
            raise refusal
        labels = Gathered(self.ranks, labels, counts).wait()
        place = labels - self.class_start
        local = torch.where((place >= 0) & (place < self.num_local), place, NO_TARGET)
        batch = Batch(counts, sum(counts[: self.ranks.rank]), need_x, labels, local)
        return batch, Gathered(self.ranks, embeddings.detach(), counts)

    def _swept(
        self, batch: Batch, rows: Tensor, groups: list[Group], with_best: bool
    ) -> tuple[Step, ClassLoss, Sums]:
        """The sweep over this shard, its statistics merged with those of the others."""
        x = rows.to(accumulate_dtype(self.weight.dtype))
        x = (unit_rows(x) if self.normalize else x).contiguous()
        shard = Shard(self.weight.detach(), batch.local, rows.device, self.chunk_bytes)
        loss, values = self._loss_and_values(shard, x, batch.present, batch.valid)
        sweep = ShardSweep(shard, groups, self._engine(loss, batch.labels.shape[1]))
        with torch.no_grad():
            found = self._merged(sweep.forward(x, values), sweep.engine.kinds, with_best)
        return Step(self.step_count, batch, x, found.statistics, values, sweep), loss, found

    def _with_pairs(
        self, statistics: Tensor, rows: Tensor, batch: Batch, loss: ClassLoss
    ) -> Tensor:
        """The statistics with `batch_negatives` among every row's negatives."""
        if self.batch_negatives is None:
            return statistics
        shared = self.batch_negatives(
            rows,
            torch.where(batch.valid, batch.labels[:, 0], NO_TARGET),
            loss.params()[0],
            normalize=self.normalize,
            ignore_index=NO_TARGET,
            backend=self.backend,
        )
        return add_shared(statistics[0], shared.to(statistics.dtype))[None]

    def _checked(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        validation.check_matrix("embeddings", embeddings, "[n, D]")
        n = embeddings.shape[0]
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embeddings: expected [n, {self.embedding_dim}], got {describe(embeddings)}"
            )
        if (embeddings.dtype == torch.float64) != (self.weight.dtype == torch.float64):
            raise TypeError(
                f"embeddings: expected float64 where the table is, and only there: it is "
                f"{self.weight.dtype}, got {describe(embeddings)}"
            )
        if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[0] == n:
            validation.check_index_vector("labels", labels.flatten(), None, embeddings)
        else:
            validation.check_index_vector("labels", labels, n, embeddings)
            labels = labels[:, None]
        labels = labels.long()
        # -1 is out of range unless it is the ignored one; a GPU's check does not wait for it
        stray = (labels == NO_TARGET) & (labels != self.ignore_index)
        if labels.device.type == "cpu" and bool(stray.any()):
            raise IndexError(f"labels: expected class ids in [0, {self.num_classes}), got -1")
        labels = torch.where(stray, NO_TARGET - 1, labels)
        validation.check_labels(labels, self.num_classes, ignore_index=self.ignore_index)
        return torch.where(labels == self.ignore_index, NO_TARGET, labels)

    def _groups(self, local: Tensor, training: bool) -> list[Group]:
        """The rows of this shard that take part."""
        if not training or self.sample_rate == 1:
            return [Group(None)]
        own = local[local != NO_TARGET].unique()
        drawn = sample(
            self.class_start,
            self.num_local,
            self.sample_rate,
            seed=self.seed,
            step=self.step_count,
            device=local.device,
        )
        if not self.log_q:
            return [Group(torch.cat([own, drawn]).unique())]
        others = drawn[~torch.isin(drawn, own, assume_unique=True)]
        return [Group(own), Group(others, self.sample_rate)]

    def _catch_up(self, groups: list[Group]) -> None:
        if self._rows is None:
            return
        for ids, _ in groups:
            if ids is None:
                self._rows.settle()
            else:
                self._rows.catch_up(ids.to(self.weight.device))

    def _loss_of(self, scale: float, valid: Tensor | None = None) -> ClassLoss:
        if isinstance(self.margin, ClassLoss):
            return self.margin
        if isinstance(self.margin, AdaptiveScale):
            return _Adaptive(self.margin, scale, valid, self.training)
        return Softmax(self.margin, self.scale, self.gradient)

    def _loss_and_values(
        self, shard: Shard, x: Tensor, present: Tensor, valid: Tensor
    ) -> tuple[ClassLoss, Tensor | None]:
        """The batch's loss, and the numbers of each row that its rule takes before the sweep."""
        adaptive = isinstance(self.margin, AdaptiveScale)
        if adaptive and present.shape[1] != 1:
            raise ValueError(f"labels: expected one a row with {type(self.margin).__name__}")
        loss = self._loss_of(self.scale, valid)
        if not adaptive and not hasattr(getattr(loss, "margin", None), "bend"):
            none = x.new_zeros(present.shape, dtype=torch.float64)
            return loss, loss.values(none, present)
        # of all shards, before the sweep, which gives them again with a gradient
        targets = shard.targets(x, loss.softness, self.normalize)
        self.ranks.sum_(targets)
        if adaptive:
            loss = self._loss_of(float(self.margin.scale_of(targets[:, 0], valid)), valid)
        with torch.no_grad():
            return loss, loss.values(targets, present)

    def _engine(self, loss: ClassLoss, labels: int) -> Engine:
        plain = self.sub_centers == 1 and labels == 1
        shared = (self.normalize, self.precision, self.backend)
        if plain and loss.rule == "softmax" and loss.softness == 0:
            return SoftmaxEngine(loss.params()[0], *shared)
        return RuleEngine(loss.rule, tuple(loss.params()), loss.softness, *shared)

    def _merged(self, found: Sums, kinds: tuple[str, ...], with_best: bool) -> Sums:
        """Statistics over all shards, by the maximum and the sum of O(B) numbers."""
        if self.ranks.world == 1:
            return found
        is_lse = torch.tensor([kind == "lse" for kind in kinds], device=found.best.device)
        own = found.statistics[is_lse]
        top = torch.cat([own, found.best[None]]) if with_best else own.clone()
        if top.shape[0]:
            self.ranks.maximum_(top)
        shift = top[: own.shape[0]]
        shift = torch.where(shift > -torch.inf, shift, 0)
        statistics = found.statistics.clone()
        statistics[is_lse] = (own - shift).exp()
        together = torch.cat([statistics, found.targets.T])
        self.ranks.sum_(together)
        statistics, targets = together[: len(kinds)].clone(), together[len(kinds) :].T
        statistics[is_lse] = statistics[is_lse].log() + shift
        return Sums(statistics, targets.contiguous(), top[-1] if with_best else found.best)

    @contextmanager
    def _alike(self, device: torch.device) -> Iterator[None]:
        """The same random numbers on any number of ranks, for margins that draw some."""
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(rounding_key(self.seed, self.step_count) >> 1)
            yield

    # ---- backward -------------------------------------------------------------------------------

    def _backward(self, step: Step, grad: Gradients) -> tuple[Tensor | None, Scattered | None]:
        """The table's gradient for autograd (or its update), and dX on its way to its ranks."""
        if step.at != self.step_count and self._rows is not None:
            raise RuntimeError(
                "the class centres were updated after this forward: its backward came twice, or "
                "after another one's; update='step' lets several backwards add up"
            )
        dx = torch.zeros_like(step.x) if step.batch.need_x else None
        if self._rows is None:
            d_weight = self._dense_or_sparse(step, grad, dx)
            return d_weight, dx if dx is None else Scattered(self.ranks, dx, step.batch.counts)
        if self.update_at == "step":
            self._pending.append((step, grad))
            for _, part, _ in self._sweep(step, grad, need_x=step.batch.need_x, need_weight=False):
                dx += part
            return None, dx if dx is None else Scattered(self.ranks, dx, step.batch.counts)
        factor = self._clipping([(step, grad)])
        self._rows.begin(self._group())
        for rows, part, d_rows in self._sweep(
            step, grad, need_x=step.batch.need_x, need_weight=True
        ):
            if dx is not None:
                dx += part
            self._update(rows, d_rows, factor)
        on_the_way = None if dx is None else Scattered(self.ranks, dx, step.batch.counts)
        self._rows.end()
        return None, on_the_way

    def _sweep(
        self, step: Step, grad: Gradients, *, need_x: bool, need_weight: bool, **part: int
    ) -> Iterator[tuple[Rows, Tensor | None, Tensor | None]]:
        if not need_x and not need_weight:
            return iter(())
        return step.sweep.gradients(
            grad,
            step.statistics,
            step.x,
            step.values,
            need_x=need_x,
            need_weight=need_weight,
            **part,
        )

    def _dense_or_sparse(self, step: Step, grad: Gradients, dx: Tensor | None) -> Tensor | None:
        """The gradient of a parameter: of every row, or of the rows that took part."""
        need = self.weight.requires_grad
        sampled = step.sweep.groups[0].ids is not None
        dense = torch.zeros_like(self.weight) if need and not sampled else None
        parts: list[tuple[Tensor, Tensor]] = []
        for rows, part, d_rows in self._sweep(
            step, grad, need_x=step.batch.need_x, need_weight=need
        ):
            if dx is not None:
                dx += part
            if dense is not None:
                dense[rows] = d_rows.to(dense.device)
            elif need:
                parts.append((rows.to(self.weight.device), d_rows.to(self.weight.device)))
        if not need or dense is not None:
            return dense
        ids = torch.cat([rows for rows, _ in parts]) if parts else torch.empty(0, dtype=torch.int64)
        values = (
            torch.cat([d for _, d in parts])
            if parts
            else self.weight.new_empty((0, *self.weight.shape[1:]))
        )
        return torch.sparse_coo_tensor(ids[None], values, self.weight.shape, check_invariants=False)

    def _group(self) -> dict[str, Any]:
        """The hyper-parameters of now, as a schedule has left them."""
        group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        return {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()}

    def _update(self, rows: Rows, d_rows: Tensor, factor: float) -> None:
        d_rows = d_rows.to(self.weight.device)
        if factor != 1:
            d_rows = d_rows * factor
        if isinstance(rows, Tensor):
            rows = rows.to(self.weight.device)
        self._rows.update(rows, d_rows)

    # ---- updates apart from backward ------------------------------------------------------------

    def _chunk_gradients(
        self, pending: list[tuple[Step, Gradients]]
    ) -> Iterator[tuple[Rows, Tensor]]:
        """The sum of some backwards' gradients, a chunk of rows at a time."""
        if len(pending) == 1:
            for rows, _, d_rows in self._sweep(*pending[0], need_x=False, need_weight=True):
                yield rows, d_rows
            return
        height = pending[0][0].sweep.shard.height
        for first in range(0, self.num_local, height):
            last = min(first + height, self.num_local)
            total = torch.zeros_like(
                self.weight[first:last], dtype=accumulate_dtype(self.weight.dtype)
            )
            touched = torch.zeros(last - first, dtype=torch.bool, device=total.device)
            for step, grad in pending:
                for rows, _, d_rows in self._sweep(
                    step, grad, need_x=False, need_weight=True, first=first, last=last
                ):
                    if isinstance(rows, slice):
                        total[rows.start - first : rows.stop - first] += d_rows.to(total)
                        touched[rows.start - first : rows.stop - first] = True
                    else:
                        at = rows.to(total.device) - first
                        total.index_add_(0, at, d_rows.to(total))
                        touched[at] = True
            at = touched.nonzero()[:, 0]
            if at.numel():
                yield at + first, total[at].to(self.weight.dtype)

    def _norm(self, pending: list[tuple[Step, Gradients]]) -> float:
        square = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        for _, d_rows in self._chunk_gradients(pending):
            square += torch.linalg.vector_norm(d_rows, dtype=torch.float64).square().to(square)
        self.ranks.sum_(square)
        return math.sqrt(float(square))

    def _clipping(self, pending: list[tuple[Step, Gradients]]) -> float:
        """What the gradient is multiplied by, as torch.nn.utils.clip_grad_norm_ has it."""
        if self.max_grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (self._norm(pending) + 1e-6))

    def grad_norm(self) -> float:
        """The norm of the gradient that waits for `optimizer.step()`, over all shards.

        With update="step", on every rank alike. One sweep for its scores and its gradient.
        """
        self._check_waits()
        return abs(self._grad_factor) * self._norm(self._pending)

    def scale_grad(self, factor: float) -> None:
        """Multiplies the gradient that waits for `optimizer.step()`, to clip or to unscale it."""
        self._check_waits()
        self._grad_factor *= factor

    def _check_waits(self) -> None:
        if self.update_at != "step":
            raise RuntimeError("update: expected 'step' for a gradient that waits, got 'backward'")

    @torch.no_grad()
    def _take_pending(self) -> None:
        if not self._pending:
            return
        factor = self._grad_factor
        if self.max_grad_norm is not None:
            norm = abs(factor) * self._norm(self._pending)
            factor *= min(1.0, self.max_grad_norm / (norm + 1e-6))
        self._rows.begin(self._group())
        for rows, d_rows in self._chunk_gradients(self._pending):
            self._update(rows, d_rows, factor)
        self._rows.end()
        self._pending.clear()
        self._grad_factor = 1.0

    # ---- state ----------------------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Steps that the table has taken; without an optimiser, training forwards."""
        return self._version if self._rows is None else self._rows.steps

    def settle(self) -> None:
        """Every row catches up with the steps that it took no part in; before reading `weight`."""
        if self._rows is not None:
            self._rows.settle()

    def row_states(self) -> dict[str, Tensor]:
        """The optimiser's states of this shard, [c, ...] each, in place."""
        return {} if self._rows is None else self._rows.states

    def state(self) -> dict[str, Tensor]:
        """What torch.distributed.checkpoint saves, and loads in place: call `load` after that.

        weight and each "optimizer.<name>" as a DTensor over the shards (a plain tensor without
        process group), "margin.<name>" of the averages that a margin keeps, and "steps". They share
        the head's memory; every row has caught up.
        """
        self.settle()
        tables = {"weight": self.weight.detach()}
        tables |= {f"optimizer.{name}": t for name, t in self.row_states().items()}
        self._steps = torch.tensor(self.step_count)
        kept = self.margin.state_dict() if isinstance(self.margin, nn.Module) else {}
        return {
            **{name: self._over_ranks(t) for name, t in tables.items()},
            **{f"margin.{name}": t for name, t in kept.items()},
            "steps": self._steps,
        }

    def load(self) -> None:
        """After the tensors of `state()` were loaded in place: goes on from there."""
        self._set_steps(int(self._steps))

    def _set_steps(self, steps: int) -> None:
        self._pending.clear()
        self._grad_factor = 1.0
        if self._rows is None:
            self._version = steps
        else:
            self._rows.load(steps)

    def _over_ranks(self, local: Tensor) -> Tensor:
        if self.ranks.group is None:
            return local
        from torch.distributed import tensor as distributed

        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        mesh, rows = self.ranks.device_mesh(local.device), [distributed.Shard(0)]
        return distributed.DTensor.from_local(local, mesh, rows, shape=shape, stride=stride)

    def get_extra_state(self) -> dict[str, Any]:
        self.settle()
        return {"steps": self.step_count, "optimizer": dict(self.row_states())}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        own = self.row_states()
        if set(state["optimizer"]) != set(own):
            raise ValueError(
                f"optimizer: expected the states {sorted(own)}, got {sorted(state['optimizer'])}"
            )
        for name, tensor in own.items():
            tensor.copy_(state["optimizer"][name])
        self._set_steps(state["steps"])

    def extra_repr(self) -> str:
        shard = f"{self.class_start}:{self.class_start + self.num_local}"
        return (
            f"{self.num_classes} x {self.embedding_dim}, rows {shard}, "
            f"sample_rate={self.sample_rate}, world={self.ranks.world}"
        )
