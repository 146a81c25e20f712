"""Shapes and memory at which a GPU runs forms of the kernels that small calls never reach."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class LittleRoom(NamedTuple):
    """Memory that a module lets a sweep's partial results, or a chunk of stored scores, take."""

    module: str  # within `fused_losses`
    name: str  # of its number of bytes
    size: int


class KernelForm(NamedTuple):
    """An example at which a kernel is launched, and what it takes."""

    kernel: str
    example: str  # of `base.examples.TABLE`
    dtype: torch.dtype
    shape: tuple[int, int, int]
    room: LittleRoom | None = None
    launches: int = 1  # at least
    backend: str = "triton"


HALF, FULL = torch.bfloat16, torch.float32
STORED = LittleRoom("backends.gpu.device", "STORED_BYTES", 8 << 20)


def forms(processors: int) -> tuple[KernelForm, ...]:
    """Those of a GPU with so many processors."""
    # owners of class tiles run where there is one of 64 classes a processor; the last one is ragged
    owned = 64 * processors + 37
    return (
        KernelForm("owner_rows", "linear_cross_entropy", HALF, (130, owned, 128)),
        KernelForm("owner_classes", "linear_cross_entropy", FULL, (130, owned, 128)),  # by bf16
        KernelForm("owner_classes", "margin_softmax", HALF, (130, owned, 256)),  # wide rows
        KernelForm("forward_resident", "margin_softmax", HALF, (256, 1024, 512)),
        # scores that are stored a chunk of classes, and of rows, at a time
        KernelForm("gradient_tiles", "linear_cross_entropy", FULL, (520, 20_003, 72), STORED, 3),
        KernelForm(
            "row_gradient", "linear_cross_entropy", FULL, (520, 20_003, 72), STORED, 2, "cuda"
        ),
        KernelForm("gradient_tiles", "margin_softmax", FULL, (4229, 611, 72), STORED, 2),
        KernelForm("gradient_tiles", "info_nce, symmetric", FULL, (4229, 4301, 72), STORED, 2),
        # keys of long lists
        KernelForm("key_tiles", "topk, many", FULL, (37, 8301, 72), None, 2),
        # partial results of several segments, merged
        KernelForm(
            "merge_tiles", "margin_softmax", FULL, (130, 999, 72), _room("row_statistics"), 3
        ),
        KernelForm("merge_tiles", "info_nce, symmetric", FULL, (130, 999, 72), _room("pairs"), 3),
        KernelForm("merge_classes", "SFace", FULL, (130, 999, 72), _room("class_rules"), 3),
    )


def _room(primitive: str) -> LittleRoom:
    """As little as one tile's partial results at a time."""
    return LittleRoom(f"primitives.{primitive}.triton", "PARTIAL_BYTES", 1)


@contextmanager
def within(room: LittleRoom | None) -> Iterator[None]:
    """A sweep takes no more memory than this, so that few rows and columns make several runs."""
    if room is None:
        yield
        return
    held = vars(importlib.import_module(f"fused_losses.{room.module}"))
    before = held[room.name]
    held[room.name] = room.size
    try:
        yield
    finally:
        held[room.name] = before
