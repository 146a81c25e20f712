"""What moves between the shards of a class table, and how much of it.

Per step and rank, W ranks, at most b rows a rank, P = W b rows in all (short batches are padded):

    counts      all-gather    32 (W - 1)                bytes received
    outlooks    all-gather    8 (W - 1)                 of a step by an optimizer of the head's own
    labels      all-gather    8 L b (W - 1)             L labels a row (row weights: 8 b (W - 1))
    embeddings  all-gather    e D b (W - 1)             e bytes an element
    statistics  all-reduce    2 (W - 1) / W x 8 P n     of n numbers a row, float64
    gradients   reduce-scatter  g D b (W - 1)           g bytes an element of the accumulation

and in a distillation the teacher's rows, e Dt b (W - 1), with n of 7 to 10.

None of it grows with the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OLD_NAMES = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}


def _collective(name: str) -> Callable[..., Any]:
    """On one tensor each way: torch 2.13 renamed them."""
    new = f"{name}_single"
    return getattr(dist, new if hasattr(dist, new) else OLD_NAMES[name])


class Traffic(NamedTuple):
    """Bytes that a rank receives, by a ring's count."""

    gathered: int
    reduced: int
    scattered: int

    @property
    def total(self) -> int:
        return sum(self)


def step_traffic(
    world: int,
    batch: int,
    dim: int,
    *,
    labels: int = 1,
    element_bytes: int = 4,
    gradient_bytes: int = 4,
    reduced_numbers: int = 3,
) -> Traffic:
    """Bytes a rank receives in a training step (module docstring).

    batch: rows of the fullest rank. reduced_numbers: n, summed over the step's all-reduces: of a
    margin softmax 3, the maximum, the sum and the target.
    """
    others = world - 1
    gathered = others * (40 + batch * (8 * labels + element_bytes * dim))
    reduced = 2 * others * 8 * batch * reduced_numbers  # 2 (W - 1) / W x 8 W b n
    return Traffic(gathered, reduced, others * batch * dim * gradient_bytes)


