"""One fold: train on its people, write a checkpoint every step, embed the people it never saw."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_losses.train.faces.augment import augment, normalize
from fused_losses.train.faces.backbone import build, embed, embedding_size
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.data import Pictures, batch_indices, seed_from
from fused_losses.train.faces.evaluation import FoldEmbeddings, Scores, pair_scores
from fused_losses.train.faces.head import MarginHead
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.memory import PeakMemory

# Pictures whose pairs give a threshold when one fold runs alone: 10^6 pairs are plenty.
MOST_TRAINING_PICTURES = 1500


class Interrupted(Exception):
    """The run was asked to stop by a signal; its checkpoint is written."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}; resume goes on from here")
        self.signal = signal


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The share of the peak rate at `step`: a linear rise, then the schedule down to 0."""
    rise = round(config.warmup * config.steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, config.steps - rise)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


class FoldTraining:
    """Everything that a step changes, and what a checkpoint must hold."""

    def __init__(
        self, config: TrainConfig, people: Pictures, *, fold: int, variant: str = "trained"
    ) -> None:
        self.config, self.people, self.fold, self.variant = config, people, fold, variant
        self.device = torch.device(config.device)
        # equal for both variants and the untrained one: they differ in the head's backend alone
        seed = seed_from("weights", config.seed, fold)
        torch.manual_seed(seed)
        random.seed(seed)
        self.backbone = build(config).to(self.device)
        dim = embedding_size(self.backbone, config)
        self.head = MarginHead(len(people.names), dim, config).to(self.device)
        self.optimizers = self._optimizers()
        self.peaks = [
            (group, group["lr"])
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        self.losses: list[float] = []
        self.step_ms: list[float] = []
        self.peak_mib = 0.0
        self.memory_by = ""

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

    @property
    def done(self) -> int:
        return len(self.losses)

    def step(self) -> float:
        """One batch: the loss before the update."""
        start = time.perf_counter()
        config, step = self.config, self.done
        self.backbone.train()
        self.head.train()
        factor = learning_rate_factor(step, config)
        for group, peak in self.peaks:
            group["lr"] = peak * factor
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
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {step + 1}: lower lr or head_lr")
        self.losses.append(value)
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        return value

    def state(self) -> dict[str, Any]:
        return {
            "fold": self.fold,
            "variant": self.variant,
            "backbone": self.backbone.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": checkpoint.random_state(),
            # as tensors: a long curve must not slow the write of every step
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "step_ms": torch.tensor(self.step_ms, dtype=torch.float64),
            "peak_mib": self.peak_mib,
            "memory_by": self.memory_by,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.backbone.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
            for parameter, kept in optimizer.state.items():
                # the layout too: another order of elements may round otherwise
                for key, value in kept.items():
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        kept[key] = torch.empty_like(parameter).copy_(value)
        # load_state_dict replaces the groups; the peak rates belong to the configuration
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.peaks = [(group, peak) for group, (_, peak) in zip(groups, self.peaks, strict=True)]
        self.losses = state["losses"].tolist()
        self.step_ms = state["step_ms"].tolist()
        self.peak_mib = state["peak_mib"]
        self.memory_by = state["memory_by"]
        checkpoint.set_random_state(state["random"])

    def run(
        self,
        path: Path,
        *,
        stop: Callable[[], int | None] = lambda: None,
        after_step: Callable[[float], None] = lambda loss: None,
        memory: PeakMemory,
    ) -> None:
        """The steps that are left, each followed by a checkpoint at `path` when one is due."""
        schedule = checkpoint.Schedule(self.config.checkpoint_every)
        size = 0
        before = self.peak_mib
        self.memory_by = memory.method
        while self.done < self.config.steps:
            loss = self.step()
            self.peak_mib = max(before, memory.mib())
            after_step(loss)
            size = size or checkpoint.state_bytes(self.state())
            asked = stop()
            if asked or schedule.due(self.done, size):
                checkpoint.save(path, self.state())
                schedule.written()
            if asked:
                raise Interrupted(asked)

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


def fold_embeddings(result: dict[str, Any]) -> FoldEmbeddings:
    """The part of a finished fold that is judged."""
    training = result["training"] and Scores(*result["training"])
    return FoldEmbeddings(result["embeddings"], result["labels"], training)


def warm_up(config: TrainConfig, people: Pictures) -> None:
    """One thrown-away step: what libraries allocate once must not count for whoever is first."""
    few = FoldTraining(config.with_changes(classes=0), people, fold=0)
    few.step()
