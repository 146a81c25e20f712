"""insightface's per-rank class tables: read into a head on any number of ranks, and written back.

`train_v2.py` leaves checkpoint_gpu_{rank}.pt with the rank's rows of the table under
state_dict_softmax_fc["weight"] and, among the optimiser's states, their momentum as the last
parameter's; the first Partial FC left rank_{rank}_softmax_weight.pt and
rank_{rank}_softmax_weight_mom.pt, each one tensor. Rank r of W has C // W + (r < C % W) rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fused_losses.base.files import DataError, write_atomically
from fused_losses.base.validation import describe
from fused_losses.centers.collectives import everyones, gather_rows, local_rows
from fused_losses.centers.insightface_files import STEP, TABLE, WEIGHT, find_files, read_part
from fused_losses.centers.state import BEGUN

BLOCK = 1 << 16  # rows that are checked or copied at once


class Head(Protocol):
    """What is needed of `ClassCenters`."""

    num_classes: int
    class_start: int
    num_local: int

    def state(self) -> dict[str, Tensor]: ...

    def load(self) -> None: ...


class InsightFaceTable:
    """The class table of a run of insightface, over all its ranks' files.

    source: the folder, or the files of all ranks. Files are memory-mapped: only the rows that are
    asked for are read (a file in torch's format from before 1.6 is read whole).
    DataError (a ValueError), with the file, key and shape: a rank's file is missing, damaged, holds
    something else, or does not belong to the others. No code of a file is run; numpy's scalars and
    arrays in it are passed over.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]) -> None:
        self.paths = find_files(source)
        read = [read_part(path) for path in self.paths]
        self.parts = [part.tables for part in read]
        self.steps = [part.step for part in read]
        first = self.parts[0][WEIGHT]
        self.dim: int = first.shape[1]
        self.dtype: torch.dtype = first.dtype
        self.num_classes = sum(part[WEIGHT].shape[0] for part in self.parts)
        self._check()

    @property
    def step(self) -> int:
        """Steps that the run had done; 0 where the files do not say."""
        return int(self.steps[0] or 0)

    @property
    def names(self) -> tuple[str, ...]:
        """ "weight" and the optimiser's states of the same shape that every rank's file has."""
        return tuple(name for name in self.parts[0] if all(name in part for part in self.parts))

    def rows(self, start: int, stop: int, name: str = WEIGHT) -> Tensor:
        """Rows [stop - start, D] of the table or of one of its optimiser states, a copy.

        DataError, with file and row, for a number that is not finite.
        """
        if not 0 <= start <= stop <= self.num_classes:
            raise IndexError(
                f"start, stop: expected rows of [0, {self.num_classes}), got {start} and {stop}"
            )
        if name not in self.names:
            raise ValueError(f"name: expected one of {', '.join(self.names)}, got {name!r}")
        out = torch.empty(stop - start, self.dim, dtype=self.parts[0][name].dtype)
        for path, part, (begin, end) in zip(self.paths, self.parts, self._spans(), strict=True):
            low, high = max(start, begin), min(stop, end)
            if low >= high:
                continue
            rows = out[low - start : high - start]
            rows.copy_(part[name][low - begin : high - begin])
            bad = (~rows.isfinite()).any(dim=1).nonzero()
            if len(bad):
                row = low - begin + int(bad[0])
                raise DataError(
                    f"{path}: {name}: expected finite numbers, got others in row {row}, which is "
                    f"class {begin + row}"
                )
        return out

    def blocks(self, start: int, stop: int) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first class, rows [b, D]) of every table, some rows at a time."""
        for name in self.names:
            for first in range(start, stop, BLOCK):
                yield name, first, self.rows(first, min(first + BLOCK, stop), name)

    def _spans(self) -> Iterator[tuple[int, int]]:
        for rank in range(len(self.parts)):
            yield shard(self.num_classes, rank, len(self.parts))

    def _check(self) -> None:
        for path, part, step, (begin, end) in zip(
            self.paths, self.parts, self.steps, self._spans(), strict=True
        ):
            for name, tensor in part.items():
                if tuple(tensor.shape) != (end - begin, self.dim):
                    raise DataError(
                        f"{path}: {name}: expected shape ({end - begin}, {self.dim}), this rank's "
                        f"share of {self.num_classes} classes over {len(self.parts)} files, got "
                        f"{describe(tensor)}; are files of another run among them?"
                    )
            if step != self.steps[0]:
                raise DataError(
                    f"{path}: {STEP}: expected {self.steps[0]} as in {self.paths[0]}, got {step}"
                )


def shard(classes: int, rank: int, world: int) -> tuple[int, int]:
    """First row and the row after the last that insightface gives to a rank."""
    begin = classes // world * rank + min(rank, classes % world)
    return begin, begin + classes // world + int(rank < classes % world)


def import_checkpoints(
    source: str | Path | Sequence[str | Path], head: Head, *, resize: bool = False
) -> InsightFaceTable:
    """Fill a head with the table, its optimiser's states and step; each rank reads its own rows.

    States that the files or the head do not have are left as they are. resize: the head may have
    more classes, whose rows stay as they are, or fewer. ValueError: the number of classes (without
    resize) or their dimension is another one, or the head has sub-centres. DataError: the files
    are damaged, or hold a number that is not finite. Every rank must call it: no head is written
    before all ranks have checked their rows (a rank's part of the files is read twice), and where
    one refuses, the others raise a DataError that names it.
    """
    state = head.state()
    group = _group_of(state[WEIGHT])
    table, start, stop, failure = None, 0, 0, None
    try:
        table = InsightFaceTable(source)
        start, stop = _checked_rows(table, state[WEIGHT], head, resize)
    except Exception as error:  # the others hear of it, whatever it is
        failure = error
    _agree(failure, group)
    assert table is not None
    with torch.no_grad():
        for name, first, rows in table.blocks(start, stop):
            key = name if name == WEIGHT else f"optimizer.{name}"
            if key in state:
                local_rows(state[key])[first - start : first - start + len(rows)].copy_(rows)
    state["steps"].fill_(table.step)
    if BEGUN in state and "momentum_buffer" in table.names:  # torch.optim.SGD makes it then
        state[BEGUN].fill_(1)
    head.load()
    return table


def _checked_rows(
    table: InsightFaceTable, weight: Tensor, head: Head, resize: bool
) -> tuple[int, int]:
    """[first, last) of the classes that this rank takes from the files, all read once."""
    expected = (head.num_classes if resize else table.num_classes, table.dim)
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"head: expected a weight of shape {expected} as in {table.paths[0].parent}, got "
            f"{describe(weight)}; resize=True takes over the rows of another number of "
            f"classes than {table.num_classes}"
        )
    start = min(head.class_start, table.num_classes)
    stop = min(head.class_start + head.num_local, table.num_classes)
    for _ in table.blocks(start, stop):
        pass
    return start, stop


def export_checkpoints(
    head: Head,
    folder: str | Path,
    world: int,
    *,
    backbone: Mapping[str, Tensor] | None = None,
) -> list[Path]:
    """Write checkpoint_gpu_{rank}.pt for `world` ranks, to be read by PartialFC_V2.load_state_dict.

    Each holds state_dict_softmax_fc, global_step and, where given, state_dict_backbone. The
    optimiser's state is not written: insightface keeps it in one with the backbone's.
    A collective call of the head's ranks; file r is written by rank r modulo their number, which
    holds one file's rows in memory. The paths are those of all files. Where a rank cannot write, it
    raises its OSError, and the others a DataError that names it.
    """
    folder = Path(folder)
    if world < 1:
        raise ValueError(f"world: expected at least 1, got {world}")
    state = head.state()
    weight = state[WEIGHT]
    if weight.dim() != 2 or getattr(head, "has_bias", False):
        raise ValueError(f"head: insightface has neither sub-centres nor a bias, got {head}")
    group = _group_of(weight)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    paths = [folder / f"checkpoint_gpu_{file}.pt" for file in range(world)]
    starts = [*everyones(head.class_start, group), head.num_classes]
    failure: Exception | None = None
    for file, path in enumerate(paths):
        begin, end = shard(head.num_classes, file, world)
        rows = gather_rows(local_rows(weight), starts, begin, end, rank, file % ranks, group)
        if rows is None or failure is not None:
            continue
        record: dict[str, Any] = {
            TABLE: {WEIGHT: rows.cpu()},
            STEP: int(state["steps"]),
            "epoch": 0,
        }
        if backbone is not None:
            record["state_dict_backbone"] = dict(backbone)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda handle, record=record: torch.save(record, handle))
        except Exception as error:  # after the others have had the rows that they wait for
            failure = error
    _agree(failure, group)
    return paths


def _group_of(weight: Tensor) -> dist.ProcessGroup | None:
    return weight.device_mesh.get_group() if isinstance(weight, DTensor) else None


def _agree(failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raises on every rank where one has failed: its own error, a DataError on the others."""
    told = everyones(None if failure is None else f"{type(failure).__name__}: {failure}", group)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
    if failed:
        raise DataError("; ".join(failed))


__all__ = ["InsightFaceTable", "export_checkpoints", "import_checkpoints", "shard"]
