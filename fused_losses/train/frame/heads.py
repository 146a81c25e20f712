"""The class table of the trainer, as a module around `fused_losses.functional.margin_softmax`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_losses import margins
from fused_losses.losses.margin_softmax import margin_softmax
from fused_losses.train.faces.config import TrainConfig


def make_margin(name: str, value: float | None) -> margins.Margin | None:
    """The margin object of that name, with `value` in place of its paper's size."""
    if name == "none":
        return None
    if name == "magface":
        # its margin runs from l_margin to u_margin: `value` is where it starts
        shift = {} if value is None else {"l_margin": value, "u_margin": value + 0.35}
        # this trainer's embeddings have unit variance: a norm near sqrt(D), not the paper's 110
        return margins.MagFace(l_a=2.0, u_a=14.0, **shift)
    kind = {
        "arcface": margins.ArcFace,
        "cosface": margins.CosFace,
        "sphereface": margins.SphereFace,
        "adaface": margins.AdaFace,
        "elastic-arcface": margins.ElasticArcFace,
        "elastic-cosface": margins.ElasticCosFace,
        "curricularface": margins.CurricularFace,
        "mv-softmax": lambda *value: margins.MVSoftmax("am", *value or (0.35,)),
    }[name]
    if value is not None:
        return kind(value)
    # four times the angle does not start on 30 people; SphereFace2017's own code anneals to it
    return kind(1.5) if name == "sphereface" else kind()


class MarginHead(nn.Module):
    """weight [C, D]: one row per training person, then distractors that no picture belongs to."""

    def __init__(self, people: int, dim: int, config: TrainConfig) -> None:
        super().__init__()
        rows = max(people, config.classes)
        self.weight = nn.Parameter(F.normalize(torch.randn(rows, dim)))
        self.margin = make_margin(config.margin, config.margin_value)
        self.scale = config.scale
        self.options = {"precision": config.precision, "memory_budget": config.memory_budget}
        # None and not "auto": `use_backend` and FUSED_LOSSES_BACKEND keep their say
        self.backend = None if config.backend == "auto" else config.backend
        self.padded = rows > people

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # [B, D], [B] -> scalar
        return margin_softmax(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            backend=self.backend,
            **self.options,
        )
