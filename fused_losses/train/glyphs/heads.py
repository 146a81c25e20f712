"""The heads that the recipe compares: `ClassCenters`, its dense reference, the Z-loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.centers import ClassCenters, SphericalHead
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.margins import Margin
from fused_losses.train.frame.heads import make_margin
from fused_losses.train.glyphs.config import GlyphConfig


class ReferenceHead(nn.Module):
    """weight [C, D] with a dense gradient: materialised logits and torch.optim.SGD."""

    def __init__(
        self, classes: int, dim: int, margin: Margin | None, scale: float, **options: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, dim))
        self.optimizer = torch.optim.SGD([self.weight], **options)
        self.margin, self.scale = margin, scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # [B, D], [B] -> scalar
        self.optimizer.zero_grad(set_to_none=True)
        loss = margin_softmax(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            backend="reference",
        )
        assert isinstance(loss, Tensor)  # no stats were asked for
        return loss

    def settle(self) -> None:
        """Nothing waits."""

    def get_extra_state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


class ZHead(SphericalHead):
    """`SphericalHead` as the training asks for its table."""

    @property
    def weight(self) -> Tensor:
        """[C, D] as it is now, a copy."""
        return self.rows(torch.arange(self.num_classes, device=self.table.rows.device))

    def settle(self) -> None:
        """Nothing waits."""


GlyphHead = ClassCenters | ReferenceHead | ZHead


def imprint(head: GlyphHead, rows: Tensor) -> None:
    """The table's first rows. [C, D]"""
    if isinstance(head, ZHead):
        head.fill_(rows)
    else:
        head.weight.copy_(rows)


def make_head(config: GlyphConfig, classes: int) -> GlyphHead:
    """The configured head, whose first rows the training sets."""
    if config.head == "spherical":
        return ZHead(
            classes,
            config.embedding,
            lr=config.head_lr,
            weight_decay=config.head_weight_decay,
            a=config.z_a,
            b=config.z_b,
            seed=config.seed,
            device=config.device,
        )
    margin = make_margin(config.margin, config.margin_size())
    options = {
        "lr": config.head_lr,
        "momentum": config.head_momentum,
        "weight_decay": config.head_weight_decay,
    }
    head: GlyphHead
    if config.head == "reference":
        head = ReferenceHead(classes, config.embedding, margin, config.scale, **options)
    else:
        head = ClassCenters(
            classes,
            config.embedding,
            margin=margin,
            scale=config.scale,
            sample_rate=config.sample_rate,
            log_q=config.log_q,
            optimizer="sgd",
            optimizer_options=options,
            seed=config.seed,
            # None and not "auto": `use_backend` and FUSED_LOSSES_BACKEND keep their say
            backend=None if config.backend == "auto" else config.backend,
            device=config.device,
        )
    return head.to(config.device)
