"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin); no pickle is run.

Such a file is a pickle of (encoded pictures, same): two pictures a pair, and whether they show one
person.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_losses import metrics
from fused_losses.base.files import DataError
from fused_losses.base.unit_norm import unit
from fused_losses.datasets.base import check_indices
from fused_losses.datasets.decoding import check_channels, check_size, decode_picture
from fused_losses.datasets.files import MAX_ENCODED, StoredFile
from fused_losses.datasets.pickles.arrays import Array, describe
from fused_losses.datasets.pickles.values import read_pickled
from fused_losses.metrics import VerificationAccuracy

MAX_BIN = 1 << 29  # bytes of a file, which is read whole


@dataclass(frozen=True)
class BinSet:
    """Pairs of encoded pictures: pair p is pictures 2 p and 2 p + 1."""

    path: Path
    images: list[bytes]  # 2 pairs of them
    same: Tensor  # [pairs] bool

    def __len__(self) -> int:
        """Pairs."""
        return len(self.same)

    def read(
        self, indices: Sequence[int], size: int | tuple[int, int], channels: int = 3
    ) -> Tensor:
        """Pictures of indices in [0, 2 pairs). [B, channels, height, width] uint8"""
        size, channels = check_size(size), check_channels(channels)
        places = check_indices(indices, len(self.images))
        pictures = torch.empty(len(places), channels, *size, dtype=torch.uint8)
        for row, i in zip(pictures, places, strict=True):
            row.copy_(decode_picture(self.images[i], size, channels, f"{self.path}: picture {i}"))
        return pictures


@dataclass(frozen=True)
class BinResult:
    """How well an embedding tells the pairs of a set apart."""

    accuracy: VerificationAccuracy  # over the folds
    tar: dict[float, float]  # FAR -> TAR, over all pairs
    scores: Tensor  # [pairs] float64, cosines


def _picture(path: Path, value: object, number: int) -> bytes:
    if isinstance(value, Array) and value.kind == "u1" and value.flat():
        value = value.data
    if not isinstance(value, bytes) or not 1 <= len(value) <= MAX_ENCODED:
        raise DataError(
            f"{path}: picture {number}: expected 1 to {MAX_ENCODED} bytes or uint8 values, got "
            f"{describe(value)}"
        )
    return value


def _flags(path: Path, value: object) -> Tensor:
    if isinstance(value, Array) and value.flat():
        value = value.values()
    if not isinstance(value, list | tuple):
        raise DataError(f"{path}: expected a list of same or not, got {describe(value)}")
    for number, flag in enumerate(value):
        if type(flag) not in (bool, int) or flag not in (0, 1):
            raise DataError(f"{path}: pair {number}: expected True or False, got {describe(flag)}")
    return torch.tensor([bool(flag) for flag in value], dtype=torch.bool)


def read_bin(path: str | Path) -> BinSet:
    """The pairs of a .bin set, pickled by Python 2 or 3, as byte strings or uint8 arrays.

    A picture's array may be [n], [n, 1] or [1, n]; the flags are booleans, or integers 0 and 1, in
    a list or an array. Raises DataError that names the file and the offset, picture or pair for
    anything else in it, and for more than MAX_BIN bytes. Time and memory O(the file's size).
    """
    path = Path(path)
    file = StoredFile(path)
    value = read_pickled(file.whole("the pickle", MAX_BIN), str(path))
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise DataError(f"{path}: expected (pictures, same), got {describe(value)}")
    pictures, same = value[0], _flags(path, value[1])
    if not isinstance(pictures, list | tuple) or len(pictures) != 2 * len(same):
        raise DataError(
            f"{path}: expected a list of {2 * len(same)} pictures, two for each of {len(same)} "
            f"pairs, got {describe(pictures)}"
        )
    return BinSet(path, [_picture(path, p, i) for i, p in enumerate(pictures)], same)


@torch.no_grad()
def evaluate_bin(
    embed: Callable[[Tensor], Tensor],  # [B, channels, height, width] uint8 -> [B, D]
    pairs: BinSet | str | Path,
    *,
    size: int | tuple[int, int],
    channels: int = 3,
    batch: int = 256,
    mirror: bool = True,
    folds: int = 10,
    far: Sequence[float] = (1e-1, 1e-2, 1e-3),
) -> BinResult:
    """Verification accuracy over `folds` and TAR at each FAR of an embedding on a .bin set.

    The score of a pair is the cosine of its embeddings. mirror: a picture's embedding is the sum
    over it and its mirror image. Accuracy as `metrics.verification_accuracy`: InsightFace's ten
    folds of consecutive pairs, with the exact best threshold in place of a grid. Time O(pairs)
    calls of `embed`; memory O(pairs D) and a batch.
    """
    pairs = pairs if isinstance(pairs, BinSet) else read_bin(pairs)
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    rows = []
    for start in range(0, len(pairs.images), batch):
        stop = min(start + batch, len(pairs.images))
        pictures = pairs.read(range(start, stop), size, channels)
        found = embed(pictures).double()
        if mirror:
            found = found + embed(pictures.flip(3)).double()
        if found.dim() != 2 or len(found) != len(pictures):
            raise ValueError(
                f"embed: expected [{len(pictures)}, D] for {len(pictures)} pictures, got shape "
                f"{tuple(found.shape)}"
            )
        rows.append(unit(found).cpu())
    if not rows:
        raise DataError(f"{pairs.path}: expected pairs, got none")
    x = torch.cat(rows)
    scores = (x[0::2] * x[1::2]).sum(dim=1)
    return BinResult(
        metrics.verification_accuracy(scores, pairs.same, folds),
        metrics.tar_at_far(scores, pairs.same, list(far)),
        scores,
    )
