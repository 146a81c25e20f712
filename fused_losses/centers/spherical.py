"""A head of any number of classes whose step costs the same for all of them, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node, get_gradient_edge

from fused_losses.base import validation
from fused_losses.base.class_labels import check_positions, class_labels, flattened
from fused_losses.base.numerics import accumulate_dtype, no_autocast, reduced, root, softplus
from fused_losses.base.parameters import check_above, check_parameter
from fused_losses.centers import arguments
from fused_losses.centers.factored import WIDE, FactoredTable, Outputs, Slopes, together
from fused_losses.centers.head_optimizer import HeadOptimizer
from fused_losses.centers.predict import TopClasses
from fused_losses.centers.step import accumulates
from fused_losses.centers.storage import initialise_
from fused_losses.centers.waiting import WaitingGradients
from fused_losses.pairwise.topk import pairwise_topk

# ---- losses: of a row's outputs of its classes, and of two sums over all outputs -----------------


def z_loss(found: Outputs, present: Tensor, classes: int, a: float, b: float) -> Tensor:
    """mean over the row's classes of softplus(a (b - (o_c - mu) / sigma)) / a. [N]"""
    mean = found.total / classes
    deviation = root(found.square / classes - mean**2) + 1e-12
    z = (found.chosen - mean[:, None]) / deviation[:, None]
    return _mean(softplus(a * (b - z)) / a, present)


def squared_error(found: Outputs, present: Tensor, *_: Any) -> Tensor:
    """sum over all classes of (o_j - y_j)^2, y 1 for the row's classes and 0 for others. [N]"""
    each = torch.where(present, 1 - 2 * found.chosen, 0).sum(dim=1)
    return found.square + each


def taylor_softmax(found: Outputs, present: Tensor, classes: int, *_: Any) -> Tensor:
    """mean over the row's classes of -log((1 + o_c + o_c^2 / 2) / sum_j (1 + o_j + o_j^2 / 2))."""
    whole = classes + found.total + found.square / 2
    each = 1 + found.chosen + found.chosen**2 / 2
    return _mean(whole.log()[:, None] - each.log(), present)


def _mean(each: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, each, 0).sum(dim=1) / present.sum(dim=1).clamp_min(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "z": z_loss,
    "mse": squared_error,
    "taylor": taylor_softmax,
}


# ---- the step ------------------------------------------------------------------------------------


class SphericalTable:
    """The factored table as `HeadOptimizer` sees a table: hyper-parameters, no states."""

    states: Mapping[str, Tensor] = {}

    def __init__(self, table: FactoredTable, lr: float, weight_decay: float) -> None:
        self.table, self.steps = table, 0
        self.defaults = {"lr": lr, "weight_decay": weight_decay}

    @property
    def weight(self) -> Tensor:
        return self.table.rows

    def unfit(self, states: Mapping[str, Tensor]) -> str | None:
        return f"optimizer: expected no states, got {sorted(states)}" if states else None


class SphericalUpdates:
    """The steps of the table, and what waits for one."""

    begun: bool | None = None  # there is no momentum

    def __init__(self, rows: SphericalTable) -> None:
        self.rows = rows
        self.waits: WaitingGradients[tuple[int, Slopes]] = WaitingGradients()
        self.optimizer = HeadOptimizer(self)

    @property
    def probe(self) -> Tensor:
        return self.waits.probe

    @property
    def steps(self) -> int:
        return self.rows.steps

    @property
    def states(self) -> dict[str, Tensor]:
        return {}

    def fill(
        self,
        states: Mapping[str, Tensor],  # noqa: ARG002 (none here)
        steps: int,
        begun: bool | None = None,  # noqa: ARG002 (nor a momentum)
    ) -> None:
        self.forget()
        self.rows.steps = steps

    def forget(self) -> None:
        self.waits.forget()

    def check_turn(self, generation: int) -> None:
        if generation != self.rows.table.generation:
            raise RuntimeError(
                "the classes were updated, moved or loaded after this forward; several backwards "
                "before optimizer.step() add up, and optimizer.zero_grad() forgets them"
            )

    def summed(self) -> Slopes | None:
        """Of the gradients that wait; None: none does."""
        waiting = self.waits.pending()
        for (generation, _), _ in waiting:
            self.check_turn(generation)
        if not waiting:
            return None
        return together([slopes.times(factor) for (_, slopes), factor in waiting])

    def take_pending(self) -> None:
        """The step by what waits; FloatingPointError where it is not finite, no row changed."""
        slopes = self.summed()
        self.forget()
        if slopes is None:
            return
        if not all(bool(each.isfinite().all()) for each in slopes):
            raise FloatingPointError(
                "SphericalHead: the batch or its gradient is not finite, and no row was changed"
            )
        group = self.optimizer.param_groups[0]
        self.rows.table.step(slopes, float(group["lr"]), float(group["weight_decay"]))
        self.rows.steps += 1


