"""The large-class head: class centres sharded over ranks, sampled, and updated inside backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh

from fused_losses.base import validation
from fused_losses.base.class_labels import flattened
from fused_losses.base.numerics import accumulate_dtype, no_autocast
from fused_losses.base.rounding import rounding_key
from fused_losses.base.validation import NO_TARGET
from fused_losses.centers import arguments, class_margins
from fused_losses.centers.batch import GlobalBatch, device_of
from fused_losses.centers.collectives import Ranks
from fused_losses.centers.distillation import distillation
from fused_losses.centers.engines import RuleEngine, Sums
from fused_losses.centers.objective import HeadMargin, engine_of, loss_of
from fused_losses.centers.optimizers import make_row_optimizer
from fused_losses.centers.resize import carry_over
from fused_losses.centers.shard import CHUNK_BYTES, ClassGroup, Shard, ShardSweep
from fused_losses.centers.statistics import HeadStats, over_shards
from fused_losses.centers.step import SavedForward
from fused_losses.centers.storage import Storage, initialise_
from fused_losses.centers.swept_table import SweptTable
from fused_losses.centers.update import NONFINITE, AutogradUpdates, RowUpdates
from fused_losses.functions.adaptive_scale import AdaptiveScale
from fused_losses.functions.class_values import ClassLoss, MergedRows, Sweep, count_negatives
from fused_losses.functions.unpg import UNPG
from fused_losses.margins import ArcFace
from fused_losses.primitives.shared_negatives.op import add_shared

UPDATES = ("backward", "step")


class ClassCenters(SweptTable):
    """A margin-softmax head over any number of classes, sharded over the ranks.

        loss = mean over all ranks' rows of  loss_i(cosines of x_i with every class)

    Each rank holds ceil(C / W) consecutive classes (the last ones fewer, or none) and gets the
    batches of all; the loss is the same number on every rank, and its gradients are those of one
    process with the whole table. Batches may differ in size between ranks and be empty.

    Args:
        num_classes, embedding_dim: C, D.
        margin: None, an object of `fused_losses.margins`, a callable on the target cosine, a
            `ClassLoss` (SFace, SphereFace2, MLCD, SoftTriple, ...) or `AdaptiveScale`. A tensor [C]
            among its numbers is one value a class (LDAM: CosFace(delta)), of which each rank
            keeps its classes'; one that learns stays whole.
        scale: > 0 (a ClassLoss and AdaptiveScale have their own); a parameter of one value learns
            with whoever steps it, but beside none that bends other classes, nor batch_negatives.
        normalize: rows of both sides by their norm.
        gradient: "exact" or "straight_through", as in `margin_softmax`.
        sample_rate: in (0, 1]; below 1 a training step sees the batch's own classes and each other
            class with this chance (PartialFC: An et al., 2022), drawn by (seed, step) alike
            whatever the number of ranks.
        log_q: a drawn class counts 1 / sample_rate times: the sums over classes are then unbiased.
        sub_centers: K centres of a class, the best counts; weight is [C, K, D].
        optimizer: None: `weight` is a parameter with an ordinary gradient (below sample_rate 1 a
            row-sparse one, for SGD or Adagrad without weight decay or SparseAdam). "sgd",
            "adamw", "adagrad": backward updates the rows chunk by chunk, as torch.optim would
            with a dense gradient (`fused_losses.centers.optimizers`), and no gradient of the
            table ever exists.
        optimizer_options: its hyper-parameters, `state_dtype`, `stochastic_rounding`.
        update: "backward" (each is a step, or `every` of them are one), or "step":
            backward keeps O(B D), `head.optimizer.step()` sweeps again and updates. Several
            backwards before a step add up; `grad_norm`, `scale_grad` work in between.
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
        nonfinite: of an optimizer's step whose embeddings or incoming gradient are not finite:
            "raise" (FloatingPointError) or "skip", before any row is written, on every rank.
        label_smoothing: in [0, 1], of a softmax over the classes that take part.
        every: backwards whose gradients add up to one step inside the last of them, for gradient
            accumulation; `optimizer.step()` before that takes it at once, `zero_grad()` forgets.
        grow_from: a head of fewer classes or more, where this one goes on: `carry_over`.
        bias: logits scale <x, w_j> + b_j, with margin=None and normalize=False: `weight` has a
            column more, which starts at 0 and trains as the rows do.

    With an optimizer the table is neither a parameter nor a buffer, so that the head may lie inside
    what DistributedDataParallel or FSDP wrap; `requires_grad_(False)` of the head or of a model
    around it freezes the table. Without one it must stay outside: its rows differ between ranks.
    Memory: table, optimiser states, 8 bytes a row, a chunk's gradient, O(B D). Time O(B C D / W)
    a rank. Communication: `fused_losses.centers.collectives`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: HeadMargin = ArcFace(0.5),
        scale: float | nn.Parameter = 64.0,
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
        nonfinite: str = "raise",
        label_smoothing: float = 0.0,
        every: int = 1,
        grow_from: ClassCenters | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_classes, embedding_dim, sub_centers, chunk_bytes = arguments.counts(
            num_classes=num_classes, embedding_dim=embedding_dim, sub_centers=sub_centers,
            chunk_bytes=chunk_bytes,
        )  # fmt: skip
        seed, ignore_index = arguments.integers(seed=seed, ignore_index=ignore_index)
        arguments.check_set("max_grad_norm", max_grad_norm)
        arguments.check_kernels(dtype, backend)
        if grow_from is not None and not isinstance(grow_from, ClassCenters):
            raise TypeError(
                f"grow_from: expected None or a ClassCenters, got {type(grow_from).__name__}; a "
                "state dict is loaded by a head of its number of classes"
            )
        arguments.check_objects(
            batch_negatives=batch_negatives, optimizer_options=optimizer_options, storage=storage,
            process_group=process_group, device_mesh=device_mesh,
        )  # fmt: skip
        self.label_smoothing = arguments.check_smoothing(label_smoothing, batch_negatives)
        bias = arguments.check_bias(bias, margin, normalize, sub_centers)
        validation.check_choice("update", update, UPDATES)
        validation.check_choice("precision", precision, validation.PRECISIONS)
        validation.check_choice("nonfinite", nonfinite, NONFINITE)
        if optimizer is None and (update != "backward" or max_grad_norm or optimizer_options):
            raise ValueError(
                "update, max_grad_norm, optimizer_options: expected an optimizer beside them, "
                "got optimizer=None"
            )
        self.ranks = Ranks(process_group, device_mesh, mesh_dim)
        self.class_start, stop = self.ranks.shard(num_classes)
        self.num_local = stop - self.class_start
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.batch_negatives, self.sub_centers = batch_negatives, sub_centers
        self.scale, self.margin, self.normalize = scale, margin, normalize
        self.gradient, self.sample_rate, self.log_q = gradient, sample_rate, log_q
        self.gradient_scale = gradient_scale
        self.seed, self.ignore_index, self.chunk_bytes = seed, ignore_index, chunk_bytes
        self.precision, self.backend = precision, backend
        loss_of(margin, scale, gradient)  # its own checks

        device = torch.device(device or "cpu")
        place = Storage(storage, device, rank=self.ranks.rank, world=self.ranks.world)
        middle = () if sub_centers == 1 else (sub_centers,)
        weight = place.zeros("weight", (self.num_local, *middle, embedding_dim + bias), dtype)
        initialise_(weight[..., :embedding_dim], self.class_start, seed=seed)
        updates: AutogradUpdates | RowUpdates = AutogradUpdates(self.ranks)
        if optimizer is not None:
            rows = make_row_optimizer(
                optimizer, weight, seed=seed, allocate=place.zeros, **(optimizer_options or {})
            )
            rows.row_offset = self.class_start
            updates = RowUpdates(
                rows, self.ranks, at=update, max_norm=max_grad_norm, nonfinite=nonfinite
            )
        self._own(weight, updates)
        self.every = every
        if grow_from is not None:
            carry_over(grow_from, self)

    distillation = distillation

    # ---- forward --------------------------------------------------------------------------------

    @_disable_dynamo  # steps of rows and talk of ranks are no graph; what is around is one
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        row_weight: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, HeadStats]:
        """The mean loss over all ranks' rows that have a label, the same on every rank; 0 of none.

        embeddings [n, D] of this rank · labels [n] or [n, L] int64 in [0, C), or `ignore_index` ·
        row_weight [n] >= 0, of the mean; or [n, T, D], [n, T], [n, T]. Every rank must call it, and
        its backward. In eval mode all classes take part and nothing changes. Without gradients the
        sample is the next step's, so that a checkpoint's loss is what its backward is of, and
        nothing changes but the averages that a margin keeps. Raises ValueError, TypeError or
        IndexError for bad arguments, on the other ranks a RuntimeError that names the rank.
        """
        self._check_wrapped()
        given = embeddings
        embeddings, labels, row_weight = flattened(embeddings, labels, row_weight)
        with no_autocast(device_of(embeddings, self._table)):
            batch, arriving = self._met(embeddings, labels, row_weight)
            # while the embeddings are on their way
            taking_part = self._groups(batch.local)
            self._updates.catch_up(taking_part, self._table.device)
            # an ignored row must not reach the gradients, not even with NaN
            rows = torch.where(batch.valid[:, None], arriving.wait(), 0)
            saved, loss, found = self._swept(batch, rows, taking_part, return_stats)
            statistics, targets, norms, rows = self._apart(embeddings, saved, found.targets, rows)
            statistics = self._with_pairs(statistics, rows, batch, loss)
            with self._alike(embeddings.device):
                merged = MergedRows(statistics, targets, batch.present, norms)
                told = dict(negatives=saved.negatives, values=saved.values)
                each = loss.row_loss(merged._replace(**told))
            total = self._mean(each, saved)
        if not return_stats:
            return total
        own, lead = slice(batch.first, batch.first + len(embeddings)), given.shape[:-1]
        cosine = torch.where(batch.valid, found.targets[:, 0], 0)
        hit = batch.valid & (found.targets[:, 0] > found.best)
        return total, HeadStats(cosine[own].view(lead), hit[own].view(lead))

    def _swept(
        self, batch: GlobalBatch, rows: Tensor, taking_part: list[ClassGroup], with_best: bool
    ) -> tuple[SavedForward, ClassLoss, Sums]:
        """The sweep over this shard, its statistics merged with those of the others."""
        table = self._table.detach()
        x = self.multiplied(rows.to(accumulate_dtype(table.dtype))).contiguous()
        shard = Shard(table, batch.local, rows.device, self.chunk_bytes)
        counts = isinstance(self.margin, ClassLoss) and self.margin.counts
        classes = self.num_classes
        if self.label_smoothing or counts:
            classes = self._counted(taking_part)
        kernels: dict[str, Any] = dict(
            normalize=self.normalize, precision=self.precision, backend=self.backend
        )

        def swept(rule: str, params: list[float], values: Tensor | None) -> Tensor:
            engine = RuleEngine(rule, tuple(params), softness=0.0, **kernels)
            found = ShardSweep(shard, taking_part, engine).forward(x, values)
            return over_shards(self.ranks, found, engine.kinds, False).statistics

        loss, values, negatives = self._loss_and_values(shard, x, batch, classes, swept)
        engine = engine_of(loss, labels=batch.labels.shape[1], centers=self.sub_centers, **kernels)
        sweep = ShardSweep(shard, taking_part, engine)
        with torch.no_grad():
            found = over_shards(self.ranks, sweep.forward(x, values), engine.kinds, with_best)
        saved = self._saved(batch, x, found.statistics, values, negatives, sweep)
        return saved, loss, found

    def _with_pairs(
        self, statistics: Tensor, rows: Tensor, batch: GlobalBatch, loss: ClassLoss
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

    def _loss_of(
        self, margin: HeadMargin, scale: float | Tensor, valid: Tensor, classes: int
    ) -> ClassLoss:
        return loss_of(
            margin, scale, self.gradient, valid=valid, training=self.training,
            smoothing=self.label_smoothing, classes=classes,
        )  # fmt: skip

    def _loss_and_values(
        self, shard: Shard, x: Tensor, batch: GlobalBatch, classes: int, swept: Sweep
    ) -> tuple[ClassLoss, Tensor | None, Tensor | None]:
        """The loss, the numbers of each row that its rule takes, and how many negatives it has."""
        present, valid = batch.present, batch.valid
        margin = class_margins.of_rows(self.margin, self.num_classes, batch.labels)
        adaptive = isinstance(margin, AdaptiveScale)
        if adaptive and present.shape[1] != 1:
            raise ValueError(f"labels: expected one a row with {type(margin).__name__}")
        loss = self._loss_of(margin, self.scale, valid, classes)
        negatives = count_negatives(batch.labels, classes) if loss.counts else None
        bends = hasattr(getattr(loss, "margin", None), "bend")
        if not (adaptive or bends or loss.by_targets):
            none = x.new_zeros(present.shape, dtype=torch.float64)
            with torch.no_grad():
                return loss, loss.values(none, present), negatives
        # of all shards, before the sweep, which gives them again with a gradient
        targets = shard.targets(x, loss.softness, self.normalize)
        self.ranks.sum_(targets)
        if adaptive:
            scale = float(margin.scale_of(targets[:, 0], valid))
            loss = self._loss_of(margin, scale, valid, classes)
        with torch.no_grad():
            values = loss.swept_values(swept, targets, present, negatives)
            # as the rule takes them: a loss may correct for that
            return loss, None if values is None else values.to(x.dtype).to(values.dtype), negatives

    @contextmanager
    def _alike(self, device: torch.device) -> Iterator[None]:
        """The same random numbers on any number of ranks, for margins that draw some."""
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            torch.manual_seed(rounding_key(self.seed, self.step_count) >> 1)
            yield

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes} x {self.embedding_dim}, "
            f"rows {self.class_start}:{self.class_start + self.num_local}, "
            f"sample_rate={self.sample_rate}, world={self.ranks.world}" + ", bias" * self.has_bias
        )
