"""insightface's per-rank class tables: read into a head on any number of ranks, and written back.

`train_v2.py` leaves checkpoint_gpu_{rank}.pt with the rank's rows of the table under
state_dict_softmax_fc["weight"] and, among the optimiser's states, their momentum as the last
parameter's; the first Partial FC left rank_{rank}_softmax_weight.pt and
rank_{rank}_softmax_weight_mom.pt, each one tensor. Rank r of W has C // W + (r < C % W) rows.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fused_losses.base.files import write_atomically
from fused_losses.base.validation import describe
from fused_losses.centers.collectives import gather_rows, local_rows

PARTIAL_FC_2 = re.compile(r"checkpoint_gpu_(\d+)\.pt")
PARTIAL_FC_1 = re.compile(r"rank_(\d+)_softmax_weight\.pt")
TABLE, WEIGHT, OPTIMIZER, STEP = "state_dict_softmax_fc", "weight", "state_optimizer", "global_step"


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
    asked for are read.
    ValueError, with the file, key and shape: a rank's file is missing, holds something else, or
    does not belong to the others. No code of a file is run.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]) -> None:
        self.paths = _paths(source)
        self.parts = [_read_part(path) for path in self.paths]
        self.steps = [part.pop(STEP, None) for part in self.parts]
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
        """Rows [stop - start, D] of the table or of one of its optimiser states, a copy."""
        if not 0 <= start <= stop <= self.num_classes:
            raise IndexError(
                f"start, stop: expected rows of [0, {self.num_classes}), got {start} and {stop}"
            )
        if name not in self.names:
            raise ValueError(f"name: expected one of {', '.join(self.names)}, got {name!r}")
        out = torch.empty(stop - start, self.dim, dtype=self.parts[0][name].dtype)
        for part, (begin, end) in zip(self.parts, self._spans(), strict=True):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                out[low - start : high - start] = part[name][low - begin : high - begin]
        return out

    def _spans(self) -> Iterator[tuple[int, int]]:
        for rank in range(len(self.parts)):
            yield shard(self.num_classes, rank, len(self.parts))

    def _check(self) -> None:
        for path, part, step, (begin, end) in zip(
            self.paths, self.parts, self.steps, self._spans(), strict=True
        ):
            for name, tensor in part.items():
                if tuple(tensor.shape) != (end - begin, self.dim):
                    raise ValueError(
                        f"{path}: {name}: expected shape ({end - begin}, {self.dim}), this rank's "
                        f"share of {self.num_classes} classes over {len(self.parts)} files, got "
                        f"{describe(tensor)}; are files of another run among them?"
                    )
            if step != self.steps[0]:
                raise ValueError(
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
    resize) or their dimension is another one, or the head has sub-centres.
    """
    table = InsightFaceTable(source)
    state = head.state()
    expected = (head.num_classes if resize else table.num_classes, table.dim)
    if tuple(state[WEIGHT].shape) != expected:
        raise ValueError(
            f"head: expected a weight of shape {expected} as in {table.paths[0].parent}, got "
            f"{describe(state[WEIGHT])}"
        )
    start = min(head.class_start, table.num_classes)
    stop = min(head.class_start + head.num_local, table.num_classes)
    for name in table.names:
        key = name if name == WEIGHT else f"optimizer.{name}"
        if key in state:
            with torch.no_grad():
                local_rows(state[key])[: stop - start].copy_(table.rows(start, stop, name))
    state["steps"].fill_(table.step)
    head.load()
    return table


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
    holds one file's rows in memory. The paths are those of all files.
    """
    folder = Path(folder)
    if world < 1:
        raise ValueError(f"world: expected at least 1, got {world}")
    state = head.state()
    weight = state[WEIGHT]
    if weight.dim() != 2:
        raise ValueError(f"head: insightface has no sub-centres, got {describe(weight)}")
    mesh = weight.device_mesh if isinstance(weight, DTensor) else None
    group = mesh.get_group() if mesh is not None else None
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if mesh else (0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"checkpoint_gpu_{file}.pt" for file in range(world)]
    starts = _starts(head, group, ranks)
    for file, path in enumerate(paths):
        begin, end = shard(head.num_classes, file, world)
        rows = gather_rows(local_rows(weight), starts, begin, end, rank, file % ranks, group)
        if rows is None:
            continue
        record: dict[str, Any] = {
            TABLE: {WEIGHT: rows.cpu()},
            STEP: int(state["steps"]),
            "epoch": 0,
        }
        if backbone is not None:
            record["state_dict_backbone"] = dict(backbone)
        write_atomically(path, lambda handle, record=record: torch.save(record, handle))
    if group is not None:
        dist.barrier(group)
    return paths


def _starts(head: Head, group: dist.ProcessGroup | None, ranks: int) -> list[int]:
    """The first class of every rank, and the number of classes."""
    starts: list[int] = [head.class_start] * ranks
    if group is not None:
        dist.all_gather_object(starts, head.class_start, group=group)
    return [*starts, head.num_classes]


def _paths(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of all ranks, in the order of the ranks."""
    if isinstance(source, (str, Path)):
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"source: expected a folder or a list of files, got {str(source)!r}")
        for pattern in (PARTIAL_FC_2, PARTIAL_FC_1):
            found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
            if found:
                break
    else:
        found = [Path(path) for path in source]
        folder = found[0].parent if found else Path()
    ranks = {_rank_of(path): path for path in found}
    if not found or sorted(ranks) != list(range(len(found))):
        has = ", ".join(sorted(path.name for path in found)) or "none"
        raise ValueError(
            f"{folder}: expected checkpoint_gpu_0.pt (or rank_0_softmax_weight.pt) and so on "
            f"without a gap, one for each rank, got {has}"
        )
    return [ranks[rank] for rank in range(len(found))]