class Saved(NamedTuple):
    """What backward needs of its forward."""

    updates: SphericalUpdates
    generation: int
    rows: Tensor  # [N, D] float64
    classes: Tensor  # [N, K]
    leaf: Node | None  # of the switch; None: the table does not train


class SphericalOutputs(torch.autograd.Function):
    """`Outputs` of embeddings, differentiable once; the table's gradient waits for its step."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, switch: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        ctx.saved, ctx.dtype, ctx.switch = saved, embeddings.dtype, switch.shape
        return tuple(saved.updates.rows.table.outputs(saved.rows, saved.classes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        saved: Saved = ctx.saved
        chosen, square, total = grads
        chosen = torch.where(saved.classes < 0, 0, chosen)
        slopes = Slopes(saved.rows, saved.classes, chosen, square, total)
        saved.updates.check_turn(saved.generation)
        if accumulates(saved.leaf):
            finite = all(bool(each.isfinite().all()) for each in (saved.rows, *slopes[2:]))
            saved.updates.waits.add((saved.generation, slopes), finite=finite)
        grad = saved.updates.rows.table.gradient(slopes) if ctx.needs_input_grad[0] else None
        return (
            None if grad is None else grad.to(ctx.dtype),
            chosen.new_zeros(ctx.switch),
            None,
        )


# ---- the module ----------------------------------------------------------------------------------


class SphericalHead(nn.Module):
    """A linear classifier over any number of classes, trained exactly in O(D^2) a row.

        o_j = <w_j, h>,   mu = mean_j o_j,   sigma^2 = mean_j (o_j - mu)^2
        "z":       softplus(a (b - (o_y - mu) / sigma)) / a
        "mse":     sum_j (o_j - [j = y])^2
        "taylor":  -log((1 + o_y + o_y^2 / 2) / sum_j (1 + o_j + o_j^2 / 2))

    These losses need of the C outputs the target's and two sums, h^T (W^T W) h and (W^T 1)^T h, and
    the table is kept in factors in which a step of SGD, with weight decay, is a change of D x D
    matrices and of the rows of the batch's classes. Loss, gradients and table are those of the
    dense computation; momentum and Adam have no such form.

    Args:
        num_classes, embedding_dim: C, D.
        loss: "z", "mse" or "taylor".
        lr, weight_decay: of SGD, > 0 and >= 0; `optimizer.param_groups` has them for schedules.
        a, b: of the Z-loss; a > 0.
        reduction: "mean" over the rows that have a class, or "sum" (the authors').
        ignore_index: of labels: no class here.
        max_condition: of the D x D factor; beyond it, it is multiplied into the rows, in O(C D^2).
            What storing a row rounds counts up to so many times in its outputs.
        dtype, device: of the rows; the D x D matrices are float64.
        seed: of the first rows.

    `head.optimizer.step()` takes the step, several backwards before it add up, and
    `optimizer.zero_grad()` forgets them. `head.optimizer` goes into a GradScaler or a schedule. In
    eval mode, frozen (`requires_grad_(False)`) or under torch.autograd.grad nothing waits. One
    process: several ranks would part, and are refused.

    Memory: the rows, 3 D^2 float64, O(N D) until the step. Time O(N D (N + D + K) + D^3) a step,
    and once in a while O(C D^2). Papers: Vincent, de Brebisson, Bouthillier, "Efficient exact
    gradient update for training deep networks with very large sparse targets", 2015; de Brebisson,
    Vincent, "The Z-loss", 2016.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        loss: str = "z",
        *,
        lr: float,
        weight_decay: float = 0.0,
        a: float = 1.0,
        b: float = 0.0,
        reduction: str = "mean",
        ignore_index: int = -100,
        max_condition: float = 100.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        num_classes, embedding_dim = arguments.counts(
            num_classes=num_classes, embedding_dim=embedding_dim
        )
        seed, ignore_index = arguments.integers(seed=seed, ignore_index=ignore_index)
        arguments.check_kernels(dtype, None)
        validation.check_choice("loss", loss, tuple(LOSSES))
        validation.check_choice("reduction", reduction, ("mean", "sum"))
        check_above("lr", lr)
        check_parameter("weight_decay", weight_decay, 0)
        check_above("a", a)
        check_parameter("b", b)
        check_parameter("max_condition", max_condition, 1)
        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.loss, self.reduction, self.ignore_index = loss, reduction, ignore_index
        self.a, self.b = float(a), float(b)
        rows = torch.empty(num_classes, embedding_dim, dtype=dtype, device=device)
        initialise_(rows, 0, seed=seed, std=embedding_dim**-0.5)
        self.table = FactoredTable(rows, float(max_condition))
        self.trains = nn.Parameter(rows.new_empty(0))
        self._updates = SphericalUpdates(SphericalTable(self.table, lr, weight_decay))

    @property
    def optimizer(self) -> HeadOptimizer:
        """SGD over all classes."""
        self._updates.optimizer.belongs_to(self)
        return self._updates.optimizer

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss. [N, D] or [..., D], and labels [N], [N, K], [...] or [..., K] int64.

        K classes a row, -> a number in the embeddings' accumulation dtype. Raises ValueError,
        TypeError, IndexError.
        """
        x, classes = self._checked(embeddings, labels)
        present = classes >= 0
        valid = present.any(dim=1)
        trains = self.training and torch.is_grad_enabled() and self.trains.requires_grad
        if trains and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "SphericalHead: expected one process, got "
                f"{dist.get_world_size()}, whose tables would part; ClassCenters is sharded"
            )
        with no_autocast(x.device):
            # an ignored row must not reach the gradients, not even with NaN
            rows = torch.where(valid[:, None], x.to(WIDE), 0)
            leaf = get_gradient_edge(self.trains).node if trains else None
            saved = Saved(self._updates, self.table.generation, rows.detach(), classes, leaf)
            found = Outputs(*SphericalOutputs.apply(rows, self.trains, saved))
            each = LOSSES[self.loss](found, present, self.num_classes, self.a, self.b)
            return reduced(each, valid, self.reduction, accumulate_dtype(embeddings.dtype))

    def _checked(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D], and classes [N, K] with -1 for none."""
        check_positions(embeddings, labels)
        embeddings, labels = flattened(embeddings, labels)
        self._check_embeddings(embeddings)
        return embeddings, class_labels(labels, embeddings, self.num_classes, self.ignore_index)

    def _check_embeddings(self, embeddings: Tensor) -> None:
        validation.check_matrix("embeddings", embeddings, "[N, D]")
        arguments.check_width(embeddings, self.num_classes, self.embedding_dim, of="SphericalHead")
        validation.check_device("embeddings", embeddings, "the head", self.table.rows)

    # ---- the classes -----------------------------------------------------------------------------

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, in its dtype; ids [...] int64 in [0, C). [..., D]"""
        validation.check_class_ids("ids", ids.flatten(), self.num_classes)
        return self.table.of(ids.long()).to(self.table.rows.dtype)

    def fill_(self, weight: Tensor) -> SphericalHead:
        """Takes a table [C, D] as it is."""
        self.table.fill(weight)
        return self

    @torch.no_grad()
    def top_classes(self, embeddings: Tensor, k: int = 1) -> TopClasses:
        """The k classes of the highest outputs for each row, best first: scores and ids [N, k].

        Streamed over the rows: time O(N C D), memory O(N (D + k)) and a tile.
        """
        self._check_embeddings(embeddings)
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k: expected a count in [1, {self.num_classes}], got {k}")
        x = embeddings.to(WIDE)
        mixed = (x @ self.table.mixing.T).to(accumulate_dtype(self.table.rows.dtype))
        scores, classes = pairwise_topk(mixed, self.table.rows, k, "dot")
        scores = scores + (x @ self.table.shift)[:, None]
        return TopClasses(scores.to(accumulate_dtype(embeddings.dtype)), classes)

    # ---- its gradient and its health -------------------------------------------------------------

    def grad_norm(self) -> float:
        """The norm of the whole table's gradient that waits for the step; 0 of none."""
        slopes = self._updates.summed()
        return 0.0 if slopes is None else self.table.norm(slopes)

    def scale_grad(self, factor: float) -> None:
        """Multiplies the gradient that waits, to clip it."""
        self._updates.waits.scale(factor)

    def condition(self) -> float:
        """Of the D x D factor, in the 1-norm; 1 after a `refactor`."""
        return self.table.condition()

    def drift(self) -> float:
        """How far the tracked W^T W is from that of the rows, relative. O(C D^2)"""
        return self.table.drift()

    def refactor(self) -> None:
        """The D x D factor goes into the rows. O(C D^2); a step does it where it must."""
        self.table.refactor()

    # ---- the life of a module --------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As nn.Module's; what waits for the step is forgotten, too."""
        super().zero_grad(set_to_none)
        self._updates.forget()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "trains"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[prefix + "trains"] = self.trains  # torch hands on a copy
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def get_extra_state(self) -> Tensor:
        """[1] int64: the steps."""
        return torch.tensor([self._updates.steps], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The steps; what waits is forgotten."""
        self._updates.fill({}, int(state.sum()))

    def extra_repr(self) -> str:
        group = self.optimizer.param_groups[0]
        return (
            f"{self.num_classes}, {self.embedding_dim}, loss={self.loss!r}, lr={group['lr']}, "
            f"weight_decay={group['weight_decay']}"
        )
