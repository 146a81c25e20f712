"""Pictures in folders: root/class/picture.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fused_losses.datasets.base import SUFFIXES, DataError, EncodedImages, StoredFile
from fused_losses.datasets.side_files import Cache, Index, remembered, side_path


class ImageFolders(EncodedImages):
    """Every folder directly under `root` that holds pictures is a class, in the order of names.

    size: an integer or (height, width); channels 1 or 3. Pictures are the files directly in a
    class's folder with one of SUFFIXES, in the order of names. cache: where the list of them is
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
        cache: Cache = None,
    ) -> None:
        self.root = Path(root)
        folders = _class_folders(self.root)
        index, files = remembered(
            side_path(cache, self.root), folders, lambda: _list_pictures(self.root, folders)
        )
        self.files: list[str] = files  # names inside the class's folder
        if not files:
            raise DataError(
                f"{self.root}: expected folders with pictures ({', '.join(SUFFIXES)}), got none"
            )
        names = [folders[int(i)][0] for i in index["folders"]]
        super().__init__(index["labels"], len(names), names, size, channels)

    def path(self, index: int) -> Path:
        assert self.names is not None
        return self.root / self.names[int(self.labels[index])] / self.files[index]

    def encoded(self, index: int) -> bytes:
        file = StoredFile(self.path(index))
        return file.read(0, file.size, "the picture")

    def where(self, index: int) -> str:
        return str(self.path(index))


def _class_folders(root: Path) -> list[list]:
    """[name, time of change in ns] of every folder under the root, by name."""
    try:
        with os.scandir(root) as entries:
            found = [[e.name, e.stat().st_mtime_ns] for e in entries if e.is_dir()]
    except OSError as error:
        raise DataError(f"{root}: expected a folder of folders ({error.strerror})") from None
    return sorted(found)


def _list_pictures(root: Path, folders: list[list]) -> tuple[Index, list[str]]:
    labels, files, used = [], [], []
    for place, (name, _) in enumerate(folders):
        with os.scandir(root / name) as entries:
            pictures = sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES))
        if pictures:
            labels += [len(used)] * len(pictures)
            files += pictures
            used.append(place)
    return {"labels": torch.tensor(labels), "folders": torch.tensor(used)}, files
