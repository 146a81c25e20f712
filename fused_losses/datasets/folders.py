"""Pictures in folders: root/class/picture.jpg."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.datasets.base import Corrupt, EncodedImages
from fused_losses.datasets.decoding import SUFFIXES
from fused_losses.datasets.files import StoredFile
from fused_losses.datasets.side_files import (
    Cache,
    Index,
    remembered,
    rising,
    side_path,
    within,
)


class ImageFolders(EncodedImages):
    """Every folder directly under `root` that holds pictures is a class, in the order of names.

    size: an integer or (height, width); channels 1 or 3. Pictures are the files directly in a
    class's folder with one of SUFFIXES, in the order of names; nothing hidden (a leading dot)
    counts. transform: what `set[index]` does to a picture. corrupt: "skip" puts the next
    picture in the place of one that can't be read (`skipped`). cache: where the list of them is
    kept (True: beside the root); it counts while no folder's time has changed. Raises DataError
    without any picture, and in `read` for one that can't be read. Time O(files) once, then
    O(folders); memory some 100 bytes a file: beyond ten million take records or shards.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int | tuple[int, int],
        channels: int = 3,
        transform: Callable[[Tensor], Any] | None = None,
        corrupt: Corrupt = "raise",
        cache: Cache = None,
    ) -> None:
        self.root = Path(root)
        folders = _class_folders(self.root)
        index, files = remembered(
            side_path(cache, self.root),
            folders,
            lambda: _list_pictures(self.root, folders),
            lambda index, files: _fits(index, files, len(folders)),
        )
        self.files: list[str] = files  # names inside the class's folder
        if not files:
            raise DataError(
                f"{self.root}: expected folders with pictures ({', '.join(SUFFIXES)}), got none"
            )
        names = [folders[int(i)][0] for i in index["folders"]]
        super().__init__(index["labels"], len(names), names, size, channels, transform, corrupt)

    def path(self, index: int) -> Path:
        assert self.names is not None
        return self.root / self.names[int(self.labels[index])] / self.files[index]

    def encoded(self, index: int) -> bytes:
        return StoredFile(self.path(index)).whole("the picture")

    def where(self, index: int) -> str:
        return str(self.path(index))


def is_picture(path: PurePath) -> bool:
    """Whether this path below a root is taken for a picture: by its suffix, and nothing hidden.

    Hidden are names with a leading dot: .ipynb_checkpoints, and ._x.jpg as some systems leave it.
    """
    return path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.parts)


def _class_folders(root: Path) -> list[list]:
    """[name, time of change in ns] of every folder under the root, by name."""
    try:
        with os.scandir(root) as entries:
            found = [[e.name, e.stat().st_mtime_ns] for e in entries if _is_class(e)]
    except OSError as error:
        raise DataError(f"{root}: expected a folder of folders ({error.strerror})") from None
    return sorted(found)


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _list_pictures(root: Path, folders: list[list]) -> tuple[Index, list[str]]:
    labels, files, used = [], [], []
    for place, (name, _) in enumerate(folders):
        with os.scandir(root / name) as entries:
            # what is there and no folder, though a link to nowhere: reading it says so
            pictures = sorted(
                e.name for e in entries if is_picture(PurePath(e.name)) and not e.is_dir()
            )
        if pictures:
            labels += [len(used)] * len(pictures)
            files += pictures
            used.append(place)
    return {"labels": torch.tensor(labels), "folders": torch.tensor(used)}, files


def _fits(index: Index, files: Any, folders: int) -> bool:
    """Whether a list of pictures is one that `_list_pictures` can have made."""
    labels, used = index["labels"], index["folders"]
    # a name is no path: it must not lead out of its folder
    named = isinstance(files, list) and all(
        type(name) is str and PurePath(name).parts == (name,) and is_picture(PurePath(name))
        for name in files
    )
    placed = within(labels, 0, len(used)) and within(used, 0, folders) and rising(used)
    return named and placed and len(labels) == len(files)