class Ranks:
    """The ranks that share a table; without a process group, one."""

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        device_mesh: DeviceMesh | None = None,
        mesh_dim: int | str | None = None,
    ) -> None:
        if process_group is not None and device_mesh is not None:
            raise ValueError("process_group, device_mesh: expected one of them, got both")
        if device_mesh is not None:
            if device_mesh.ndim > 1 and mesh_dim is None:
                raise ValueError(
                    f"mesh_dim: expected a dimension of the device mesh {tuple(device_mesh.shape)} "
                    "to shard the classes over, got None"
                )
            process_group = device_mesh.get_group(mesh_dim)
        elif process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        self.group = process_group
        self._mesh = device_mesh
        if device_mesh is not None and device_mesh.ndim > 1:
            # a dimension is taken by its name; one without is made anew of its group
            names = device_mesh.mesh_dim_names
            name = names[mesh_dim] if names and isinstance(mesh_dim, int) else mesh_dim
            self._mesh = device_mesh[name] if isinstance(name, str) else None
        self.world = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # nothing of it changes, and a process group has no copy

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None and self.world != dist.get_world_size():
            raise TypeError(
                "process_group: expected all ranks in a head that is pickled, got "
                f"{self.world} of {dist.get_world_size()}; save its state_dict() or state()"
            )
        return {"joined": self.group is not None, "world": self.world, "rank": self.rank}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.group = self._mesh = None
        world: int = state["world"]
        rank: int = state["rank"]
        self.world, self.rank = world, rank
        here = dist.is_available() and dist.is_initialized()
        now = (dist.get_world_size(), dist.get_rank()) if here else (1, 0)
        if state["joined"] and (self.world, self.rank) != now:
            raise RuntimeError(
                f"a pickled head has the shard of rank {self.rank} of {self.world} and is now at "
                f"rank {now[1]} of {now[0]}; its state() loads on any number of ranks"
            )
        if state["joined"] and here:
            self.group = dist.group.WORLD

    def device_mesh(self, device: torch.device) -> DeviceMesh:
        """The ranks as a one-dimensional mesh."""
        if self._mesh is None:
            assert self.group is not None
            self._mesh = DeviceMesh.from_group(self.group, device.type)
        return self._mesh

    def shard(self, rows: int, rank: int | None = None) -> tuple[int, int]:
        """[first, last) of a rank's rows: ceil(rows / W) each, the last shorter or empty."""
        each, at = -(-rows // self.world), self.rank if rank is None else rank
        return min(at * each, rows), min((at + 1) * each, rows)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[...] of each rank, equal shapes. [W, ...]"""
        if self.world == 1:
            return tensor[None]
        out = tensor.new_empty((self.world, *tensor.shape))
        _collective("all_gather")(out.view(-1), tensor.contiguous().view(-1), group=self.group)
        return out

    def maximum_(self, tensor: Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def sum_(self, tensor: Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)


def everyones(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """A small plain value of each rank."""
    if group is None:
        return [value]
    told = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, value, group=group)
    return told


def gather_rows(
    local: Tensor,  # this rank's rows
    starts: list[int],  # of every rank's rows, and their number
    begin: int,
    end: int,
    rank: int,
    writer: int,
    group: dist.ProcessGroup | None,
) -> Tensor | None:
    """Rows [begin, end) of the table, sent from their ranks to the writer; None elsewhere."""
    out = local.new_empty((end - begin, *local.shape[1:])) if rank == writer else None
    for owner, (first, after) in enumerate(pairwise(starts)):
        low, high = max(begin, first), min(end, after)
        if low >= high:
            continue
        if rank == owner:
            mine = local.detach()[low - first : high - first].contiguous()
            if out is None:
                dist.send(mine, group=group, group_dst=writer)
            else:
                out[low - begin : high - begin] = mine
        elif out is not None:
            dist.recv(out[low - begin : high - begin], group=group, group_src=owner)
    return out


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor as it is."""
    part: Any = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


class Gathered:
    """Rows of every rank in the order of the ranks, on their way."""

    def __init__(self, ranks: Ranks, rows: Tensor, counts: list[int]) -> None:
        self._counts = counts
        self._work, self._out = None, rows
        if ranks.world == 1:
            return
        most = max(counts)
        padded = rows.contiguous()
        if rows.shape[0] < most:
            padded = rows.new_zeros((most, *rows.shape[1:]))
            padded[: rows.shape[0]] = rows
        self._sent = padded  # alive until it has gone
        self._out = rows.new_empty((ranks.world * most, *rows.shape[1:]))
        self._work = _collective("all_gather")(self._out, padded, group=ranks.group, async_op=True)

    def wait(self) -> Tensor:  # [B, ...]
        if self._work is not None:
            self._work.wait()
            self._work = None
            most = max(self._counts)
            if min(self._counts) < most:
                parts = self._out.split(most)
                self._out = torch.cat(
                    [part[:n] for part, n in zip(parts, self._counts, strict=True)]
                )
        return self._out


class Scattered:
    """Each rank's own rows of a sum over the ranks, on their way."""

    def __init__(self, ranks: Ranks, rows: Tensor, counts: list[int]) -> None:  # [B, ...]
        self.ranks, self._own = ranks, counts[ranks.rank]
        self._work, self._out = None, rows
        if ranks.world == 1:
            return
        most = max(counts)
        if min(counts) < most:
            padded = rows.new_zeros((ranks.world, most, *rows.shape[1:]))
            for place, part in zip(padded, rows.split(counts), strict=True):
                place[: part.shape[0]] = part
            rows = padded.flatten(0, 1)
        self._sent = rows.contiguous()
        self._out = rows.new_empty((most, *rows.shape[1:]))
        self._work = _collective("reduce_scatter")(
            self._out, self._sent, group=ranks.group, async_op=True
        )

    def wait(self) -> Tensor:  # [n, ...]
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._out[: self._own]


class BatchShapes(NamedTuple):
    """What the ranks told each other before a step."""

    rows: list[int]  # of each rank
    needs_gradient: bool  # any rank's embeddings


def exchange_shapes(
    ranks: Ranks,
    refused: bool,
    rows: int,
    columns: int,
    labels: int,
    code: int,
    needs_gradient: bool,
    weighted: bool,
    device: torch.device,
    asked: int = 0,
) -> BatchShapes:
    """All ranks say what they bring: rows, D, labels a row, dtype (in DTYPES), weights or none.

    asked: a number below 2^32 of what else has to be alike; 0: the head's own loss.

    A rank whose own checks failed says so here, or the others would wait for it for ever.
    Raises RuntimeError on the other ranks, ValueError where batches do not fit each other.
    """
    if ranks.world == 1:
        return BatchShapes([rows], needs_gradient)
    flags = needs_gradient + 2 * weighted + 4 * asked
    told = [-1 if refused else rows, columns, labels, code + len(DTYPES) * flags]
    table = ranks.all_gather(torch.tensor(told, device=device)).tolist()
    kinds = [
        (d, each, str(DTYPES[code % len(DTYPES)]), "weighted" * (code // len(DTYPES) >> 1 & 1))
        for _, d, each, code in table
    ]
    for rank, (n, *_) in enumerate(table):
        if n < 0 and rank != ranks.rank:
            raise RuntimeError(f"rank {rank} refused its batch; its own error says why")
        if n >= 0 and not refused and table[rank][3] // len(DTYPES) >> 2 != asked:
            raise ValueError(
                "distillation: expected the same call on all ranks, with one kind, one set of "
                "options, labels or none, and teachers of one width and dtype; ranks "
                f"{ranks.rank} and {rank} differ"
            )
        if n >= 0 and not refused and kinds[rank] != kinds[ranks.rank]:
            raise ValueError(
                "embeddings, labels, row_weight: expected the same width, labels a row, dtype and "
                f"weights or none on all ranks, got {kinds[rank]} on rank {rank} and "
                f"{kinds[ranks.rank]} on rank {ranks.rank}"
            )
    return BatchShapes([n for n, *_ in table], any(code // len(DTYPES) & 1 for *_, code in table))
