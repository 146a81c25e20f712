"""Checksums of a checkpoint's files: each rank sums what it writes, and a share of what is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

CHECKSUMS, METADATA = "checksums.json", ".metadata"


class _FileSums(dict[str, str]):
    """{file: checksum} of one rank, which travels with the results of its writes."""


class ChecksumWriter(FileSystemWriter):
    """DCP's writer that leaves `CHECKSUMS` beside its files: {name: blake2b, 16 bytes in hex}."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        sums = _FileSums((name, _sum(Path(self.path, name))) for name in names)
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, WriteResult(MetadataIndex(CHECKSUMS), 0, sums)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        sums: dict[str, str] = {}
        written: list[WriteResult] = []
        for result in itertools.chain.from_iterable(results):
            if isinstance(result.storage_data, _FileSums):
                sums |= result.storage_data
            else:
                written.append(result)
        super().finish(metadata, [written])
        sums[METADATA] = _sum(Path(self.path, METADATA))
        with open(Path(self.path, CHECKSUMS), "w") as file:
            json.dump(sums, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())


def damage(folder: Path, rank: int, world: int) -> str | None:
    """The first file of this rank's share that is not as it was written; None: all are.

    A checkpoint without `CHECKSUMS` was written before there were any, and is not judged.
    """
    place = folder / CHECKSUMS
    if not place.exists():
        return None
    try:
        sums: Any = json.loads(place.read_bytes())
    except (ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict) or METADATA not in sums:
        return f"{CHECKSUMS}: no table of checksums"
    for name in sorted(sums)[rank::world]:
        path = folder / name
        if not path.is_file():
            return f"{name}: missing"
        if _sum(path) != sums[name]:
            return f"{name}: not as it was written"
    return None


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


__all__ = ["ChecksumWriter", "damage"]
