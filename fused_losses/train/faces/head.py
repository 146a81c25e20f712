"""The class table of the trainer, as a module around `fused_losses.functional.margin_softmax`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.frame.heads import make_margin


class MarginHead(nn.Module):
    """weight [C, D]: one row per training person, then distractors that no picture belongs to."""

    def __init__(self, people: int, dim: int, config: TrainConfig) -> None:
        super().__init__()
        rows = max(people, config.classes)
        self.weight = nn.Parameter(F.normalize(torch.randn(rows, dim)))
        self.margin = make_margin(config.margin, config.margin_value)
        self.scale = config.scale
        self.options: dict[str, Any] = {
            "precision": config.precision,
            "memory_budget": config.memory_budget,
        }
        # None and not "auto": `use_backend` and FUSED_LOSSES_BACKEND keep their say
        self.backend = None if config.backend == "auto" else config.backend
        self.padded = rows > people

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # [B, D], [B] -> scalar
        loss = margin_softmax(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            backend=self.backend,
            **self.options,
        )
        assert isinstance(loss, Tensor)  # no stats were asked for
        return loss
