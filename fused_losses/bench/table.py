"""The table of cases: `fused-losses bench`, benchmarks/ and the tests draw on it at their sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fused_losses.bench.heads import cases as head_cases
from fused_losses.bench.heads import class_rules
from fused_losses.bench.micro import (
    batch_cases,
    cases,
    distance_cases,
    distillation_cases,
    pair_cases,
    text_cases,
)
from fused_losses.bench.micro.cases import Case

Shape = tuple[int, ...]


class CaseSizes(NamedTuple):
    """Sizes that cases share; an option of `fused-losses bench` gives others."""

    letters: str
    what: str
    usual: list[Shape]
    small: list[Shape]  # of benchmarks/


SIZES = {
    "shape": CaseSizes(
        "B,C,D",
        "batch, classes, width",
        [(256, 100_000, 512), (128, 1_000_000, 512)],
        [(256, 20_000, 512), (64, 50_000, 128)],
    ),
    "head": CaseSizes(
        "B,C,D",
        "batch, classes and width of the large-class head",
        [(256, 200_000, 512)],
        [(256, 20_000, 512)],
    ),
    "pairs": CaseSizes(
        "N,D", "batch and width of the losses over pairs", [(8192, 512)], [(2048, 256)]
    ),
    "tokens": CaseSizes(
        "Q,LQ,B,LD,D",
        "queries and documents with their tokens, and width, of maxsim",
        [(256, 32, 1024, 128, 128)],
        [(32, 32, 128, 128, 128)],
    ),
    "distances": CaseSizes(
        "N,D", "rows and width of the matrices of distances", [(4096, 128)], [(1024, 128)]
    ),
    "bank": CaseSizes(
        "N,M,D,K",
        "queries, bank, width and neighbours of topk",
        [(1024, 200_000, 256, 32)],
        [(256, 20_000, 256, 32)],
    ),
    "batch": CaseSizes(
        "N,D",
        "batch and width of mining and of the losses over triplets",
        [(8192, 128)],
        [(1024, 128)],
    ),
}


def every(rounds: int, _: Shape) -> int:
    """All rounds that are asked for."""
    return rounds


def half(rounds: int, _: Shape) -> int:
    """Of the slower cases."""
    return max(3, rounds // 2)


def quarter(rounds: int, _: Shape) -> int:
    """Of those whose eager step takes 20 s on two cores."""
    return max(1, rounds // 4)


@dataclass(frozen=True)
class Entry:
    """A case of the table. make(*shape, device=, rivals="all"|"eager"|"none", seed=)."""

    make: Callable[..., Case]
    sizes: str  # key of SIZES
    rounds: Callable[[int, Shape], int] = half
    own: Shape | None = None  # in the place of the usual sizes
    in_16_bits: bool = False  # takes a dtype

    def usual(self) -> list[Shape]:
        """The shapes that are measured where none is asked for."""
        return SIZES[self.sizes].usual if self.own is None else [self.own]

    def dtypes(self, device: str) -> tuple[torch.dtype, ...]:
        """The peers' kernels on a GPU take 16-bit rows only."""
        both = self.in_16_bits and device != "cpu"
        return (torch.float32, torch.bfloat16) if both else (torch.float32,)

    def case(self, shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Case:
        """The case at this shape, with all rivals."""
        how = {"dtype": dtype} if self.in_16_bits else {}
        return self.make(*shape, device=device, **how)


CASES = {
    "margin_softmax": Entry(
        cases.margin_softmax,
        "shape",
        lambda rounds, shape: (every if shape[0] * shape[1] <= 3e7 else half)(rounds, shape),
        in_16_bits=True,
    ),
    "distillation": Entry(distillation_cases.distillation, "shape", in_16_bits=True),
    "class_centers": Entry(head_cases.class_centers, "head"),
    "head_distillation": Entry(head_cases.head_distillation, "head"),
    "spherical_head": Entry(head_cases.spherical_head, "head"),
    **{
        name: Entry(make, "head", own=(256, 100_000, 512))
        for name, make in class_rules.CASES.items()
    },
    "info_nce": Entry(pair_cases.info_nce, "pairs", in_16_bits=True),
    "siglip": Entry(pair_cases.siglip, "pairs", in_16_bits=True),
    "supervised_contrastive": Entry(pair_cases.supervised_contrastive, "pairs"),
    "nt_xent": Entry(pair_cases.nt_xent, "pairs"),
    "uniformity": Entry(pair_cases.uniformity, "pairs"),
    "multi_similarity": Entry(pair_cases.multi_similarity, "pairs"),
    "circle": Entry(pair_cases.circle, "pairs"),
    "attention": Entry(pair_cases.attention, "pairs", in_16_bits=True),
    "multiple_negatives": Entry(text_cases.multiple_negatives, "pairs"),
    "guided_contrastive": Entry(text_cases.guided, "pairs"),
    "maxsim": Entry(text_cases.maxsim, "tokens", quarter),
    "maxsim_scores": Entry(text_cases.maxsim_scores, "tokens", quarter),
    **{name: Entry(make, "distances", every) for name, make in distance_cases.MATRICES.items()},
    "topk": Entry(batch_cases.topk, "bank"),
    "topk_principal": Entry(batch_cases.topk_principal, "bank"),
    "batch_hard_mining": Entry(batch_cases.batch_hard_mining, "batch"),
    "all_triplets": Entry(batch_cases.all_triplets, "batch", own=(4096, 128)),
    "contrastive": Entry(batch_cases.contrastive, "batch"),
    "batch_hard_triplet": Entry(batch_cases.batch_hard_triplet, "batch"),
}


# of each kind of work, the cases
SUITES: dict[str, tuple[str, ...]] = {
    "margin": ("margin_softmax", "distillation", *class_rules.CASES),
    "contrastive": (
        *(name for name, entry in CASES.items() if entry.sizes in ("pairs", "tokens")),
        "contrastive",
    ),
    "distance": tuple(distance_cases.MATRICES),
    "mining": (
        "topk",
        "topk_principal",
        "batch_hard_mining",
        "all_triplets",
        "batch_hard_triplet",
    ),
    "head": ("class_centers", "head_distillation", "spherical_head"),
}


def title(name: str, shape: Shape, dtype: torch.dtype = torch.float32) -> str:
    """The name of a case at a shape: of its files, of its rows."""
    letters = SIZES[CASES[name].sizes].letters.split(",")
    sizes = (f"{letter}{size}" for letter, size in zip(letters, shape, strict=True))
    bits = [] if dtype == torch.float32 else [cases.short(dtype)]
    return "_".join([name, *sizes, *bits])
