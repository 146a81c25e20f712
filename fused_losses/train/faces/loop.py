"""One fold: train on its people, write a checkpoint every step, embed the people it never saw."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.backbone import build, embed, embedding_size
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.data import Pictures, batch_indices
from fused_losses.train.faces.evaluation import FoldEmbeddings, PairScores, pair_scores
from fused_losses.train.faces.head import MarginHead
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.seeds import seed_from
from fused_losses.train.frame.steps import Training, numbers

# Pictures whose pairs give a threshold when one fold runs alone: 10^6 pairs are plenty.
MOST_TRAINING_PICTURES = 1500
RESULT_KEYS = frozenset(
    ("losses", "step_ms", "peak_mib", "memory_by", "embeddings", "labels", "training", "backbone")
)


class FoldTraining(Training[TrainConfig]):
    """The training of one fold with one head."""

    def __init__(
        self, config: TrainConfig, people: Pictures, *, fold: int, variant: str = "trained"
    ) -> None:
        super().__init__(config, fold=fold, variant=variant)
        self.people, self.fold = people, fold
        # equal for both variants and the untrained one: they differ in the head's backend alone
        seed = seed_from("weights", config.seed, fold)
        torch.manual_seed(seed)
        random.seed(seed)
        self.backbone = build(config).to(self.device)
        dim = embedding_size(self.backbone, config)
        self.head = MarginHead(len(people.names), dim, config).to(self.device)
        self.optimizers = self._optimizers()
        self.peaks = tuple(zip(self.optimizers, (config.lr, config.head_lr), strict=True))

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        decayed = [p for p in self.backbone.parameters() if p.dim() > 1]
        plain = [p for p in self.backbone.parameters() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "adamw":
            backbone = torch.optim.AdamW(groups, lr=config.lr)
        else:
            backbone = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        # a momentum buffer of 10^6 distractor rows would cost as much memory as the rows
        momentum = 0.0 if self.head.padded else config.head_momentum
        return [
            backbone,
            torch.optim.SGD(self.head.parameters(), lr=config.head_lr, momentum=momentum),
        ]

    def update(self, step: int) -> float:
        config = self.config
        self.backbone.train()
        self.head.train()
        rows = batch_indices(
            len(self.people), config.batch_size, step, seed=config.seed, fold=self.fold
        )
        generator = torch.Generator().manual_seed(
            seed_from("augment", config.seed, self.fold, step)
        )
        images = normalize(self.people.images[rows].to(self.device))
        images = augment(images, config.augment, generator)
        labels = self.people.labels[rows].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            embeddings = self.backbone(images)
        loss = self.head(embeddings.float(), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "backbone": self.backbone.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": checkpoint.random_state(),
            "memory_by": self.memory_by,
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.backbone.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            checkpoint.load_optimizer(optimizer, saved)
        self.memory_by = state["memory_by"]
        checkpoint.set_random_state(state["random"])

    def embeddings(self, held_out: Pictures) -> FoldEmbeddings:
        """The held-out people, and the training people's scores for a fold that runs alone."""
        found = FoldEmbeddings(embed(self.backbone, held_out.images), held_out.labels)
        if self.config.folds > 1:
            return found
        people = embed(self.backbone, self.people.images[:MOST_TRAINING_PICTURES])
        scores = pair_scores(people, self.people.labels[:MOST_TRAINING_PICTURES])
        return found._replace(training=scores.balanced(self.config.seed))

    def result(self, held_out: Pictures) -> dict[str, Any]:
        """What is kept of a finished fold."""
        found = self.embeddings(held_out)
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "step_ms": torch.tensor(self.step_ms, dtype=torch.float64),
            "peak_mib": self.peak_mib,
            "memory_by": self.memory_by,
            "embeddings": found.embeddings,
            "labels": found.labels,
            "training": found.training and list(found.training),
            "backbone": self.backbone.state_dict(),
        }


def check_result(result: dict[str, Any]) -> None:
    """TypeError or ValueError, by name, for what no finished fold has."""
    if len(numbers(result, "losses")) != len(numbers(result, "step_ms")):
        raise ValueError("step_ms: expected one a loss")
    rows, labels = result["embeddings"], result["labels"]
    if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
        raise TypeError("embeddings: expected floats [n, D]")
    if (
        not isinstance(labels, Tensor)
        or labels.shape != rows.shape[:1]
        or labels.dtype != torch.int64
    ):
        raise TypeError(f"labels: expected int64 [{len(rows)}], one a row of the embeddings")
    for kind, scores in zip(PairScores._fields, result["training"] or (), strict=False):
        numbers({kind: scores}, kind)
    fold_embeddings(result)


def fold_embeddings(result: dict[str, Any]) -> FoldEmbeddings:
    """The part of a finished fold that is judged."""
    training = result["training"] and PairScores(*result["training"])
    return FoldEmbeddings(result["embeddings"], result["labels"], training)


def warm_up(config: TrainConfig, people: Pictures) -> None:
    """One thrown-away step: what libraries allocate once must not count for whoever is first."""
    few = FoldTraining(config.with_changes(classes=0), people, fold=0)
    few.step()