def _rank_of(path: Path) -> int:
    match = PARTIAL_FC_2.fullmatch(path.name) or PARTIAL_FC_1.fullmatch(path.name)
    if match is None:
        raise ValueError(
            f"{path}: expected a file named checkpoint_gpu_(rank).pt or "
            "rank_(rank)_softmax_weight.pt"
        )
    return int(match[1])


def _read_part(path: Path) -> dict[str, Any]:
    """ "weight" and optimiser states [rows, D] of one rank, and "global_step" where it is said."""
    saved = _load(path)
    if PARTIAL_FC_1.fullmatch(path.name):
        part = {WEIGHT: _matrix(path, "the tensor", saved)}
        momentum = path.with_name(path.name.replace("weight.pt", "weight_mom.pt"))
        if momentum.exists():
            part["momentum_buffer"] = _matrix(momentum, "the tensor", _load(momentum))
        return part
    if not isinstance(saved, dict) or not isinstance(saved.get(TABLE), dict):
        got = ", ".join(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path}: expected a dict {TABLE!r}, got {got}")
    if WEIGHT not in saved[TABLE]:
        raise ValueError(f"{path}: {TABLE}: expected a key {WEIGHT!r}, got {list(saved[TABLE])}")
    weight = _matrix(path, f"{TABLE}[{WEIGHT!r}]", saved[TABLE][WEIGHT])
    part = {WEIGHT: weight, **_optimizer_states(saved.get(OPTIMIZER), weight)}
    if isinstance(saved.get(STEP), int):
        part[STEP] = saved[STEP]
    return part


def _optimizer_states(saved: Any, weight: Tensor) -> dict[str, Tensor]:
    """The states of the last parameter, which is the table, as far as they have its shape."""
    try:
        last = saved["param_groups"][-1]["params"][-1]
        states = saved["state"][last]
    except (KeyError, IndexError, TypeError):
        return {}  # a run that saved no optimiser, or one without momentum
    return {
        name: value
        for name, value in states.items()
        if isinstance(value, Tensor) and value.shape == weight.shape
    }


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a file of tensors that can be read ({reason})") from error


def _matrix(path: Path, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {key}: expected a tensor [C, D], got {type(value).__name__}")
    if value.dim() != 2 or not value.is_floating_point():
        raise ValueError(f"{path}: {key}: expected floats [C, D], got {describe(value)}")
    return value


__all__ = ["InsightFaceTable", "export_checkpoints", "import_checkpoints", "shard"]
