"""What a large-class run is: every value that its numbers depend on, in one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from fused_losses.centers.arguments import LEAST_RATE
from fused_losses.datasets.base import Corrupt
from fused_losses.datasets.sampler import MAX_PICTURES
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

SETS = ("synthetic", "folders", "recordio", "webdataset", "glyphs")
OPTIMIZERS = ("sgd", "adamw")
HEAD_OPTIMIZERS = ("sgd", "adamw", "adagrad")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda")
PARALLEL = ("ddp", "fsdp2")
NONFINITE = ("stop", "skip")
MOST_SECONDS = 1e8  # three years; the clocks of threads have no room for any number


@dataclass(frozen=True)
class LargeConfig(Config):
    """One run. Field `a_b` is option `--a-b` of the command line, with the same default."""

    # how state is kept and how a run is watched changes no loss
    MAY_DIFFER = frozenset(
        {
            "checkpoint_every", "keep", "readers", "interval", "timeout", "hang_timeout", "storage",
            "tensorboard", "nonfinite", "corrupt",
        }
    )  # fmt: skip
    MAY_GROW = frozenset({"steps"})

    data: str = option(
        "synthetic",
        "synthetic, folders:ROOT, recordio:PATH/train.rec, webdataset:PATTERN, glyphs or "
        "glyphs:FONT_FOLDER",
    )
    classes: int = option(
        1000, "classes of synthetic; elsewhere pads the table to this many rows", least=1
    )
    samples: int = option(8, "vectors of a class of synthetic", least=1)
    features: int = option(64, "size of a vector of synthetic", least=1)
    noise: float = option(
        0.5, "deviation of the vectors of synthetic from their class's mean", least=0, most=MOST
    )
    image_size: int = option(32, "height and width of the pictures", least=1)
    channels: int = option(1, "1 grey, 3 colour", (1, 3))
    augment: str = option("none", "none, light (flip, shift), full", AUGMENTATIONS)
    backbone: str = option(
        "auto",
        "mlp (vectors), small (pictures) or package.module:factory, called with num_classes=D; "
        "auto: mlp for synthetic, else small",
    )
    backbone_args: str = option("{}", "JSON object of keyword arguments for the factory")
    hidden: int = option(128, "hidden units of mlp", least=1)
    embedding: int = option(128, "embedding size D", least=1)
    margin: str = option("arcface", "margin on the target class", MARGINS)
    margin_value: float | None = option(None, "the margin's size; default: its paper's")
    scale: float = option(64.0, "scale s of the cosines", above=0, most=MOST)
    sample_rate: float = option(
        1.0, "chance of another class to take part in a step", least=LEAST_RATE, most=1
    )
    log_q: bool = option(False, "make the sums over sampled classes unbiased")
    sub_centers: int = option(1, "centres of a class", least=1)
    head_optimizer: str = option("sgd", "optimiser of the table", HEAD_OPTIMIZERS)
    head_lr: float = option(0.1, "peak learning rate of the table", least=0, most=MOST)
    head_momentum: float = option(0.9, "momentum of the table's sgd", least=0, most=1)
    head_weight_decay: float = option(0.0, "weight decay of the table", least=0, most=MOST)
    dtype: str = option("float32", "of the table; float64 makes the whole run float64", DTYPES)
    storage: str = option("", "folder for a memory-mapped table; empty: in memory")
    backend: str = option("auto", "backend of the head", BACKENDS)
    precision: str = option("fp32", "precision of the head's products", PRECISIONS)
    steps: int = option(200, "steps; a finished run goes on to more", least=1)
    batch_size: int = option(256, "pictures per step, of all ranks together", least=1)
    optimizer: str = option("sgd", "optimiser of the backbone", OPTIMIZERS)
    lr: float = option(0.1, "peak learning rate of the backbone", least=0, most=MOST)
    momentum: float = option(0.9, "momentum of the backbone's sgd", least=0, most=1)
    weight_decay: float = option(5e-4, "weight decay of the backbone", least=0, most=MOST)
    schedule: str = option("cosine", "learning rates after the warm-up", SCHEDULES)
    warmup: float = option(
        0.1, "share of the steps with linearly rising learning rates", least=0, most=1
    )
    corrupt: str = option(
        "raise",
        "at a picture that cannot be read: raise ends the run, skip takes the next one in its "
        "place and names it",
        get_args(Corrupt),
    )
    nonfinite: str = option(
        "stop",
        "a step whose loss or gradient is NaN or infinite: end the run, or skip it",
        NONFINITE,
    )
    parallel: str = option("ddp", "how the backbone is spread over ranks", PARALLEL)
    device: str = option("cpu", "cuda: each rank takes the GPU of its local rank", DEVICES)
    threads: int = option(
        1, "CPU threads of a rank; more may order sums in another way", least=1, most=MOST_THREADS
    )
    seed: int = option(0, "seeds weights, data order, samples and augmentation", least=0)
    readers: int = option(
        2, "threads of a rank that read pictures ahead", least=1, most=MOST_THREADS
    )
    checkpoint_every: int = option(50, "steps between checkpoints", least=1)
    keep: int = option(2, "checkpoints that stay", least=1)
    interval: float = option(1.0, "seconds between a rank's heartbeats", least=1e-3)
    timeout: float = option(
        30.0, "seconds without a heartbeat after which a rank is dead", above=0, most=MOST_SECONDS
    )
    tensorboard: bool = option(False, "write scalars for TensorBoard, beside log.jsonl")
    hang_timeout: float = option(
        600.0, "seconds without progress after which a rank hangs", above=0, most=MOST_SECONDS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.margin_value)
        if not self.interval < self.timeout / 2:
            raise OptionError(
                "interval",
                f"expected less than half of --timeout {self.timeout}, got {self.interval}",
            )
        if not self.hang_timeout > self.interval:
            raise OptionError(
                "hang_timeout",
                f"expected more than --interval {self.interval}, got {self.hang_timeout}",
            )
        kind, colon, place = self.data.partition(":")
        fits = not colon if kind == "synthetic" else place or (kind == "glyphs" and not colon)
        if kind not in SETS or not fits:
            raise OptionError(
                "data",
                f"expected synthetic, glyphs, or one of {', '.join(SETS[1:])} and where it lies "
                f"after a colon, got {self.data!r}",
            )
        if kind == "synthetic" and self.classes * self.samples > MAX_PICTURES:
            raise OptionError(
                "samples" if self.samples > self.classes else "classes",
                f"expected at most 2^48 vectors, {self.classes} classes of {self.samples} are more",
            )
        self.factory_args()

    def factory_args(self) -> dict[str, Any]:
        """`backbone_args` as a dictionary."""
        return json_object("backbone_args", self.backbone_args)

    def head_options(self) -> dict[str, float]:
        """Hyper-parameters of the table's optimiser."""
        options = {"lr": self.head_lr, "weight_decay": self.head_weight_decay}
        return options | ({"momentum": self.head_momentum} if self.head_optimizer == "sgd" else {})
