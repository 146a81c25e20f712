"""One step of a sharded head: what backward needs of its forward, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from fused_losses.base.numerics import no_autocast, unit_rows
from fused_losses.centers.batch import GlobalBatch
from fused_losses.centers.collectives import Scattered
from fused_losses.centers.engines import Gradients, Rows
from fused_losses.centers.shard import ShardChunks


class SavedForward(NamedTuple):
    """What a forward's backward and a later update need of it, O(B D) and the drawn ids."""

    at: int  # generation of the table
    batch: GlobalBatch
    x: Tensor  # [B, D] as multiplied
    statistics: Tensor  # [S, B] of all shards
    values: Tensor | None
    negatives: Tensor | None  # [B] how many, where the loss counts
    sweep: ShardChunks[Any]
    need_weight: bool  # autograd wants the table's gradient
    normalize: bool
    dx_scale: int  # of what the embeddings get
    trains: bool  # the rows are to step
    leaf: Node | None  # which autograd wants the table's gradient for
    incoming: list[Tensor]  # gradients of the loss that backward came with

    @property
    def table(self) -> Tensor:
        """The shard's rows. [c, ...]"""
        return self.sweep.shard.weight

    def gradients(
        self,
        grad: Gradients,
        dx: Tensor | None,  # [B, D], gets this shard's share added
        *,
        need_weight: bool,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[tuple[Rows, Tensor | None]]:
        """Of each chunk of the table's rows in [first, last): its rows and their gradient."""
        if dx is None and not need_weight:
            return
        for rows, part, d_rows in self.sweep.gradients(
            grad,
            self.statistics,
            self.x,
            self.values,
            need_x=dx is not None,
            need_weight=need_weight,
            first=first,
            last=last,
        ):
            if dx is not None and part is not None:
                dx += part
            yield rows, d_rows


def accumulates(leaf: Node | None) -> bool:
    """Whether the backward that runs is to change a leaf: torch.autograd.grad changes none.

    Nor does any change one that was frozen since its forward, as torch has it.
    """
    variable = getattr(leaf, "variable", None)
    if leaf is None or (variable is not None and not variable.requires_grad):
        return False
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch.autograd.grad with regard to the leaf itself
        return False


# the table's gradient for autograd (None: it has been dealt with), and dX on its way to its ranks
TakeGradient = Callable[[SavedForward, Gradients], tuple[Tensor | None, Scattered | None]]


class Sharded(torch.autograd.Function):
    """This rank's embeddings -> statistics, targets and norms of the rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        take: TakeGradient,
        saved: SavedForward,
        targets: Tensor,
        gathered: Tensor,
        scale: Tensor | None,  # that learns
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.take, ctx.saved, ctx.targets = take, saved, targets
        ctx.save_for_backward(embeddings, scale)
        norms = torch.linalg.vector_norm(gathered.to(saved.x.dtype), dim=1)
        # views, or autograd would mark the step's own tensors
        return saved.statistics.clone(), targets.clone(), norms, gathered.view_as(gathered)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_statistics: Tensor, d_targets: Tensor, d_norms: Tensor, d_gathered: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved: SavedForward = ctx.saved
        batch = saved.batch
        embeddings, scale = ctx.saved_tensors
        with no_autocast(embeddings.device):
            d_weight, on_the_way = ctx.take(saved, Gradients(d_statistics, d_targets))
            dx = d_scale = None
            if on_the_way is not None:
                own = slice(batch.first, batch.first + embeddings.shape[0])
                alive = torch.where(batch.valid[own, None], embeddings, 0)
                dx = on_the_way.wait()[:, : embeddings.shape[1]]  # a bias' unit is no coordinate
                if ctx.needs_input_grad[6]:
                    # scores are scale <x, w>, linear in both: scale d_scale = sum <x, dx>
                    d_scale = (dx.double() * saved.x[own, : embeddings.shape[1]]).sum()
                    d_scale -= (d_targets[own].double() * ctx.targets[own]).sum()
                    on_the_way.ranks.sum_(d_scale)
                    d_scale = (d_scale.to(scale.device) / scale.double()).to(scale.dtype)
                dx = _to_embeddings(alive, dx, d_norms[own], d_gathered[own], saved.normalize)
                dx = (dx * saved.dx_scale).to(embeddings.dtype)
        return dx, d_weight, None, None, None, None, d_scale

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "ClassCenters: forward mode through the sharded head is not supported; use reverse "
            "mode, or margin_softmax on one process"
        )


def _to_embeddings(
    embeddings: Tensor, dx: Tensor, d_norms: Tensor, d_gathered: Tensor, normalize: bool
) -> Tensor:
    """From the gradients of the rows as multiplied, of their norms and of themselves. [n, D]"""
    with torch.enable_grad():
        leaf = embeddings.detach().to(dx.dtype).requires_grad_()
        norms = torch.linalg.vector_norm(leaf, dim=1)
        rows = unit_rows(leaf) if normalize else leaf * 1
        return torch.autograd.grad(
            [rows, norms, leaf * 1], leaf, [dx, d_norms.to(dx), d_gathered.to(dx)]
        )[0]
