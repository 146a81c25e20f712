"""One step of a sharded head: the rows of all ranks, what backward needs of them, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_losses.base.numerics import no_autocast, unit_rows
from fused_losses.base.validation import NO_TARGET
from fused_losses.centers.shard import Gradients, ShardSweep

if TYPE_CHECKING:
    from fused_losses.centers.head import ClassCenters


class Batch(NamedTuple):
    """The rows of all ranks."""

    counts: list[int]  # of each rank
    first: int  # where this rank's begin
    need_x: bool  # any rank's embeddings need a gradient
    labels: Tensor  # [B, L] class ids, NO_TARGET: nothing there
    local: Tensor  # [B, L] rows of this shard, NO_TARGET: nothing there, or elsewhere

    @property
    def present(self) -> Tensor:
        return self.labels != NO_TARGET

    @property
    def valid(self) -> Tensor:
        """[B] rows with a label."""
        return self.present.any(dim=1)


class Step(NamedTuple):
    """A forward: what its backward and a later update need, O(B D) and the drawn ids."""

    at: int  # steps that the table had taken
    batch: Batch
    x: Tensor  # [B, D] as multiplied
    statistics: Tensor  # [S, B] of all shards
    values: Tensor | None
    sweep: ShardSweep


class Sharded(torch.autograd.Function):
    """This rank's embeddings -> statistics, targets and norms of the rows of all ranks."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        head: ClassCenters,
        step: Step,
        targets: Tensor,
        gathered: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.head, ctx.step = head, step
        ctx.save_for_backward(embeddings)
        norms = torch.linalg.vector_norm(gathered.to(step.x.dtype), dim=1)
        # views, or autograd would mark the step's own tensors
        return step.statistics.clone(), targets.clone(), norms, gathered.view_as(gathered)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_statistics: Tensor, d_targets: Tensor, d_norms: Tensor, d_gathered: Tensor
    ) -> tuple[Tensor | None, ...]:
        head, step = ctx.head, ctx.step
        (embeddings,) = ctx.saved_tensors
        with no_autocast(embeddings.device):
            d_weight, on_the_way = head._backward(step, Gradients(d_statistics, d_targets))
            dx = None
            if on_the_way is not None:
                own = slice(step.batch.first, step.batch.first + embeddings.shape[0])
                alive = torch.where(step.batch.valid[own, None], embeddings, 0)
                dx = _to_embeddings(
                    alive, on_the_way.wait(), d_norms[own], d_gathered[own], head.normalize
                )
                if head.gradient_scale == "ddp_mean":
                    dx = dx * head.ranks.world
                dx = dx.to(embeddings.dtype)
        return dx, d_weight, None, None, None, None


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
