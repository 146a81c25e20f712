"""Where a table lives: on a device, or in a file that is mapped and streams by tile."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fused_losses.base.rounding import rounding_key

INITIAL_STD = 0.01  # insightface's: short rows turn fast at first
TABLE = 0x7AB1E  # apart from what else draws by (seed, step)
BLOCK_ROWS = 4096  # that share a generator
PINNED = "pinned"


class Storage:
    """Makes the tensors of one shard: zeros on a device, "pinned", or mapped files of a folder.

    A mapped file is working memory, as a tensor is: it is made anew by every process, and only a
    checkpoint outlives one.
    """

    def __init__(
        self,
        folder: str | Path | None,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if folder is not None and device.type != "cpu":
            raise ValueError(f"storage: expected device='cpu' beside it, got {device}")
        self.pinned = folder == PINNED
        if self.pinned and not torch.accelerator.is_available():
            raise ValueError("storage: pinned memory is for a GPU to read, and there is none")
        self.folder = None if folder is None or self.pinned else Path(folder)
        self.device = device
        self._suffix = f"{rank}-of-{world}.bin"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.zeros(shape, dtype=dtype, device=self.device, pin_memory=self.pinned)
        count = prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        path = self.folder / f"{name}-{self._suffix}"
        path.unlink(missing_ok=True)  # who still maps the old file keeps it
        with open(path, "wb") as file:
            file.truncate(count * dtype.itemsize)  # a hole: zeros that take no room until written
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype, device="cpu").view(
            shape
        )


@torch.no_grad()
def initialise_(weight: Tensor, first: int, *, seed: int, std: float = INITIAL_STD) -> None:
    """Normal rows that depend on (seed, global row) alone, whatever the shards. [c, ...]"""
    rows, done = weight.shape[0], 0
    while done < rows:
        block, offset = divmod(first + done, BLOCK_ROWS)
        take = min(BLOCK_ROWS - offset, rows - done)
        generator = torch.Generator("cpu").manual_seed(_key(seed, block))
        drawn = torch.randn(
            (BLOCK_ROWS, *weight.shape[1:]), generator=generator, device=generator.device
        ).mul_(std)
        weight[done : done + take] = drawn[offset : offset + take].to(weight)
        done += take


def _key(seed: int, block: int) -> int:
    """Of a block's rows. Scrambled: `torch.manual_seed(seed); torch.randn` must not draw the table,
    of which random embeddings would otherwise be copies.
    """
    return rounding_key(TABLE, seed, block) >> 1
