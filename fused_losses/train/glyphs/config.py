"""What a glyph run is: every value that its numbers depend on, in one frozen record."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from fused_losses.train.frame.options import (
    BACKENDS,
    MARGINS,
    SCHEDULES,
    Config,
    check_choices,
    check_least,
    check_warmup,
    option,
)

HEADS = ("centers", "reference")


@dataclass(frozen=True)
class GlyphConfig(Config):
    """One run. Field `a_b` is option `--a-b` of the command line, with the same default."""

    # how often state is written changes no loss
    MAY_DIFFER = frozenset({"checkpoint_every"})

    data: str = option("glyphs", "the characters of the installed fonts", ("glyphs",))
    fonts: str = option("", "folders of fonts, separated as in PATH; default: the installed ones")
    characters: str = option("", "hexadecimal ranges, such as 21-17f,4e00-9fff; default: all")
    size: int = option(32, "side of the pictures")
    least_fonts: int = option(3, "fonts that must draw a character")
    held_out: str = option(
        "", "part of the names of fonts to judge by, separated by commas; default: the widest"
    )
    classes: int = option(0, "only this many classes, drawn at random; 0: all")
    embedding: int = option(128, "embedding size D")
    head: str = option("centers", "ClassCenters, or the dense table of the reference", HEADS)
    sample_rate: float = option(1.0, "chance of another class to take part in a step")
    log_q: bool = option(False, "make the sums over sampled classes unbiased")
    margin: str = option("cosface", "margin on the target class", MARGINS)
    margin_value: float | None = option(0.2, "the margin's size")
    scale: float = option(32.0, "scale s of the cosines")
    backend: str = option("auto", "backend of the head's products", BACKENDS)
    steps: int = option(1800, "steps of the training")
    subset: int = option(3000, "classes of the comparison with the reference head; 0: none")
    subset_steps: int = option(250, "steps of each head of that comparison")
    queries: int = option(10_000, "classes judged at the most; 0: all that the held-out fonts draw")
    batch_size: int = option(256, "pictures per step")
    lr: float = option(4e-3, "peak learning rate of the network (AdamW)")
    weight_decay: float = option(0.05, "of the network")
    head_lr: float = option(0.5, "peak learning rate of the class centres (SGD)")
    head_momentum: float = option(0.9, "momentum of the class centres")
    head_weight_decay: float = option(0.0, "of the class centres")
    schedule: str = option("cosine", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(0.05, "share of the steps with a linearly rising learning rate")
    device: str = option("cpu", "torch device")
    threads: int = option(0, "CPU threads; 0: torch's own choice, then kept by --resume")
    seed: int = option(0, "seeds weights, data order, samples and changes of the pictures")
    checkpoint_every: int = option(
        0, "steps between checkpoints; 0: once in 60 s and when interrupted"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(
            self, size=8, least_fonts=1, classes=0, embedding=1, steps=1, subset=0, queries=0
        )
        check_least(self, subset_steps=1, batch_size=2, threads=0, checkpoint_every=0)
        self.code_points()
        if self.classes == 1 or self.subset == 1:
            raise ValueError("classes, subset: expected 0 or at least 2, got 1")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate: expected a value in (0, 1], got {self.sample_rate}")
        check_warmup(self)
        if self.head == "reference" and (self.sample_rate < 1 or self.log_q):
            raise ValueError("head: the reference takes every class; expected sample_rate 1")

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
                raise ValueError(f"characters: expected ranges such as 21-17f, got {part!r}")
            points += found
        return points or None

    def subset_of(self, head: str) -> GlyphConfig:
        """The same training on few classes, by the full `head`."""
        return self.with_changes(
            head=head, classes=self.subset, steps=self.subset_steps, sample_rate=1.0, log_q=False
        )
