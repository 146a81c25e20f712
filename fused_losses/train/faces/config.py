"""What a training run is: every value that its numbers depend on, in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_losses.train.frame.heads import check_margin
from fused_losses.train.frame.options import (
    AUGMENTATIONS,
    BACKENDS,
    MARGINS,
    MOST,
    MOST_THREADS,
    PRECISIONS,
    SCHEDULES,
    Config,
    OptionError,
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

    # how often state is written, and how a run is told and judged against others, changes no loss
    MAY_DIFFER = frozenset({"checkpoint_every", "compare", "tensorboard"})
    MAY_GROW = frozenset({"steps", "folds"})

    data: str = option("orl", "orl, or a folder that holds one folder of pictures per person")
    image_size: str = option("auto", "HEIGHTxWIDTH; auto: 56x46 for orl, 64x64 for a folder")
    folds: int = option(SPLITS, f"folds of people to run, 1 to {SPLITS}", least=1, most=SPLITS)
    backbone: str = option("small", "small, or package.module:factory (torchvision, timm style)")
    backbone_args: str = option("{}", "JSON object of keyword arguments for the factory")
    channels: int = option(0, "1 grey, 3 colour; 0: 1 for small, 3 for a factory", (0, 1, 3))
    embedding: int = option(128, "embedding size D", least=1)
    classes: int = option(
        0, "pad the class table to this many rows with distractor identities; 0: none", least=0
    )
    margin: str = option("arcface", "margin on the target class", MARGINS)
    margin_value: float | None = option(None, "the margin's size; default: its paper's")
    scale: float = option(30.0, "scale s of the cosines", above=0, most=MOST)
    backend: str = option("auto", "backend of the trained head", BACKENDS)
    precision: str = option("fp32", "precision of the head's products", PRECISIONS)
    memory_budget: int = option(
        0, "bytes of logits that the head may keep for its backward", least=0
    )
    compare: bool = option(True, "train a second time with the reference backend")
    steps: int = option(150, "steps per fold; --resume may add to them", least=1)
    batch_size: int = option(120, "pictures per step", least=2)
    optimizer: str = option("adamw", "optimiser of the backbone", OPTIMIZERS)
    lr: float = option(1e-3, "peak learning rate of the backbone", least=0, most=MOST)
    head_lr: float = option(0.1, "peak learning rate of the class table (SGD)", least=0, most=MOST)
    head_momentum: float = option(
        0.9, "momentum of the class table; 0 with --classes padding", least=0, most=1
    )
    weight_decay: float = option(
        0.05, "decoupled for adamw; the class table has none", least=0, most=MOST
    )
    momentum: float = option(0.9, "momentum of sgd", least=0, most=1)
    schedule: str = option("cosine", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(
        0.1, "share of the steps with a linearly rising learning rate", least=0, most=1
    )
    augment: str = option("full", "none, light (flip, shift), full", AUGMENTATIONS)
    amp: str = option("off", "autocast of the backbone", AMPS)
    device: str = option("cpu", "torch device")
    threads: int = option(
        0, "CPU threads; 0: torch's own choice, then kept by --resume", least=0, most=MOST_THREADS
    )
    seed: int = option(0, "seeds weights, folds, data order and augmentation", least=0)
    checkpoint_every: int = option(
        0,
        "steps between checkpoints; 0: every step while the state is under 64 MiB (a kill loses "
        "at most the step under way), else once in 60 s and when interrupted",
        least=0,
    )
    tensorboard: bool = option(False, "write scalars for TensorBoard, beside log.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.margin_value)
        self.size()
        self.factory_args()

    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the backbone sees."""
        if self.image_size == "auto":
            return (56, 46) if self.data == "orl" else (64, 64)
        parts = self.image_size.lower().split("x")
        if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise OptionError(
                "image_size", f"expected HEIGHTxWIDTH or auto, got {self.image_size!r}"
            )
        return int(parts[0]), int(parts[1])

    def picture_channels(self) -> int:
        return self.channels or (1 if self.backbone == "small" else 3)

    def code(self) -> dict[str, Any]:
        """The factory, unless it is this package's own, and its arguments."""
        if self.backbone == "small":
            return {}
        args = {"backbone_args": self.backbone_args} if self.factory_args() else {}
        return {"backbone": self.backbone, **args}

    def factory_args(self) -> dict[str, Any]:
        """`backbone_args` as a dictionary."""
        return json_object("backbone_args", self.backbone_args)
