"""What a training run is: every value that its numbers depend on, in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_losses.train.frame.options import (
    AUGMENTATIONS,
    BACKENDS,
    MARGINS,
    PRECISIONS,
    SCHEDULES,
    Config,
    check_choices,
    check_least,
    check_warmup,
    json_object,
    option,
)

# People are always split into this many folds; `folds` says how many of them are run.
SPLITS = 4
OPTIMIZERS = ("adamw", "sgd")
AMPS = ("off", "bf16")


@dataclass(frozen=True)
class TrainConfig(Config):
    """One run. Field `a_b` is option `--a-b` of the command line, with the same default."""

    # how often state is written, and how a run is judged against others, changes no loss
    MAY_DIFFER = frozenset({"checkpoint_every", "compare"})

    data: str = option("orl", "orl, or a folder that holds one folder of pictures per person")
    image_size: str = option("auto", "HEIGHTxWIDTH; auto: 56x46 for orl, 64x64 for a folder")
    folds: int = option(SPLITS, f"folds of people to run, 1 to {SPLITS}")
    backbone: str = option("small", "small, or package.module:factory (torchvision, timm style)")
    backbone_args: str = option("{}", "JSON object of keyword arguments for the factory")
    channels: int = option(0, "1 grey, 3 colour; 0: 1 for small, 3 for a factory")
    embedding: int = option(128, "embedding size D")
    classes: int = option(0, "pad the class table to this many rows with distractor identities")
    margin: str = option("arcface", "margin on the target class", MARGINS)
    margin_value: float | None = option(None, "the margin's size; default: its paper's")
    scale: float = option(30.0, "scale s of the cosines")
    backend: str = option("auto", "backend of the trained head", BACKENDS)
    precision: str = option("fp32", "precision of the head's products", PRECISIONS)
    memory_budget: int = option(0, "bytes of logits that the head may keep for its backward")
    compare: bool = option(True, "train a second time with the reference backend")
    steps: int = option(150, "steps per fold")
    batch_size: int = option(120, "pictures per step")
    optimizer: str = option("adamw", "optimiser of the backbone", OPTIMIZERS)
    lr: float = option(1e-3, "peak learning rate of the backbone")
    head_lr: float = option(0.1, "peak learning rate of the class table (SGD)")
    head_momentum: float = option(0.9, "momentum of the class table; 0 with --classes padding")
    weight_decay: float = option(0.05, "decoupled for adamw; the class table has none")
    momentum: float = option(0.9, "momentum of sgd")
    schedule: str = option("cosine", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(0.1, "share of the steps with a linearly rising learning rate")
    augment: str = option("full", "none, light (flip, shift), full", AUGMENTATIONS)
    amp: str = option("off", "autocast of the backbone", AMPS)
    device: str = option("cpu", "torch device")
    threads: int = option(0, "CPU threads; 0: torch's own choice, then kept by --resume")
    seed: int = option(0, "seeds weights, folds, data order and augmentation")
    checkpoint_every: int = option(
        0,
        "steps between checkpoints; 0: every step while the state is under 64 MiB (a kill loses "
        "at most the step under way), else once in 60 s and when interrupted",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, steps=1, batch_size=2, embedding=1, classes=0)
        check_least(self, memory_budget=0, threads=0, checkpoint_every=0)
        if not 1 <= self.folds <= SPLITS:
            raise ValueError(f"folds: expected 1 to {SPLITS}, got {self.folds}")
        check_warmup(self)
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels: expected 0, 1 or 3, got {self.channels}")
        if self.margin == "none" and self.margin_value is not None:
            raise ValueError("margin_value: margin 'none' takes no value")
        self.size()
        self.factory_args()

    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the backbone sees."""
        if self.image_size == "auto":
            return (56, 46) if self.data == "orl" else (64, 64)
        parts = self.image_size.lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise ValueError(f"image_size: expected HEIGHTxWIDTH or auto, got {self.image_size!r}")
        return int(parts[0]), int(parts[1])

    def picture_channels(self) -> int:
        return self.channels or (1 if self.backbone == "small" else 3)

    def factory_args(self) -> dict[str, Any]:
        """`backbone_args` as a dictionary."""
        return json_object("backbone_args", self.backbone_args)
