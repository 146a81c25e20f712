"""What a glyph run is: every value that its numbers depend on, in one frozen record."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from fused_losses.centers.arguments import LEAST_RATE
from fused_losses.train.frame.heads import check_margin
from fused_losses.train.frame.options import (
    BACKENDS,
    MARGINS,
    MOST,
    MOST_THREADS,
    SCHEDULES,
    Config,
    OptionError,
    option,
)

HEADS = ("centers", "reference", "spherical")


@dataclass(frozen=True)
class GlyphConfig(Config):
    """One run. Field `a_b` is option `--a-b` of the command line, with the same default."""

    # how often state is written, and how a run is told, changes no loss
    MAY_DIFFER = frozenset({"checkpoint_every", "tensorboard"})
    MAY_GROW = frozenset({"steps", "subset_steps"})

    data: str = option("glyphs", "the characters of the installed fonts", ("glyphs",))
    fonts: str = option("", "folders of fonts, separated as in PATH; default: the installed ones")
    characters: str = option("", "hexadecimal ranges, such as 21-17f,4e00-9fff; default: all")
    size: int = option(32, "side of the pictures", least=8, most=256)
    least_fonts: int = option(3, "fonts that must draw a character", least=1, most=10**6)
    held_out: str = option(
        "", "part of the names of fonts to judge by, separated by commas; default: the widest"
    )
    classes: int = option(0, "only this many classes, drawn at random; 0: all", least=0)
    embedding: int = option(128, "embedding size D", least=1)
    head: str = option(
        "centers",
        "ClassCenters, the dense table of the reference, or SphericalHead's Z-loss",
        HEADS,
    )
    z_a: float = option(0.1, "a of the Z-loss", above=0)
    z_b: float = option(10.0, "b of the Z-loss", least=0)
    sample_rate: float = option(
        1.0, "chance of another class to take part in a step", least=LEAST_RATE, most=1
    )
    log_q: bool = option(False, "make the sums over sampled classes unbiased")
    margin: str = option("cosface", "margin on the target class", MARGINS)
    margin_value: float | None = option(
        None, "the margin's size; default: 0.2 of cosface, else its paper's"
    )
    scale: float = option(32.0, "scale s of the cosines", above=0, most=MOST)
    backend: str = option("auto", "backend of the head's products", BACKENDS)
    steps: int = option(1800, "steps of the training; --resume may add to them", least=1)
    subset: int = option(
        3000, "classes at the most of the comparison with the reference head; 0: none", least=0
    )
    subset_steps: int = option(250, "steps of each head of that comparison", least=1)
    queries: int = option(
        10_000, "classes judged at the most; 0: all that the held-out fonts draw", least=0
    )
    batch_size: int = option(256, "pictures per step", least=2)
    lr: float = option(4e-3, "peak learning rate of the network (AdamW)", least=0, most=MOST)
    weight_decay: float = option(0.05, "of the network", least=0, most=MOST)
    head_lr: float = option(
        0.5, "peak learning rate of the class centres (SGD)", least=0, most=MOST
    )
    head_momentum: float = option(0.9, "momentum of the class centres", least=0, most=1)
    head_weight_decay: float = option(0.0, "of the class centres", least=0, most=MOST)
    schedule: str = option("cosine", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(
        0.05, "share of the steps with a linearly rising learning rate", least=0, most=1
    )
    device: str = option("cpu", "torch device")
    threads: int = option(
        0, "CPU threads; 0: torch's own choice, then kept by --resume", least=0, most=MOST_THREADS
    )
    seed: int = option(0, "seeds weights, data order, samples and changes of the pictures", least=0)
    checkpoint_every: int = option(
        0, "steps between checkpoints; 0: once in 60 s and when interrupted", least=0
    )
    tensorboard: bool = option(False, "write scalars for TensorBoard, beside log.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.margin_value)
        self.code_points()
        for name in ("classes", "subset"):
            if getattr(self, name) == 1:
                raise OptionError(name, "expected 0 or at least 2, got 1")
        if self.head == "reference" and (self.sample_rate < 1 or self.log_q):
            raise OptionError("head", "the reference takes every class; expected sample_rate 1")
        if self.head == "spherical":
            self._check_spherical()

    def _check_spherical(self) -> None:
        """It has every class, plain SGD and no margin: nothing given may be without effect."""
        if self.sample_rate < 1 or self.log_q:
            raise OptionError("head", "spherical takes every class; expected sample_rate 1")
        if self.head_momentum:
            raise OptionError("head_momentum", f"expected 0 of spherical, got {self.head_momentum}")
        if self.margin != "none":
            raise OptionError("margin", f"expected none of spherical, got {self.margin}")

    def margin_size(self) -> float | None:
        """`margin_value`, with this recipe's own default."""
        return 0.2 if self.margin == "cosface" and self.margin_value is None else self.margin_value

    def folders(self) -> list[str] | None:
        return [folder for folder in self.fonts.split(os.pathsep) if folder] or None

    def code_points(self) -> list[int] | None:
        """What `characters` names; None for all."""
        points: list[int] = []
        for part in filter(None, self.characters.split(",")):
            try:
                first, _, last = part.partition("-")
                found = range(int(first, 16), int(last or first, 16) + 1)
            except ValueError:
                found = range(0)
            if not found or found[-1] > sys.maxunicode:
                raise OptionError("characters", f"expected ranges such as 21-17f, got {part!r}")
            points += found
        return points or None

    def subset_of(self, head: str) -> GlyphConfig:
        """The same training on few classes, by the full `head`."""
        return self.with_changes(
            head=head, classes=self.subset, steps=self.subset_steps, sample_rate=1.0, log_q=False
        )
